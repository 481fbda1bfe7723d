"""The backward is written by hand: nothing in it asks autograd, and it hands gradients of the right kind on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import checkpoint

from nbkit.errors import ModelError
from nbkit.models.layer import Keep
from tests.closeness import assert_like_stock
from tests.models.layer.rig import batch, lora, step, worst
from tests.models.layer.test_layer import bound

KEEPS = [None, Keep(0), Keep(1, 16), Keep(2), Keep(3, 7, True, 1), Keep(4), Keep(4, 5, False, 2)]


@pytest.mark.parametrize("keep", KEEPS, ids=str)
def test_the_backward_calls_no_autograd(keep: Keep | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor `enable_grad` or checkpointing: what is computed again is computed as plain tensors."""
    model = lora("qwen2")
    binding = bound(model, keep)
    step(model, **batch(padded=True))
    loss = model(**batch(padded=True)).loss

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the backward asked autograd")

    saved: list[Any] = []
    with monkeypatch.context() as inner, torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        for place, name in (
            (torch, "enable_grad"),
            (torch.autograd, "grad"),
            (torch.autograd.functional, "vjp"),
            (checkpoint, "checkpoint"),
        ):
            inner.setattr(place, name, refuse)
        right = torch.set_grad_enabled  # `no_grad` goes through it
        inner.setattr(torch, "set_grad_enabled", lambda mode: refuse() if mode else right(mode))
        loss.backward()
    assert not saved  # a tape in the backward would have saved something
    assert binding.how and all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    binding.release()


def test_gradients_have_their_parameters_dtype_and_no_graph() -> None:
    model = lora("llama")
    model.get_base_model().to(torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    binding = bound(model)
    grads = step(model, **batch())[1]
    assert binding.how and {g.dtype for g in grads.values()} == {torch.float32}
    assert not any(g.requires_grad for g in grads.values()) and all(torch.isfinite(g).all() for g in grads.values())
    binding.release()


def test_a_gradient_of_a_gradient_is_refused() -> None:
    model = lora("llama")
    binding = bound(model)
    weight = next(p for n, p in model.named_parameters() if "lora_B" in n)
    for loss in (lambda: model(**batch()).loss, lambda: model.get_base_model().model(batch()["input_ids"])[0].mean()):
        with pytest.raises(ModelError, match="Gradients of gradients"):
            torch.autograd.grad(loss(), [weight], create_graph=True)
    assert weight.grad is None
    binding.release()


@pytest.mark.parametrize("keep", [None, *KEEPS[1:3], Keep(4, 7, True, 1)], ids=str)
def test_hooks_may_write_to_what_a_layer_gives(keep: Keep | None) -> None:
    """As those that steer a model do."""
    model = lora("llama")

    def steer(module: Any, args: Any, out: torch.Tensor) -> None:
        out[:, -3:] += 0.3
        out.mul_(1.1)

    base = model.get_base_model().model
    for module in (*base.layers, base.norm):
        module.register_forward_hook(steer)
    truth = step(model, **batch(), use_cache=False)
    binding = bound(model)
    binding.keep = keep
    loss, grads = step(model, **batch(), use_cache=False)
    assert binding.how and not binding.reasons
    assert loss == pytest.approx(truth[0], rel=1e-6) and worst(grads, truth[1])[0] < 1e-5
    out = base(batch()["input_ids"], use_cache=False).last_hidden_state
    out[:, 0] = 0.0
    out.sum().backward()
    binding.release()


@pytest.mark.parametrize("keep", [None, Keep(0), Keep(4, 7, True, 1), Keep(4, 0, True, 2)], ids=str)
def test_hooks_of_the_backward_see_the_gradients_of_stock(keep: Keep | None) -> None:
    model, seen = lora("llama"), []
    for layer in model.get_base_model().model.layers:
        layer.register_full_backward_hook(lambda module, given, got: seen.append(got[0].clone()))
    step(model, **batch(), use_cache=False)
    truth, seen = seen, []
    binding = bound(model)
    binding.keep = keep
    step(model, **batch(), use_cache=False)
    assert len(seen) == len(truth) == 2
    for ours, theirs in zip(seen, truth, strict=True):
        assert_like_stock("gradient", ours, theirs)
    binding.release()
