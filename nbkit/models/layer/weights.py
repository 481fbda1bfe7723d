"""Linears that read the same input share one weight buffer, with their LoRA matrices in its border.

    buffer (O + P, I + P) =  [ W_OI   scale * B_OR   . ]        x_NI -> [x | x A^T] -> y = [x | x A^T] [W | scale B]^T
                             [ A_RI        .         . ]        dy   -> [dy | dy (scale B)] -> dx = [dy | ..] [W ; A]

So base and LoRA are one GEMM over K = I + R with float32 accumulation, with no second pass over the output. With several
linears (q, k, v) the rows of W are stacked and B is block-diagonal. 16-bit and float32 weights live in the buffer (the
modules' Parameters become views of it: nothing is held twice); NF4 weights stay packed where bitsandbytes has them and are
dequantised into one scratch of that form, shared by all layers, at each use, or once for all where memory is free (`copied`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nbkit.errors import ModelError
from nbkit.kernels.lora_border import write_borders
from nbkit.kernels.nf4 import Nf4, dequantize_nf4
from nbkit.models.layer.adapters import Term, Unfit, Watch, base_of, differ, kind_of, part_of, terms

RANK_STEP = 16  # ranks are padded with zeros to a multiple of it: tensor cores read K in such steps
STRIDE_STEP = 64  # the border's width: rows stay 128-byte aligned in 16 bits


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


@dataclass
class Scratch:
    """Buffers that all layers of a model share, by group name: what an NF4 weight is dequantised into."""

    buffers: dict[str, Tensor] = field(default_factory=dict)
    shaped: dict[str, Tensor] = field(default_factory=dict)  # the last view of each
    owner: dict[str, object] = field(default_factory=dict)  # which group's weight a buffer holds now
    changes: int = 0  # goes up whenever a layer may read other adapters, weights or norms than before

    def take(self, name: str, rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A (rows, columns) view. Its contents are the last writer's; `owner` says whose."""
        held = self.buffers.get(name)
        if held is None or held.numel() < rows * columns or held.dtype != dtype or held.device != like.device:
            self.buffers[name] = held = torch.empty(rows * columns, dtype=dtype, device=like.device)
            self.owner.pop(name, None)
            self.shaped.pop(name, None)
        view = self.shaped.get(name)
        if view is None or view.shape != (rows, columns):
            view = self.shaped[name] = held[: rows * columns].view(rows, columns)
        return view

    def clear(self) -> None:
        """Give all buffers back."""
        self.buffers.clear()
        self.shaped.clear()
        self.owner.clear()


class Own(NamedTuple):
    """What of a linear itself is trained, on output rows start:stop of its group; None: frozen."""

    weight: Tensor | None
    bias: Tensor | None
    start: int
    stop: int


class Used(NamedTuple):
    """What a forward read: terms of adapters, what is trained of the linears, these, which PEFT may switch, their tensors."""

    terms: list[Term]
    own: list[Own]
    bases: list[Any]
    tensors: list[Any]


class Views(NamedTuple):
    """A weight with its border by the parts that products read; None: the group has no LoRA."""

    weight: Tensor  # (O + R, I + R)
    whole_t: Tensor  # (I + R, O): [W scale B]^T
    base_t: Tensor  # (I, O): W^T
    back: Tensor  # (O + R, I): [W ; A]
    a: Tensor | None  # (R, I)
    a_t: Tensor | None  # (I, R)
    b: Tensor | None  # (O, R), scaled
    b_t: Tensor | None  # (R, O)

    @classmethod
    def of(cls, weight: Tensor, o: int, i: int, r: int) -> Views:
        whole, a, b = weight[:o, : i + r], weight[o : o + r, :i], weight[:o, i : i + r]
        lora = (a, a.t(), b, b.t()) if r else (None, None, None, None)
        return cls(weight, whole.t(), weight[:o, :i].t(), weight[: o + r, :i], *lora)


