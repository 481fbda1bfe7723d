"""`KernelOp`: what tests, benchmarks and the docs need to know of one op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One set of inputs worth trying. `sizes` are by the letters of the op's file; `options` are its keyword arguments."""

    reason: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.reason.replace(" ", "-")


@dataclass(frozen=True)
class KernelOp:
    """A public op and the oracle it is held to.

    `fn` and `reference` take the same arguments; the reference is plain torch, differentiable by autograd.
    `inputs(case, dtype, device, seed)` makes the tensor arguments by name; `gradients` names those that are differentiated.
    `cases` are for parity (small and awkward), `benchmark` for timing (real sizes).
    """

    name: str
    fn: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]
    inputs: Callable[[Case, torch.dtype, str, int], dict[str, Any]]
    gradients: tuple[str, ...]
    cases: tuple[Case, ...]
    benchmark: tuple[Case, ...]
