"""The one tolerance rule, as arithmetic: tests assert it, `nbkit.certify` measures by it on the user's machine.

An op in some dtype may err twice as much as plain torch does in that dtype, plus a tolerance:

    |ours - truth| <= 2 |eager - truth| + tol * scale        for each element; truth in float64 (or float32)

`tol` is 1e-5 for float32 and wider, 1e-3 for float16, 1e-2 for bfloat16. `scale` is 1 for a tensor that reaches 1 somewhere;
the largest |truth| of a tensor that does not, so that gradients of 1e-6 are held to something; and |truth| of the element
where that is above 1. Where the truth is not finite, ours must be the same (nan, inf or -inf).

The gradients of a whole model in 16 bits are sums of millions of roundings: of them the rule holds for the norm of the
difference, tensor by tensor, with tol times the norm of the truth. In float32 a whole model is held to the stock one itself:

    |ours - stock| <= 1e-5 * max |stock|        for each element

Where stock itself errs more than that (a cross-entropy over 50,000 columns in float32 does), float64 decides, by the rule for
norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
LIKE_STOCK = 1e-5  # of the largest element, for whole models in float32
FLOOR = 1e-12  # below it a truth of zeros counts as zeros
CHUNK = 2**24  # elements compared at a time: in float64 they and their differences take about 1 GB


@dataclass(frozen=True)
class Gap:
    """How far a tensor is from what it should be. `ratio`: the largest error by what is allowed there; at most 1 passes.

    `index` is where that is, `ours`, `eager` and `truth` the values there, `count` the elements outside; `odd` says that
    something is not finite where the truth is, or the other way round.
    """

    ratio: float
    index: tuple[int, ...] = ()
    ours: float = 0.0
    eager: float = 0.0
    truth: float = 0.0
    count: int = 0
    odd: bool = False

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


def by_element(ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> Gap:
    """The rule for each element, for tensors of one shape; `tol` is that of the dtype of `ours`."""
    tol = TOLERANCE[ours.dtype]
    size = torch.where(torch.isfinite(truth.detach()), truth.detach().abs(), 0.0)
    top = float(size.max()) if size.numel() else 0.0
    least = min(max(top, FLOOR), 1.0)

    def part(o: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        odd = ~torch.isfinite(t)
        same = torch.where(odd, (o == t) | (o.isnan() & t.isnan()), o.isfinite())
        allowed = 2 * (e - t).nan_to_num(0.0, 0.0, 0.0).abs() + tol * torch.where(odd, 1.0, t).abs().clamp(min=least)
        error = torch.where(odd, 0.0, (o - t).abs())
        return torch.where(same, error / allowed, torch.inf)

    return _worst(ours, eager, truth, part)


def like_stock(ours: torch.Tensor, stock: torch.Tensor, relative: float = LIKE_STOCK) -> Gap:
    """For whole models in float32: each element within `relative` of the largest |stock|."""
    top = float(stock.detach().abs().max()) if stock.numel() else 0.0
    allowed = relative * max(top, FLOOR)

    def part(o: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        same = (o == t) | (o.isnan() & t.isnan())
        return torch.where(same, 0.0, ((o - t).abs() / allowed).nan_to_num(torch.inf))

    return _worst(ours, stock, stock, part)


def by_norm(ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, tol: float | None = None) -> Gap:
    """The rule for the norm of the difference; `ours`, `eager` and `truth` of the Gap are the two distances and the norm.

    Args:
        tol: None is that of the dtype of `ours`; a model computes in another dtype than its float32 adapters have.
    """
    tol = TOLERANCE[ours.dtype] if tol is None else tol
    squares = torch.zeros(3, dtype=torch.float64)
    for o, e, t in _chunks(ours, eager, truth):
        squares += torch.stack([((o - t) ** 2).sum(), ((e - t) ** 2).sum(), (t**2).sum()]).cpu()
    mine, theirs, size = squares.sqrt().tolist()
    ratio = mine / (2 * theirs + tol * max(size, FLOOR))
    odd = ratio != ratio
    return Gap(float("inf") if odd else ratio, (), mine, theirs, size, 0, odd)


def _chunks(*tensors: torch.Tensor):  # type: ignore[no-untyped-def]
    """Flat pieces of CHUNK elements of each, in float64 on the device of the last."""
    flat = [t.detach().reshape(-1) for t in tensors]
    for start in range(0, flat[-1].numel(), CHUNK):
        yield [f[start : start + CHUNK].to(flat[-1].device, torch.float64) for f in flat]


def _worst(ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, part) -> Gap:  # type: ignore[no-untyped-def]
    """The worst element by `part(ours, eager, truth)`, which gives error by allowance."""
    worst, place, count = Gap(0.0), -1, 0
    for number, (o, e, t) in enumerate(_chunks(ours, eager, truth)):
        ratios = part(o, e, t)
        count += int((ratios > 1).sum())
        here = int(ratios.argmax())
        ratio = float(ratios[here])
        if place < 0 or ratio > worst.ratio:
            place = number * CHUNK + here
            worst = Gap(ratio, (), float(o[here]), float(e[here]), float(t[here]), 0, ratio == float("inf"))
    if place < 0:
        return worst
    index = torch.unravel_index(torch.tensor(place), truth.shape) if truth.dim() else ()
    return Gap(worst.ratio, tuple(int(i) for i in index), worst.ours, worst.eager, worst.truth, count, worst.odd)
