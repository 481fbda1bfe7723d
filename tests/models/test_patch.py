"""`patch` against the stock model: loss, every gradient, generation; and that nothing but the instance changes."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nbkit.errors import ModelError
from nbkit.families import find
from nbkit.models import head, obstacles
from nbkit.models.forwards import MARK
from nbkit.models.patch import patch, unpatch
from tests.closeness import assert_all_like_stock, assert_close, assert_like_stock
from tests.tiny import VOCAB, tiny_config, tiny_model

FAMILIES = ["llama", "mistral", "qwen2"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batch(seed: int = 0, rows: int = 3, tokens: int = 21, pad: str | None = "right") -> dict[str, torch.Tensor]:
    """Rows of unequal length; labels on the last part of each."""
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=make)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(rows):
        gap = 3 * row if pad else 0
        empty = slice(tokens - gap, tokens) if pad == "right" else slice(0, gap)
        mask[row, empty] = 0
        labels[row, : 8 + row] = -100
        labels[row][mask[row] == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_lora(model: Any, targets: Any = ALL, **options: Any) -> Any:
    """LoRA whose B is not zero, so that A has gradients too."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def measured(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, gradients by name) of one forward and backward in training mode."""
    model.train().zero_grad(set_to_none=True)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def assert_same(model: Any, inputs: dict[str, Any], bind: Callable[[Any], Any] = patch) -> Any:
    """Patched and stock give one loss and the same gradients. Returns the report."""
    loss, gradients = measured(model, inputs)
    report = bind(model)
    ours, found = measured(model, inputs)
    assert_like_stock("loss", ours, loss)
    assert_all_like_stock(found, gradients)
    return report


@pytest.mark.parametrize("pad", ["right", "left", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_lora_gradients_equal_the_stock_model(family: str, pad: str | None) -> None:
    model = with_lora(tiny_model(family))
    report = assert_same(model, batch(pad=pad))
    assert report.family == family and not report.skipped
    assert [one.op for one in report.bound].count("rms_norm") == 5
    assert len(measured(model, batch(pad=pad))[1]) == 2 * 2 * len(ALL)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_with_checkpointing_and_a_tied_head(family: str, attention: str) -> None:
    model = tiny_model(family, tie_word_embeddings=True, attn_implementation=attention)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(model, batch())
    gradients = measured(model, batch())[1]
    assert "model.embed_tokens.weight" in gradients and "model.norm.weight" in gradients


def test_adapters_added_after_patch_are_trained_as_well() -> None:
    before, after = tiny_model(), tiny_model()
    patch(after)
    before, after = with_lora(before), with_lora(after)
    report = patch(before)
    loss, gradients = measured(before, batch())
    ours, found = measured(after, batch())
    assert torch.equal(loss, ours) and len(report.bound) == 10
    assert_all_like_stock(found, gradients, 0)


def test_unpatch_restores_the_stock_forward_bit_for_bit() -> None:
    from transformers.models.llama import modeling_llama

    classes = {name: vars(kind).get("forward") for name, kind in vars(modeling_llama).items() if isinstance(kind, type)}
    model, other = with_lora(tiny_model()), tiny_model()
    kept = [dict(vars(module)) for module in model.modules()]
    inputs = batch()
    loss, gradients = measured(model, inputs)
    patch(model)
    measured(model, inputs)
    assert not any(MARK in vars(module) or "forward" in vars(module) for module in other.modules())
    unpatch(model)
    assert [set(vars(module)) for module in model.modules()] == [set(names) for names in kept]
    again, found = measured(model, inputs)
    assert torch.equal(loss, again) and all(torch.equal(found[name], gradients[name]) for name in gradients)
    now = {name: vars(kind).get("forward") for name, kind in vars(modeling_llama).items() if isinstance(kind, type)}
    assert now == classes
    unpatch(model)  # once more is no fault


def test_patching_twice_changes_nothing() -> None:
    model = tiny_model()
    first = patch(model)
    bound = [vars(module).get("forward") for module in model.modules()]
    assert patch(model) == first
    assert [vars(module).get("forward") for module in model.modules()] == bound


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_unchanged(family: str) -> None:
    model = tiny_model(family)
    inputs = batch(pad="left")
    del inputs["labels"]
    wanted = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    beams = model.generate(**inputs, max_new_tokens=5, num_beams=2, do_sample=False)
    logits = model(**inputs).logits
    patch(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), wanted)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, num_beams=2, do_sample=False), beams)
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("items", [17, torch.tensor(17), torch.tensor(17.0)])
def test_num_items_in_batch_is_the_denominator(items: Any) -> None:
    model = tiny_model()
    assert_same(model, {**batch(), "num_items_in_batch": items})


