"""The one tolerance rule.

An op in some dtype may err twice as much as plain torch does in that dtype, plus a tolerance:

    |ours - truth| <= 2 |eager - truth| + tol * scale        for each element; truth in float64 (or float32)

`tol` is 1e-5 for float32 and wider, 1e-3 for float16, 1e-2 for bfloat16. `scale` is 1 for a tensor that reaches 1 somewhere;
the largest |truth| of a tensor that does not, so that gradients of 1e-6 are held to something; and |truth| of the element
where that is above 1. Where the truth is not finite, ours must be the same (nan, inf or -inf).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
FLOOR = 1e-12  # below it a truth of zeros counts as zeros


def assert_close(name: str, ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> None:
    """Holds `ours` to the rule.

    Args:
        name: of the tensor, for the message.
        eager: plain torch in the dtype of `ours`, from the same inputs.
        truth: plain torch in float64, or float32 where that is all there is, from the same (rounded) inputs.
    """
    assert ours.shape == eager.shape == truth.shape, f"{name}: shapes {ours.shape}, {eager.shape}, {truth.shape}"
    assert ours.dtype == eager.dtype, f"{name} is {ours.dtype}, eager {eager.dtype}"
    tol = TOLERANCE[ours.dtype]
    ours, eager, truth = (t.detach().to("cpu", torch.float64) for t in (ours, eager, truth))
    if truth.numel() == 0:
        return
    odd = ~torch.isfinite(truth)
    same = torch.where(odd, (ours == truth) | (ours.isnan() & truth.isnan()), ours.isfinite())
    if not same.all():
        _fail(name, ~same, ours, eager, truth, "is not finite where the truth is, or is where the truth is not")
    finite = torch.where(odd, 0.0, truth)
    scale = finite.abs().clamp(min=min(max(float(finite.abs().max()), FLOOR), 1.0))
    allowed = 2 * (eager - truth).nan_to_num(0.0, 0.0, 0.0).abs() + tol * scale
    error = torch.where(odd, 0.0, (ours - truth).abs())
    if (error > allowed).any():
        _fail(name, error / allowed, ours, eager, truth, f"is outside 2 |eager - truth| + {tol} scale")


def assert_like_stock(name: str, ours: torch.Tensor, stock: torch.Tensor, relative: float = 1e-5) -> None:
    """For whole models in float32: |ours - stock| <= relative * max |stock|, for each element."""
    assert ours.shape == stock.shape, f"{name}: shapes {ours.shape} and {stock.shape}"
    ours, stock = (t.detach().to("cpu", torch.float64) for t in (ours, stock))
    if stock.numel() == 0:
        return
    allowed = relative * max(float(stock.abs().max()), FLOOR)
    excess = (ours - stock).abs() / allowed
    bad = ~(excess <= 1) & ~((ours == stock) | (ours.isnan() & stock.isnan()))
    if bad.any():
        badness = torch.where(bad, excess.nan_to_num(float("inf")), 0.0)
        _fail(name, badness, ours, stock, stock, f"differs by more than {relative} of the largest element")


def assert_all_like_stock(ours: Mapping[str, Any], stock: Mapping[str, Any], relative: float = 1e-5) -> None:
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


def _fail(name: str, badness: torch.Tensor, ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, what: str) -> None:
    __tracebackhide__ = True
    flat = int(badness.to(torch.float64).reshape(-1).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), badness.shape)) if badness.dim() else ()
    count = int((badness > (0 if badness.dtype == torch.bool else 1)).sum())
    raise AssertionError(
        f"{name}{list(index)} {what}: ours {float(ours[index])!r}, eager {float(eager[index])!r}, truth {float(truth[index])!r}; "
        f"{count} of {badness.numel()} elements are outside"
    )
