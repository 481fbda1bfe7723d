"""The backward is written by hand: nothing in it asks autograd, and it hands gradients of the right kind on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import checkpoint

from nbkit.errors import ModelError
from nbkit.models.layer import Keep
from tests.models.layer.rig import batch, lora, step
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
