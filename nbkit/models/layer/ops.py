"""The element-wise steps of the layer on rows of strided buffers: kernels on a GPU, their references elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from nbkit.kernels.rope_pack import rotate_pack as rotate_pack


def wide(dtype: torch.dtype) -> torch.dtype:
    """Float32 for 16 bits, else the dtype itself: what sums and statistics are held in."""
    return torch.promote_types(dtype, torch.float32)


def norm_forward(x: Tensor, weight: Tensor, eps: float, out: Tensor, rstd: Tensor) -> None:
    xf = x.to(rstd.dtype)
    rstd.copy_(torch.rsqrt(xf.pow(2).mean(-1) + eps))
    out.copy_(weight * (xf * rstd[:, None]).to(x.dtype))


def norm_again(x: Tensor, weight: Tensor, rstd: Tensor, out: Tensor) -> None:
    out.copy_(weight * (x.to(rstd.dtype) * rstd[:, None]).to(x.dtype))


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor, out: Tensor) -> None:
    """out = residual + d(norm)/dx^T dy."""
    w = rstd.dtype
    g = dy.to(w) * weight.to(w)
    normed = x.to(w) * rstd[:, None]
    dx = rstd[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    out.copy_(residual.to(w) + dx)


def rope_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x (B, T, heads, K) in place; cos and sin (B or 1, T, K)."""
    w = wide(x.dtype)
    c, s = cos.to(w)[:, :, None], sin.to(w)[:, :, None]
    a = x.to(w)
    half = x.shape[-1] // 2
    turned = torch.cat([-a[..., half:], a[..., :half]], -1)
    x.copy_(a * c + turned * s)


def swiglu_forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    w = wide(gate.dtype)
    out.copy_(torch.nn.functional.silu(gate.to(w)) * up.to(w))


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """dgate and dup from dh; h = silu(gate) * up is written over dh."""
    w = wide(gate.dtype)
    g, u, d = gate.to(w), up.to(w), dh.to(w)
    s = torch.sigmoid(g)
    a = g * s
    dgate.copy_(d * u * (s + a * (1 - s)))
    dup.copy_(d * a)
    dh.copy_(a * u)
