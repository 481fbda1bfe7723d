"""The decoder layer as one node of autograd: it saves what the level says and runs the hand-written backward."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nbkit.kernels._autograd import first_order
from nbkit.kernels._launch import Prepared, as_rows
from nbkit.models.layer import backward, forward, ops
from nbkit.models.layer.forward import Call, Kept

_SINGLE = tuple(f.name for f in fields(Kept) if f.name != "attention")


class GradientRows:
    """Hands the residual stream's gradient from one layer's backward to the next in rows with room for LoRA's columns.

    The gradient that autograd passes on is a view of such rows. It is recognised by its storage, which is held here, so the
    address cannot have been given to anything else. What autograd and its hooks see, the first D columns, is never written again.
    """

    def __init__(self) -> None:
        self.handed: Tensor | None = None
        self.kind: tuple[Any, ...] = ()  # of tensors, which these are prepared for:
        self.norms: tuple[Prepared, Prepared] | None = None  # of the norm after the layers, forward and backward

    def norms_for(self, *kind: Any) -> tuple[Prepared, Prepared]:
        """The launches of the norm after the layers; `kind` is all that tells its tensors apart, but for addresses."""
        if self.norms is None or kind != self.kind:
            self.kind, self.norms = kind, (Prepared(partial(_norm, kind[0])), Prepared(_norm_back, strides_of=(0,)))
        return self.norms

    def receive(self, dy: Tensor, rows: int, width: int) -> Tensor:
        """dy (B, T, D) as the first D columns of (rows, width) rows."""
        held, self.handed = self.handed, None
        if (
            held is not None
            and held.untyped_storage().data_ptr() == dy.untyped_storage().data_ptr()
            and held.data_ptr() == dy.data_ptr()
            and dy.stride() == (dy.shape[1] * held.shape[1], held.shape[1], 1)
            and held.shape[0] == rows
            and held.shape[1] >= width
        ):
            return held
        g = torch.empty(rows, width, dtype=dy.dtype, device=dy.device)
        g[:, : dy.shape[-1]] = dy.reshape(rows, -1)
        return g

    def hand(self, g: Tensor, batch: int, width: int) -> Tensor:
        """The first `width` columns of g as (B, T, D), for autograd to pass on."""
        self.handed = g
        return g[:, :width].unflatten(0, (batch, -1))


class LayerFunction(torch.autograd.Function):
    """y = layer(x). `params` are what is trained, in the order of `Parts.parameters`; `call` holds everything else."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, call: Call, rows: GradientRows, *params: Tensor
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # dtypes are the weights' own; autocast would mix them
            y, kept = forward.run(call, as_rows(x), cos, sin, mask)
        ctx.call, ctx.gradient_rows = call, rows
        ctx.used = call.parts.used()
        held = None if call.parcel is not None else x
        ctx.save_for_backward(held, cos, sin, mask, *params, *kept.attention, *(getattr(kept, name) for name in _SINGLE))
        ctx.counts = (len(params), len(kept.attention))
        return y.resize_(x.shape)  # no view to autograd: hooks may write to it, as to the stock layer's

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        call: Call = ctx.call
        saved, (n, m) = ctx.saved_tensors, ctx.counts
        x, cos, sin, mask = saved[:4]
        kept = Kept(attention=saved[4 + n : 4 + n + m], **dict(zip(_SINGLE, saved[4 + n + m :], strict=True)))
        p, parcel = call.parts, call.parcel
        if parcel is not None:
            found = parcel.fetch()
            x, kept.out, kept.mid = found["x"], found.get("out"), found.get("mid")
            del found
        p.use(ctx.used)
        need_dx = ctx.needs_input_grad[0]
        width = p.d + max(p.o.rank, p.down.rank)
        with torch.autocast(x.device.type, enabled=False):
            g = ctx.gradient_rows.receive(dy, call.rows, width)
            if call.keep.in_place and (p.layer._backward_hooks or p.layer._backward_pre_hooks):
                g = g.clone()  # hooks are shown dy after this
            g, grads = backward.run(call, g, as_rows(x), cos, sin, mask, kept, need_dx)
            dx = ctx.gradient_rows.hand(g, call.batch, p.d) if g is not None and need_dx else None
        wanted = ctx.needs_input_grad[6:]
        return (dx, None, None, None, None, None, *(d if w else None for d, w in zip(grads, wanted, strict=True)))


def _norm(eps: float, x: Tensor, weight: Tensor, out: Tensor, rstd: Tensor) -> None:
    ops.rms_norm_forward(x, weight, eps, out=out, rstd=rstd)


def _norm_back(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, out: Tensor) -> None:
    ops.rms_norm_backward(dy, x, weight, rstd, out=out)


class FinalNorm(torch.autograd.Function):
    """RMSNorm after the last layer; its gradient goes down in rows with room for LoRA's columns, so that nothing copies it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, rows: GradientRows, width: int) -> Tensor:
        flat = as_rows(x)
        rstd = torch.empty(flat.shape[0], dtype=ops.wide(x.dtype), device=x.device)
        y = torch.empty_like(flat)
        norm, ctx.back = rows.norms_for(eps, width, x.shape, x.dtype, flat.stride(), weight.dtype, weight.stride())
        norm(flat, weight, y, rstd)
        ctx.save_for_backward(x, weight, rstd)
        ctx.gradient_rows, ctx.width = rows, width
        return y.resize_(x.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, rstd = ctx.saved_tensors
        d = x.shape[-1]
        g = torch.empty(rstd.shape[0], ctx.width, dtype=x.dtype, device=x.device)
        dw, given = None, (as_rows(dy), as_rows(x), weight, rstd)
        if ctx.needs_input_grad[1]:
            _, dw = ops.rms_norm_backward(*given, out=g[:, :d], weight_grad=True)
        else:
            ctx.back(*given, g[:, :d])
        return ctx.gradient_rows.hand(g, x.shape[0], d), None if dw is None else dw.to(weight.dtype), None, None, None
