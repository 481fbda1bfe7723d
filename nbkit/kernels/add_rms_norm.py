"""The residual added and the sum normalised, in one launch; and the other order, normalised and then added (sandwich norms).

    add, then norm:  s = x + residual        y = rms_norm(s)                 ds += rms_norm's dx (dy, s);  dx = dresidual = ds
    norm, then add:  s = residual + rms_norm(x)                              dresidual = ds;  dx = rms_norm's dx (ds, x)

s is rounded to x's dtype before it is normalised, and the norm before it is added, as the separate steps do. Read and written
once: x, residual, s, y; apart, s would be read once more. Norms, weights, `offset` and `cast` as in rms_norm.py.
Shapes: x, residual, s, y (…, D) in any strides and one dtype; weight (D,); rstd (N,) float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbkit.kernels import rms_norm as rms
from nbkit.kernels._autograd import first_order
from nbkit.kernels._launch import as_rows, check_rows, kernel, on_device, power_of_two, tl, use_triton
from nbkit.kernels._op import Case, KernelOp
from nbkit.kernels.rms_norm import BEFORE_WEIGHT, LAST, rms_norm_backward, rms_norm_forward

# -- reference -------------------------------------------------------------------------------------


def reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, cast: str = BEFORE_WEIGHT
) -> tuple[Tensor, Tensor]:
    """(s, y) of "add, then norm" in plain torch."""
    total = residual + x
    return total, rms.reference(total, weight, eps, offset=offset, cast=cast)


# -- kernel ----------------------------------------------------------------------------------------


@kernel
def _add_rms_norm_kernel(
    X, RESIDUAL, W, SUM, Y, RSTD, stride_x, stride_residual, stride_sum, stride_y, eps,
    OFFSET: tl.constexpr, CAST_LAST: tl.constexpr, NORM_FIRST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row a program. SUM may be X or RESIDUAL. NORM_FIRST: Y is not written."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    x = tl.load(X + row * stride_x + col, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(RESIDUAL + row * stride_residual + col, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(W + col, mask=inside, other=0.0).to(tl.float32) + OFFSET
    if not NORM_FIRST:
        x = (x + residual).to(SUM.dtype.element_ty)
        tl.store(SUM + row * stride_sum + col, x, mask=inside)
        x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    xhat = x * rstd
    if not CAST_LAST:
        xhat = xhat.to(X.dtype.element_ty).to(tl.float32)
    y = (xhat * weight).to(Y.dtype.element_ty)
    tl.store(RSTD + row, rstd)
    if NORM_FIRST:
        tl.store(SUM + row * stride_sum + col, (residual + y.to(tl.float32)).to(SUM.dtype.element_ty), mask=inside)
    else:
        tl.store(Y + row * stride_y + col, y, mask=inside)


def _launch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, total: Tensor, y: Tensor, rstd: Tensor, offset: float, cast: str,
    norm_first: bool,
) -> None:  # fmt: skip
    n, d = x.shape
    block = power_of_two(d)
    with on_device(x):
        _add_rms_norm_kernel[(n,)](
            x, residual, weight, total, y, rstd, x.stride(0), residual.stride(0), total.stride(0), y.stride(0), float(eps),
            OFFSET=float(offset), CAST_LAST=cast == LAST, NORM_FIRST=norm_first, D=d, BLOCK=block, num_warps=rms.warps(block)
        )  # fmt: skip


# -- raw functions, without autograd ---------------------------------------------------------------


def add_rms_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    cast: str = BEFORE_WEIGHT,
    total: Tensor | None = None,
    out: Tensor | None = None,
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(s, y, rstd) of "add, then norm" for x and residual (N, D) with any row strides.

    Args:
        total: (N, D) for s; may be x or residual. out: (N, D) for y. rstd: (N,) float32. All with any row stride.
    The backward is `rms_norm_backward(dy, s, weight, rstd, add_to=ds)`: it gives dx, which is dresidual as well.
    """
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if total is None else total
    if out is None:
        dtype = x.dtype if cast == LAST else torch.promote_types(x.dtype, weight.dtype)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _check(x=x, residual=residual, total=total, out=out)
    if not use_triton(x, residual, weight, total, out):
        torch.add(residual, x, out=total)
        return total, *rms_norm_forward(total, weight, eps, offset=offset, cast=cast, out=out, rstd=rstd)
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device) if rstd is None else rstd
    _launch(x, residual, weight, eps, total, out, rstd, offset, cast, False)
    return total, out, rstd


