"""LayerNorm (Ba, Kiros and Hinton 2016, arXiv:1607.06450), with or without a bias.

    mean_N = mean_D(x)     rstd_N = (mean_D((x - mean)^2) + eps) ^ -1/2     xhat = (x - mean) * rstd     y = xhat * weight + bias

    g = dy * weight                 dx = rstd * (g - mean_D(g) - xhat * mean_D(g * xhat))
    dweight = sum_N(dy * xhat)      dbias = sum_N(dy)

All in float32, rounded once at the end, as torch's `layer_norm`. The variance is of the centred values: no cancellation.
Shapes: x, y (…, D) in any strides; weight, bias (D,); mean, rstd (N,) float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbkit.kernels._autograd import first_order
from nbkit.kernels._launch import as_rows, cdiv, check_rows, kernel, on_device, power_of_two, tl, use_triton
from nbkit.kernels._op import Case, KernelOp
from nbkit.kernels.rms_norm import warps

_ROWS = 16  # rows a program sums before it writes its share of the weight's and the bias's gradient

# -- reference -------------------------------------------------------------------------------------


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Torch's own, on wide numbers and rounded at the end."""
    wide = torch.promote_types(x.dtype, torch.float32)
    b = None if bias is None else bias.to(wide)
    return torch.nn.functional.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), b, eps).to(x.dtype)


# -- kernels ---------------------------------------------------------------------------------------


