"""Attention's gradients, turned back by rope and packed side by side, in one launch.

dq, dk, dv come from the attention backward in its own layout, (B, heads, T, K) with any strides but the last. The backward
of the q/k/v projection reads them as rows [dq | dk | dv] of one (N, (H + 2G) K) matrix, N = B T. Rope is a rotation of each
pair (x_i, x_{i+K/2}) by an angle; its backward is the rotation by the negative angle:

    dx_i = c dy_i + s dy_{i+K/2}        dx_{i+K/2} = c' dy_{i+K/2} - s' dy_i        (c, s of column i; c', s' of column i+K/2)

Partial rotation and interleaved pairs are rope.py's: then pairs lie within the first `rotary` columns, or side by side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbkit.kernels._launch import jit, kernel, on_device, power_of_two, tl, use_triton
from nbkit.kernels._op import Case, KernelOp


def rotate_pack_reference(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, out: Tensor, at: tuple[int, int, int] | None = None,
    *, interleaved: bool = False, rotary: int | None = None,
) -> None:  # fmt: skip
    """Same in plain torch, in float32 or wider."""
    b, _, t, k = dq.shape
    r = k if rotary is None else rotary
    wide = torch.promote_types(dq.dtype, torch.float32)
    c, s = (a.to(wide).expand(b, t, r)[:, None] for a in (cos, sin))
    if interleaved:
        c, s = (x[..., : r // 2].repeat_interleave(2, -1) for x in (c, s))
    starts = at or (0, dq.shape[1], dq.shape[1] + dk.shape[1])
    for d, rotate, start in ((dq, True, starts[0]), (dk, True, starts[1]), (dv, False, starts[2])):
        x, column = d.to(wide), start * k
        if rotate:
            x, rest = x[..., :r], x[..., r:]
            y = x * s
            one, other = (y[..., 1::2], -y[..., ::2]) if interleaved else (y[..., r // 2 :], -y[..., : r // 2])
            turned = torch.stack([one, other], -1).flatten(-2) if interleaved else torch.cat([one, other], -1)
            x = torch.cat([x * c + turned, rest], -1)
        heads = d.shape[1]
        out[:, column : column + heads * k] = x.transpose(1, 2).reshape(b * t, heads * k)


@jit
def _turn_heads(
    X, COS, SIN, OUT, x_h,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr,
    BLOCK_K: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """All heads of one token, from X (heads apart by x_h) to OUT (side by side). Columns behind the first 2 HALF are copied."""
    head = tl.arange(0, BLOCK_H)[:, None]
    i = tl.arange(0, BLOCK_K)[None, :]
    ok = (head < HEADS) & (i < HALF)
    if INTERLEAVED:
        one, two, other = 2 * i, 2 * i + 1, i
    else:
        one, two, other = i, i + HALF, i + HALF
    first = tl.load(X + head * x_h + one, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(X + head * x_h + two, mask=ok, other=0.0).to(tl.float32)
    if ROTATE:
        c1 = tl.load(COS + i, mask=i < HALF, other=0.0).to(tl.float32)
        s1 = tl.load(SIN + i, mask=i < HALF, other=0.0).to(tl.float32)
        c2 = tl.load(COS + other, mask=i < HALF, other=0.0).to(tl.float32)
        s2 = tl.load(SIN + other, mask=i < HALF, other=0.0).to(tl.float32)
        turned = first * c1 + second * s2
        second = second * c2 - first * s1
        first = turned
    place = OUT + head * K
    tl.store(place + one, first.to(OUT.dtype.element_ty), mask=ok)
    tl.store(place + two, second.to(OUT.dtype.element_ty), mask=ok)
    if K > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_R)[None, :]
        stays = (head < HEADS) & (rest < K)
        x = tl.load(X + head * x_h + rest, mask=stays, other=0.0)
        tl.store(place + rest, x.to(OUT.dtype.element_ty), mask=stays)


@kernel
def _rotate_pack(
    DQ, DK, DV, COS, SIN, OUT, qb, qh, qt, kb, kh, kt, vb, vh, vt, cb, so, T, oq, ok, ov,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, HP: tl.constexpr,
    GP: tl.constexpr, KP: tl.constexpr, RP: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One program: dq (axis 1 = 0), dk (1) or dv (2) of one token. cos and sin: (B or 1, T, R)."""
    n, part = tl.program_id(0), tl.program_id(1)
    b, t = (n // T).to(tl.int64), (n % T).to(tl.int64)
    cos, sin = COS + b * cb + t * R, SIN + b * cb + t * R
    out = OUT + n.to(tl.int64) * so
    if part == 0:
        _turn_heads(DQ + b * qb + t * qt, cos, sin, out + oq, qh, True, INTERLEAVED, H, HP, R // 2, RP, K, REST)
    elif part == 1:
        _turn_heads(DK + b * kb + t * kt, cos, sin, out + ok, kh, True, INTERLEAVED, G, GP, R // 2, RP, K, REST)
    else:
        _turn_heads(DV + b * vb + t * vt, cos, sin, out + ov, vh, False, False, G, GP, K // 2, KP, K, 1)


def rotate_pack(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, out: Tensor, at: tuple[int, int, int] | None = None,
    *, interleaved: bool = False, rotary: int | None = None,
) -> None:  # fmt: skip
    """Write rope^-1(dq), rope^-1(dk) and dv into the columns of `out`, beginning at its heads `at`: (0, H, H + G) if None.

    dq (B, H, T, K), dk and dv (B, G, T, K), any strides but a contiguous last axis; cos, sin (B or 1, T, R), contiguous, R the
    `rotary` columns that turn (K if None); out (B*T, >= (H + 2G) K), rows contiguous. K and R must be even.
    `interleaved`: neighbouring columns are pairs; of the tables the first R/2 columns are read then.
    """
    if not use_triton(dq, cos, out):
        rotate_pack_reference(dq, dk, dv, cos, sin, out, at, interleaved=interleaved, rotary=rotary)
        return
    b, h, t, k = dq.shape
    g = dk.shape[1]
    r = k if rotary is None else rotary
    oq, ok, ov = (head * k for head in at or (0, h, h + g))
    with on_device(out):
        _rotate_pack[(b * t, 3)](
            dq, dk, dv, cos, sin, out, *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            cos.stride(0) if cos.shape[0] > 1 else 0, out.stride(0), t, oq, ok, ov,
            H=h, G=g, K=k, R=r, INTERLEAVED=interleaved, HP=power_of_two(h), GP=power_of_two(g), KP=power_of_two(k // 2),
            RP=power_of_two(r // 2), REST=power_of_two(k - r), num_warps=4,
        )  # fmt: skip


# -- op --------------------------------------------------------------------------------------------


def packed(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, rotary: int | None = None
) -> Tensor:
    """(B*T, (H + 2G) K), see `rotate_pack`."""
    out = dq.new_empty(dq.shape[0] * dq.shape[2], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[3])
    rotate_pack(dq, dk, dv, cos, sin, out, interleaved=interleaved, rotary=rotary)
    return out


def reference(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, rotary: int | None = None
) -> Tensor:
    """Same in plain torch."""
    out = dq.new_empty(dq.shape[0] * dq.shape[2], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[3])
    rotate_pack_reference(dq, dk, dv, cos, sin, out, interleaved=interleaved, rotary=rotary)
    return out


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    b, h, g, t, k = (case.sizes[n] for n in "BHGTK")
    tokens_first = case.sizes.get("tokens_first")
    found = {}
    for name, heads in (("dq", h), ("dk", g), ("dv", g)):
        x = torch.randn((b, t, heads, k) if tokens_first else (b, heads, t, k), generator=make).to(device, dtype)
        found[name] = x.transpose(1, 2) if tokens_first else x
    angle = torch.randn(case.sizes.get("rows", b), t, case.options.get("rotary", k), generator=make)
    return {**found, "cos": angle.cos().to(device, dtype), "sin": angle.sin().to(device, dtype)}


OP = KernelOp(
    name="rope_pack",
    fn=packed,
    reference=reference,
    inputs=_inputs,
    gradients=(),
    cases=(
        Case("odd numbers of heads, heads first", {"B": 2, "H": 3, "G": 1, "T": 5, "K": 12}),
        Case(
            "one set of positions for all rows, tokens first",
            {"B": 3, "H": 4, "G": 2, "T": 7, "K": 16, "tokens_first": 1, "rows": 1},
        ),
        Case("one token", {"B": 1, "H": 2, "G": 2, "T": 1, "K": 2}),
        Case("interleaved pairs", {"B": 1, "H": 3, "G": 2, "T": 4, "K": 12}, {"interleaved": True}),
        Case("a part of the head", {"B": 2, "H": 3, "G": 1, "T": 3, "K": 20}, {"rotary": 12}),
        Case(
            "a part of the head, interleaved",
            {"B": 1, "H": 2, "G": 1, "T": 3, "K": 16, "rows": 1},
            {"rotary": 8, "interleaved": True},
        ),
    ),
    benchmark=(
        Case("Llama-3.2-1B, 2 x 512", {"B": 2, "H": 32, "G": 8, "T": 512, "K": 64, "tokens_first": 1}),
        Case("Llama-3.1-8B, 2 x 2048", {"B": 2, "H": 32, "G": 8, "T": 2048, "K": 128, "tokens_first": 1}),
    ),
)
