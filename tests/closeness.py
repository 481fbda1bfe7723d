"""The one tolerance rule as assertions; its arithmetic and its wording are in `nbkit/models/closeness.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nbkit.models.closeness import LIKE_STOCK, TOLERANCE, Gap, by_element, like_stock


def assert_close(name: str, ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> None:
    """Holds `ours` to the rule.

    Args:
        name: of the tensor, for the message.
        eager: plain torch in the dtype of `ours`, from the same inputs.
        truth: plain torch in float64, or float32 where that is all there is, from the same (rounded) inputs.
    """
    assert ours.shape == eager.shape == truth.shape, f"{name}: shapes {ours.shape}, {eager.shape}, {truth.shape}"
    assert ours.dtype == eager.dtype, f"{name} is {ours.dtype}, eager {eager.dtype}"
    gap = by_element(ours, eager, truth)
    if gap.odd:
        _fail(name, gap, ours, "is not finite where the truth is, or is where the truth is not")
    if not gap.ok:
        _fail(name, gap, ours, f"is outside 2 |eager - truth| + {TOLERANCE[ours.dtype]} scale")


def assert_like_stock(name: str, ours: torch.Tensor, stock: torch.Tensor, relative: float = LIKE_STOCK) -> None:
    """For whole models in float32: |ours - stock| <= relative * max |stock|, for each element."""
    assert ours.shape == stock.shape, f"{name}: shapes {ours.shape} and {stock.shape}"
    gap = like_stock(ours, stock, relative)
    if not gap.ok:
        _fail(name, gap, ours, f"differs by more than {relative} of the largest element")


def assert_all_like_stock(ours: Mapping[str, Any], stock: Mapping[str, Any], relative: float = LIKE_STOCK) -> None:
    """The same for tensors by name, say all gradients of a model; neither may lack one."""
    assert ours.keys() == stock.keys(), f"only one side has {sorted(ours.keys() ^ stock.keys())}"
    for name in stock:
        assert_like_stock(name, ours[name], stock[name], relative)


def assert_no_drift(ours: Sequence[float], stock: Sequence[float], largest: float = 1e-3, mean: float = 1e-6) -> None:
    """For losses step by step: no single difference above `largest`, and the mean signed difference within `mean`."""
    assert len(ours) == len(stock) > 0
    differences = [a - b for a, b in zip(ours, stock, strict=True)]
    worst = max(range(len(differences)), key=lambda i: abs(differences[i]))
    assert abs(differences[worst]) <= largest, f"step {worst}: {ours[worst]} against {stock[worst]}, over {largest} apart"
    drift = sum(differences) / len(differences)
    assert abs(drift) <= mean, f"losses drift by {drift} a step over {len(differences)} steps, over {mean}"


def _fail(name: str, gap: Gap, ours: torch.Tensor, what: str) -> None:
    __tracebackhide__ = True
    raise AssertionError(
        f"{name}{list(gap.index)} {what}: ours {gap.ours!r}, eager {gap.eager!r}, truth {gap.truth!r}; "
        f"{gap.count} of {ours.numel()} elements are outside"
    )
