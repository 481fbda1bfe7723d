"""What the backwards of hand-written autograd functions have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from nbkit.errors import ModelError


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a backward that has no derivative itself, and says so where one is asked for.

    torch's `once_differentiable` lets a gradient of gradients through as zero, in silence, where the gradient that comes in
    asks for none itself, as that of a loss does: a penalty on gradients would train nothing.
    Raises: ModelError, in the backward, under `create_graph=True`.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # the engine switches it off unless the graph of the backward is to be made
            raise ModelError(
                "Gradients of gradients (create_graph=True) are not to be had through nbkit's kernels, which have first "
                "derivatives only; call nbkit.unpatch(model) for a loss that needs them."
            )
        return backward(ctx, *grads)

    return checked
