"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), with an optional weight offset.

    rstd_N = (mean_D(x^2) + eps) ^ -1/2          xhat = x * rstd          y = xhat * (offset + weight_D)

    g = dy * (offset + weight)      dx = rstd * (g - xhat * mean_D(g * xhat))      dweight = sum_N(dy * xhat)

All in float32, whatever the tensors' dtypes. `cast` says where y is rounded: "before_weight" rounds xhat to x's dtype and
multiplies then, as transformers' Llama does (the result has the wider dtype of x and weight); "last" rounds once, as Gemma.
Shapes: x, y (…, D) in any strides; weight (D,); rstd (N,) float32.
"""

from __future__ import annotations

from typing import Any

import torch

from nbkit.kernels._autograd import first_order
from nbkit.kernels._launch import as_rows, cdiv, check_rows, kernel, on_device, power_of_two, tl, use_triton
from nbkit.kernels._op import Case, KernelOp

BEFORE_WEIGHT, LAST = "before_weight", "last"
_ROWS = 16  # rows a program sums before it writes its share of the weight's gradient

# -- reference -------------------------------------------------------------------------------------


def reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, offset: float = 0.0, cast: str = BEFORE_WEIGHT
) -> torch.Tensor:
    """Plain torch, operation for operation as transformers' Llama (`cast` "before_weight") or Gemma ("last")."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    xhat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if cast == LAST:
        return (xhat * (offset + weight.to(wide.dtype))).to(x.dtype)
    return (weight if offset == 0 else offset + weight) * xhat.to(x.dtype)


# -- kernels ---------------------------------------------------------------------------------------


