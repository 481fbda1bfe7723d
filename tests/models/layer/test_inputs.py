"""Forwards that fused layers cannot take: they stand aside, say so once, and the stock layers see the masks they need."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from nbkit.models.attention import Documents
from nbkit.models.layer import Keep
from nbkit.models.layer import inputs as room
from tests.models.layer.rig import batch, fill, lora, step, worst
from tests.models.layer.test_layer import bound
from tests.tiny import tiny_model

SAID = "nbkit's fused layers stand aside, so training is slower than it could be: "


def packed() -> dict[str, torch.Tensor]:
    inputs = batch(rows=1, tokens=24)
    inputs["position_ids"] = torch.cat([torch.arange(3), torch.arange(14), torch.arange(7)])[None]
    inputs["labels"][0, [0, 3, 17]] = -100
    return inputs


def asides(model: Any, run: Any, sentence: str) -> Any:
    """What `run(model)` gives stock; bound, it gives the same bit for bit, and says why once in two calls."""
    wanted = run(model)
    binding = bound(model)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        got, again = run(model), run(model)
    said = [str(one.message) for one in heard if "stand aside" in str(one.message)]
    assert len(said) == 1 and said[0].startswith(SAID + sentence), said
    assert list(binding.asides) == [said[0].removeprefix(SAID).removesuffix(".")] and not binding.how
    for loss, grads in (got, again):
        assert loss == wanted[0] and worst(grads, wanted[1])[0] == 0
    binding.release()
    return wanted


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("inputs", [batch(padded=True), packed()], ids=["rows", "packs"])
def test_autocast_to_another_dtype(family: str, inputs: dict[str, Any]) -> None:
    """As `TrainingArguments(bf16=True)` over float32 weights. Packs keep apart, and the window of mistral stays."""

    def run(model: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, **inputs, use_cache=False)

    asides(lora(family), run, "autocast asks for bfloat16 and the weights are float32; load the model with dtype=bfloat16")


def test_autocast_to_the_weights_own_dtype_is_fused() -> None:
    model = lora("llama")
    model.get_base_model().to(torch.bfloat16)
    binding = bound(model)
    with torch.autocast("cpu", torch.bfloat16):
        step(model, **batch())
    assert binding.how and not binding.asides
    binding.release()


def test_embeddings_in_another_dtype() -> None:
    """As after `prepare_model_for_kbit_training`, which makes norms and embeddings float32."""
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    from tests.models.test_certify import four_bit

    model = four_bit(tiny_model("llama", hidden_size=64, intermediate_size=128))
    for module in model.model.layers.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = torch.bfloat16
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).train()
    fill(model)
    sentence = "embeddings are float32 and the layers compute in bfloat16, as prepare_model_for_kbit_training leaves them"
    asides(model, lambda model: step(model, **packed(), use_cache=False), sentence)


def test_embeddings_given_in_another_dtype() -> None:
    given = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    labels = batch(rows=2, tokens=9)["labels"]
    sentence = "embeddings are float32 and the layers compute in float64"
    asides(lora("llama").double(), lambda model: step(model, inputs_embeds=given, labels=labels, use_cache=False), sentence)


def test_scores_that_are_asked_for() -> None:
    model = lora("llama", attn_implementation="eager")
    wanted = model(**batch(), output_attentions=True).attentions
    binding = bound(model)
    with pytest.warns(UserWarning, match="output_attentions asks for scores that a fused layer never holds"):
        got = model(**batch(), output_attentions=True).attentions
    assert len(got) == 2 and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    step(model, **batch())
    assert binding.how  # the next step is fused again
    binding.release()


def test_prefix_tuning() -> None:
    from peft import PrefixTuningConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).train()
    asides(model, lambda model: step(model, **batch()), "keys and values from outside come with the batch")


def test_packs_keep_apart_where_some_layers_run_stock_and_build_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_model("llama").config
    given = {**packed(), "attention_mask": None}
    take = ("cpu", torch.float32, torch.float32, config)
    assert room.aside(given, *take, some_stock=True) is None  # sdpa builds one
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    assert room.aside(given, *take, some_stock=False) is None
    assert "rows are packed" in str(room.aside(given, *take, some_stock=True))
    assert room.aside({"input_ids": given["input_ids"]}, *take, some_stock=True) is None


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("inputs", [batch(padded=True), packed()], ids=["rows", "packs"])
def test_a_layer_that_cannot_be_fused_after_all_has_its_mask_back(family: str, inputs: dict[str, Any]) -> None:
    """What comes to the second layer is of another dtype than the first layer's weights: nobody could know before."""
    model = lora(family).double()
    wanted = step(model, **inputs, use_cache=False)
    binding = bound(model)
    binding.bound[1].parts.dtype = torch.float16
    got, grads = step(model, **inputs)
    assert binding.how and got == pytest.approx(wanted[0], rel=1e-5) and worst(grads, wanted[1])[0] < 1e-5
    binding.release()