def test_accumulated_micro_batches_give_the_loss_of_the_whole() -> None:
    model = with_lora(tiny_model())
    whole = batch(rows=4, pad=None)
    loss, gradients = measured(model, whole)
    patch(model)
    items = int((whole["labels"][:, 1:] != -100).sum())
    model.zero_grad(set_to_none=True)
    losses = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = model(**{k: v[rows] for k, v in whole.items()}, num_items_in_batch=items).loss
        part.backward()
        losses.append(part.detach())
    assert_like_stock("loss", sum(losses), loss)
    assert_all_like_stock({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, gradients)


def test_labels_that_are_all_ignored_give_zero_and_no_nan() -> None:
    model = with_lora(tiny_model())
    patch(model)
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    for extra in ({}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(0)}):
        loss, gradients = measured(model, {**inputs, **extra})
        assert loss == 0 and len(gradients) == 2 * 2 * len(ALL)
        assert not any(gradient.any() for gradient in gradients.values())


def test_shifted_labels_and_packed_positions() -> None:
    model = tiny_model()
    inputs = batch(rows=1, tokens=20, pad=None)
    del inputs["attention_mask"]
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    assert_same(model, {**inputs, "position_ids": positions, "shift_labels": shifted})


@pytest.mark.parametrize("targets", [[*ALL, "lm_head"], "saved"], ids=["lora on the head", "head saved whole"])
def test_a_head_that_peft_trains(targets: Any) -> None:
    """An adapter on it makes its own projection; a copy of it is multiplied by directly and has its gradient from the kernel."""
    options = {"targets": ALL, "modules_to_save": ["lm_head"]} if targets == "saved" else {"targets": targets}
    model = with_lora(tiny_model(), **options)
    report = assert_same(model, {**batch(), "num_items_in_batch": 30})
    assert ("it carries an adapter and makes its own projection" in str(report)) is (targets != "saved")
    assert any("lm_head" in name for name in measured(model, batch())[1])


def test_logits_are_made_only_when_they_are_read() -> None:
    model = tiny_model()
    stock = model(**batch())
    patch(model)
    calls = []
    model.lm_head.register_forward_hook(lambda *a: calls.append(1))  # also: a hooked head goes through its own forward
    calls_for_the_loss = 1
    outputs = model.train()(**batch())
    assert list(outputs) == ["loss", "past_key_values"] and len(calls) == calls_for_the_loss
    assert torch.equal(outputs.logits, stock.logits) and outputs.logits is outputs.logits
    assert len(calls) == calls_for_the_loss + 1
    outputs = model.eval()(**batch())
    assert outputs["loss"] == outputs[0] == outputs.loss and len(calls) == 2 * calls_for_the_loss + 1
    assert list(outputs) == list(stock) and torch.equal(outputs["logits"], stock.logits) and torch.equal(outputs[1], stock[1])
    assert "logits" in outputs and len(outputs.to_tuple()) == 3
    as_tuple = model.train()(**batch(), return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], stock.logits)


