"""Buffers of a step that the host sets the pace of, made once with the views that the layers read them by.

An empty buffer or a view costs the host 1 to 4 microseconds, and a layer takes some 150 of them where it makes each as it goes.
Here what all layers keep lies in one slab a kind, whose views come layer by layer out of one call; what lives within a layer
only is one `Room`, which all layers and steps of one shape write again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nbkit.kernels._launch import Layered, Prepared, Stand
from nbkit.models.layer import ops
from nbkit.models.layer.parts import Parts
from nbkit.models.layer.weights import round_up

Views = tuple[Tensor, ...]  # one a layer


class Span(NamedTuple):
    """Where one LoRA term lies: output rows start:stop of its group, columns offset:offset + rank of the border."""

    start: int
    stop: int
    offset: int
    rank: int
    scale: float


class Layout(NamedTuple):
    """What all layers have in common, so that their buffers may lie side by side."""

    dims: tuple[int, ...]  # D, F, H, G, K
    ranks: tuple[int, ...]  # border columns by group: qkv, o, gate_up, down
    spans: tuple[tuple[Span, ...], ...]  # by group
    dtype: torch.dtype
    norms: tuple[Any, ...]  # what tells two kinds of norm apart
    trained: torch.dtype | None  # of the LoRA parameters
    device: torch.device

    def kept_bytes(self, rows: int, layers: int) -> int:
        """Of the slabs."""
        d, f, h, g, k = self.dims
        columns = 4 * d + (2 * h + 2 * g) * k + 2 * f + self.ranks[1] + self.ranks[3] + self.ranks[0] + self.ranks[2]
        return rows * layers * columns * self.dtype.itemsize

    def room_bytes(self, rows: int) -> int:
        """Of a `Room`."""
        d, f, h, g, k = self.dims
        return rows * (2 * d + 4 * f + (2 * h + 2 * g) * k + sum(self.ranks)) * self.dtype.itemsize


def layout_of(parts: Sequence[Parts]) -> Layout | None:
    """The layout of these layers; None where they differ, or train more than LoRA."""
    found = set()
    for p in parts:
        if any(p.norms_trained) or any(group.own for group in p.groups):
            return None
        kinds = {x.dtype for group in p.groups for t in group.terms for x in (t.a, t.b)}
        if len(kinds) > 1:
            return None
        spans = tuple(tuple(Span(t.start, t.stop, t.offset, t.rank, t.scale) for t in group.terms) for group in p.groups)
        ranks = tuple(group.rank for group in p.groups)
        trained = next(iter(kinds), None)
        norms = (p.eps, *((weight.dtype, weight.stride()) for weight in p.weights))
        found.add(Layout((p.d, p.f, p.h, p.g, p.k), ranks, spans, p.dtype, norms, trained, p.qkv.device))
    return found.pop() if len(found) == 1 else None


class Border(NamedTuple):
    """Rows of W + R columns: `x` the first W, `xa` the last R."""

    all: Tensor
    x: Tensor
    xa: Tensor


def border(rows: int, width: int, rank: int, like: Layout) -> Border:
    whole = torch.empty(rows, width + rank, dtype=like.dtype, device=like.device)
    return Border(whole, whole[:, :width], whole[:, width:])


class Stream:
    """The gradient of the residual stream in rows of D + R columns, as down_proj's backward and as o_proj's read it."""

    def __init__(self, rows: Tensor, layout: Layout) -> None:
        d, (_, o, _, down) = layout.dims[0], layout.ranks
        self.x = rows[:, :d]
        self.down, self.down_xa = rows[:, : d + down], rows[:, d : d + down]
        self.o, self.o_xa = rows[:, : d + o], rows[:, d : d + o]


class Room:
    """What lives within one layer's forward or backward. Whatever stream reads it, the next layer writes it after that."""

    def __init__(self, layout: Layout, batch: int, tokens: int, turned: tuple[Any, ...]) -> None:
        d, f, h, g, k = layout.dims
        n, (r_qkv, r_o, r_gate_up, r_down) = batch * tokens, layout.ranks
        self.kind = (batch, tokens, turned)
        self.layout, (self.cuts, self.row) = layout, cuts_of(layout)
        self.slabs: Slabs | None = None
        self.stand = Stand()
        self.hidden = border(n, f, r_down, layout)
        self.g = Stream(self._empty(layout, n, d + max(r_o, r_down)), layout)
        self.dh = self._empty(layout, n, f)
        self.d_norm = self._empty(layout, n, d)
        do = self._empty(layout, n, h * k)
        self.do, self.do_heads = do, do.view(batch, tokens, h, k).transpose(1, 2)
        self.dgu = border(n, 2 * f, r_gate_up, layout)
        self.dgate, self.dup = self.dgu.all[:, :f], self.dgu.all[:, f : 2 * f]
        self.dqkv = border(n, (h + 2 * g) * k, r_qkv, layout)
        # The columns of dy that make each term's dB.
        self.dqkv_parts = [self.dqkv.all[:, s.start : s.stop] for s in layout.spans[0]]
        self.dgu_parts = [self.dgu.all[:, s.start : s.stop] for s in layout.spans[2]]
        self._prepare()

    def _prepare(self) -> None:
        """The kernels for this shape; LoRA's gradients in two launches, before the second norm's backward and after."""
        layout = self.layout
        r_down = layout.ranks[3]
        norm, made = partial(_norm, layout.norms[0]), partial(Prepared, stand=self.stand)
        self.norm1, self.norm2 = made(norm), made(norm)
        self.norm1_back, self.norm2_back = made(_norm_back), made(_norm_back)
        self.first_back, self.last_back = made(_norm_back), made(_norm_back, strides_of=(1,))  # from g as it came in; into dx
        self.rope = made(ops.rope_rotate_)
        qkv, o, gate_up, down = layout.spans
        self.fused = len(down) < 2 and len({s.start for s in gate_up}) == len(gate_up)
        self.swiglu = made(ops.swiglu_lora_forward, own=True) if r_down else made(ops.swiglu_forward)
        self.swiglu_back = made(_fused_back(layout, self.cuts), own=True) if self.fused else made(_swiglu_back)
        self.pack = made(ops.rotate_pack, strides_of=(0, 1, 2))
        cuts = self.cuts
        self.of_mlp = made(_products([(not self.fused, down, cuts[3], True), (True, gate_up, cuts[2], not self.fused)]))
        self.of_attention = made(_products([(True, o, cuts[1], True), (True, qkv, cuts[0], True)]))

    def calls(self, kept: Slabs) -> Calls:
        """The launches on these slabs, for one forward or backward: where they go is found out once."""
        if self.norm1.found is not None:  # where kernels run at all
            self.stand.look()
        if kept.calls is None:
            kept.calls = self._calls(kept)
        return kept.calls

    def _calls(self, kept: Slabs) -> Calls:
        g, hidden, activated = self.g, self.hidden, (self.dgate, self.dup)
        qkv, o, gate_up, down = self.layout.spans
        xa_qkv, xa_o, xa_gate_up, xa_down = kept.terms
        of_hidden = (None, hidden.x, hidden.xa, kept.xa_down) if self.layout.ranks[3] else (hidden.x,)
        back = (None, kept.h_gate_up.xa, *activated, None) if self.fused else activated
        of_down = _pairs(down, None if self.fused else (None, self.dh), xa_down, [None] * len(down))
        of_gate_up = _pairs(gate_up, (self.dgu.xa, kept.h_gate_up.x), xa_gate_up, [] if self.fused else self.dgu_parts)
        of_o = _pairs(o, (g.o_xa, None), xa_o, [g.x] * len(o))
        of_qkv = _pairs(qkv, (self.dqkv.xa, kept.h_qkv.x), xa_qkv, self.dqkv_parts)
        return Calls(
            norm1=Layered(self.norm1, None, None, kept.h_qkv.x, kept.rstd1, kept.mid),
            rope=Layered(self.rope, kept.turned, None, None),
            norm2=Layered(self.norm2, kept.mid, None, kept.h_gate_up.x, kept.rstd2, None),
            swiglu=Layered(self.swiglu, kept.gate, kept.up, *of_hidden),
            swiglu_back=Layered(self.swiglu_back, self.dh, kept.gate, kept.up, *back),
            of_mlp=Layered(self.of_mlp, *of_down, *of_gate_up, None),
            norm2_back=Layered(self.norm2_back, self.d_norm, kept.mid, None, kept.rstd2, g.x, g.x),
            pack=Layered(self.pack, None, None, None, None, None, self.dqkv.all),
            of_attention=Layered(self.of_attention, *of_o, *of_qkv, None),
            norm1_back=Layered(self.norm1_back, self.d_norm, kept.y[:-1], None, kept.rstd1[1:], g.x, g.x),
        )

    def of_stream(self, g: Stream) -> list[Tensor]:
        """What `Calls.of_mlp` takes of the gradient of the residual stream."""
        down = self.layout.spans[3]
        return [g.down_xa] * bool(down and not self.fused) + [g.x] * len(down)

    def sums(self, layers: int) -> Sums:
        return Sums(self.layout, self.cuts, self.row, layers)

    def lend(self, layers: int) -> Slabs:
        """Slabs for a node: those of the last step of this shape, once its backward is through; else new ones."""
        if self.slabs is None:
            self.slabs = Slabs(self.layout, *self.kind[:2], layers)
        elif self.slabs.lent():
            return Slabs(self.layout, *self.kind[:2], layers)
        return self.slabs

    @staticmethod
    def _empty(layout: Layout, rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=layout.dtype, device=layout.device)


