"""Attention for the fused layer: forward and backward as two plain calls on the best implementation for the card and shape.

The layer keeps `out` and the log-sum-exp, so the backward never repeats the forward. All implementations are exact; which one
runs is decided by capability, dtype, head width, mask and window, and `Attend.why` says it for the report:

    cudnn       Hopper and newer, 16 bits, heads a multiple of 8 and at most 128 wide (T = 8,192: 550 TFLOP/s, flash 320)
    flash       Ampere and Ada; also sliding windows, packed documents, and shapes seen for the first time (cuDNN builds a plan
                per shape)
    efficient   a mask that is not causal alone, and Turing and Volta (packed documents too)
    plain       everything else: CPU, float64; the formulas below, in float32 or wider
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_CUDNN_LARGEST_HEAD = 128
_LONG = 16384  # tokens from which cuDNN's plan is paid back within one step


@dataclass(frozen=True)
class Documents:
    """Where the documents of a pack begin: none looks into another.

    Attributes:
        starts: int32 (documents + 1,), ascending, from 0 to B T; equal neighbours are empty documents.
        longest: tokens of the longest, or more.
    """

    starts: Tensor
    longest: int


@dataclass(frozen=True)
class Attend:
    """How one call attends: the implementation, the scale of the scores, the sliding window in tokens or None, and why."""

    kind: str
    scale: float
    window: int | None = None
    why: str = ""
    documents: Documents | None = None

    @property
    def side(self) -> tuple[int | None, int | None]:
        """The window as flash takes it: tokens to the left and to the right of a query."""
        return (self.window - 1, 0) if self.window else (None, None)


class Shapes:
    """Shapes met so far. A cuDNN plan costs about 0.15 s, so a shape gets one only when it comes a second time."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, ...]] = set()

    def repeated(self, *shape: int) -> bool:
        if shape in self.seen:
            return True
        self.seen.add(shape)
        return False


def choose(
    shape: tuple[int, int, int, int],
    like: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    window: int | None,
    shapes: Shapes,
    documents: Documents | None = None,
) -> Attend:
    """The implementation for q of `shape` (B, H, T, K), of `like`'s dtype and device. A window as long as T is no window."""
    b, h, t, k = shape
    if documents is not None:
        return _for_documents(like, k, scale, window if window is not None and window < documents.longest else None, documents)
    if window is not None and window >= t:
        window = None
    if like.device.type != "cuda" or like.dtype not in (torch.float16, torch.bfloat16):
        return Attend("plain", scale, window, f"{like.device.type} {str(like.dtype).removeprefix('torch.')}")
    if k % 8:
        return Attend("plain", scale, window, f"head width {k}")
    if mask is not None:
        return Attend("efficient", scale, None, "a mask that is not causal alone")  # a mask of the model holds its window too
    major, _ = torch.cuda.get_device_capability(like.device)
    if major < 8:
        return Attend("plain" if window else "efficient", scale, window, f"capability {major}")
    if window is not None:
        return Attend("flash", scale, window, f"sliding window of {window}")
    if major >= 9 and k <= _CUDNN_LARGEST_HEAD and t > 1:  # cuDNN refuses one token
        if t >= _LONG or shapes.repeated(b, h, t, k):
            return Attend("cudnn", scale, None, "Hopper or newer")
        return Attend("flash", scale, None, "first batch of this shape")
    return Attend("flash", scale, None, "Ampere or Ada")


def _for_documents(like: Tensor, head: int, scale: float, window: int | None, documents: Documents) -> Attend:
    """The implementation for packed documents, whose batch is one row of tokens."""
    fast = like.device.type == "cuda" and like.dtype in (torch.float16, torch.bfloat16) and head % 8 == 0
    major = torch.cuda.get_device_capability(like.device)[0] if fast else 0
    if fast and major >= 8:
        return Attend("flash documents", scale, window, "packed documents", documents)
    if fast and window is None:
        return Attend("efficient documents", scale, None, f"packed documents, capability {major}", documents)
    return Attend("plain", scale, window, "packed documents without a kernel for them", documents)