def test_the_plain_head_is_not_called_for_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    patch(model)
    shapes = []
    stock = head.linear_cross_entropy
    monkeypatch.setattr(head, "linear_cross_entropy", lambda *a, **k: shapes.append(a[0].shape) or stock(*a, **k))
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: torch.nn.functional.linear(x, self.weight, self.bias)
                        if self.out_features != VOCAB else pytest.fail("whole logits were made"))  # fmt: skip
    model.train()(**batch()).loss.backward()
    assert shapes == [(3 * 21, 32)]


def test_a_loss_of_ones_own_stays() -> None:
    model = tiny_model()
    model.loss_function = lambda logits, labels, **kwargs: logits.float().mean()
    wanted = model(**batch()).loss
    patch(model)
    assert torch.equal(model(**batch()).loss, wanted)
    fresh = tiny_model()
    wanted = fresh(**batch(), logits_to_keep=21).loss
    patch(fresh)
    assert torch.equal(fresh(**batch(), logits_to_keep=21).loss, wanted)


def test_an_undeclared_family_runs_stock_and_says_so() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)).eval()
    ids = torch.arange(6)[None]
    wanted = model(ids, labels=ids).loss
    report = patch(model)
    assert report.family is None and not report.bound
    assert "'gpt2' is no declared family" in str(report) and "runs stock" in str(report)
    assert torch.equal(model(ids, labels=ids).loss, wanted)


def test_what_is_no_model_is_refused() -> None:
    for thing in (nn.Linear(2, 2), None, "llama"):
        with pytest.raises(ModelError, match="nbkit patches a transformers model"):
            patch(thing)
        with pytest.raises(ModelError, match="nbkit patches a transformers model"):
            unpatch(thing)


def test_a_gpu_below_capability_seven_runs_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla P40")
    reason = obstacles.stock_reason(tiny_model(), find("llama"), torch.device("cuda", 0))
    assert reason == "Tesla P40 has capability 6.1, kernels need 7.0, so it runs stock, and slowly"


def test_forwards_of_others_are_respected() -> None:
    model = tiny_model()
    theirs = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: theirs(x) * 0
    report = patch(model)
    assert [(one.path, one.reason) for one in report.skipped] == [
        ("model.layers.1.mlp", "another library has bound a forward of its own to it")
    ]
    assert "model.layers.*.mlp: another library" in str(report)
    unpatch(model)
    assert "forward" in vars(model.model.layers[1].mlp)


def test_unpatch_reaches_what_was_wrapped_since(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    patch(model)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # as accelerate does for autocast
    assert patch(model).bound[-1].op == "linear_cross_entropy"
    unpatch(model)
    monkeypatch.setattr(head, "linear_cross_entropy", lambda *a, **k: pytest.fail("still bound"))
    assert model(**batch()).logits is not None


def test_copies_and_pickles() -> None:
    model = with_lora(tiny_model())
    patch(model)
    loss, gradients = measured(model, batch())
    twin = copy.deepcopy(model)
    assert vars(twin.get_base_model())["forward"].__self__ is twin.get_base_model()
    ours, found = measured(twin, batch())
    assert torch.equal(ours, loss) and all(torch.equal(found[n], gradients[n]) for n in gradients)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_like_stock("loss", measured(loaded, batch())[0], loss)
    assert len(patch(loaded).bound) == 10
    assert torch.equal(measured(loaded, batch())[0], loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_signatures_are_those_of_transformers(family: str) -> None:
    """Trainer, PEFT and generate look at them."""
    model = tiny_model(family)
    layer = model.model.layers[0]
    parts = [model, model.model.norm, layer.input_layernorm, layer.mlp, layer.self_attn]
    stock = [list(inspect.signature(part.forward).parameters) for part in parts]
    patch(model)
    assert [list(inspect.signature(part.forward).parameters) for part in parts] == stock


def test_a_classifier_is_bound_without_a_head() -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=2)).eval()
    inputs = {k: v for k, v in batch().items() if k != "labels"} | {"labels": torch.tensor([0, 1, 1])}
    report = assert_same(model, inputs)
    assert len(report.bound) == 9 and "no next-token loss" in str(report)