class Group:
    """The linears `names` of `parent`, which read the same input. `name` is "qkv", "o", "gate_up" or "down"."""

    def __init__(self, name: str, parent: nn.Module, names: Sequence[str], scratch: Scratch) -> None:
        self.name, self.parent, self.names, self.scratch = name, parent, tuple(names), scratch
        self.copied = False  # NF4: whether a dequantised copy is held for good
        self.buffer: Tensor | None = None  # None: before the first use, and for NF4 that is not copied
        self.terms: list[Term] = []
        self.own: list[Own] = []
        self.rank = 0  # border columns in use, padded to RANK_STEP
        self.bias: Tensor | None = None
        self.shares_bias = False  # whether the modules' biases are parts of it
        self.places: list[tuple[dict[str, Any], str, Tensor, int]] = []  # weights and biases, as they were last seen
        self._watch: Watch | None = None
        self._views: Views | None = None
        self._look_at([base_of(part_of(parent, n)) for n in names])
        self.used = Used([], [], self.bases, tensors_of(self.bases))

    def _look_at(self, bases: list[Any]) -> None:
        """Take these as the linears of the group. Raises: Unfit where they do not go together."""
        names = ", ".join(self.names)
        odd = next((b for b in bases if not isinstance(b, nn.Linear)), None)
        if odd is not None:
            raise Unfit(f"one of {names} is a {kind_of(odd)}, not a plain or NF4 linear")
        if any(b._parameters.get("weight") is None for b in bases):
            raise Unfit(f"the weight of {names} is made anew in each forward (pruned or parametrized)")
        if len({id(b.weight) for b in bases}) != len(bases):
            raise Unfit(f"two of {names} share one weight")
        self.bases = bases
        self.sizes = tuple(b.out_features for b in bases)
        self.inputs, self.outputs = bases[0].in_features, sum(self.sizes)
        self.device: torch.device = bases[0].weight.device
        if any(b.in_features != self.inputs or b.weight.device != self.device for b in bases):
            raise Unfit(f"{names} differ in input size or device")
        self.packed = [Nf4.of(b.weight) for b in bases]
        if any(self.packed) and not all(self.packed):
            raise Unfit(f"{names} are stored in different formats")
        self.nf4 = all(self.packed)
        self.dtype = self._dtype(bases)
        self.bias = self._bias(bases)

    def _dtype(self, bases: Sequence[nn.Module]) -> torch.dtype:
        if self.nf4:
            found = {b.compute_dtype for b in bases}
        else:
            odd = next((b for b in bases if type(b) is not nn.Linear), None)
            if odd is not None:
                raise Unfit(f"one of {', '.join(self.names)} is a {kind_of(odd)}, not a plain or NF4 linear")
            odd = next((b.weight for b in bases if type(b.weight) not in (nn.Parameter, Tensor)), None)
            if odd is not None:
                raise Unfit(f"a weight of {', '.join(self.names)} is a {kind_of(odd)}, a format that no kernel here knows")
            found = {b.weight.dtype for b in bases}
        if len(found) != 1 or not next(iter(found)).is_floating_point:
            raise Unfit(f"{', '.join(self.names)} compute in different dtypes")
        return next(iter(found))

    def _bias(self, bases: Sequence[Any]) -> Tensor | None:
        """The biases side by side; where all are there in the dtype of the products, they become parts of it."""
        self.shares_bias = False
        if all(b.bias is None for b in bases):
            return None
        parts = [b.bias if b.bias is not None else b.weight.new_zeros(b.out_features) for b in bases]
        found = torch.cat([p.detach().to(self.dtype) for p in parts])
        if all(b.bias is not None and b.bias.dtype == self.dtype for b in bases):
            for base, part in zip(bases, found.split(self.sizes), strict=True):
                base.bias.data = apart(part)
            self.shares_bias = True
        return found

    # -- what the layer reads ------------------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Read the adapters' state; True if anything changed since the last call. Raises: Unfit."""
        if self._watch is not None and self._watch.fresh() and self.in_place():
            return False
        modules = self.parent._modules
        self._follow([base_of(modules[n]) for n in self.names])
        if not self.in_place():  # moved, cast, merged or replaced
            self._look_at(self.bases)
        found: list[Term] = []
        start = offset = 0
        own: list[Own] = []
        for name, size in zip(self.names, self.sizes, strict=True):
            module = modules[name]
            own += self._own_of(base_of(module), name, start, start + size)
            of_linear = terms(module, start, start + size, offset, name)
            found += of_linear
            start, offset = start + size, offset + sum(t.rank for t in of_linear)
        self._take(Used(found, own, self.bases, tensors_of(self.bases)))
        self._watch = Watch(self.parent, self.names)
        return True

    def _take(self, used: Used) -> None:
        self.used, self.terms, self.own = used, used.terms, used.own
        self.rank = round_up(max((t.offset + t.rank for t in used.terms), default=0), RANK_STEP)
        self._adopt()
        held = [(base._parameters, name) for base in self.bases for name in ("weight", "bias")]
        self.places = [(of, name, p, p.data_ptr()) for of, name in held if (p := of[name]) is not None]

    def _follow(self, bases: list[Any]) -> None:
        """Take the linears that are in use now, where PEFT has switched to or from a trained copy. Raises: Unfit."""
        left = [base for base in self.bases if all(base is not one for one in bases)]
        if not left:
            return
        self._give_back(left)
        self.buffer = None
        self.scratch.owner.pop(self.name, None)
        self._look_at(bases)

    def _own_of(self, base: nn.Module, name: str, start: int, stop: int) -> list[Own]:
        """What of the linear itself is trained. Raises: Unfit for a packed weight."""
        weight, bias = (p if p is not None and p.requires_grad else None for p in (base.weight, base.bias))
        if weight is not None and self.nf4:
            raise Unfit(f"the packed weight of {name} is trained")
        return [] if weight is None and bias is None else [Own(weight, bias, start, stop)]

    def bring_bias(self) -> None:
        """Biases that are no parts of the one here (bitsandbytes may hold them in another dtype) are copied again."""
        if self.bias is not None and not self.shares_bias:
            self.bias = self._bias(self.bases)

    def parameters(self) -> list[Tensor]:
        """All that is trained: A and B of each term, then weights and biases of the linears themselves."""
        lora = [p for t in self.terms for p in (t.a, t.b)]
        return lora + [p for o in self.own for p in (o.weight, o.bias) if p is not None]

    def use(self, used: Used) -> None:
        """Put back what a forward used, where another adapter was switched to between it and its backward.

        Raises: ModelError where the linears bear other weights by now: those of the forward are nowhere any more.
        """
        if used is self.used:
            return
        if differ(tensors_of(used.bases), used.tensors):
            raise ModelError(
                f"The weights of {', '.join(self.names)} were replaced, and a forward was made, between another forward and its "
                "backward; run the backward first."
            )
        self._follow(used.bases)
        self._watch = None
        self.scratch.owner.pop(self.name, None)
        self._take(used)

    def in_place(self) -> bool:
        """Whether weights and biases are where they were last seen: `model.to()`, say, or a merge gives them new storage."""
        return bool(self.places) and all(of.get(name) is p and p.data_ptr() == at for of, name, p, at in self.places)

    def report_to(self, everything: Watch) -> bool:
        """Add what `refresh` looks at; False if it has to be asked each time."""
        if self._watch is None or (self.bias is not None and not self.shares_bias):
            return False
        everything.add(self._watch)
        everything.places.append((vars(self), "_watch", self._watch))
        everything.places += [place[:3] for place in self.places]
        everything.addresses += [place[2:] for place in self.places]
        everything.addresses += [(p, p.data_ptr()) for t in self.terms for p in (t.a, t.b)]
        return True

    def weight(self) -> Tensor:
        """(O + R, I + R): the buffer with the weight and border of this group in it, dequantised now if need be."""
        if self.buffer is not None:
            return self.buffer
        if not self.nf4:
            raise ModelError("The model was unpatched between this step's forward and its backward; run the forward again.")
        width = self.inputs + round_up(self.rank, STRIDE_STEP)
        out = self.scratch.take(self.name, self.outputs + self.rank, width, self.packed[0].data, self.dtype)
        if self.scratch.owner.get(self.name) is not self:
            self._dequantise(out)
            used = max((t.offset + t.rank for t in self.terms), default=0)
            if used < self.rank:  # rows of A that pad the rank: garbage times a zero column of B could still be NaN
                out[self.outputs + used : self.outputs + self.rank].zero_()
            self.scratch.owner[self.name] = self
        return out

    def views(self) -> Views:
        """`weight()` by its parts; the views are made once for each place that it lies in."""
        held = self._views
        if held is not None and held.weight is self.buffer:
            return held
        weight = self.weight()
        if held is None or held.weight is not weight:
            held = self._views = Views.of(weight, self.outputs, self.inputs, self.rank)
        return held

    def _dequantise(self, out: Tensor) -> None:
        start = 0
        for packed, size in zip(self.packed, self.sizes, strict=True):
            dequantize_nf4(packed, out, start, self.outputs, self.rank, [t for t in self.terms if t.start == start])
            start += size

    def borders(self) -> list[tuple[Tensor, Tensor, float]]:
        """(source, destination, factor) of every copy that brings the border up to date; none without a buffer."""
        if self.buffer is None:
            return []
        i, o, w = self.inputs, self.outputs, self.buffer
        copies = []
        for t in self.terms:
            columns = slice(t.offset, t.offset + t.rank)
            copies.append((t.a, w[o:][columns, :i], 1.0))
            copies.append((t.b, w[t.start : t.stop, i:][:, columns], t.scale))
        return copies

    # -- ownership of weights ------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Move 16-bit weights into one bordered buffer (or copy NF4 ones there), unless they are there with room enough."""
        self._views = None
        if self.nf4 and not self.copied:
            return
        i, o, room = self.inputs, self.outputs, round_up(self.rank, STRIDE_STEP)
        if self.buffer is None or not self.in_place() or self.buffer.shape[1] < i + self.rank:
            self.buffer = self._moved(torch.empty(o + room, i + room, dtype=self.dtype, device=self.device))
        self.buffer[:o, i:].zero_()
        self.buffer[o:].zero_()
        write_borders(self.borders())

    def _moved(self, buffer: Tensor) -> Tensor:
        if self.nf4:
            self._dequantise(buffer)
            return buffer
        start = 0
        for base in self.bases:
            rows = buffer[start : start + base.out_features, : self.inputs]
            rows.copy_(base.weight.detach())
            base.weight.data = apart(rows)
            start += base.out_features
        return buffer

    def copy(self, wanted: bool) -> None:
        """Hold a dequantised copy of NF4 weights from the next refresh on, or give it back; others stay as they are."""
        if self.nf4 and wanted != self.copied:
            self.copied, self.buffer, self._watch, self._views = wanted, None, None, None

    def release(self) -> None:
        """Give each module its own contiguous weight and bias back."""
        self._give_back(self.bases)
        self.buffer, self._watch, self._views, self.places = None, None, None, []

    def _give_back(self, bases: Sequence[nn.Module]) -> None:
        """What of these linears is a part of a buffer here gets storage of its own, under whatever name it is held by now."""
        ours = [(at := t.data_ptr(), at + t.numel() * t.element_size()) for t in (self.buffer, self.bias) if t is not None]
        for p in (p for base in bases for p in base.parameters()):
            if any(first <= p.data_ptr() < end for first, end in ours):
                p.data = p.detach().clone(memory_format=torch.contiguous_format)


def tensors_of(bases: Sequence[Any]) -> list[Any]:
    """Weight and bias of each."""
    return [base._parameters.get(name) for base in bases for name in ("weight", "bias")]


def apart(part: Tensor) -> Tensor:
    """The same memory as a storage of its own, which keeps the whole alive.

    Who saves a model takes tensors of one storage for one tied weight: transformers refuses them, accelerate drops all but one.
    """
    return torch.from_dlpack(part)
