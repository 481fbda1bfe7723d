"""What is watched at each optimizer step: that all is finite, and that every adapter tensor trains. At most one wait a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nbkit.errors import TrainingError
from nbkit.training.optim import unwrapped


class Guard:
    """Lets the optimizer skip a step that is not finite by itself, on the device, so that nobody has to wait before it.

    Optimizers with this mark (torch's fused ones, nbkit's) read `found_inf`, one element on the device, which torch's GradScaler
    would give them: where it is 1, weights and state stay as they are.
    """

    def __init__(self, optimizer: Any) -> None:
        inner = unwrapped(optimizer)
        self._optimizer: Any = inner if getattr(inner, "_step_supports_amp_scaling", False) else None

    def arm(self, figures: Tensor) -> bool:
        """Skip the coming step if any of `figures` is not finite; False if this optimizer cannot."""
        if self._optimizer is None:
            return False
        self._optimizer.found_inf = (~torch.isfinite(figures).all()).float()
        return True

    def release(self) -> None:
        if self._optimizer is not None:
            vars(self._optimizer).pop("found_inf", None)


class Norms:
    """The gradient norm of `params`, clipping included, and the norm of each for the case that one is not finite."""

    def __init__(self, named: list[tuple[str, torch.nn.Parameter]]) -> None:
        self.named = named
        self.each: Tensor | None = None  # of those that have a gradient
        self.names: list[str] = []

    def measure(self, max_norm: float | None) -> Tensor:
        """The norm over all gradients before clipping, one element on the device; nothing waits for it."""
        present = [(name, p) for name, p in self.named if p.grad is not None]
        self.names = [name for name, _ in present]
        if not present:
            self.each = None
            return torch.zeros(())
        grads = [p.grad for _, p in present if p.grad is not None]
        device = grads[0].device
        self.each = torch.stack([norm.float().to(device) for norm in torch._foreach_norm(grads)])
        total: Any = torch.linalg.vector_norm(self.each)
        if max_norm:
            torch.nn.utils.clip_grads_with_norm_([p for _, p in present], max_norm, total)
        return total


class Liveness:
    """Every trainable LoRA tensor must have had a gradient that is not zero once lora_B has moved.

    lora_B starts at zero, so lora_A's gradient is exactly zero until the first step that changes lora_B.
    """

    def __init__(self, model: Any) -> None:
        self._waiting = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}
        self._moved = False

    @property
    def done(self) -> bool:
        """Whether every tensor has been seen to train; from then on nothing is looked at."""
        return not self._waiting

    def look(self, step: int, learning_rate: float) -> None:
        """Raises: TrainingError naming the modules that get no gradient."""
        if not self._waiting:
            return
        present = {n: p.grad for n, p in self._waiting.items() if p.grad is not None}
        if present:
            found = torch._foreach_norm(list(present.values()), ord=math.inf)
            device = found[0].device
            norms = torch.stack([norm.float().to(device) for norm in found])
            for name in [n for n, alive in zip(present, (norms > 0).tolist(), strict=True) if alive]:
                del self._waiting[name]
        if self._moved and self._waiting:
            names = sorted({n.split(".lora_")[0].removeprefix("base_model.model.") for n in self._waiting})
            raise TrainingError(
                f"Step {step}: {len(self._waiting)} adapter tensors get no gradient, in {', '.join(names[:4])}"
                f"{f' and {len(names) - 4} more' if len(names) > 4 else ''}; nothing would be learned there. "
                "Leave these modules out of the LoRA targets, or run nbkit.unpatch(model) and report it."
            )
        self._moved = self._moved or learning_rate > 0
