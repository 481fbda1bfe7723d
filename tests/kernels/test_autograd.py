"""Second derivatives: refused in a sentence wherever a hand-written backward would pass none on in silence."""

from __future__ import annotations

import pytest
import torch

from nbkit.errors import ModelError
from nbkit.kernels.linear_cross_entropy import linear_cross_entropy


def loss_of(hidden: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden, torch.eye(8), torch.tensor([1, 2, 3]))


def test_a_penalty_on_gradients_is_refused_and_not_dropped() -> None:
    hidden = torch.randn(3, 8, requires_grad=True)
    loss = loss_of(hidden)
    with pytest.raises(ModelError, match=r"create_graph=True.*nbkit.unpatch\(model\)"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(ModelError, match="create_graph=True"):
        loss.backward(create_graph=True)
    with torch.enable_grad():  # says nothing of the backward
        loss_of(hidden).backward()
    assert hidden.grad is not None and not hidden.grad.requires_grad