def test_another_activation_is_left_alone() -> None:
    model = tiny_model(hidden_act="gelu")
    report = assert_same(model, batch())
    assert "the kernel has silu" in str(report) and len(report.skipped) == 2


def test_four_bit_weights() -> None:
    pytest.importorskip("bitsandbytes")
    import bitsandbytes

    model = tiny_model(hidden_size=64, intermediate_size=128)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    quantised = bitsandbytes.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                    )
                    quantised.load_state_dict(linear.state_dict())
                    setattr(parent, name, quantised.to("cpu"))
    model = with_lora(model)
    report = assert_same(model, batch())
    assert not report.skipped


def stock_trainer_losses(model: Any, tmp_path: Any, **options: Any) -> tuple[list[float], dict[str, float]]:
    from transformers import Trainer, TrainingArguments

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {k: v[0] for k, v in batch(seed=index, rows=1, tokens=14, pad=None).items()}

    shapes = {}
    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, seed=1, save_strategy="no", **options
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=Rows(), eval_dataset=Rows(),
        compute_metrics=lambda p: shapes.update(logits=p.predictions.shape) or {"mean": float(p.predictions.mean())},
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert shapes["logits"] == (8, 14, VOCAB)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], metrics


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "autocast"])
def test_transformers_own_trainer(tmp_path: Any, options: dict[str, Any]) -> None:
    wanted, metrics = stock_trainer_losses(with_lora(tiny_model()), tmp_path, **options)
    model = with_lora(tiny_model())
    patch(model)
    losses, found = stock_trainer_losses(model, tmp_path, **options)
    close = 1e-5 if not options else 2e-2
    assert losses == pytest.approx(wanted, rel=close)
    assert found["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=close)
    assert found["eval_mean"] == pytest.approx(metrics["eval_mean"], rel=close, abs=1e-3 if options else 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_on_a_gpu_by_the_tolerance_rule(family: str, dtype: torch.dtype) -> None:
    inputs = {k: v.to("cuda") for k, v in batch(tokens=37).items()}
    model = with_lora(tiny_model(family, hidden_size=128, head_dim=32)).to("cuda")
    model.get_base_model().to(dtype)  # rounds the weights, which truth and eager then share
    loss, gradients = measured(copy.deepcopy(model).double(), inputs)
    eager, rough = measured(model, inputs)
    report = patch(model)
    assert report.runs == "Triton kernels" and not report.skipped
    ours, found = measured(model, inputs)
    assert_close("loss", ours.to(dtype), eager.to(dtype), loss)
    for name in gradients:
        # Rounding of a whole model is no elementwise matter: the rule holds for the norm of the difference.
        distance = (found[name].double() - gradients[name]).norm() / gradients[name].norm()
        allowed = 2 * (rough[name].double() - gradients[name]).norm() / gradients[name].norm()
        assert distance <= allowed + {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype], name


@pytest.mark.gpu
def test_every_kernel_is_launched_in_a_real_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.profiler import ProfilerActivity, profile

    model = with_lora(tiny_model()).to("cuda", torch.bfloat16)
    patch(model)
    inputs = {k: v.to("cuda") for k, v in batch().items()}
    measured(model, inputs)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        measured(model, inputs)
    names = {event.key for event in seen.key_averages()}
    fused = torch.cuda.get_device_capability() >= (8, 0)
    ops = ("rms_norm", "swiglu_lora" if fused else "swiglu")
    parts = [f"_{op}_{way}_kernel" for op in ops for way in ("forward", "backward")]
    parts += ["_lora_gradients_kernel", "_swiglu_lora_sums_kernel", "_swiglu_lora_xa_kernel"] if fused else []
    for kernel in ("_rotate_kernel", "_rotate_pack", "_rows_kernel", "_copy_tiles", *parts):
        assert kernel in names, f"{kernel} is not among {sorted(names)}"
    unpatch(model)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        measured(model, inputs)
    assert not {"_rotate_kernel", "_rows_kernel", *parts} & {event.key for event in seen.key_averages()}
