"""All decoder layers of a small step as one node of autograd, straight down, with few calls of torch around the GEMMs.

Where a step has few tokens the GPU waits for the host: then what costs is a call, not a byte. This is the layer of forward.py
and backward.py at level 0, with the normalised rows kept, for LoRA alone and for layers that are alike: the same products in
the same order, without tiles, host RAM or a second stream, from buffers that room.py made beforehand. Everything else, and
whatever wants to see a single layer (hooks, hidden states of each), goes layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from nbkit.kernels._autograd import first_order
from nbkit.kernels._launch import as_rows, on_device
from nbkit.models import attention
from nbkit.models.layer.adapters import hooked, hooks_made, own_forward
from nbkit.models.layer.function import GradientRows
from nbkit.models.layer.parts import Parts
from nbkit.models.layer.room import Layout, Room, Slabs, Stream, layout_of
from nbkit.models.layer.weights import Scratch

PACE = 2.0e11  # tokens times weights of a layer up to which the host, not the GPU, sets the pace: 900 tokens of an 8B model
LARGEST_ROOM = 256 * 2**20  # bytes that stay allocated between steps


@dataclass(frozen=True)
class Stack:
    """One call of all layers."""

    parts: list[Parts]
    used: list[tuple[Any, ...]]  # what each reads in this forward
    scratch: Scratch  # says whether that has changed
    layout: Layout
    room: Room
    hows: list[attention.Attend]  # by layer
    batch: int
    tokens: int


def forward(call: Stack, x: Tensor, cos: Tensor, sin: Tensor, kept: Slabs) -> tuple[Tensor, list[tuple[Any, ...]]]:
    """y (N, D), and of each layer's attention: out (N, H K), its tensors, its numbers. x (N, D) contiguous; `kept` is filled.

    The norms copy the residual stream to where the next product is added to it: on a GPU `addmm` would need a launch for that.
    """
    room, n, mm = call.room, call.batch * call.tokens, torch.mm
    h1, h2, hidden, attended = kept.h_qkv, kept.h_gate_up, room.hidden, []
    y = torch.empty_like(x)
    go = room.calls(kept)
    for i, p in enumerate(call.parts):
        w_qkv, w_o, w_gate_up, w_down = p.qkv.views(), p.o.views(), p.gate_up.views(), p.down.views()
        norm1, norm2 = p.weights
        mid, xa_o = kept.mid[i], kept.xa_o[i]
        go.norm1(i, x, norm1)
        _project(h1.all[i], h1.x[i], h1.xa[i], w_qkv, p.qkv.bias, kept.qkv[i])
        go.rope(i, cos, sin)
        out, state, numbers = attention.forward(call.hows[i], kept.q[i], kept.k[i], kept.v[i], None)
        out = out.transpose(1, 2).reshape(n, -1)
        attended.append((out, state, numbers))
        mid.addmm_(out, w_o.base_t)
        if w_o.a_t is not None:
            mm(out, w_o.a_t, out=xa_o)
            mid.addmm_(xa_o, w_o.b_t)
        if p.o.bias is not None:
            mid.add_(p.o.bias)
        x = y if i == len(call.parts) - 1 else kept.y[i]
        go.norm2(i, norm2, x)
        _project(h2.all[i], h2.x[i], h2.xa[i], w_gate_up, p.gate_up.bias, kept.gate_up[i])
        if w_down.a is None:
            go.swiglu(i)
        else:
            go.swiglu(i, w_down.a)
        x.addmm_(hidden.all, w_down.whole_t)
        if p.down.bias is not None:
            x.add_(p.down.bias)
    return y, attended


def _project(rows: Tensor, x: Tensor, xa: Tensor, weight: Any, bias: Tensor | None, out: Tensor) -> None:
    """rows (N, I + R), `x` of them filled -> out = x W^T + LoRA (+ bias), and `xa` = x A^T."""
    if weight.a_t is not None:
        torch.mm(x, weight.a_t, out=xa)
    if bias is None:
        torch.mm(rows, weight.whole_t, out=out)
    else:
        torch.addmm(bias, rows, weight.whole_t, out=out)


def backward(
    call: Stack,
    g: Stream,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    kept: Slabs,
    attended: list[tuple[Any, ...]],
    need_dx: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx (N, D), if needed, and the LoRA gradients layer by layer. `g` is only read; room.g follows it after the first norm."""
    room, dqkv, dgu, mm = call.room, call.room.dqkv, call.room.dgu, torch.mm
    sums, stream = room.sums(len(call.parts)), room.of_stream(g)
    dx = torch.empty_like(x) if need_dx else None
    heads = (call.batch, call.tokens, *call.layout.dims[2::2])
    go = room.calls(kept)
    for i in reversed(range(len(call.parts))):
        p = call.parts[i]
        w_down, w_gate_up, w_o, w_qkv = p.down.views(), p.gate_up.views(), p.o.views(), p.qkv.views()
        norm1, norm2 = p.weights
        if w_down.b is not None:
            mm(g.x, w_down.b, out=g.down_xa)
        mm(g.down, w_down.back, out=room.dh)
        if room.fused:  # with dA of down and dB of gate and up
            go.swiglu_back(i, g.down_xa, sums.rows[i])
        else:
            go.swiglu_back(i)  # room.dh holds h from here on
        if w_gate_up.b is not None:
            mm(dgu.x, w_gate_up.b, out=dgu.xa)
        d_norm = mm(dgu.all, w_gate_up.back, out=room.d_norm)
        go.of_mlp(i, *stream, sums.rows[i])
        if g is room.g:
            go.norm2_back(i, norm2)
        else:
            room.first_back(d_norm, kept.mid[i], norm2, kept.rstd2[i], g.x, room.g.x)
            g, stream = room.g, room.of_stream(room.g)
        if w_o.b is not None:
            mm(g.x, w_o.b, out=g.o_xa)
        mm(g.o, w_o.back, out=room.do)
        out, state, numbers = attended[i]
        by_head = out.view(heads).transpose(1, 2)
        grads = attention.backward(call.hows[i], room.do_heads, kept.q[i], kept.k[i], kept.v[i], by_head, None, state, numbers)
        go.pack(i, *grads, cos, sin)
        if w_qkv.b is not None:
            mm(dqkv.x, w_qkv.b, out=dqkv.xa)
        if w_o.b is None:
            go.of_attention(i, sums.rows[i])
        else:
            go.of_attention(i, out, sums.rows[i])
        if i:
            mm(dqkv.all, w_qkv.back, out=room.d_norm)
            go.norm1_back(i - 1, norm1)
        elif dx is not None:
            d_norm = mm(dqkv.all, w_qkv.back, out=room.d_norm)
            room.last_back(d_norm, x, norm1, kept.rstd1[i], g.x, dx)
    return dx, sums.out()