def forward(
    how: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
    """out (B, H, T, K) and what `backward` needs: tensors, numbers.

    q (B, H, T, K), k and v (B, G, T, K), any strides but a contiguous last axis; mask (B, 1, T, T), True = may attend or
    added to the scores, or None for causal.
    """
    if how.kind == "cudnn":
        out, lse, cq, ck, mq, mk, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False, scale=how.scale
        )
        return out, (lse, cq, ck, seed, offset), (mq, mk)
    if how.kind == "flash":
        side = how.side
        t = q.shape[2]
        out, lse, state, unused, _ = aten._flash_attention_forward(
            *(a.transpose(1, 2) for a in (q, k, v)), None, None, t, t, 0.0, True, False, scale=how.scale,
            window_size_left=side[0], window_size_right=side[1],
        )  # fmt: skip
        return out.transpose(1, 2), (lse, state, unused), (t, *side)
    if how.documents is not None and how.kind != "plain":
        return _documents_forward(how, how.documents, q, k, v)
    if how.kind == "efficient":
        rep = q.shape[1] // k.shape[1]
        bias = _bias(mask, q)
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            q, *(repeat(a, rep) for a in (k, v)), bias, True, 0.0, mask is None, scale=how.scale
        )
        return out, (lse, seed, offset), ()
    out, lse = _plain_forward(how, q, k, v, mask)
    return out, (lse,), ()


def backward(
    how: Attend, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None, kept: tuple, numbers: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, H, T, K), dk and dv (B, G, T, K), each with its own strides, from do (B, H, T, K)."""
    if how.kind == "cudnn":
        lse, cq, ck, seed, offset = kept
        return aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, out, lse, seed, offset, None, cq, ck, *numbers, 0.0, True, scale=how.scale
        )
    if how.kind == "flash":
        lse, state, unused = kept
        t, left, right = numbers
        grads = aten._flash_attention_backward(
            *(a.transpose(1, 2) for a in (do, q, k, v, out)), lse, None, None, t, t, 0.0, True, state, unused, scale=how.scale,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return tuple(g.transpose(1, 2) for g in grads)
    if how.documents is not None and how.kind != "plain":
        return _documents_backward(how, how.documents, do, q, k, v, out, kept)
    if how.kind == "efficient":
        lse, seed, offset = kept
        g, rep = k.shape[1], q.shape[1] // k.shape[1]
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            do, q, repeat(k, rep), repeat(v, rep), _bias(mask, q), _dense(out), lse, seed, offset, 0.0, [True, True, True, False],
            mask is None, scale=how.scale,
        )  # fmt: skip
        return dq, _sum_groups(dk, g), _sum_groups(dv, g)
    return _plain_backward(how, do, q, k, v, out, mask, kept[0])


def _dense(out: Tensor) -> Tensor:
    """out (B, H, T, K) with all its heads of a token side by side: the memory-efficient backward reads it without strides."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _side_by_side(*tensors: Tensor) -> list[Tensor]:
    """(B, heads, T, K) as (B T, heads, K)."""
    return [x.transpose(1, 2).flatten(0, 1) for x in tensors]