@kernel
def _layer_norm_forward_kernel(
    X, W, BIAS, Y, MEAN, RSTD, stride_x, stride_y, eps, HAS_BIAS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    x = tl.load(X + row * stride_x + col, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / D
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
    y = centred * rstd * tl.load(W + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(BIAS + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * stride_y + col, y.to(Y.dtype.element_ty), mask=inside)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)


@kernel
def _layer_norm_backward_kernel(
    DY, X, W, MEAN, RSTD, ADDED, DX, DW, DB, stride_dy, stride_x, stride_added, stride_dx, N,
    ADD: tl.constexpr, WEIGHT_GRAD: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """ROWS rows a program. ADD: ADDED, which may be DX, is added to dx. DW, DB: (programs, D), the share of each program."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    weight = tl.load(W + col, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        mask = inside & (row < N)
        x = tl.load(X + row * stride_x + col, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * stride_dy + col, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(MEAN + row, mask=row < N, other=0.0)
        rstd = tl.load(RSTD + row, mask=row < N, other=0.0)
        xhat = tl.where(mask, (x - mean) * rstd, 0.0)
        g = dy * weight
        dx = rstd * (g - tl.sum(g, axis=0) / D - xhat * (tl.sum(g * xhat, axis=0) / D))
        if ADD:
            dx += tl.load(ADDED + row * stride_added + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + row * stride_dx + col, dx.to(DX.dtype.element_ty), mask=mask)
        if WEIGHT_GRAD:
            dweight += dy * xhat
            dbias += dy
    if WEIGHT_GRAD:
        tl.store(DW + program * D + col, dweight, mask=inside)
        tl.store(DB + program * D + col, dbias, mask=inside)


# -- raw functions, without autograd ---------------------------------------------------------------


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of x (N, D) with any row stride; y into `out` (N, D, any row stride) if given."""
    check_rows("x", x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    check_rows("out", out)
    n, d = x.shape
    if not use_triton(x, weight, out, *(() if bias is None else (bias,))):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.mean(-1)
        centred = wide - mean[:, None]
        rstd = torch.rsqrt(centred.square().mean(-1) + eps)
        y = centred * rstd[:, None] * weight.to(wide.dtype)
        out.copy_(y if bias is None else y + bias.to(wide.dtype))
        return out, mean, rstd
    mean, rstd = torch.empty(2, n, dtype=torch.float32, device=x.device)
    block = power_of_two(d)
    with on_device(x):
        _layer_norm_forward_kernel[(n,)](
            x, weight, weight if bias is None else bias, out, mean, rstd, x.stride(0), out.stride(0), float(eps),
            HAS_BIAS=bias is not None, D=d, BLOCK=block, num_warps=warps(block)
        )  # fmt: skip
    return out, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    add_to: Tensor | None = None,
    out: Tensor | None = None,
    weight_grad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) for dy and x (N, D) with any row strides.

    Args:
        add_to: (N, D), say the residual's gradient; dx is added to it in place and it is returned as dx.
        out: (N, D); where given, the sum goes there and `add_to` is only read.
        weight_grad: whether to compute dweight and dbias (D,) in float32; None is returned for both otherwise.
    """
    dx = add_to if out is None else out
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
    added = dx if add_to is None else add_to
    for name, rows in (("dy", dy), ("x", x), ("out", dx), ("add_to", added)):
        check_rows(name, rows)
    n, d = x.shape
    if not use_triton(dy, x, weight, dx, added):
        wide = torch.promote_types(x.dtype, torch.float32)
        xhat = (x.to(wide) - mean.to(wide)[:, None]) * rstd.to(wide)[:, None]
        g = dy.to(wide) * weight.to(wide)
        own = rstd.to(wide)[:, None] * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
        dx.copy_(own if add_to is None else own + added)
        return (dx, (dy.to(wide) * xhat).sum(0), dy.to(wide).sum(0)) if weight_grad else (dx, None, None)
    rows = _ROWS if weight_grad else 1
    programs = cdiv(n, rows)
    shares = torch.empty((2, programs, d) if weight_grad else (2, 1, 1), dtype=torch.float32, device=x.device)
    block = power_of_two(d)
    with on_device(x):
        _layer_norm_backward_kernel[(programs,)](
            dy, x, weight, mean, rstd, added, dx, shares[0], shares[1], dy.stride(0), x.stride(0), added.stride(0),
            dx.stride(0), n, ADD=add_to is not None, WEIGHT_GRAD=weight_grad, ROWS=rows, D=d, BLOCK=block,
            num_warps=warps(block)
        )  # fmt: skip
    if not weight_grad:
        return dx, None, None
    dweight, dbias = shares.sum(1)
    return dx, dweight, dbias


# -- with autograd ---------------------------------------------------------------------------------


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = layer_norm_forward(as_rows(x), weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(x.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        _, of_weight, of_bias, _ = ctx.needs_input_grad
        dx, dw, db = layer_norm_backward(as_rows(dy), as_rows(x), weight, mean, rstd, weight_grad=of_weight or of_bias)
        dw = dw.to(weight.dtype) if dw is not None and of_weight else None
        db = db.to(ctx.bias_dtype) if db is not None and of_bias else None
        return dx.view(x.shape), dw, db, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm of x (…, D) by weight (D,) and bias (D,) or None, float32 inside, in x's dtype.

    Raises: ValueError where weight or bias is not (D,).
    """
    for name, one in (("weight", weight), ("bias", bias)):
        if one is not None and one.shape != x.shape[-1:]:
            raise ValueError(f"{name} is {tuple(one.shape)}; for x {tuple(x.shape)} it must be ({x.shape[-1]},).")
    if use_triton(x, weight, *(() if bias is None else (bias,))):
        return _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return]
    return reference(x, weight, bias, eps)


# -- op --------------------------------------------------------------------------------------------


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    b, t, d = (case.sizes[letter] for letter in "BTD")
    x = torch.randn(b, t, d, generator=make) * case.sizes.get("scale", 1) + case.sizes.get("shift", 0)
    weight, bias = torch.randn(2, d, generator=make) * 0.2 + torch.tensor([[1.0], [0.0]])
    if case.sizes.get("equal"):
        x[:, 0] = 3.0
    x = x.to(device, dtype)
    if case.sizes.get("strided"):
        x = torch.cat([x, x], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)[..., :d]
    return {"x": x, "weight": weight.to(device, dtype), "bias": bias.to(device, dtype)}


OP = KernelOp(
    name="layer_norm",
    fn=layer_norm,
    reference=reference,
    inputs=_inputs,
    gradients=("x", "weight", "bias"),
    cases=(
        Case("odd sizes", {"B": 3, "T": 7, "D": 37}),
        Case("three columns", {"B": 1, "T": 2, "D": 3}),
        Case("more rows than a program sums", {"B": 5, "T": 9, "D": 16}),
        Case("rows that lie apart", {"B": 2, "T": 3, "D": 40, "strided": 1}),
        Case("a row of equal values", {"B": 2, "T": 2, "D": 32, "equal": 1}),
        Case("a mean far above the spread", {"B": 1, "T": 4, "D": 64, "shift": 30}),
        Case("large values", {"B": 1, "T": 4, "D": 64, "scale": 300}),
    ),
    benchmark=(
        Case("width 2048, 2 x 512", {"B": 2, "T": 512, "D": 2048}),
        Case("width 4096, 2 x 2048", {"B": 2, "T": 2048, "D": 4096}),
    ),
)
