"""Bound layers whose surroundings change: other layers, blocks and settings, evaluation beside training, caches, threads."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from tests.models.layer.rig import TARGETS, batch, fill, lora, step, worst
from tests.models.layer.test_layer import FAMILIES, bound
from tests.models.layer.test_weights import assert_followed


def decoder(model: Any) -> Any:
    return model.get_base_model().model


# -- what layers are made from -------------------------------------------------------------------------------------------


def deleted(model: Any) -> None:
    del decoder(model).layers[2]
    model.config.num_hidden_layers = 2


def left_out(model: Any) -> None:
    """transformers runs the first `num_hidden_layers`."""
    model.config.num_hidden_layers = 1


def swapped(model: Any) -> None:
    layers = decoder(model).layers
    decoder(model).layers = nn.ModuleList([layers[1], layers[0], layers[2]])


def one_twice(model: Any) -> None:
    layers = decoder(model).layers
    layers[0] = layers[1]
    model.config.use_cache = False  # a cache has one place for the two


def another_mlp(model: Any) -> None:
    layers = decoder(model).layers
    layers[0].mlp = layers[1].mlp


@pytest.mark.parametrize("change", [deleted, left_out, swapped, one_twice, another_mlp])
def test_layers_that_are_replaced(change: Callable[[Any], None]) -> None:
    assert_followed(lambda: lora("qwen2", num_hidden_layers=3), change)


@pytest.mark.parametrize("window", [3, None])
def test_a_window_that_is_changed(window: int | None) -> None:
    def change(model: Any) -> None:
        model.config.sliding_window = window

    assert_followed(lambda: lora("mistral"), change)


def not_causal(model: Any) -> None:
    for layer in decoder(model).layers:
        layer.self_attn.is_causal = False


def not_causal_by_config(model: Any) -> None:
    model.config.is_causal = False


def another_activation(model: Any) -> None:
    for layer in decoder(model).layers:
        layer.mlp.act_fn = nn.GELU()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (not_causal, "attention is not causal (is_causal is False)"),
        (not_causal_by_config, "attention is not causal (is_causal is False)"),
        (another_activation, "the activation is GELU, not silu"),
    ],
)
def test_settings_that_no_fused_step_has(change: Callable[[Any], None], reason: str) -> None:
    binding = assert_followed(lambda: lora("llama"), change, fused=False)
    assert set(binding.reasons.values()) == {reason}
    model = lora("llama")
    change(model)
    binding = bound(model)
    assert set(binding.reasons.values()) == {reason}
    binding.release()


def test_a_dropout_of_attention_that_is_switched_on_and_off() -> None:
    model = lora("llama")
    binding = bound(model)
    first = step(model, **batch())
    for layer in decoder(model).layers:
        layer.self_attn.attention_dropout = 0.5
    torch.manual_seed(3)
    ours = step(model, **batch())
    assert set(binding.reasons.values()) == {"attention_dropout is 0.5"}
    for layer in decoder(model).layers:
        layer.self_attn.attention_dropout = 0.0
    assert step(model, **batch())[0] == first[0] and not binding.reasons
    binding.release()
    for layer in decoder(model).layers:
        layer.self_attn.attention_dropout = 0.5
    torch.manual_seed(3)
    assert ours[0] == step(model, **batch())[0] != first[0]


# -- evaluation beside training ------------------------------------------------------------------------------------------


def test_an_adapter_that_first_runs_in_inference_mode() -> None:
    def change(model: Any) -> None:
        model.add_adapter("wide", LoraConfig(r=80, target_modules=TARGETS))
        model.set_adapter("wide")
        fill(model, 4)
        with torch.inference_mode():
            model(**batch())

    assert_followed(lambda: lora("llama"), change)


def test_a_thread_that_evaluates_changes_no_step() -> None:
    """As a chat panel beside a run."""
    model, truth = lora("llama"), []
    for seed in range(12):
        truth.append(step(model, **batch(2, 9, seed=seed)))
    binding, stop, failed = bound(model), threading.Event(), []

    def evaluate() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad():
                    model(input_ids=batch(2, 5)["input_ids"])
            except Exception as error:
                failed.append(error)
                return

    thread, pace = threading.Thread(target=evaluate), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        for seed in range(12):
            loss, grads = step(model, **batch(2, 9, seed=seed))
            assert loss == pytest.approx(truth[seed][0], rel=1e-5) and worst(grads, truth[seed][1])[0] < 1e-5
    finally:
        stop.set()
        sys.setswitchinterval(pace)
        thread.join()
    assert not failed and binding.how
    binding.release()


# -- caches --------------------------------------------------------------------------------------------------------------


def decoded(model: Any, **first: Any) -> list[torch.Tensor]:
    """Three tokens by hand, with the cache of the steps before and with gradients on, as newcomers write it."""
    ids = batch(2, 11)["input_ids"]
    out, found = model(input_ids=ids, **first), []
    for _ in range(3):
        found.append(out.logits[:, -1].detach())
        out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("training", "first"),
    [(False, {}), (False, {"use_cache": True}), (True, {"use_cache": True})],
    ids=["eval", "asked", "train"],
)
def test_a_cache_that_is_asked_for_is_filled(family: str, training: bool, first: dict[str, Any]) -> None:
    model = lora(family).train(training)
    stock = decoded(model, **first)
    binding = bound(model)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        ours = decoded(model, **first)
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))
    said = " ".join(str(one.message) for one in heard)
    assert ("use_cache=True asks for keys and values" if first else "model.train() to train, torch.no_grad() to evaluate") in said
    binding.release()


def test_a_loss_in_eval_mode_asks_for_no_cache() -> None:
    """from_pretrained gives a model in eval mode, and many a loop never calls train()."""
    import nbkit

    model = lora("llama").eval()
    stock = step(model, **batch())
    nbkit.patch(model)
    binding = bound(model)
    loss, grads = step(model, **batch())
    assert binding.how and not binding.asides
    assert loss == pytest.approx(stock[0], rel=1e-5) and worst(grads, stock[1])[0] < 1e-5
    nbkit.unpatch(model)


def layer_norm(model: Any) -> None:
    decoder(model).layers[0].input_layernorm = nn.LayerNorm(32)


def another_eps(model: Any) -> None:
    decoder(model).layers[0].post_attention_layernorm.variance_epsilon = 0.5


@pytest.mark.parametrize(
    ("change", "reason"),
    [(layer_norm, "input_layernorm is a LayerNorm of torch, not an RMSNorm"), (another_eps, "its norms differ in epsilon")],
)
def test_norms_that_no_fused_step_has(change: Callable[[Any], None], reason: str) -> None:
    binding = assert_followed(lambda: lora("llama", num_hidden_layers=1), change, fused=False)
    assert binding.reasons == {0: reason}


def test_an_epsilon_that_is_changed() -> None:
    def change(model: Any) -> None:
        for layer in decoder(model).layers:
            layer.input_layernorm.variance_epsilon = layer.post_attention_layernorm.variance_epsilon = 0.5

    assert_followed(lambda: lora("llama"), change)


# -- copies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_of_a_bound_model_is_bound_itself(made: Callable[[Any], Any]) -> None:
    model = lora("llama")
    stock, logits = step(model, **batch(padded=True)), model.eval()(**batch()).logits.detach()
    model.train()
    binding = bound(model)
    step(model, **batch())
    twin = made(model)
    own = bound(twin)
    for one in (twin, model):
        loss, grads = step(one, **batch(padded=True))
        assert loss == pytest.approx(stock[0], rel=1e-6) and worst(grads, stock[1])[0] < 1e-5
    with torch.no_grad():
        assert torch.equal(twin.eval()(**batch()).logits, logits)
    assert own.how and own is not binding
    own.release()
    assert not decoder(twin)._forward_pre_hooks and not any("forward" in vars(layer) for layer in decoder(twin).layers)
    binding.release()


def test_a_copy_that_is_unpatched_keeps_nothing() -> None:
    import nbkit

    model = lora("llama")
    nbkit.patch(model)
    bound(model)
    twin = copy.deepcopy(model)
    nbkit.unpatch(twin)
    for module in twin.modules():
        assert not any(key.startswith("_nbkit") for key in vars(module)) and "forward" not in vars(module)
        assert not module._forward_pre_hooks or module is model
    nbkit.unpatch(model)


def test_a_model_that_is_unpatched_between_forward_and_backward_says_so() -> None:
    from nbkit.errors import ModelError

    model = lora("llama")
    binding = bound(model)
    loss = model(**batch()).loss
    binding.release()
    with pytest.raises(ModelError, match="was unpatched between this step's forward and its backward; run the forward again"):
        loss.backward()


# -- layers that the decoder does not call -------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_called_by_hand_follow_the_adapters(family: str, attention: str) -> None:
    """As early exits, tools that look at single layers, and decoders of one's own do; without a mask each implementation has
    its own way."""
    model = lora(family, attn_implementation=attention)

    def by_hand() -> Any:
        hidden = decoder(model).embed_tokens(batch()["input_ids"])
        turned = decoder(model).rotary_emb(hidden, torch.arange(19)[None])
        for layer in decoder(model).layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=turned)
        loss = (hidden * torch.linspace(-1, 1, 32)).square().mean()
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return loss.item(), grads

    fill(model, 1)
    truth = by_hand()
    fill(model, 0)
    binding = bound(model)
    step(model, **batch())
    fill(model, 1)
    loss, grads = by_hand()
    assert loss == pytest.approx(truth[0], rel=1e-6) and worst(grads, truth[1])[0] < 1e-5
    binding.release()


def packed() -> dict[str, torch.Tensor]:
    places = torch.cat([torch.arange(7), torch.arange(12)])[None]
    return {**batch(rows=1), "position_ids": places}


@pytest.mark.parametrize("inputs", [batch(), batch(padded=True), packed()], ids=["plain", "padded", "packed"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_single_layers(reentrant: bool, inputs: dict[str, torch.Tensor]) -> None:
    """They run again in the backward, where no forward of the decoder has begun."""
    from torch.utils.checkpoint import checkpoint

    model = lora("llama")
    truth = step(model, **inputs, use_cache=False)
    binding = bound(model)
    if reentrant:
        model.enable_input_require_grads()

    def around(theirs: Any) -> Any:
        return lambda hidden, **kwargs: checkpoint(partial(theirs, **kwargs), hidden, use_reentrant=reentrant)

    for layer in decoder(model).layers:
        layer.forward = around(layer.forward)
    for _ in range(2):
        loss, grads = step(model, **inputs, use_cache=False)
        assert loss == pytest.approx(truth[0], rel=1e-6) and worst(grads, truth[1])[0] < 1e-5
    assert binding.how and not binding.reasons and not binding.asides
    for layer in decoder(model).layers:
        del layer.forward
    binding.release()
