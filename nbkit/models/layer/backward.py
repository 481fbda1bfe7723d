"""The backward of one decoder layer by hand, straight down; no autograd in it. Frozen weights: dX only. LoRA: dA and dB.
Weights, biases and norms that are trained themselves: dW = dy^T x, db = sum of dy, and the norm's own.

With W' = W + scale B A, y = x W'^T:    dx = dy W + (dy scale B) A       dA = (dy scale B)^T x       dB = scale dy^T (x A^T)
Written with the border (weights.py):   [dy | dy scale B] [W ; A] is dx, and the border columns of dy give dA.

`g` is the gradient of the residual stream. It lives in rows of D + R columns, so it is [dy | ..] for down_proj and o_proj as it
stands. Gradients that come from outside are copied into such rows once; from layer to layer the rows are handed on (function.py).
Where `keep.in_place` says so, g is updated in place and dq, dk, dv are written over q, k, v, some heads at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbkit.kernels._gemm import accumulate
from nbkit.models import attention
from nbkit.models.layer import ops
from nbkit.models.layer.arena import Arena
from nbkit.models.layer.forward import Call, Kept, attend, border, empty, gates, heads, middle, normed, queries_keys_values
from nbkit.models.layer.parts import Parts
from nbkit.models.layer.weights import Group

EARLY = 64 * 2**20  # bytes of a layer input up to which the next one is fetched at once: longer copies hide behind less work


class Gradients:
    """What one group trains, summed over tiles in float32 (in the parameter's dtype where there is one tile).

    In a recorded step dA and dB lie in `arena` if that is of their dtype.
    """

    def __init__(self, group: Group, tiles: int, arena: Arena | None = None) -> None:
        self.group, self.first, self.tiles = group, True, tiles
        self.da: Tensor | None = None
        self.db: list[Tensor] = []
        self.own = [(self._empty(o.weight), self._empty(o.bias)) for o in group.own]
        if not group.terms:
            return
        a, rooms = group.terms[0].a, arena.rooms(group) if arena is not None else [None] * (1 + len(group.terms))
        self.da = self._empty(a, group.rank, group.inputs, room=rooms[0])
        self.db = [self._empty(a, t.stop - t.start, t.rank, room=room) for t, room in zip(group.terms, rooms[1:], strict=True)]

    def _empty(self, like: Tensor | None, *shape: int, room: Tensor | None = None) -> Tensor | None:
        if like is None:
            return None
        dtype = like.dtype if self.tiles == 1 else torch.promote_types(like.dtype, torch.float32)
        if room is not None and room.dtype == dtype:
            return room
        return torch.empty(shape or like.shape, dtype=dtype, device=like.device)

    def products(self, dy: Tensor, x: Tensor | None, xa: Tensor | None) -> list[ops.Product]:
        """dA = (dy scale B)^T x, dB = scale dy^T (x A^T) of one tile."""
        o, found = self.group.outputs, []
        if self.da is not None and x is not None:
            found.append(ops.Product(dy[:, o : o + self.group.rank], x, self.da))
        if xa is not None:
            for out, t in zip(self.db, self.group.terms, strict=True):
                thin = xa[:, t.offset : t.offset + t.rank]
                found.append(ops.Product(thin, dy[:, t.start : t.stop], out, turned=True, scale=t.scale))
        return found

    def add_own(self, dy: Tensor, x: Tensor | None) -> None:
        """dW = dy^T x and db of the linears that train themselves. The tile is done with."""
        for (dw, db), own in zip(self.own, self.group.own, strict=True):
            part = dy[:, own.start : own.stop]
            if dw is not None and x is not None:
                accumulate(dw, part.t(), x, 1.0, not self.first)
            if db is not None:
                total = part.sum(0, dtype=ops.wide(db.dtype))
                db.copy_(total) if self.first else db.add_(total)
        self.first = False

    def out(self) -> list[Tensor]:
        """(dA, dB) of each term, then dW and db of the linears, in the order of `Group.parameters`."""
        found = []
        for db, t in zip(self.db, self.group.terms, strict=True):
            found += [self.da[t.offset : t.offset + t.rank].to(t.a.dtype), db.to(t.b.dtype)]
        for sums, own in zip(self.own, self.group.own, strict=True):
            found += [s.to(p.dtype) for s, p in zip(sums, (own.weight, own.bias), strict=True) if p is not None]
        return found


class NormGradients:
    """dweight of the layer's norms that are trained, summed over tiles in float32."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.sums: list[Tensor | None] = [None, None]

    def back(self, which: int, dy: Tensor, x: Tensor, rstd: Tensor, add_to: Tensor, out: Tensor | None = None) -> None:
        """add_to + dx of norm `which` into `out` (or add_to), and its dweight into the sum."""
        p = self.parts
        trained = p.norms_trained[which]
        _, dw = ops.rms_norm_backward(dy, x, p.weights[which], rstd, add_to=add_to, out=out, weight_grad=trained)
        if trained:
            self.sums[which] = dw if self.sums[which] is None else self.sums[which].add_(dw)

    def out(self) -> list[Tensor]:
        return [s.to(weight.dtype) for s, weight in zip(self.sums, self.parts.weights, strict=True) if s is not None]


# One tile of one group: its sums, dy (n, O + R) with its border filled, x (n, I), xa (n, R) = x A^T. Without x dA is there
# already, without xa dB.
Tile = tuple[Gradients, Tensor, Tensor | None, Tensor | None]


def add(*tile: Tile) -> None:
    """Add one tile of some groups to their sums, all their LoRA products in one launch."""
    ops.thin_products([p for sums, dy, x, xa in tile for p in sums.products(dy, x, xa)], add=not tile[0][0].first)
    for sums, dy, x, _ in tile:
        sums.add_own(dy, x)


def fill_border(dy: Tensor, group: Group, weight: Tensor) -> Tensor:
    """dy (n, >= O + R), its first O columns filled: fills the next R with dy (scale B). Returns the (n, O + R) part."""
    i, o, r = group.inputs, group.outputs, group.rank
    if r:
        torch.mm(dy[:, :o], weight[:o, i : i + r], out=dy[:, o : o + r])
    return dy[:, : o + r]


def input_gradient(dy: Tensor, group: Group, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """dx (n, I) from dy (n, O + R) with its border filled."""
    w = weight[: group.outputs + group.rank, : group.inputs]
    return torch.mm(dy, w, out=out)


def run(
    call: Call, g: Tensor, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, kept: Kept, need_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """g (N, D + R) -> (N, D + R) rows whose first D columns are dx (None unless `need_dx`), and the LoRA gradients."""
    p, n, lean = call.parts, call.rows, call.keep.in_place
    tiles = call.keep.tiles(n)
    sums = {group.name: Gradients(group, len(tiles), call.arena) for group in p.groups}
    norms = NormGradients(p)
    need_dx = need_dx or p.norms_trained[0]
    early = call.parcel is not None and n * p.d * x.element_size() <= EARLY
    if early:
        call.parcel.start_previous()
    qkv, xa_qkv, out, state = kept.qkv, kept.xa_qkv, kept.out, kept.attention
    if qkv is None:
        qkv, xa_qkv = queries_keys_values(call, x, cos, sin, None, room=p.qkv.rank if lean else 0)
    if out is None:
        out, state = attend(call, qkv, mask)
    g_mid = g if lean else torch.empty_like(g)
    last: list[Tile] = []  # o's products, where they can wait for q, k and v's
    for t in tiles:
        last = [_mlp_and_o(call, t, g[t], g_mid[t], x, out, kept, sums, norms)]
        if lean or len(tiles) > 1:
            add(*last)
            last = []
    attention_backward = _attention_by_heads if lean else _attention
    dqkv = attention_backward(call, g_mid, qkv, out, cos, sin, mask, state)
    del qkv, out, state
    kept.out, kept.attention = None, ()
    if call.parcel is not None and not early:
        call.parcel.start_previous()
    w_qkv = p.qkv.weight()
    fill_border(dqkv, p.qkv, w_qkv)
    for t in tiles:
        h, xa = (empty(x, t.stop - t.start, p.d), xa_qkv[t]) if kept.h_qkv is None else split(kept.h_qkv, p.d)
        if kept.h_qkv is None:
            normed(p, 0, x[t], h)
        add(*last, (sums["qkv"], dqkv[t], h, xa))
        if need_dx:
            # Where h has been read by now, its memory takes dh.
            dh = input_gradient(dqkv[t], p.qkv, w_qkv, out=h if kept.h_qkv is None else None)
            norms.back(0, dh, x[t], kept.rstd1[t], g_mid[t, : p.d])
    return (g_mid if need_dx else None), [d for group in p.groups for d in sums[group.name].out()] + norms.out()


def split(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The first `width` columns, and the rest."""
    return rows[:, :width], rows[:, width:]


def _mlp_and_o(
    call: Call,
    t: slice,
    g: Tensor,
    g_mid: Tensor,
    x: Tensor,
    out: Tensor,
    kept: Kept,
    sums: dict[str, Gradients],
    norms: NormGradients,
) -> Tile:
    """One tile of rows: back through the MLP and its norm into g_mid, the gradient of x_mid; what down and gate/up train.

    Returns what o trains, for `add`.
    """
    n, p = t.stop - t.start, call.parts
    if kept.mid is None:
        mid, xa_o = empty(x, n, p.d), empty(x, n, p.o.rank)
        middle(p, x[t], out[t], p.o.weight(), mid, xa_o)
    else:
        mid, xa_o = kept.mid[t], kept.xa_o[t]
    w_gate_up = p.gate_up.weight()
    if kept.gate_up is None:
        gate_up = empty(x, n, 2 * p.f)
        h, xa = split(gates(p, mid, None, w_gate_up, gate_up), p.d)
        again = False
    elif kept.h_gate_up is not None:
        gate_up, (h, xa) = kept.gate_up, split(kept.h_gate_up, p.d)
        again = False
    else:
        gate_up, xa, h = kept.gate_up[t], kept.xa_gate_up[t], empty(x, n, p.d)
        again = True
    w_down = p.down.weight()
    dy = fill_border(g, p.down, w_down)
    dh = input_gradient(dy, p.down, w_down)
    dgu = border(2 * p.f, p.gate_up, n, x)
    xa_down = kept.xa_down[t] if kept.xa_down is not None else None
    fused = xa_down is not None and _activation_and_lora(p, dy, dh, gate_up, xa, dgu, sums)
    of_down: list[Tile] = [(sums["down"], dy, None, xa_down)]
    if not fused:
        ops.swiglu_backward(dh, gate_up[:, : p.f], gate_up[:, p.f :], dgu[:, : p.f], dgu[:, p.f : 2 * p.f], h=dh)
        # dh holds h by now
        xa_down = lora_products(dh, p.down, w_down) if xa_down is None else xa_down
        add((sums["down"], dy, dh, xa_down))
        of_down = []
    del dh, gate_up
    fill_border(dgu, p.gate_up, w_gate_up)
    if again:
        normed(p, 1, mid, h)
    add(*of_down, (sums["gate_up"], dgu, h, None if fused else xa))
    d_norm = input_gradient(dgu, p.gate_up, w_gate_up)
    norms.back(1, d_norm, mid, kept.rstd2[t], g[:, : p.d], g_mid[:, : p.d])
    dy = fill_border(g_mid, p.o, p.o.weight())
    return sums["o"], dy, out[t], xa_o


def _activation_and_lora(
    p: Parts, dy: Tensor, dh: Tensor, gate_up: Tensor, xa: Tensor, dgu: Tensor, sums: dict[str, Gradients]
) -> bool:
    """dgate and dup into dgu, and in the same pass dB of gate and up and dA of down; False, and nothing done, where it cannot."""
    down, both = sums["down"], sums["gate_up"]
    if not p.one_pass or not ops.fits(dh, p.down.rank, *(t.rank for t in p.gate_up.terms)):
        return False
    found = {t.start: (t, db) for t, db in zip(p.gate_up.terms, both.db, strict=True)}
    (gate, db_gate), (up, db_up) = (found.get(start, (None, None)) for start in (0, p.f))
    ops.swiglu_lora_backward(
        dh, gate_up[:, : p.f], gate_up[:, p.f :], dy[:, p.d :], xa, dgu[:, : p.f], dgu[:, p.f : 2 * p.f],
        gate_rank=gate.rank if gate is not None else 0,
        scales=(gate.scale if gate is not None else 1.0, up.scale if up is not None else 1.0),
        da=None if down.da is None else down.da[: p.down.terms[0].rank], db_gate=db_gate, db_up=db_up, add=not down.first,
    )  # fmt: skip
    return True


def lora_products(x: Tensor, group: Group, weight: Tensor) -> Tensor:
    """x A^T (n, R) of x (n, I)."""
    return torch.mm(x, weight[group.outputs : group.outputs + group.rank, : group.inputs].t())


def _heads_of(call: Call, rows: Tensor) -> Tensor:
    """Rows (N, heads K) as (B, heads, T, K)."""
    return rows.unflatten(0, (call.batch, call.tokens)).unflatten(2, (-1, call.parts.k)).transpose(1, 2)


def _attention(
    call: Call, g_mid: Tensor, qkv: Tensor, out: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, state: tuple[Tensor, ...]
) -> Tensor:
    """Rows [dq | dk | dv | room for the border]: back through o_proj and attention, turned back by rope."""
    p, n = call.parts, call.rows
    q, k, v = heads(call, qkv)
    do = _heads_of(call, input_gradient(g_mid[:, : p.d + p.o.rank], p.o, p.o.weight()))
    dq, dk, dv = attention.backward(call.how, do, q, k, v, _heads_of(call, out), mask, state, tuple(call.numbers))
    del do
    dqkv = border(p.qkv.outputs, p.qkv, n, qkv)
    ops.rotate_pack(dq, dk, dv, cos, sin, dqkv)
    return dqkv


def _attention_by_heads(
    call: Call, g_mid: Tensor, qkv: Tensor, out: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, state: tuple[Tensor, ...]
) -> Tensor:
    """The same, `keep.groups` key/value heads and their queries at a time; dq, dk, dv take the place of q, k, v."""
    p, step = call.parts, call.keep.groups or call.parts.g
    per = p.h // p.g
    q, k, v = heads(call, qkv)
    o, w_o = _heads_of(call, out), p.o.weight()
    for first in range(0, p.g, step):
        kv = slice(first, min(first + step, p.g))
        mine = slice(kv.start * per, kv.stop * per)
        columns = w_o[: p.d + p.o.rank, mine.start * p.k : mine.stop * p.k]
        do = _heads_of(call, torch.mm(g_mid[:, : p.d + p.o.rank], columns))
        some = attention.of_heads(call.how, state, mine)
        parts = attention.backward(call.how, do, q[:, mine], k[:, kv], v[:, kv], o[:, mine], mask, some, tuple(call.numbers))
        del do
        ops.rotate_pack(*parts, cos, sin, qkv, at=(mine.start, p.h + kv.start, p.h + p.g + kv.start))
        del parts
    return qkv