class StackFunction(torch.autograd.Function):
    """y = the last layer's output. `params` are what is trained, layer by layer in the order of `Parts.parameters`."""

    @classmethod
    def apply(cls, *given: Any) -> Any:
        """As any function's, without a look at each of hundreds of parameters for what vmap and the like have left behind."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*given)
        return super(torch.autograd.Function, cls).apply(*given)

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, call: Stack, rows: GradientRows, *params: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False), on_device(x):  # dtypes are the weights' own; autocast would mix them
            kept = call.room.lend(len(call.parts))
            y, attended = forward(call, as_rows(x).contiguous(), cos, sin, kept)
        ctx.call, ctx.gradient_rows, ctx.views = call, rows, kept
        ctx.used, ctx.changes = call.used, call.scratch.changes
        ctx.numbers = [(len(state), numbers) for _, state, numbers in attended]
        states = [t for out, state, _ in attended for t in (out, *state)]
        # Parameters are not read again, their copies in the borders are: so of them it is the versions that count.
        ctx.params, ctx.versions, ctx.count = params, versions_of(params), len(kept.tensors)
        ctx.save_for_backward(x, cos, sin, *kept.tensors, *states)
        return y.resize_(x.shape)  # no view to autograd: whoever gets it may write to it, as to the stock layers'

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved, m, call = ctx.saved_tensors, ctx.count, ctx.call
        if versions_of(ctx.params) != ctx.versions:
            raise RuntimeError("An adapter's weights were modified in place between a step's forward and its backward.")
        x, cos, sin = saved[:3]
        kept, ctx.views = ctx.views, None  # views hold memory that autograd lets go of after this, unless the graph is retained
        if kept is None:
            kept = Slabs(call.layout, call.batch, call.tokens, len(call.parts), saved[3 : 3 + m])
        at, attended = 3 + m, []
        for count, numbers in ctx.numbers:
            attended.append((saved[at], saved[at + 1 : at + 1 + count], numbers))
            at += 1 + count
        if ctx.changes != call.scratch.changes:
            for p, used in zip(call.parts, ctx.used, strict=True):
                p.use(used)
        g = ctx.gradient_rows.receive(dy, call.batch * call.tokens, width := call.layout.dims[0] + max(call.layout.ranks[1::2]))
        if g.stride(0) != width:  # launches are prepared for rows as the room's
            g = torch.empty(g.shape[0], width, dtype=g.dtype, device=g.device).copy_(g[:, :width])
        with torch.autocast(x.device.type, enabled=False), on_device(x):
            dx, grads = backward(call, Stream(g, call.layout), as_rows(x), cos, sin, kept, attended, ctx.needs_input_grad[0])
        wanted = ctx.needs_input_grad[5:]
        if not all(wanted):
            grads = [d if w else None for d, w in zip(grads, wanted, strict=True)]
        return (dx.view(x.shape) if dx is not None else None, None, None, None, None, *grads)


def versions_of(params: Sequence[Tensor]) -> list[int]:
    """Autograd's counts of their changes in place."""
    return list(map(attrgetter("_version"), params))


