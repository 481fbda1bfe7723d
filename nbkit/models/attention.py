"""Attention for the fused layer: forward and backward as two plain calls on the best implementation for the card and shape.

The layer keeps `out` and the log-sum-exp, so the backward never repeats the forward. All implementations are exact; which one
runs is decided by capability, dtype, head width, mask, window and softcap, and `Attend.why` says it for the report:

    cudnn       Hopper and newer, 16 bits, heads a multiple of 8 and at most 128 wide (T = 8,192: 550 TFLOP/s, flash 320)
    flash       Ampere and Ada; also sliding windows, packed documents, and shapes seen for the first time (cuDNN builds a plan
                per shape)
    efficient   a mask that is not causal alone, and Turing and Volta (windows and packed documents too)
    flex        a softcap on the scores, Ampere and newer (attention_flex.py)
    plain       everything else: CPU, float32 and wider, a softcap with a mask; formulas, a tile at a time (attention_plain.py)

Windows stay with flash: flex takes 0.8 of its time at T = 8,192, but 4 s or more to compile in the first step (docs/log.md).

flex and plain repeat bit for bit. The others sum some gradients in the order in which blocks finish, unless
`torch.use_deterministic_algorithms(True)` is set: then flash and efficient repeat too, and cuDNN is not taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nbkit.kernels._launch import capability_of
from nbkit.models import attention_flex as flex
from nbkit.models import attention_plain as plain

aten = torch.ops.aten
_BY_FLEX = "flex"  # the number that FlexAttention's forward leaves for the backward: its log-sum-exp is of another form
_CUDNN_LARGEST_HEAD = 128
_EFFICIENT_WINDOW_LARGEST_HEAD = 128  # wider heads leave the kernel's registers, where its first block of a window is lost
_LONG = 16384  # tokens from which cuDNN's plan is paid back within one step


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents of a pack begin: none looks into another.

    Attributes:
        starts: int32 (documents + 1,), ascending, from 0 to B T; equal neighbours are empty documents.
        longest: tokens of the longest, or more.
        sights: what FlexAttention derives from them, made once for all layers.
    """

    starts: Tensor
    longest: int
    sights: dict[Any, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Attend:
    """How one call attends: the implementation, the scale of the scores, the sliding window in tokens or None, and why.

    `softcap`: scores become softcap tanh(scores / softcap) before any mask.
    """

    kind: str
    scale: float
    window: int | None = None
    why: str = ""
    documents: Documents | None = None
    softcap: float | None = None

    @property
    def side(self) -> tuple[int | None, int | None]:
        """The window as flash takes it: tokens to the left and to the right of a query."""
        return (self.window - 1, 0) if self.window else (None, None)


class Shapes:
    """Shapes met so far, and what was chosen in this forward of the model: all its layers of one kind attend alike.

    A cuDNN plan costs about 0.15 s, so a shape gets one only when it comes in a second forward.
    """

    def __init__(self) -> None:
        self.seen: set[tuple[int, ...]] = set()
        self.new: set[tuple[int, ...]] = set()
        self.chosen: dict[tuple[Any, ...], Attend] = {}

    def begin(self) -> None:
        """Call before each forward of the model."""
        self.seen |= self.new
        self.new.clear()
        self.chosen.clear()

    def repeated(self, *shape: int) -> bool:
        """Whether `shape` came in a forward before this one."""
        self.new.add(shape)
        return shape in self.seen


def choose(
    shape: tuple[int, int, int, int],
    like: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    window: int | None,
    shapes: Shapes,
    documents: Documents | None = None,
    softcap: float | None = None,
) -> Attend:
    """The implementation for q of `shape` (B, H, T, K), of `like`'s dtype and device. A window as long as T is no window."""
    key = (shape, like.dtype, like.device, scale, mask is None, window, documents, softcap, flex.trouble())
    found = shapes.chosen.get(key)
    if found is None:
        longest = shape[2] if documents is None else documents.longest
        window = None if window is not None and window >= longest else window
        kind, why = _kind(shape, like, mask is not None, window, shapes, documents is not None, softcap)
        if mask is not None:
            window = None  # a mask of the model holds its window too
        found = shapes.chosen[key] = Attend(kind, scale, window, why, documents, softcap)
    return found


def _kind(
    shape: tuple[int, int, int, int],
    like: Tensor,
    masked: bool,
    window: int | None,
    shapes: Shapes,
    packed: bool,
    softcap: float | None,
) -> tuple[str, str]:
    """(kind, why) of `choose`, whose arguments these are."""
    _, _, t, k = shape
    about = "packed documents" if packed else f"sliding window of {window}" if window else ""
    if like.device.type != "cuda" or like.dtype not in (torch.float16, torch.bfloat16):
        return "plain", _and(about, f"{like.device.type} {str(like.dtype).removeprefix('torch.')}")
    if k % 8:
        return "plain", _and(about, f"head width {k}")
    major = capability_of(like)[0]
    if softcap is not None:
        return _kind_with_softcap(k, masked, major)
    if masked:
        return "efficient", "a mask that is not causal alone"
    if major < 8:
        about = _and(about, f"capability {major}")
        if window is not None and k > _EFFICIENT_WINDOW_LARGEST_HEAD:
            return "plain", f"{about}, head width {k}"
        return "efficient documents" if packed else "efficient window" if window else "efficient", about
    if about:
        return "flash documents" if packed else "flash", about
    if major >= 9 and k <= _CUDNN_LARGEST_HEAD and t > 1:  # cuDNN refuses one token
        if torch.are_deterministic_algorithms_enabled():
            return "flash", "deterministic algorithms are asked for"
        if shapes.repeated(*shape) or t >= _LONG:
            return "cudnn", "Hopper or newer"
        return "flash", "first batch of this shape"
    return "flash", "Ampere or Ada"


def _and(about: str, more: str) -> str:
    return f"{about}, {more}" if about else more


def _kind_with_softcap(head: int, masked: bool, major: int) -> tuple[str, str]:
    if masked:
        return "plain", "a softcap on the scores and a mask that is not causal alone"
    if major < 8:
        return "plain", f"a softcap on the scores, capability {major}"
    if not flex.SMALLEST_HEAD <= head <= flex.LARGEST_HEAD:
        return "plain", f"a softcap on the scores, head width {head}"
    trouble = flex.trouble()
    return ("plain", trouble) if trouble else ("flex", "a softcap on the scores")


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
    if how.kind == "flash documents" and how.documents is not None:
        return _documents_forward(how, how.documents, q, k, v)
    if how.kind in ("efficient documents", "efficient window"):
        return _efficient_forward(how, q, k, v)
    if how.kind == "efficient":
        rep = q.shape[1] // k.shape[1]
        bias = _bias(mask, q)
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            q, *(repeat(a, rep) for a in (k, v)), bias, True, 0.0, mask is None, scale=how.scale
        )
        return out, (lse, seed, offset), ()
    if how.kind == "flex":
        try:
            out, lse = flex.forward(how, q, k, v)
        except flex.NotCompiled:  # said in a warning there; from now on `choose` gives such calls to the formulas
            return _plain_forward(how, q, k, v, mask)
        return out, (lse,), (_BY_FLEX,)
    return _plain_forward(how, q, k, v, mask)


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
    if how.kind == "flash documents" and how.documents is not None:
        return _documents_backward(how, how.documents, do, q, k, v, out, kept)
    if how.kind in ("efficient documents", "efficient window"):
        return _efficient_backward(how, do, q, k, v, out, kept)
    if how.kind == "efficient":
        lse, seed, offset = kept
        g, rep = k.shape[1], q.shape[1] // k.shape[1]
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            do, q, repeat(k, rep), repeat(v, rep), _bias(mask, q), _dense(out), lse, seed, offset, 0.0, [True, True, True, False],
            mask is None, scale=how.scale,
        )  # fmt: skip
        return dq, _sum_groups(dk, g), _sum_groups(dv, g)
    lse = kept[0]
    if numbers == (_BY_FLEX,):
        try:
            return flex.backward(how, do, q, k, v, out, lse)
        except flex.NotCompiled:
            lse = flex.natural(lse, q.shape[0], q.shape[2])
    return plain.backward(how, do, q, k, v, out, mask, lse)