def rms_norm_add_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    cast: str = BEFORE_WEIGHT,
    total: Tensor | None = None,
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(s, rstd) of "norm, then add": s = residual + rms_norm(x), the norm rounded to x's dtype first.

    Args: as `add_rms_norm_forward`. The backward is `rms_norm_backward(ds, x, weight, rstd)`; ds is dresidual.
    """
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if total is None else total
    _check(x=x, residual=residual, total=total)
    if not use_triton(x, residual, weight, total):
        y, rstd = rms_norm_forward(x, weight, eps, offset=offset, cast=cast, rstd=rstd)
        return torch.add(residual, y.to(x.dtype), out=total), rstd
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device) if rstd is None else rstd
    _launch(x, residual, weight, eps, total, x, rstd, offset, cast, True)
    return total, rstd


def _check(**rows: Tensor) -> None:
    for name, x in rows.items():
        check_rows(name, x)
        if x.shape != rows["x"].shape or (name != "out" and x.dtype != rows["x"].dtype):
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype}, x {tuple(rows['x'].shape)} {rows['x'].dtype}; make them alike."
            )


# -- with autograd ---------------------------------------------------------------------------------


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, cast: str
    ) -> tuple[Tensor, Tensor]:
        total, y, rstd = add_rms_norm_forward(as_rows(x), as_rows(residual), weight, eps, offset=offset, cast=cast)
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset = offset
        return total.view(x.shape), y.view(x.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, ds: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        dx, dw = rms_norm_backward(
            as_rows(dy), total, weight, rstd, offset=ctx.offset, add_to=as_rows(ds), out=torch.empty_like(total),
            weight_grad=ctx.needs_input_grad[2],
        )  # fmt: skip
        dx = dx.view(ds.shape)
        return dx, dx, None if dw is None else dw.to(weight.dtype), None, None, None


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, cast: str = BEFORE_WEIGHT
) -> tuple[Tensor, Tensor]:
    """(s, y): s = x + residual (…, D), y = RMSNorm of s by weight (D,), float32 inside.

    Args: `offset`, `cast` as `rms_norm`.
    Raises: ValueError for another `cast`, or x and residual that differ in shape or dtype.
    """
    if cast not in (BEFORE_WEIGHT, LAST):
        raise ValueError(f"cast is {cast!r}; it must be {BEFORE_WEIGHT!r} or {LAST!r}.")
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} {residual.dtype} must be alike.")
    if use_triton(x, residual, weight):
        return _AddRMSNorm.apply(x, residual, weight, eps, offset, cast)  # type: ignore[no-any-return]
    return reference(x, residual, weight, eps, offset=offset, cast=cast)


# -- op --------------------------------------------------------------------------------------------


def _both(fn: Any) -> Any:
    """s and y as one tensor (2, …, D), which the parity tests want."""

    def stacked(x: Tensor, residual: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return torch.stack(fn(x, residual, weight, **options))

    return stacked


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    found = rms.OP.inputs(case, dtype, device, seed)
    return found | {"residual": rms.OP.inputs(case, dtype, device, seed + 1)["x"]}


OP = KernelOp(
    name="add_rms_norm",
    fn=_both(add_rms_norm),
    reference=_both(reference),
    inputs=_inputs,
    gradients=("x", "residual", "weight"),
    cases=(
        Case("odd sizes", {"B": 3, "T": 7, "D": 37}),
        Case("one element", {"B": 1, "T": 1, "D": 1}),
        Case("Gemma: weight offset, cast last", {"B": 2, "T": 9, "D": 48}, {"offset": 1.0, "cast": LAST}),
        Case("rows that lie apart", {"B": 2, "T": 3, "D": 40, "strided": 1}),
        Case("one row expanded", {"B": 2, "T": 4, "D": 24, "expanded": 1}),
        Case("large values", {"B": 1, "T": 4, "D": 64, "scale": 300}),
    ),
    benchmark=(
        Case("Llama-3.2-1B, 2 x 512", {"B": 2, "T": 512, "D": 2048}),
        Case("Llama-3.1-8B, 2 x 2048", {"B": 2, "T": 2048, "D": 4096}),
        Case("Llama-3.1-8B, one token", {"B": 1, "T": 1, "D": 4096}),
    ),
)
