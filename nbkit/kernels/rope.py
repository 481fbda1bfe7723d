"""Rotary positions (Su et al. 2021, arXiv:2104.09864), by halves or by neighbouring pairs, of whole heads or of a part.

The first R = `rotary` of a head's K columns turn, the others stay. They form R/2 pairs (a_i, b_i): by halves, as GPT-NeoX and
Llama, a_i = x_i and b_i = x_(i + R/2); interleaved, as GPT-J, Cohere and GLM, a_i = x_2i and b_i = x_(2i+1). With c and s the
cosine and sine of pair i at the token's position:

    (a, b) -> (a c - b s,  b c + a s)             (da, db) -> (da c + db s,  db c - da s)   (the inverse rotation)

Tables come as transformers gives them: cos, sin (B, T, R), (1, T, R) or (T, R), whose first R/2 columns are read, or these alone
(…, R/2); float32 or the model's dtype. With `positions` (T,) or (B, T) the tables are indexed by them: (P, R) or (P, R/2).
Tables for every kind of `rope_parameters` that transformers knows: `Rotary` and `rope_frequencies`, from _rope_tables.py.
Shapes: x (B, T, H, K) in any strides with stride 1 along K. The rotation is computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch

from nbkit.kernels._autograd import first_order
from nbkit.kernels._launch import cdiv, kernel, on_device, power_of_two, tl, use_triton
from nbkit.kernels._op import Case, KernelOp
from nbkit.kernels._rope_tables import Rotary, rope_frequencies

__all__ = ["OP", "Rotary", "check_tables", "reference", "rope", "rope_frequencies", "rope_rotate_"]
_TILE = 4096  # elements of one half that a program rotates

# -- reference -------------------------------------------------------------------------------------


def reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    inverse: bool = False,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    rotary: int | None = None,
) -> torch.Tensor:
    """Plain torch, operation for operation as transformers' `apply_rotary_pos_emb`, rounded to x's dtype at the end."""
    rotary = x.shape[-1] if rotary is None else rotary
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    half = [table[..., : rotary // 2].unsqueeze(-2) for table in (cos, sin)]  # one for all heads
    x, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        cos, sin = (table.repeat_interleave(2, dim=-1) for table in half)
        a, b = x[..., ::2], x[..., 1::2]
        turned = torch.stack((b, -a) if inverse else (-b, a), dim=-1).flatten(-2)
    else:
        cos, sin = (torch.cat((table, table), dim=-1) for table in half)
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat((b, -a) if inverse else (-b, a), dim=-1)
    y = ((x * cos) + (turned * sin)).to(x.dtype)
    return torch.cat((y, rest), dim=-1) if rest.shape[-1] else y


# -- kernel ----------------------------------------------------------------------------------------


@kernel
def _rotate_kernel(
    X, OUT, COS, SIN, POSITIONS, x_b, x_t, x_h, out_b, out_t, out_h, table_b, table_t, positions_b, positions_t, T, H,
    INVERSE: tl.constexpr, INDEXED: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """BLOCK_H heads of one token a program. X and OUT may be the same. REST: columns behind the rotated ones, to be copied."""
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
    source = X + b * x_b + t * x_t + head * x_h
    target = OUT + b * out_b + t * out_t + head * out_h
    if INTERLEAVED:
        one, two = 2 * k, 2 * k + 1
    else:
        one, two = k, k + HALF
    first = tl.load(source + one, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + two, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + one, (first * c - second * s).to(OUT.dtype.element_ty), mask=inside)
    tl.store(target + two, (second * c + first * s).to(OUT.dtype.element_ty), mask=inside)
    if REST > 0:
        r = tl.arange(0, BLOCK_R)[None, :]
        stays = (head < H) & (r < REST)
        x = tl.load(source + 2 * HALF + r, mask=stays, other=0.0)
        tl.store(target + 2 * HALF + r, x.to(OUT.dtype.element_ty), mask=stays)


# -- raw function, without autograd ----------------------------------------------------------------


def rope_rotate_(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    inverse: bool = False,
    *,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    rotary: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates x (B, T, H, K) in place, or into `out` of the same shape and any strides; returns what it wrote to.

    Args:
        cos, sin: tables as at the top of this file.
        inverse: rotate back, as the backward does.
        positions: (T,) or (B, T) integers that index the tables' rows.
        interleaved: neighbouring columns are pairs, not columns half the width apart.
        rotary: how many of the K columns turn, an even number; all if None.
    Raises: ValueError for a table or a stride along K that does not fit.
    """
    out, rotary = x if out is None else out, x.shape[-1] if rotary is None else rotary
    check_tables(x, cos, sin, positions, rotary)
    if out.stride(-1) != 1:
        raise ValueError(f"out must have stride 1 along K, not strides {out.stride()}.")
    if not use_triton(x, cos, sin, out):
        wide = torch.promote_types(x.dtype, torch.float32)
        how: dict[str, Any] = {"inverse": inverse, "positions": positions, "interleaved": interleaved, "rotary": rotary}
        return out.copy_(reference(x.to(wide), cos.to(wide), sin.to(wide), **how))
    if cos.stride(-1) != 1 or sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    b, t, h, k = x.shape
    batched = positions is None and cos.dim() == 3 and cos.shape[0] > 1
    index = x if positions is None else positions
    block_k = power_of_two(rotary // 2)
    rest = 0 if out is x else k - rotary
    block_h = min(power_of_two(h), max(_TILE // block_k, 1))
    with on_device(x):
        _rotate_kernel[(b * t, cdiv(h, block_h))](
            x, out, cos, sin, index, x.stride(0), x.stride(1), x.stride(2), out.stride(0), out.stride(1), out.stride(2),
            cos.stride(0) if batched else 0, cos.stride(-2),
            index.stride(0) if index.dim() == 2 else 0, index.stride(-1), t, h,
            INVERSE=inverse, INDEXED=positions is not None, INTERLEAVED=interleaved, HALF=rotary // 2, REST=rest,
            BLOCK_H=block_h, BLOCK_K=block_k, BLOCK_R=power_of_two(rest), num_warps=8 if block_h * block_k >= 2048 else 4
        )  # fmt: skip
    return out


def check_tables(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None, rotary: int) -> None:
    """Raises: ValueError unless tables, positions and the number of rotated columns fit x (B, T, H, K)."""
    b, t, _, k = x.shape
    if not 0 < rotary <= k or rotary % 2 or x.stride(-1) != 1:
        what = f"{rotary} of the columns of {tuple(x.shape)} with strides {x.stride()}"
        raise ValueError(f"x must have stride 1 along K and an even number of rotated columns, not {what}.")
    if positions is not None and tuple(positions.shape) not in ((t,), (b, t), (1, t)):
        raise ValueError(f"positions of x {tuple(x.shape)} must be ({t},) or ({b}, {t}), not {tuple(positions.shape)}.")
    leads = ((t,), (1, t), (b, t)) if positions is None else ((cos.shape[0],),)
    fits = cos.shape[-1] in (rotary, rotary // 2) and tuple(cos.shape[:-1]) in leads
    if not fits or cos.shape != sin.shape:
        shapes = f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        raise ValueError(f"{shapes} do not fit x (B, T, H, K) = {tuple(x.shape)} with {rotary} columns rotated.")


# -- with autograd ---------------------------------------------------------------------------------


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None, inverse: bool,
        interleaved: bool, rotary: int | None,
    ) -> torch.Tensor:  # fmt: skip
        x = x if x.stride(-1) == 1 else x.contiguous()
        ctx.save_for_backward(cos, sin, positions)
        ctx.inverse, ctx.how = inverse, {"interleaved": interleaved, "rotary": rotary}
        return rope_rotate_(x, cos, sin, inverse, positions=positions, **ctx.how, out=x.new_empty(x.shape))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx = rope_rotate_(dy, cos, sin, not ctx.inverse, positions=positions, **ctx.how, out=dy.new_empty(dy.shape))
        return dx, None, None, None, None, None, None


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    inverse: bool = False,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    rotary: int | None = None,
) -> torch.Tensor:
    """x (B, T, H, K) rotated by its positions, in x's dtype. cos and sin get no gradient.

    Args: as `rope_rotate_`, which works in place and without autograd.
    Raises: ValueError for tables that do not fit x.
    """
    if use_triton(x, cos, sin):
        return _Rope.apply(x, cos, sin, positions, inverse, interleaved, rotary)  # type: ignore[no-any-return]
    return reference(x, cos, sin, inverse=inverse, positions=positions, interleaved=interleaved, rotary=rotary)


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
    turning = case.options.get("rotary") or k
    width = turning if case.sizes.get("whole") else turning // 2
    lead = (case.sizes["tables"],) if "tables" in case.sizes else ()
    rows = case.sizes.get("P", t)
    angle = torch.rand(*lead, rows, turning // 2, generator=make) * 6.3
    angle = torch.cat((angle, angle), dim=-1)[..., :width]
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
        Case("interleaved pairs", {"B": 2, "T": 5, "H": 3, "K": 12, "whole": 1}, {"interleaved": True}),
        Case("interleaved, rotated back", {"B": 1, "T": 3, "H": 2, "K": 16}, {"interleaved": True, "inverse": True}),
        Case("a part of the head", {"B": 2, "T": 3, "H": 3, "K": 20, "tables": 2, "whole": 1}, {"rotary": 12}),
        Case("interleaved, half of the head, as GLM", {"B": 1, "T": 4, "H": 5, "K": 16}, {"rotary": 8, "interleaved": True}),
        Case("two columns by positions", {"B": 2, "T": 4, "H": 2, "K": 10, "P": 9}, {"rotary": 2}),
        Case("large values", {"B": 1, "T": 3, "H": 2, "K": 64, "scale": 500}),
    ),
    benchmark=(
        Case("Llama-3.2-1B, 2 x 512", {"B": 2, "T": 512, "H": 32, "K": 64}),
        Case("Llama-3.1-8B, 2 x 2048", {"B": 2, "T": 2048, "H": 32, "K": 128}),
        Case("Llama-3.3-70B, 1 x 8192", {"B": 1, "T": 8192, "H": 64, "K": 128}),
    ),
)  # fmt: skip