def _plain_forward(
    how: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
    out, lse = plain.forward(how, q, k, v, mask)
    return out, (lse,), ()


def _dense(out: Tensor) -> Tensor:
    """out (B, H, T, K) with all its heads of a token side by side: the memory-efficient backward reads it without strides."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _side_by_side(*tensors: Tensor) -> list[Tensor]:
    """(B, heads, T, K) as (B T, heads, K)."""
    return [x.transpose(1, 2).flatten(0, 1) for x in tensors]


def _documents_forward(
    how: Attend, documents: Documents, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
    b, _, t, _ = q.shape
    starts, longest = documents.starts, documents.longest
    left, right = how.side
    out, lse, state, unused, _ = aten._flash_attention_forward(
        *_side_by_side(q, k, v), starts, starts, longest, longest, 0.0, True, False, scale=how.scale,
        window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out.unflatten(0, (b, t)).transpose(1, 2), (lse, state, unused), ()


def _documents_backward(
    how: Attend, documents: Documents, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    b, _, t, _ = q.shape
    starts, longest = documents.starts, documents.longest
    lse, state, unused = kept
    left, right = how.side
    grads = aten._flash_attention_backward(
        *_side_by_side(do, q, k, v, out), lse, starts, starts, longest, longest, 0.0, True, state, unused, scale=how.scale,
        window_size_left=left, window_size_right=right,
    )  # fmt: skip
    dq, dk, dv = (g.unflatten(0, (b, t)).transpose(1, 2) for g in grads)
    return dq, dk, dv


_CAUSAL = 1  # the memory-efficient kernel's word for a mask from the top left


def _efficient_forward(how: Attend, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
    """Causal with a window or packed documents or both: what the public operator of this kernel does not pass on."""
    b, h, t, _ = q.shape
    rep = h // k.shape[1]
    rows, starts, longest = _efficient_rows(how, q, repeat(k, rep), repeat(v, rep))
    out, lse, seed, offset, *_ = aten._efficient_attention_forward(
        *rows, None, starts, starts, longest, longest, 0.0, _CAUSAL, True, scale=how.scale, window_size=how.window
    )
    return out.reshape(b, t, h, -1).transpose(1, 2), (lse, seed, offset), ()


def _efficient_backward(
    how: Attend, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    lse, seed, offset = kept
    b, h, t, _ = q.shape
    g, rep = k.shape[1], h // k.shape[1]
    (do_, q_, k_, v_, out_), starts, longest = _efficient_rows(how, do, q, repeat(k, rep), repeat(v, rep), _dense(out))
    longest = t if longest is None else longest
    grads = aten._efficient_attention_backward(
        do_, q_, k_, v_, None, out_, starts, starts, longest, longest, lse, 0.0, seed, offset, _CAUSAL, False,
        scale=how.scale, window_size=how.window,
    )  # fmt: skip
    dq, dk, dv = (x.reshape(b, t, h, -1).transpose(1, 2) for x in grads[:3])
    return dq, _sum_groups(dk, g), _sum_groups(dv, g)


def _efficient_rows(how: Attend, *tensors: Tensor) -> tuple[list[Tensor], Tensor | None, int | None]:
    """(B, H, T, K) as the kernel takes them, (B, T, H, K) or for documents (1, B T, H, K); where these begin; their longest."""
    if how.documents is None:
        return [x.transpose(1, 2) for x in tensors], None, None
    return [x[None] for x in _side_by_side(*tensors)], how.documents.starts, how.documents.longest


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
