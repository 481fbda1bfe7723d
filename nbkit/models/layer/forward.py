"""The forward of one decoder layer, straight down. Rows N = B T; `tile` rows at a time where the planner asks for it.

h = norm1(x)          [q|k|v] = h Wqkv^T + LoRA       q, k = rope(q, k)      out = attention(q, k, v)
x_mid = x + out Wo^T + LoRA
h = norm2(x_mid)      [gate|up] = h Wgu^T + LoRA      h = silu(gate) up      y = x_mid + h Wd^T + LoRA
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbkit.models import attention
from nbkit.models.layer import ops
from nbkit.models.layer.arena import Arena
from nbkit.models.layer.keep import Keep
from nbkit.models.layer.offload import Parcel
from nbkit.models.layer.parts import Parts
from nbkit.models.layer.weights import Group


@dataclass
class Kept:
    """What a layer holds between forward and backward; None: not kept, computed again. rstd1 and rstd2 (N,), the rest (N, ..)."""

    rstd1: Tensor
    rstd2: Tensor
    xa_down: Tensor | None = None  # scale-free products x A^T of LoRA, (N, R)
    qkv: Tensor | None = None
    xa_qkv: Tensor | None = None
    out: Tensor | None = None
    attention: tuple[Tensor, ...] = ()
    mid: Tensor | None = None
    xa_o: Tensor | None = None
    gate_up: Tensor | None = None
    xa_gate_up: Tensor | None = None
    h_qkv: Tensor | None = None  # the normalised rows with their border, (N, D + R), in place of xa_qkv and xa_gate_up
    h_gate_up: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """One call of one layer: sizes, what to keep, how to attend, and attention's numbers (filled by the forward)."""

    parts: Parts
    keep: Keep
    how: attention.Attend
    batch: int
    tokens: int
    numbers: list[Any]
    parcel: Parcel | None = None  # takes x, out and x_mid to host RAM where `keep.offload` says so
    arena: Arena | None = None  # takes LoRA's gradients in a step that is recorded

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


def border(width: int, group: Group, rows: int, like: Tensor) -> Tensor:
    """An uninitialised (rows, width + R) buffer: the input of `group` (or its gradient) with room for LoRA's columns."""
    return torch.empty(rows, width + group.rank, dtype=like.dtype, device=like.device)


SMALL = 2**20  # bytes of LoRA's products of down_proj that a layer keeps even where memory is short


def project(
    x: Tensor, group: Group, weight: Tensor, out: Tensor | None = None, residual: Tensor | None = None, filled: bool = False
) -> Tensor:
    """x (n, I + R), its first I columns filled -> x W^T + LoRA (+ bias) (+ residual).

    Fills the last R columns with x A^T, unless they are `filled`.
    """
    i, o, r = group.inputs, group.outputs, group.rank
    if r and not filled:
        torch.mm(x[:, :i], weight[o : o + r, :i].t(), out=x[:, i:])
    w = weight[:o, : i + r].t()
    if residual is not None:
        y = torch.addmm(residual, x, w, out=out) if out is not None else torch.addmm(residual, x, w)
        return y if group.bias is None else y.add_(group.bias)
    if group.bias is not None:
        return torch.addmm(group.bias, x, w, out=out) if out is not None else torch.addmm(group.bias, x, w)
    return torch.mm(x, w, out=out) if out is not None else torch.mm(x, w)


