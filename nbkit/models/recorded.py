"""One recorded micro-step: the CUDA graph with the tensors it reads and writes, packs that it takes, and its nodes of autograd.

To autograd a replay is one node: its forward replays the graph, which leaves the loss and the gradients for an upstream gradient
of 1; its backward multiplies them by the upstream gradient. So accumulation, hooks, clipping and any optimizer work as before.
In float16 the loss scale has to be inside, where gradients would vanish: each replay takes the upstream gradient of the step
before as its scale, so a scaler that halves its scale after an overflow is followed one step later.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbkit.kernels._autograd import first_order
from nbkit.kernels._launch import power_of_two
from nbkit.models.layer.arena import Place
from nbkit.models.layer.weights import Scratch


@dataclass(frozen=True)
class Pack:
    """Where the documents of a step lie: positions (1, T), and `starts` int32 (documents + 1,); `longest` bounds their tokens.

    In a recorded step `starts` has room for more documents, which are empty.
    """

    positions: Tensor
    starts: Tensor
    longest: int

    @property
    def key(self) -> tuple[int, int]:
        """(documents there is room for, longest) of the recorded step that takes this one."""
        tokens = self.positions.numel()
        # Blocks of queries that a document does not have cost almost nothing; a recording for each length would.
        longest = tokens if tokens <= 8192 else min(tokens, power_of_two(self.longest))
        return power_of_two(max(len(self.starts) - 1, 32)), longest

    def like(self) -> Pack:
        """The tensors of a recorded step for packs of this key; all tokens are one document so far."""
        room, longest = self.key
        starts = torch.full((room + 1,), self.positions.numel(), dtype=torch.int32, device=self.positions.device)
        starts[: len(self.starts)] = self.starts
        return Pack(self.positions.clone(), starts, longest)

    def fill(self, other: Pack) -> None:
        """Take over another pack of the same key."""
        self.positions.copy_(other.positions)
        self.starts.fill_(self.positions.numel())
        self.starts[: len(other.starts)].copy_(other.starts)

    def inputs(self) -> dict[str, Any]:
        """As keyword arguments of a decoder."""
        return {"position_ids": self.positions, "cu_seq_lens_q": self.starts, "max_length_q": self.longest}


class Pending:
    """The gradients of one replay until its backward: the graph's own memory, copied only if the graph is replayed before."""

    def __init__(self, flat: Tensor, scale: Tensor | None) -> None:
        self.flat: Tensor | None = flat
        self.scale = scale  # by which they are too large; None: 1
        self.used = False


@dataclass
class Recorded:
    """One graph with the tensors it reads and writes."""

    graph: Any
    ids: Tensor
    targets: Tensor
    pack: Pack | None
    items: Tensor
    scale: Tensor  # of the loss inside the graph
    loss: Tensor
    hidden: Tensor
    flat: Tensor  # the gradients, as the layers' backward leaves them
    places: list[Place]  # of each parameter's in it
    params: list[Tensor]
    scratch: Scratch  # what the step dequantises into
    follows: bool = False  # float16: `scale` follows the upstream gradient
    upstream: Tensor | None = None  # of the last backward
    pending: Any = None  # weak reference to the last replay's Pending
    last_used: int = 0

    def replay(self, ids: Tensor, targets: Tensor, items: float | Tensor | None, pack: Pack | None) -> Pending:
        """Run the step for these ids and targets. Its backward takes the gradients from what this returns."""
        self.scratch.owner.clear()  # the replay dequantises into it behind its back
        last = self.pending() if self.pending is not None else None
        if last is not None:
            last.flat = None if last.used else self.flat.clone()
        self.ids.copy_(ids)
        self.targets.copy_(targets)
        if self.pack is not None and pack is not None:
            self.pack.fill(pack)
        self.items.fill_(-1.0 if items is None else items)
        if self.upstream is not None:
            self.scale.copy_(self.upstream)
        self.graph.replay()
        pending = Pending(self.flat, self.scale.clone() if self.follows else None)
        self.pending = weakref.ref(pending)
        return pending


class Replay(torch.autograd.Function):
    """A replay as a node of autograd: the loss of `params`, whose gradients the graph has made already."""

    @staticmethod
    def forward(ctx: Any, one: Recorded, pending: Pending, *params: Tensor) -> Tensor:
        ctx.one, ctx.pending = one, pending
        return one.loss.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if ctx.pending.flat is None:
            raise RuntimeError(
                "The gradients of this step are gone: another step ran since its first backward; run it forward again."
            )
        if ctx.pending.scale is not None:
            ctx.one.upstream = g.detach().clone()
            scaled = ctx.pending.flat * (g / ctx.pending.scale)
        else:
            scaled = ctx.pending.flat * g
        ctx.pending.used = True
        return (None, None, *(place.of(scaled) for place in ctx.one.places))


class ReadOnly(torch.autograd.Function):
    """The hidden states of a recorded step: they may be read until the next one, and carry no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        raise RuntimeError(
            "Logits of a step that ran as a CUDA graph carry no gradient; patch with graphs=False to train on a loss of your own."
        )