def test_masks() -> None:
    hidden = torch.zeros(2, 5, 8)
    alone = room.mask_of(None, None, hidden)
    assert alone.shape == (1, 1, 5, 5) and torch.equal(alone[0, 0] == 0, torch.ones(5, 5).tril().bool())
    near = room.mask_of(None, 2, hidden)[0, 0] == 0
    assert near.sum(1).tolist() == [1, 2, 2, 2, 2]
    two = Documents(torch.tensor([0, 2, 5, 9, 10], dtype=torch.int32), 4)
    seen = room.mask_of(two, None, hidden)[:, 0] == 0
    assert seen.shape == (2, 5, 5) and seen[0].sum(1).tolist() == [1, 2, 1, 2, 3] and seen[1].sum(1).tolist() == [1, 2, 3, 4, 1]


# -- checkpointing -------------------------------------------------------------------------------------------------------


def test_transformers_checkpointing_is_not_wrapped_around_a_fused_layer() -> None:
    """Some versions of transformers wrap it around the layer's forward, which would run every fused layer twice."""
    model = lora("llama")
    binding = bound(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layer = binding.bound[0].parts.layer
    calls = []
    layer._gradient_checkpointing_func = lambda run, *args: calls.append(1) or run(*args)
    step(model, **batch())
    assert not calls and binding.how and binding.planner.keep.level == 4
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="stand aside"):
        step(model, **batch())
    assert calls == [1]  # stock, it is checkpointed as was asked
    binding.release()
    assert layer.gradient_checkpointing
    calls.clear()
    step(model, **batch())
    assert calls == [1]


def test_layers_that_run_stock_are_checkpointed_by_transformers() -> None:
    model = lora("llama")
    binding = bound(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers, calls = [one.parts.layer for one in binding.bound], []
    for index, layer in enumerate(layers):
        layer._gradient_checkpointing_func = lambda run, *args, index=index: calls.append(index) or run(*args)
    layers[1].mlp.register_forward_hook(lambda *args: None)
    step(model, **batch())
    assert set(binding.reasons) == {1} and calls == [1]
    binding.release()


def test_checkpointing_switched_off_and_on_between_forward_and_backward() -> None:
    """As TRL's DPO does around the forward of its reference."""
    results = []
    for fused in (False, True):
        model = lora("llama")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        binding = bound(model) if fused else None
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            loss = model(**batch()).loss
        model.gradient_checkpointing_disable()
        with torch.no_grad(), model.disable_adapter():
            model(**batch())
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        if binding is not None:
            assert binding.asides
            binding.release()
    assert worst(results[1], results[0])[0] == 0


# -- packs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, Keep(4, 7, True, 1)], ids=str)
@pytest.mark.parametrize("form", ["positions", "edges"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_packed_documents_do_not_leak(family: str, form: str, keep: Keep | None) -> None:
    """Document 1 is another one: the logits of the others are the same bit for bit, and so is what they give their input."""
    model, inputs = lora(family), packed()
    binding = bound(model, keep)
    if form == "edges":
        starts = torch.tensor([0, 3, 17, 24], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 14, "max_length_k": 14}
    ids, found = inputs.pop("input_ids"), []
    for shift in (0, 7):
        other = ids.clone()
        other[0, 3:17] = (ids[0, 3:17] + shift) % 300
        embedded = model.get_input_embeddings()(other).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, **inputs, use_cache=False).logits[0]
        logits[[0, 1, 2, *range(17, 24)]].square().sum().backward()
        found.append((logits.detach(), embedded.grad))
    (one, gradient), (two, its) = found
    assert binding.how and not binding.reasons
    assert torch.equal(one[:3], two[:3]) and torch.equal(one[17:], two[17:])
    assert all(not torch.equal(one[at], two[at]) for at in range(3, 17))
    assert not gradient[0, 3:17].any() and torch.equal(gradient, its) and gradient[0, 17:].any()
    binding.release()