class Stacks:
    """Which forwards of one model run all layers at once; the first layer runs them, the others hand its result on."""

    def __init__(self, binding: Any, own: Callable[..., Any]) -> None:
        """`own` is the forward that a layer's instance runs unless another library has put itself around it."""
        self.binding, self.own = binding, own
        binding.planning.append(self.drop)
        self.version = -1  # of the binding, as it is known here
        self.layout: Layout | None = None  # None: layers differ, or train more than LoRA
        self.weights = 0  # of a layer
        self.params: list[Tensor] = []
        self.parts: list[Parts] = []
        self.used: list[tuple[Any, ...]] = []  # of the parts, as it was at
        self.changes = -1  # of the binding's scratch
        self.fitting: tuple[Any, ...] | None = None  # what all layers fitted by when they were last looked at
        self.kinds: list[tuple[Any, ...]] = []  # what attention goes by, by layer
        self.firsts: list[tuple[int, tuple[Any, ...]]] = []  # the first layer of each kind
        self.room: Room | None = None  # of the last shape
        self.ahead: Tensor | None = None  # the last layer's output, in a forward whose first layer has run them all

    def begin(self) -> None:
        """Call before each training forward of the model."""
        self.ahead = None

    def rest(self) -> None:
        """Give back what the next step could use again: whoever evaluates or generates now may want the memory."""
        if self.room is not None:
            self.room.slabs = None

    def drop(self) -> None:
        """Give back what stays allocated between steps."""
        self.room = None

    def call(self, first: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Stack | None:
        """All layers as one call on x (B, T, D) and rope's tables; None where this step goes layer by layer.

        `first` is the layer that is asked; the first one runs them all.
        """
        bound = self.binding.bound
        if first is not bound[0] or self.binding.recording:
            return None
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return None  # checkpoint, save_on_cpu: they take what is saved, and this node holds its own
        if self.version != self.binding.version:
            self._learn()
        layout, (batch, tokens, _) = self.layout, x.shape
        if layout is None or not self._fits(layout, batch * tokens):
            self.drop()
            return None
        turned = (cos.dtype, cos.shape, cos.stride(), sin.stride())
        if self.room is None or self.room.kind != (batch, tokens, turned):
            self.drop()  # before the next is made
            self.room = Room(layout, batch, tokens, turned)
        scratch = self.binding.scratch
        if self.changes != scratch.changes:
            self.used, self.changes = [p.used() for p in self.parts], scratch.changes
        return Stack(self.parts, self.used, scratch, layout, self.room, self._attends(x), batch, tokens)

    def _fits(self, layout: Layout, rows: int) -> bool:
        """Whether the host sets the pace of a step of so many rows, all is kept, and nobody looks at a layer."""
        binding = self.binding
        if rows * self.weights > PACE or layout.room_bytes(rows) > LARGEST_ROOM:
            return False
        if len(binding.bound) != binding.decoder.config.num_hidden_layers:
            return False
        if own_forward(binding.decoder):
            return False  # which may leave layers out
        # All that makes layers fit; hooks that are taken away matter only where there were some.
        about = (binding.everything, hooks_made(), binding.keep, binding.planner.plan)
        if binding.everything is None or about != self.fitting:
            self.fitting = about if all(self._layer_fits(one) for one in binding.bound) else None
        return self.fitting is not None

    def _layer_fits(self, one: Any) -> bool:
        keep = self.binding.keep_of(one.parts.index)
        return not (keep.level or keep.tile or self._watched(one.parts.layer))

    def run(self, call: Stack, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The last layer's output."""
        self.ahead = StackFunction.apply(x, cos, sin, call, self.binding.rows, *self.params)
        return self.ahead

    def _learn(self) -> None:
        """Look at the layers again: adapters, or what is trained, changed."""
        bound = self.binding.bound
        layout = None if self.binding.reasons else layout_of([one.parts for one in bound])
        self.room = self.room if layout == self.layout else None
        self.layout, self.version = layout, self.binding.version
        self.weights = sum(g.inputs * g.outputs for g in bound[0].parts.groups)
        self.parts, self.changes = [one.parts for one in bound], -1
        self.params = [p for one in bound for p in one.params]
        self.kinds = [(one.parts.window, one.parts.scale, one.parts.softcap) for one in bound]
        self.firsts = [(self.kinds.index(kind), kind) for kind in dict.fromkeys(self.kinds)]

    def _attends(self, x: Tensor) -> list[attention.Attend]:
        """How each layer attends; layers that are alike are asked about once."""
        binding = self.binding
        found = {kind: attend(binding, binding.bound[index].parts, x, None, binding.documents) for index, kind in self.firsts}
        return [found[kind] for kind in self.kinds]

    def _watched(self, layer: Any) -> bool:
        """Whether somebody wants to see this very layer: a hook, or a forward of another library around the bound one."""
        return hooked(layer) or getattr(vars(layer).get("forward"), "__func__", None) is not self.own


def attend(binding: Any, p: Parts, x: Tensor, mask: Tensor | None, documents: attention.Documents | None) -> attention.Attend:
    """How a layer attends to x (B, T, D); the report reads it from the binding."""
    shape = (x.shape[0], p.h, x.shape[1], p.k)
    how = attention.choose(
        shape, x, scale=p.scale, mask=mask, window=p.window, shapes=binding.shapes, documents=documents, softcap=p.softcap
    )
    binding.how.add(f"{how.kind}: {how.why}")
    return how
