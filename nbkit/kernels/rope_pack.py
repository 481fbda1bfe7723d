"""Attention's gradients, turned back by rope and packed side by side, in one launch.

dq, dk, dv come from the attention backward in its own layout, (B, heads, T, K) with any strides but the last. The backward
of the q/k/v projection reads them as rows [dq | dk | dv] of one (N, (H + 2G) K) matrix, N = B T. Rope is a rotation of each
pair (x_i, x_{i+K/2}) by an angle; its backward is the rotation by the negative angle:

    dx_i = c dy_i + s dy_{i+K/2}        dx_{i+K/2} = c' dy_{i+K/2} - s' dy_i        (c, s of column i; c', s' of column i+K/2)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rotate_pack_reference(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Same in plain torch, in float32 or wider."""
    b, _, t, k = dq.shape
    wide = torch.promote_types(dq.dtype, torch.float32)
    c, s = (a.to(wide).expand(b, t, k)[:, None] for a in (cos, sin))
    column = 0
    for d, rotate in ((dq, True), (dk, True), (dv, False)):
        x = d.to(wide)
        if rotate:
            y = x * s
            x = x * c + torch.cat([y[..., k // 2 :], -y[..., : k // 2]], -1)
        heads = d.shape[1]
        out[:, column : column + heads * k] = x.transpose(1, 2).reshape(b * t, heads * k)
        column += heads * k


@triton.jit
def _rotate_pack(
    DQ, DK, DV, COS, SIN, OUT, qb, qh, qt, kb, kh, kt, vb, vh, vt, cb, so, T,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HP: tl.constexpr, GP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """One program: all heads of dq (axis 1 = 0), dk (1) or dv (2) of one token. cos and sin: (B or 1, T, K)."""
    n, part = tl.program_id(0), tl.program_id(1)
    b, t = (n // T).to(tl.int64), (n % T).to(tl.int64)
    i = tl.arange(0, KP)[None, :]
    half: tl.constexpr = K // 2
    cs = COS + b * cb + t * K
    sn = SIN + b * cb + t * K
    c1, c2 = tl.load(cs + i, mask=i < half, other=0.0).to(tl.float32), tl.load(cs + half + i, mask=i < half, other=0.0).to(tl.float32)
    s1, s2 = tl.load(sn + i, mask=i < half, other=0.0).to(tl.float32), tl.load(sn + half + i, mask=i < half, other=0.0).to(tl.float32)
    out = OUT + n.to(tl.int64) * so
    if part == 0:
        h = tl.arange(0, HP)[:, None]
        ok = (h < H) & (i < half)
        p = DQ + b * qb + h * qh + t * qt + i
        x, y = tl.load(p, mask=ok, other=0.0).to(tl.float32), tl.load(p + half, mask=ok, other=0.0).to(tl.float32)
        o = out + h * K + i
        tl.store(o, (x * c1 + y * s2).to(OUT.dtype.element_ty), mask=ok)
        tl.store(o + half, (y * c2 - x * s1).to(OUT.dtype.element_ty), mask=ok)
    elif part == 1:
        h = tl.arange(0, GP)[:, None]
        ok = (h < G) & (i < half)
        p = DK + b * kb + h * kh + t * kt + i
        x, y = tl.load(p, mask=ok, other=0.0).to(tl.float32), tl.load(p + half, mask=ok, other=0.0).to(tl.float32)
        o = out + (H + h) * K + i
        tl.store(o, (x * c1 + y * s2).to(OUT.dtype.element_ty), mask=ok)
        tl.store(o + half, (y * c2 - x * s1).to(OUT.dtype.element_ty), mask=ok)
    else:
        h = tl.arange(0, GP)[:, None]
        ok = (h < G) & (i < half)
        p = DV + b * vb + h * vh + t * vt + i
        o = out + (H + G + h) * K + i
        tl.store(o, tl.load(p, mask=ok, other=0.0).to(OUT.dtype.element_ty), mask=ok)
        tl.store(o + half, tl.load(p + half, mask=ok, other=0.0).to(OUT.dtype.element_ty), mask=ok)


def rotate_pack(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write [rope^-1(dq) | rope^-1(dk) | dv] into the first (H + 2G) K columns of `out`.

    dq (B, H, T, K), dk and dv (B, G, T, K), any strides but a contiguous last axis; cos, sin (B or 1, T, K), contiguous;
    out (B*T, >= (H + 2G) K), rows contiguous. Head widths must be even.
    """
    if not out.is_cuda:
        rotate_pack_reference(dq, dk, dv, cos, sin, out)
        return
    b, h, t, k = dq.shape
    g = dk.shape[1]
    up = triton.next_power_of_2
    _rotate_pack[(b * t, 3)](
        dq, dk, dv, cos, sin, out, *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0,
        out.stride(0), t, H=h, G=g, K=k, HP=up(h), GP=up(g), KP=up(k // 2), num_warps=4,
    )  # fmt: skip
