"""Rotary positions by halves (Su et al. 2021, arXiv:2104.09864; the "rotate half" layout of GPT-NeoX and Llama).

With a = x[..., :K/2], b = x[..., K/2:] of a head and c, s the cosine and sine of its token's position:

    y = [a * c - b * s,  b * c + a * s]          dx = [da * c + db * s,  db * c - da * s]   (the inverse rotation)

Tables come as transformers gives them: cos, sin (B, T, K), (1, T, K) or (T, K) with both halves alike, or their first halves
(…, K/2); float32 or the model's dtype. With `positions` (T,) or (B, T) the tables are indexed by them: (P, K) or (P, K/2).
Shapes: x (B, T, H, K) in any strides with stride 1 along K. The rotation is computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nbkit.kernels._launch import cdiv, kernel, on_device, power_of_two, tl, use_triton
from nbkit.kernels._op import Case, KernelOp

_TILE = 4096  # elements of one half that a program rotates

# -- reference -------------------------------------------------------------------------------------


def reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    inverse: bool = False,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain torch, operation for operation as transformers' `apply_rotary_pos_emb`, rounded to x's dtype at the end."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    if cos.shape[-1] != x.shape[-1]:
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one for all heads
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat((b, -a) if inverse else (-b, a), dim=-1)
    return ((x * cos) + (turned * sin)).to(x.dtype)


# -- kernel ----------------------------------------------------------------------------------------


@kernel
def _rotate_kernel(
    X, OUT, COS, SIN, POSITIONS, x_b, x_t, x_h, out_b, out_t, out_h, table_b, table_t, positions_b, positions_t, T, H,
    INVERSE: tl.constexpr, INDEXED: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """BLOCK_H heads of one token a program. X and OUT may be the same."""
    n = tl.program_id(0).to(tl.int64)
    b = n // T
    t = n % T
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = (head < H) & (k < HALF)
    place = t
    if INDEXED:
        place = tl.load(POSITIONS + b * positions_b + t * positions_t).to(tl.int64)
    table = b * table_b + place * table_t + k
    c = tl.load(COS + table, mask=k < HALF, other=0.0).to(tl.float32)
    s = tl.load(SIN + table, mask=k < HALF, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    source = X + b * x_b + t * x_t + head * x_h + k
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = OUT + b * out_b + t * out_t + head * out_h + k
    tl.store(target, (first * c - second * s).to(OUT.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * c + first * s).to(OUT.dtype.element_ty), mask=inside)


# -- raw function, without autograd ----------------------------------------------------------------


def rope_rotate_(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    inverse: bool = False,
    *,
    positions: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates x (B, T, H, K) in place, or into `out` of the same shape and any strides; returns what it wrote to.

    Args:
        cos, sin: tables as at the top of this file.
        inverse: rotate back, as the backward does.
        positions: (T,) or (B, T) integers that index the tables' rows.
    Raises: ValueError for a table or a stride along K that does not fit.
    """
    out = x if out is None else out
    _check(x, cos, sin, positions)
    if out.stride(-1) != 1:
        raise ValueError(f"out must have stride 1 along K, not strides {out.stride()}.")
    if not use_triton(x, cos, sin, out):
        wide = torch.promote_types(x.dtype, torch.float32)
        return out.copy_(reference(x.to(wide), cos.to(wide), sin.to(wide), inverse=inverse, positions=positions))
    if cos.stride(-1) != 1 or sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    b, t, h, k = x.shape
    batched = positions is None and cos.dim() == 3 and cos.shape[0] > 1
    index = x if positions is None else positions
    block_k = power_of_two(k // 2)
    block_h = min(power_of_two(h), max(_TILE // block_k, 1))
    with on_device(x):
        _rotate_kernel[(b * t, cdiv(h, block_h))](
            x, out, cos, sin, index, x.stride(0), x.stride(1), x.stride(2), out.stride(0), out.stride(1), out.stride(2),
            cos.stride(0) if batched else 0, cos.stride(-2),
            index.stride(0) if index.dim() == 2 else 0, index.stride(-1), t, h,
            INVERSE=inverse, INDEXED=positions is not None, HALF=k // 2, BLOCK_H=block_h, BLOCK_K=block_k,
            num_warps=8 if block_h * block_k >= 2048 else 4
        )  # fmt: skip
    return out


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None) -> None:
    b, t, _, k = x.shape
    rows = (t,) if positions is None else (cos.shape[0],)
    shapes = {(*lead, *rows, width) for lead in ((), (1,), (b,)) for width in (k, k // 2)}
    if positions is not None:
        shapes = {(*rows, k), (*rows, k // 2)}
        if positions.shape not in ((t,), (b, t), (1, t)):
            raise ValueError(f"positions of x {tuple(x.shape)} must be ({t},) or ({b}, {t}), not {tuple(positions.shape)}.")
    if tuple(cos.shape) not in shapes or cos.shape != sin.shape:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit x (B, T, H, K) = {tuple(x.shape)}.")
    if k % 2 or x.stride(-1) != 1:
        raise ValueError(f"x must have an even K with stride 1, not {tuple(x.shape)} with strides {x.stride()}.")


# -- with autograd ---------------------------------------------------------------------------------


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None, inverse: bool
    ) -> torch.Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        ctx.save_for_backward(cos, sin, positions)
        ctx.inverse = inverse
        return rope_rotate_(x, cos, sin, inverse, positions=positions, out=x.new_empty(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        cos, sin, positions = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx = rope_rotate_(dy, cos, sin, not ctx.inverse, positions=positions, out=dy.new_empty(dy.shape))
        return dx, None, None, None, None


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    inverse: bool = False,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (B, T, H, K) rotated by its positions, in x's dtype. cos and sin get no gradient.

    Args: as `rope_rotate_`, which works in place and without autograd.
    Raises: ValueError for tables that do not fit x.
    """
    if use_triton(x, cos, sin):
        return _Rope.apply(x, cos, sin, positions, inverse)  # type: ignore[no-any-return]
    return reference(x, cos, sin, inverse=inverse, positions=positions)


# -- op --------------------------------------------------------------------------------------------


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    b, t, h, k = (case.sizes[letter] for letter in "BTHK")
    x = (torch.randn(b, t, h, k, generator=make) * case.sizes.get("scale", 1)).to(device, dtype)
    if case.sizes.get("heads_first"):  # as attention holds it
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    if case.sizes.get("packed"):  # a slice of one buffer for q, k and v
        x = torch.cat([x, x, x], dim=2)[:, :, h : 2 * h]
    if case.sizes.get("expanded"):
        x = x[:, :, :1].expand(b, t, h, k)
    width = k if case.sizes.get("whole") else k // 2
    lead = (case.sizes["tables"],) if "tables" in case.sizes else ()
    rows = case.sizes.get("P", t)
    angle = torch.rand(*lead, rows, k // 2, generator=make) * 6.3
    angle = angle if width == k // 2 else torch.cat((angle, angle), dim=-1)
    table = dtype if case.sizes.get("narrow") else torch.float32
    found: dict[str, Any] = {"x": x, "cos": angle.cos().to(device, table), "sin": angle.sin().to(device, table)}
    if "P" in case.sizes:
        found["positions"] = torch.randint(0, rows, (b, t), generator=make).to(device)
    return found


OP = KernelOp(
    name="rope",
    fn=rope,
    reference=reference,
    inputs=_inputs,
    gradients=("x",),
    cases=(
        Case("odd numbers of tokens and heads", {"B": 2, "T": 5, "H": 3, "K": 16}),
        Case("one token of one head", {"B": 1, "T": 1, "H": 1, "K": 2}),
        Case("head width 80, half no power of two", {"B": 1, "T": 3, "H": 5, "K": 80}),
        Case("tables per row of the batch, whole, in the model's dtype",
             {"B": 2, "T": 4, "H": 4, "K": 32, "tables": 2, "whole": 1, "narrow": 1}),
        Case("one table for the batch", {"B": 3, "T": 4, "H": 2, "K": 32, "tables": 1, "whole": 1}),
        Case("heads before tokens in memory", {"B": 2, "T": 5, "H": 4, "K": 24, "heads_first": 1}),
        Case("a slice of a packed buffer", {"B": 2, "T": 3, "H": 2, "K": 16, "packed": 1}),
        Case("one head expanded", {"B": 1, "T": 4, "H": 3, "K": 16, "expanded": 1}),
        Case("indexed by positions", {"B": 2, "T": 6, "H": 2, "K": 16, "P": 11}),
        Case("rotated back", {"B": 1, "T": 4, "H": 2, "K": 16}, {"inverse": True}),
        Case("large values", {"B": 1, "T": 3, "H": 2, "K": 64, "scale": 500}),
    ),
    benchmark=(
        Case("Llama-3.2-1B, 2 x 512", {"B": 2, "T": 512, "H": 32, "K": 64}),
        Case("Llama-3.1-8B, 2 x 2048", {"B": 2, "T": 2048, "H": 32, "K": 128}),
        Case("Llama-3.3-70B, 1 x 8192", {"B": 1, "T": 8192, "H": 64, "K": 128}),
    ),
)  # fmt: skip