def _documents_forward(
    how: Attend, documents: Documents, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
    b, h, t, _ = q.shape
    starts, longest = documents.starts, documents.longest
    if how.kind == "flash documents":
        left, right = how.side
        out, lse, state, unused, _ = aten._flash_attention_forward(
            *_side_by_side(q, k, v), starts, starts, longest, longest, 0.0, True, False, scale=how.scale,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out.unflatten(0, (b, t)).transpose(1, 2), (lse, state, unused), ()
    rep = h // k.shape[1]
    rows = [x[None] for x in _side_by_side(q, repeat(k, rep), repeat(v, rep))]
    out, lse, seed, offset, *_ = aten._efficient_attention_forward(
        *rows, None, starts, starts, longest, longest, 0.0, 1, True, scale=how.scale
    )
    return out[0].unflatten(0, (b, t)).transpose(1, 2), (lse, seed, offset), ()


def _documents_backward(
    how: Attend, documents: Documents, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    b, _, t, _ = q.shape
    starts, longest = documents.starts, documents.longest
    if how.kind == "flash documents":
        lse, state, unused = kept
        left, right = how.side
        grads = aten._flash_attention_backward(
            *_side_by_side(do, q, k, v, out), lse, starts, starts, longest, longest, 0.0, True, state, unused, scale=how.scale,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
        dq, dk, dv = (g.unflatten(0, (b, t)).transpose(1, 2) for g in grads)
        return dq, dk, dv
    lse, seed, offset = kept
    g, rep = k.shape[1], q.shape[1] // k.shape[1]
    rows = [x[None] for x in _side_by_side(do, q, repeat(k, rep), repeat(v, rep))]
    grads = aten._efficient_attention_backward(
        *rows, None, _side_by_side(_dense(out))[0][None], starts, starts, longest, longest, lse, 0.0, seed, offset, 1, False,
        scale=how.scale,
    )  # fmt: skip
    dq, dk, dv = (x[0].unflatten(0, (b, t)).transpose(1, 2) for x in grads[:3])
    return dq, _sum_groups(dk, g), _sum_groups(dv, g)


def of_heads(how: Attend, kept: tuple[Tensor, ...], heads: slice) -> tuple[Tensor, ...]:
    """What `forward` kept, for some of the query heads: its log-sum-exp (B, H, T), (B, H, T, 1) or (H, B T) is cut."""
    lse, *rest = kept
    some = lse[heads] if how.kind == "flash documents" else lse[:, heads]
    return (some if how.kind == "cudnn" else some.contiguous(), *rest)  # the other kernels read it without strides


def repeat(x: Tensor, times: int) -> Tensor:
    """(B, G, T, K) -> (B, G * times, T, K), each key/value head for `times` query heads."""
    if times == 1:
        return x
    b, g, t, k = x.shape
    return x[:, :, None].expand(b, g, times, t, k).reshape(b, g * times, t, k)


def _sum_groups(x: Tensor, groups: int) -> Tensor:
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as scores to add, (B, H, T, T) by expansion; its rows start at multiples of 8 elements, as the kernel asks."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min)
    b, h, t, _ = q.shape
    room = -(-t // 16) * 16
    padded = mask.new_zeros(*mask.shape[:-1], room, dtype=q.dtype)
    padded[..., :t] = mask
    return padded[..., :t].expand(b, h, t, t)


# -- the formulas: S = scale q k^T + mask, P = exp(S - lse), out = P v ---------------------------------------------------


def _scores(how: Attend, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, T, T) in float32 or wider; -inf where a query may not look."""
    t = q.shape[2]
    scores = (q @ k.transpose(-1, -2)) * how.scale
    if mask is not None:
        return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    place = torch.arange(t, device=q.device)
    distance = place[:, None] - place[None, :]
    hidden = distance < 0 if how.window is None else (distance < 0) | (distance >= how.window)
    if how.documents is not None:
        every = torch.arange(q.shape[0] * t, device=q.device)
        which = torch.searchsorted(how.documents.starts.long(), every, right=True).view(-1, 1, t)
        hidden = hidden | (which[..., :, None] != which[..., None, :])
    return scores.masked_fill(hidden, -math.inf)


def _widen(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def _plain_forward(how: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    rep = q.shape[1] // k.shape[1]
    wide = _widen(q, repeat(k, rep), repeat(v, rep))
    scores = _scores(how, wide[0], wide[1], mask)
    lse = scores.logsumexp(-1)
    lse = torch.where(lse == -math.inf, 0.0, lse)  # a row that may look nowhere (a padded query) gives zeros, not NaN
    out = torch.exp(scores - lse[..., None]) @ wide[2]
    # As (B, T, H, K) underneath, so that merging the heads is a view.
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def _plain_backward(
    how: Attend, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dv = P^T do; dS = P (do v^T - sum(do out)); dq = scale dS k; dk = scale dS^T q."""
    g, rep = k.shape[1], q.shape[1] // k.shape[1]
    do_, q_, k_, v_, out_ = _widen(do, q, repeat(k, rep), repeat(v, rep), out)
    p = torch.exp(_scores(how, q_, k_, mask) - lse[..., None])
    dv = p.transpose(-1, -2) @ do_
    ds = p * (do_ @ v_.transpose(-1, -2) - (do_ * out_).sum(-1, keepdim=True)) * how.scale
    dq, dk = ds @ k_, ds.transpose(-1, -2) @ q_
    return dq.to(q.dtype), _sum_groups(dk, g).to(k.dtype), _sum_groups(dv, g).to(v.dtype)