class Calls(NamedTuple):
    """The launches of a layer, each called with its number and the tensors that are not the room's or the slabs' own."""

    norm1: Layered  # x, weight
    rope: Layered  # cos, sin
    norm2: Layered  # weight, what gets the copy
    swiglu: Layered  # A of down, if it has LoRA
    swiglu_back: Layered  # in one pass: dy (scale B) of down, the layer's row of sums
    of_mlp: Layered  # what `Room.of_stream` gives, the row
    norm2_back: Layered  # weight; for the gradient in the room
    pack: Layered  # dq, dk, dv, cos, sin
    of_attention: Layered  # attention's output, if o has LoRA, the row
    norm1_back: Layered  # weight; called with the number of the layer before


def _pairs(spans: Sequence[Span], of_a: Any, thin: Sequence[Any], wide: Sequence[Any]) -> list[Any]:
    """Thin and wide, each None where it is given at the call, for dA of all terms, unless there is none to make, and dB of each
    that has a `wide`."""
    found = [*of_a] if spans and of_a is not None else []
    return found + [one for pair in zip(thin, wide, strict=False) for one in pair]


def _products(groups: Sequence[tuple[bool, Sequence[Span], Cuts, bool]]) -> Callable[..., None]:
    """A launch that takes thin and wide for each group's dA of all terms at once, where it is wanted (first), and for dB of each
    term (last); then the row that all go to."""
    kinds: list[tuple[Place, bool, float]] = []
    for of_a, spans, cuts, of_b in groups:
        kinds += [(cuts.whole, False, 1.0)] if of_a and spans else []
        kinds += [(place, True, s.scale) for place, s in zip(cuts.db, spans, strict=True)] if of_b else []

    def run(*tensors: Tensor) -> None:
        *pairs, row = tensors
        each = zip(pairs[::2], pairs[1::2], kinds, strict=True)
        ops.thin_products([ops.Product(thin, wide, _cut(row, place), *kind) for thin, wide, (place, *kind) in each])

    return run