def heads(call: Call, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the rows [q | k | v]: (B, H, T, K), (B, G, T, K), (B, G, T, K)."""
    p, b, t = call.parts, call.batch, call.tokens
    x = qkv[:, : (p.h + 2 * p.g) * p.k].unflatten(0, (b, t)).unflatten(2, (p.h + 2 * p.g, p.k)).transpose(1, 2)
    return x[:, : p.h], x[:, p.h : p.h + p.g], x[:, p.h + p.g :]


def queries_keys_values(
    call: Call, x: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor | None, room: int = 0, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """x (N, D) -> rows [q | k | v | `room` columns], q and k rotated, and LoRA's products (`whole`: the rows they end)."""
    p, n = call.parts, call.rows
    weight = p.qkv.weight()
    qkv = torch.empty(n, p.qkv.outputs + room, dtype=x.dtype, device=x.device)
    xa = border(p.d, p.qkv, n, x) if whole else torch.empty(n, p.qkv.rank, dtype=x.dtype, device=x.device)
    for t in call.keep.tiles(n):
        h = xa if whole else border(p.d, p.qkv, t.stop - t.start, x)
        normed(p, 0, x[t], h, None if rstd is None else rstd[t])
        project(h, p.qkv, weight, out=qkv[t, : p.qkv.outputs])
        if not whole:
            xa[t] = h[:, p.d :]
    turn = qkv[:, : (p.h + p.g) * p.k].unflatten(0, (call.batch, call.tokens)).unflatten(2, (p.h + p.g, p.k))
    ops.rope_rotate_(turn, cos, sin)
    return qkv, xa


def normed(p: Parts, which: int, x: Tensor, h: Tensor, rstd: Tensor | None = None) -> None:
    """norm(x) into the first D columns of h, and 1 / rms of each row into `rstd` where the forward wants it."""
    ops.rms_norm_forward(x, p.weights[which], p.eps, out=h[:, : p.d], rstd=rstd)


def attend(call: Call, qkv: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """out (N, H K) and what attention's backward needs; its numbers go to `call.numbers`."""
    out, kept, numbers = attention.forward(call.how, *heads(call, qkv), mask)
    call.numbers[:] = numbers
    return out.transpose(1, 2).reshape(call.rows, -1), kept


def middle(p: Parts, x: Tensor, out: Tensor, weight: Tensor, mid: Tensor, xa: Tensor) -> None:
    """mid = x + out Wo^T + LoRA, xa = out A^T. `out` comes from attention and has no room for a border: LoRA is a second pass."""
    i, o, r = p.o.inputs, p.o.outputs, p.o.rank
    torch.addmm(x, out, weight[:o, :i].t(), out=mid)
    if r:
        torch.mm(out, weight[o : o + r, :i].t(), out=xa)
        mid.addmm_(xa, weight[:o, i : i + r].t())
    if p.o.bias is not None:
        mid.add_(p.o.bias)


def gates(p: Parts, mid: Tensor, rstd: Tensor | None, weight: Tensor, out: Tensor) -> Tensor:
    """Rows [gate | up] into `out`; returns h (N, D + R), whose last columns are LoRA's products."""
    h = border(p.d, p.gate_up, mid.shape[0], mid)
    normed(p, 1, mid, h, rstd)
    project(h, p.gate_up, weight, out=out)
    return h


def empty(like: Tensor, rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=like.dtype, device=like.device)


def run(call: Call, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> tuple[Tensor, Kept]:
    """y (N, D) and what `call.keep` says is kept. x (N, D) contiguous rows."""
    p, keep, n = call.parts, call.keep, call.rows
    stats = torch.empty(2, n, dtype=ops.wide(x.dtype), device=x.device)
    kept = Kept(stats[0], stats[1])
    if not keep.in_place or n * p.down.rank * x.element_size() <= SMALL:
        kept.xa_down = empty(x, n, p.down.rank)
    if keep.mid:
        kept.mid, kept.xa_o = empty(x, n, p.d), empty(x, n, p.o.rank)
    if call.parcel is not None:
        call.parcel.send("x", x)
    qkv, xa_qkv = queries_keys_values(call, x, cos, sin, kept.rstd1, whole=keep.normed)
    out, state = attend(call, qkv, mask)
    if keep.normed:
        kept.qkv, kept.h_qkv = qkv, xa_qkv
    elif keep.qkv:
        kept.qkv, kept.xa_qkv = qkv, xa_qkv
    if keep.attention:
        kept.attention = state
        if call.parcel is not None:
            call.parcel.send("out", out)
        else:
            kept.out = out
    if keep.gate_up:
        kept.gate_up = empty(x, n, 2 * p.f)
        kept.xa_gate_up = None if keep.normed else empty(x, n, p.gate_up.rank)
    del qkv, xa_qkv, state
    y = torch.empty_like(x)
    weights = p.o.weight(), p.gate_up.weight(), p.down.weight()
    for t in keep.tiles(n):
        _o_and_mlp(call, t, x[t], out[t], y[t], kept, weights)
    if call.parcel is not None:
        if kept.mid is not None:
            call.parcel.send("mid", kept.mid)
            kept.mid = None
        call.parcel.settle()
    return y, kept


def _o_and_mlp(
    call: Call, t: slice, x: Tensor, out: Tensor, y: Tensor, kept: Kept, weights: tuple[Tensor, Tensor, Tensor]
) -> None:
    """One tile of rows: o_proj, the norm and the MLP into y, and what is kept of them."""
    p, rows = call.parts, t.stop - t.start
    w_o, w_gate_up, w_down = weights
    mid = kept.mid[t] if kept.mid is not None else y  # y is written last, from mid: the same memory serves both
    xa_o = kept.xa_o[t] if kept.xa_o is not None else empty(x, rows, p.o.rank)
    middle(p, x, out, w_o, mid, xa_o)
    gate_up = kept.gate_up[t] if kept.gate_up is not None else empty(x, rows, 2 * p.f)
    h = gates(p, mid, kept.rstd2[t], w_gate_up, gate_up)
    if call.keep.normed:
        kept.h_gate_up = h
    elif kept.xa_gate_up is not None:
        kept.xa_gate_up[t] = h[:, p.d :]
    del h
    hidden = border(p.f, p.down, rows, x)
    activate(p, gate_up, w_down, hidden, kept.xa_down[t] if kept.xa_down is not None else None)
    project(hidden, p.down, w_down, out=y, residual=mid, filled=True)


def activate(p: Parts, gate_up: Tensor, weight: Tensor, hidden: Tensor, xa: Tensor | None) -> None:
    """h = silu(gate) up into the first F columns of `hidden`, LoRA's products h A^T into those that follow and into `xa`."""
    gate, up, o, r = gate_up[:, : p.f], gate_up[:, p.f :], p.down.outputs, p.down.rank
    if r:
        ops.swiglu_lora_forward(gate, up, weight[o : o + r, : p.f], hidden[:, : p.f], hidden[:, p.f :], xa)
    else:
        ops.swiglu_forward(gate, up, hidden[:, : p.f])