@kernel
def _rms_norm_forward_kernel(
    X, W, Y, RSTD, COPY, stride_x, stride_y, stride_copy, eps,
    OFFSET: tl.constexpr, CAST_LAST: tl.constexpr, COPIES: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row a program. COPIES: COPY gets x."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    x = tl.load(X + row * stride_x + col, mask=inside, other=0.0)
    if COPIES:
        tl.store(COPY + row * stride_copy + col, x, mask=inside)
    x = x.to(tl.float32)
    weight = tl.load(W + col, mask=inside, other=0.0).to(tl.float32) + OFFSET
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    xhat = x * rstd
    if not CAST_LAST:
        xhat = xhat.to(X.dtype.element_ty).to(tl.float32)
    tl.store(Y + row * stride_y + col, (xhat * weight).to(Y.dtype.element_ty), mask=inside)
    tl.store(RSTD + row, rstd)


@kernel
def _rms_norm_backward_kernel(
    DY, X, W, RSTD, ADDED, DX, DW, stride_dy, stride_x, stride_added, stride_dx, N,
    OFFSET: tl.constexpr, ADD: tl.constexpr, WEIGHT_GRAD: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """ROWS rows a program. ADD: ADDED, which may be DX, is added to dx. DW: (programs, D), the share of each program."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    weight = tl.load(W + col, mask=inside, other=0.0).to(tl.float32) + OFFSET
    share = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        mask = inside & (row < N)
        x = tl.load(X + row * stride_x + col, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * stride_dy + col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, mask=row < N, other=0.0)
        xhat = x * rstd
        g = dy * weight
        dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=0) / D))
        place = DX + row * stride_dx + col
        if ADD:
            dx += tl.load(ADDED + row * stride_added + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, dx.to(DX.dtype.element_ty), mask=mask)
        if WEIGHT_GRAD:
            share += dy * xhat
    if WEIGHT_GRAD:
        tl.store(DW + program * D + col, share, mask=inside)


def warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


# -- raw functions, without autograd ---------------------------------------------------------------


def rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    cast: str = BEFORE_WEIGHT,
    out: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, rstd) of x (N, D) with any row stride, into `out` (N, D, any row stride) and `rstd` (N,) float32 if given.

    `copy` (N, D, any row stride, x's dtype) gets x as it is: the sum that a product is added to, without a launch for it.
    """
    check_rows("x", x)
    if copy is not None:
        check_rows("copy", copy)
        if copy.shape != x.shape or copy.dtype != x.dtype:
            raise ValueError(f"copy is {tuple(copy.shape)} {copy.dtype}; it must be as x, {tuple(x.shape)} {x.dtype}.")
    if out is None:
        dtype = x.dtype if cast == LAST else torch.promote_types(x.dtype, weight.dtype)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    check_rows("out", out)
    n, d = x.shape
    if not use_triton(x, weight, out):
        if copy is not None:
            copy.copy_(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        root = torch.rsqrt(wide.pow(2).mean(-1) + eps)
        xhat = wide * root[:, None]
        if cast != LAST:
            xhat = xhat.to(x.dtype).to(wide.dtype)
        out.copy_(xhat * (weight.to(wide.dtype) + offset))
        return out, root if rstd is None else rstd.copy_(root)
    if rstd is None:
        rstd = torch.empty(n, dtype=torch.float32, device=x.device)
    block, copies = power_of_two(d), out if copy is None else copy  # where x is not copied, it is not written
    with on_device(x):
        _rms_norm_forward_kernel[(n,)](
            x, weight, out, rstd, copies, x.stride(0), out.stride(0), copies.stride(0), eps,
            OFFSET=float(offset), CAST_LAST=cast == LAST, COPIES=copy is not None, D=d, BLOCK=block, num_warps=warps(block)
        )  # fmt: skip
    return out, rstd


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    *,
    offset: float = 0.0,
    add_to: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    weight_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dx, dweight) for dy and x (N, D) with any row strides.

    Args:
        add_to: (N, D), say the residual's gradient; dx is added to it in place and it is returned as dx.
        out: (N, D); where given, the sum goes there and `add_to` is only read.
        weight_grad: whether to compute dweight (D,) in float32; None is returned otherwise.
    """
    check_rows("dy", dy)
    check_rows("x", x)
    dx = add_to if out is None else out
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
    added = dx if add_to is None else add_to
    check_rows("out", dx)
    check_rows("add_to", added)
    n, d = x.shape
    if not use_triton(dy, x, weight, dx, added):
        wide = torch.promote_types(x.dtype, torch.float32)
        xhat = x.to(wide) * rstd.to(wide)[:, None]
        g = dy.to(wide) * (weight.to(wide) + offset)
        own = rstd.to(wide)[:, None] * (g - xhat * (g * xhat).mean(-1, keepdim=True))
        dx.copy_(own if add_to is None else own + added)
        return dx, (dy.to(wide) * xhat).sum(0) if weight_grad else None
    rows = _ROWS if weight_grad else 1
    programs = cdiv(n, rows)
    shares = torch.empty(programs, d, dtype=torch.float32, device=x.device) if weight_grad else rstd  # where not, it is not read
    block = power_of_two(d)
    with on_device(x):
        _rms_norm_backward_kernel[(programs,)](
            dy, x, weight, rstd, added, dx, shares, dy.stride(0), x.stride(0), added.stride(0), dx.stride(0), n,
            OFFSET=float(offset), ADD=add_to is not None, WEIGHT_GRAD=weight_grad, ROWS=rows, D=d, BLOCK=block,
            num_warps=warps(block)
        )  # fmt: skip
    return dx, shares.sum(0) if weight_grad else None


# -- with autograd ---------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast: str) -> torch.Tensor:
        y, rstd = rms_norm_forward(as_rows(x), weight, eps, offset=offset, cast=cast)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y.view(x.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dw = rms_norm_backward(as_rows(dy), as_rows(x), weight, rstd, offset=ctx.offset, weight_grad=ctx.needs_input_grad[1])
        return dx.view(x.shape), None if dw is None else dw.to(weight.dtype), None, None, None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, offset: float = 0.0, cast: str = BEFORE_WEIGHT
) -> torch.Tensor:
    """RMSNorm of x (…, D) by weight (D,), float32 inside.

    Args:
        offset: added to the weight: 0 for Llama, 1 for Gemma.
        cast: "before_weight" or "last", see the top of this file.
    Raises: ValueError for another `cast`.
    """
    if cast not in (BEFORE_WEIGHT, LAST):
        raise ValueError(f"cast is {cast!r}; it must be {BEFORE_WEIGHT!r} or {LAST!r}.")
    if use_triton(x, weight):
        return _RMSNorm.apply(x, weight, eps, offset, cast)  # type: ignore[no-any-return]
    return reference(x, weight, eps, offset=offset, cast=cast)


# -- op --------------------------------------------------------------------------------------------


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    b, t, d = case.sizes["B"], case.sizes["T"], case.sizes["D"]
    x = torch.randn(b, t, d, generator=make) * case.sizes.get("scale", 1)
    weight = torch.randn(d, generator=make) * 0.2 + 1 - case.options.get("offset", 0.0)
    if case.sizes.get("zero_rows"):
        x[:, 0] = 0
    x, weight = x.to(device, dtype), weight.to(device, dtype)
    if case.sizes.get("strided"):  # rows that lie apart, batch and tokens swapped
        x = torch.cat([x, x], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)[..., :d]
    if case.sizes.get("expanded"):
        x = x[:, :1].expand(b, t, d)
    return {"x": x, "weight": weight}


OP = KernelOp(
    name="rms_norm",
    fn=rms_norm,
    reference=reference,
    inputs=_inputs,
    gradients=("x", "weight"),
    cases=(
        Case("width of SmolLM2, no power of two", {"B": 1, "T": 5, "D": 576}),
        Case("more rows than a program sums", {"B": 3, "T": 13, "D": 32}),
        Case("one row of odd width", {"B": 1, "T": 1, "D": 37}),
        Case("rows of zeros", {"B": 2, "T": 3, "D": 64, "zero_rows": 1}),
        Case("large values", {"B": 1, "T": 4, "D": 48, "scale": 200}),
        Case("rows apart and batch swapped with tokens", {"B": 2, "T": 7, "D": 40, "strided": 1}),
        Case("one token expanded", {"B": 2, "T": 6, "D": 33, "expanded": 1}),
        Case("Gemma: offset 1, rounded once", {"B": 2, "T": 5, "D": 72}, {"offset": 1.0, "cast": LAST}),
    ),
    benchmark=(
        Case("Llama-3.2-1B, 2 x 512", {"B": 2, "T": 512, "D": 2048}),
        Case("Llama-3.1-8B, 2 x 2048", {"B": 2, "T": 2048, "D": 4096}),
        Case("Llama-3.3-70B, 1 x 8192", {"B": 1, "T": 8192, "D": 8192}),
    ),
)