def _norm(eps: float, x: Tensor, weight: Tensor, out: Tensor, rstd: Tensor, copy: Tensor) -> None:
    ops.rms_norm_forward(x, weight, eps, out=out, rstd=rstd, copy=copy)


def _norm_back(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add_to: Tensor, out: Tensor) -> None:
    ops.rms_norm_backward(dy, x, weight, rstd, add_to=add_to, out=out)


def _swiglu_back(dh: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    ops.swiglu_backward(dh, gate, up, dgate, dup, h=dh)


def _fused_back(layout: Layout, cuts: Sequence[Cuts]) -> Callable[..., Any]:
    """swiglu's backward with what LoRA gets there: takes dh, gate, up, u, xa, dgate, dup, and the row of sums."""
    found = {s.start: (s, place) for s, place in zip(layout.spans[2], cuts[2].db, strict=True)}
    gate, up = found.get(0), found.get(layout.dims[1])
    places = {"da": cuts[3].da[0] if layout.spans[3] else None, "db_gate": gate and gate[1], "db_up": up and up[1]}
    rank, scales = gate[0].rank if gate else 0, (gate[0].scale if gate else 1.0, up[0].scale if up else 1.0)

    def back(dh: Tensor, g: Tensor, u: Tensor, dy: Tensor, xa: Tensor, dgate: Tensor, dup: Tensor, row: Tensor) -> None:
        gets = {name: _cut(row, place) for name, place in places.items() if place is not None}
        ops.swiglu_lora_backward(dh, g, u, dy, xa, dgate, dup, gate_rank=rank, scales=scales, **gets)

    return back


class Slabs:
    """What all layers keep between forward and backward. `tensors` are what autograd saves; the rest are views of them."""

    def __init__(self, layout: Layout, batch: int, tokens: int, layers: int, tensors: Sequence[Tensor] = ()) -> None:
        d, f, h, g, k = layout.dims
        n, (r_qkv, r_o, r_gate_up, r_down) = batch * tokens, layout.ranks
        if not tensors:
            widths = (d, d + r_qkv, (h + 2 * g) * k, d, r_o, d + r_gate_up, 2 * f, r_down)
            tensors = [torch.empty(layers, n, w, dtype=layout.dtype, device=layout.device) for w in widths]
            padded = round_up(n, 16)  # every layer's begins at an address that kernels like
            tensors.append(torch.empty(2, layers, padded, dtype=ops.wide(layout.dtype), device=layout.device))
        self.tensors = tensors
        y, h_qkv, qkv, mid, xa_o, h_gate_up, gate_up, xa_down, stats = tensors
        self.y: Views = y.unbind(0)  # of all layers but the last: what the next one reads
        self.h_qkv, self.h_gate_up = (_Borders(slab, d) for slab in (h_qkv, h_gate_up))
        self.qkv: Views = qkv.unbind(0)
        by_head = qkv.view(layers, batch, tokens, h + 2 * g, k)
        self.turned: Views = by_head.narrow(3, 0, h + g).unbind(0)
        by_head = by_head.transpose(2, 3)
        self.q: Views = by_head.narrow(2, 0, h).unbind(0)
        self.k: Views = by_head.narrow(2, h, g).unbind(0)
        self.v: Views = by_head.narrow(2, h + g, g).unbind(0)
        self.mid: Views = mid.unbind(0)
        self.xa_o: Views = xa_o.unbind(0)
        self.xa_down: Views = xa_down.unbind(0)
        self.gate_up: Views = gate_up.unbind(0)
        self.gate: Views = gate_up.narrow(2, 0, f).unbind(0)
        self.up: Views = gate_up.narrow(2, f, f).unbind(0)
        self.rstd1, self.rstd2 = (half.narrow(1, 0, n).unbind(0) for half in stats.unbind(0))
        # x A^T of each term, for its dB.
        borders = ((h_qkv, d), (xa_o, 0), (h_gate_up, d), (xa_down, 0))
        self.terms = [
            [slab.narrow(2, start + s.offset, s.rank).unbind(0) for s in spans]
            for (slab, start), spans in zip(borders, layout.spans, strict=True)
        ]
        self.calls: Calls | None = None  # made when first asked for
        self.holders = stats._use_count()  # without a node of autograd that has saved it

    def lent(self) -> bool:
        """Whether a backward may still read what its node saved; autograd lets go of it when none will."""
        return self.tensors[-1]._use_count() > self.holders


class _Borders:
    """`Border` for every layer."""

    def __init__(self, slab: Tensor, width: int) -> None:
        self.all: Views = slab.unbind(0)
        self.x: Views = slab.narrow(2, 0, width).unbind(0)
        self.xa: Views = slab.narrow(2, width, slab.shape[2] - width).unbind(0)


class Place(NamedTuple):
    """Of a matrix in a layer's row of sums: where it begins, in elements, its rows and columns."""

    start: int
    rows: int
    columns: int


class Cuts(NamedTuple):
    """Where the gradients of one group lie: dA of all terms as one matrix, dA of each, dB of each."""

    whole: Place
    da: list[Place]
    db: list[Place]


def cuts_of(layout: Layout) -> tuple[list[Cuts], int]:
    """The places by group, and how long a layer's row is."""
    d, f, h, _, k = layout.dims
    found, end = [], 0
    for inputs, rank, spans in zip((d, h * k, d, f), layout.ranks, layout.spans, strict=True):
        whole = Place(end, rank if spans else 0, inputs)
        da = [Place(end + s.offset * inputs, s.rank, inputs) for s in spans]
        db, end = [], end + whole.rows * inputs
        for s in spans:
            db.append(Place(end, s.stop - s.start, s.rank))
            end += (s.stop - s.start) * s.rank
        found.append(Cuts(whole, da, db))
    return found, end


def _cut(row: Tensor, place: Place) -> Tensor:
    return row[place.start : place.start + place.rows * place.columns].view(place.rows, place.columns)


class Sums:
    """The gradients of all LoRA parameters of all layers in one buffer: a row a layer, for the products; and as parameters."""

    def __init__(self, layout: Layout, cuts: Sequence[Cuts], row: int, layers: int) -> None:
        flat = torch.empty(layers, row, dtype=layout.trained, device=layout.device)
        self.rows: Views = flat.unbind(0)
        places = [place for group in cuts for pair in zip(group.da, group.db, strict=True) for place in pair]
        shapes = [(flat, (layers, p.rows, p.columns), (row, p.columns, 1), p.start) for p in places]
        self.by_parameter: list[Views] = [torch.as_strided(*shape).unbind(0) for shape in shapes]  # as `Parts.parameters`

    def out(self) -> list[Any]:
        """Layer by layer, as autograd takes them. Nothing else holds them then, so that no copy becomes p.grad."""
        return [one for of_layer in zip(*self.by_parameter, strict=True) for one in of_layer]
