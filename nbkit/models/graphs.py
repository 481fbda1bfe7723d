"""A whole micro-step (forward, loss, backward of the LoRA parameters) as one CUDA graph, where launches cost more than the work.

A graph is recorded for a shape that comes again and again, and replayed with new tokens: one launch in place of a thousand
(recorded.py). Here is which steps are recorded, which one a step takes, and what becomes of their memory. What a graph
holds fixed (adapters, storage of parameters, shapes, that all layers are fused) is compared at every replay; where it differs
the step runs eagerly, and a graph is recorded anew when the new state has come twice. On a small model the comparison takes a
tenth of the step, so the replay begins as soon as all storage is known to be in place, and the rest is compared while the GPU
works: a replay that turns out to be out of date is not used.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nbkit.config import IGNORE_INDEX
from nbkit.families import Family
from nbkit.kernels.linear_cross_entropy import linear_cross_entropy
from nbkit.models.capture import capture, forget, give_back, reason_of
from nbkit.models.head import head_of, plain_head, shaping
from nbkit.models.layer import Binding
from nbkit.models.layer.adapters import foreign, hooks_made, own_forward, plain_tensors
from nbkit.models.layer.arena import Arena
from nbkit.models.layer.bind import autocast_differs
from nbkit.models.planner import free_bytes
from nbkit.models.recorded import Pack, ReadOnly, Recorded, Replay

EAGER_FIRST = 2  # eager steps of a shape before it is recorded: kernels compile and cuDNN makes its plan in them
RECENT = 12  # and they lie within this many steps: batches of ever new lengths are not worth a recording each
FIRST_SCALE = 2.0**16  # of the loss in float16, until the first backward tells; torch's own scaler begins there too
PATIENCE = 3  # times that graphs make way for eager steps and are recorded again
MOST = 8  # graphs at a time: each holds its gradients and the activations of a step
# Weights times tokens up to which a graph pays: 8B gains 70 % at 512 tokens and nothing at 4,096; the 1B gains 130 % at 1,024.
LAUNCH_BOUND = 2.0e13


@dataclass
class Graphs:
    """The graphs of one model. `note` says what happened last, for the report."""

    model: nn.Module
    family: Family
    binding: Binding
    failed: str = ""  # why recording was given up: from then on all steps run eagerly
    note: str = "no step yet"
    recent: deque[tuple] = field(default_factory=lambda: deque(maxlen=RECENT))
    recorded: dict[tuple, Recorded] = field(default_factory=dict)
    outside: list[Tensor] = field(default_factory=list)  # the parameters that are in no decoder layer
    clock: int = 0
    forwards: list[Any] = field(default_factory=list)  # bound to what lies around the layers when it was last looked at
    hooks: int = -1  # how many there were anywhere when they were last looked through
    odd: str = ""  # what replays would not call, as it was found then
    version: int = -1  # the binding's, as the graphs know it
    only_lora: bool = False  # whether nothing but LoRA is trained
    weights: int = 0  # of all decoder linears
    storage: tuple[list[Tensor], list[int]] = ([], [])  # parameters and buffers of the model, and where they lay
    pool: Any = None
    held: int = 0  # bytes of it: eager steps cannot have them
    gave_way: int = 0  # times that they had to be given back for an eager step

    def step(
        self, ids: Tensor, targets: Tensor, items: float | Tensor | None, pack: Pack | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """(loss, hidden states for reading only) of ids and targets (B, T), or None where this step has to run eagerly.

        Then the adapters have been read: whoever calls takes `binding.looked` back after the decoder's forward.
        """
        key = self.key(ids, pack) if self.version == self.binding.version else None
        moved = key is not None and self.moved()
        early = self.recorded.get(key) if key is not None and not moved else None
        pending = early.replay(ids, targets, items, pack) if early is not None else None
        self.binding.refresh()
        if moved or self.version != self.binding.version:
            self.learn()
            key = self.key(ids, pack)
        one = (self.recorded.get(key) or self.record_if_due(key, ids.shape, pack)) if key is not None else None
        if one is None:
            self.make_way(ids.numel())
            self.binding.looked = True
            return None
        if pending is None or one is not early:
            pending = one.replay(ids, targets, items, pack)
        self.clock += 1
        one.last_used = self.clock
        self.note = f"{len(self.recorded)} CUDA graphs, the last of shape {tuple(ids.shape)}"
        loss = Replay.apply(one, pending, *one.params)
        return loss, ReadOnly.apply(one.hidden.detach().requires_grad_())

    def key(self, ids: Tensor, pack: Pack | None) -> tuple | None:
        """What tells the recorded steps apart; None for a step that cannot be one."""
        if not self.fits(ids):
            return None
        binding, plan = self.binding, self.binding.planned
        more = plan.count if plan is not None else 0
        return (tuple(ids.shape), binding.chosen, more, binding.checkpointed, pack.key if pack else None)

    def moved(self) -> bool:
        """Whether anything of the model lies elsewhere than the recorded steps read it."""
        tensors, places = self.storage
        with plain_tensors():
            return list(map(Tensor.data_ptr, tensors)) != places

    def __post_init__(self) -> None:
        self.binding.planning.append(self.drop)
        self.binding.records = self.records

    def drop(self) -> None:
        """Give all graphs and their memory back."""
        self.recorded.clear()
        self.recent.clear()
        self.pool, self.held = None, 0

    def learn(self) -> None:
        """What graphs hold fixed has changed: drop them, count anew what is trained and how large the model is."""
        self.drop()
        self.version = self.binding.version
        held = [*self.model.parameters(), *self.model.buffers()]
        self.storage = (held, [t.data_ptr() for t in held])
        bound = self.binding.bound
        inside = f"{self.family.decoder.layers}."
        self.outside = [p for name, p in self.model.named_parameters() if not name.startswith(inside)]
        trained = sum(1 for p in self.model.parameters() if p.requires_grad)
        self.only_lora = trained == sum(2 * len(g.terms) for b in bound for g in b.parts.groups)
        self.weights = sum(g.inputs * g.outputs for b in bound for g in b.parts.groups)

    def fits(self, ids: Tensor) -> bool:
        """Whether this call may be a graph at all; `note` gets the reason if not."""
        binding, plan = self.binding, self.binding.planned
        reasons = {
            "the tokens are not on the GPU": not ids.is_cuda,
            "layer inputs are kept in host RAM": binding.chosen.offload,
            "the embedding is in host RAM": plan is not None and plan.park,
            "memory is too short for a recorded step beside the eager ones": plan is not None and not plan.records,
        }
        why = self.obstacle(ids.numel()) or next((reason for reason, holds in reasons.items() if holds), None)
        self.note = why or self.note
        return why is None

    def obstacle(self, rows: int) -> str | None:
        """Why steps of so many tokens are recorded on no GPU, whatever memory there is; None where they are."""
        parts = self.binding.bound[0].parts if self.binding.bound else None
        passed_over = self.passed_over()
        reasons = {
            self.failed: bool(self.failed),
            "not every layer takes the fused path": parts is None or bool(self.binding.reasons),
            "autocast asks for another dtype": parts is not None and autocast_differs("cuda", parts.dtype),
            passed_over: bool(passed_over),
            "more is trained than LoRA": not self.only_lora or any(p.requires_grad for p in self.outside),
            "the GPU, not its launches, sets the pace": rows * self.weights > LAUNCH_BOUND,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def passed_over(self) -> str:
        """What replays would not call: a forward or hook of another library on what lies around the layers. "" if there is none.

        What lies in the layers is for them to see.
        """
        decoder, head = self.binding.decoder, head_of(self.model, self.family)
        around = [(name, module) for name, module in decoder.named_children() if not isinstance(module, nn.ModuleList)]
        forwards = [vars(module).get("forward") for _, module in around]
        quiet = self.hooks == hooks_made() and self.forwards == forwards and not self.odd
        own, why = own_forward(decoder), plain_head(head)
        if quiet and not own and why is None:
            return ""
        self.hooks, self.forwards = hooks_made(), forwards
        layers = [(f"layer {one.parts.index}", one.parts.layer) for one in self.binding.bound]
        self.odd = foreign([(type(decoder).__name__, decoder), *around, *layers], "a replay") or ""
        if why is not None:
            self.odd = f"{self.family.head.module}: {why}"
        elif own and not self.odd:
            self.odd = f"{type(decoder).__name__} has a forward of its own"
        return self.odd

    def records(self, rows: int) -> bool:
        """For the planner: whether steps of so many tokens are recorded, if there is memory for it."""
        if self.version != self.binding.version:
            self.learn()
        return self.obstacle(rows) is None

    def record_if_due(self, key: tuple, shape: Sequence[int], pack: Pack | None) -> Recorded | None:
        """Record this shape if it came often enough of late; None if it did not, or cannot be recorded."""
        if self.recent.count(key) < EAGER_FIRST:
            self.recent.append(key)
            self.note = "the first steps of a shape run eagerly"
            return None
        try:
            one = self.record(shape, pack)
        except RuntimeError as error:  # mostly for want of memory, or a step that waits for the device: rope that grows with it
            one = None
            why = reason_of(error)
            forget(error)
        if one is None:
            todo = "; a smaller batch leaves room for it" if "out of memory" in why else ""
            self.give_up(f"recording one of {' x '.join(map(str, shape))} tokens failed: {why}{todo}")
            return None
        while len(self.recorded) >= MOST:
            del self.recorded[min(self.recorded, key=lambda k: self.recorded[k].last_used)]
        self.recorded[key] = one
        return one

    def make_way(self, rows: int) -> None:
        """Before an eager step of so many tokens: recorded ones hold memory, and give it back where both do not fit.

        The plan is for one of them at a time: shapes that return are recorded, and others come between.
        """
        plan = self.binding.planned
        if not self.recorded or plan is None or rows > plan.rows:
            return  # more rows than were planned for: they are planned anew, for which graphs are dropped
        if free_bytes(self.binding.bound[0].parts.qkv.device) - self.held >= self.binding.planner.passing(rows):
            return
        self.gave_way += 1
        if self.gave_way < PATIENCE:
            self.drop()
            give_back()
            return
        self.give_up(
            "memory holds no recorded step beside eager ones of other shapes; batches of one shape, as packs are, need none"
        )

    def give_up(self, what: str) -> None:
        """From now on steps run eagerly, with all memory that graphs had. Said once, noted for good."""
        self.drop()
        self.binding.planner.stop_recording()
        self.binding.rows.handed = None  # a gradient on its way from layer to layer
        give_back()
        self.note = self.failed = f"steps run without CUDA graphs, since {what}"
        warnings.warn(f"Slower than it could be: {self.failed}.", stacklevel=2)

    def record(self, shape: Sequence[int], pack: Pack | None = None) -> Recorded:
        """Record one micro-step for ids of this shape, and for packs of this one's key."""
        binding, parts = self.binding, self.binding.bound[0].parts
        device, half = parts.qkv.device, parts.dtype == torch.float16
        ids = torch.zeros(*shape, dtype=torch.int64, device=device)
        targets = torch.zeros(*shape, dtype=torch.int64, device=device)
        items = torch.full((), -1.0, device=device)
        scale = torch.full((), FIRST_SCALE if half else 1.0, device=device)
        pack = pack.like() if pack is not None else None
        params = [p for b in binding.bound for p in b.params]
        # Leaves of their own on the same memory: autograd ties the real ones to the stream of steps that are still alive.
        leaves = [p.detach().requires_grad_() for p in params]
        arena = Arena([b.parts for b in binding.bound], params[0].dtype, device)

        def run() -> tuple[Tensor, Tensor]:
            with binding.stand_ins(leaves, arena), torch.autocast(device.type, enabled=False):
                hidden = self.model.get_submodule(self.family.decoder.base)(
                    input_ids=ids, use_cache=False, **(pack.inputs() if pack else {})
                ).last_hidden_state
                loss = self.loss(hidden, targets, items)
                arena.bring(torch.autograd.grad(loss * scale, leaves))
            return loss.detach(), hidden.detach()

        binding.stacks.drop()  # the buffers of eager steps
        graph, (loss, hidden), taken = capture(run, self.pool, device)
        self.pool, self.held = graph.pool(), self.held + taken
        places, scratch = arena.places, binding.scratch
        return Recorded(graph, ids, targets, pack, items, scale, loss, hidden, arena.flat, places, params, scratch, half)

    def loss(self, hidden: Tensor, targets: Tensor, items: Tensor) -> Tensor:
        """Sum over the labelled rows by `items`, or by their number where that is negative; nothing here waits for the device."""
        weight = self.model.get_submodule(self.family.head.module).get_parameter("weight")
        softcap, scale = shaping(self.model, self.family)
        rows, labels = hidden.flatten(0, 1), targets.flatten()
        total = linear_cross_entropy(
            rows, weight, labels, reduction="sum", softcap=softcap, logit_scale=scale, labelled_only=False
        )
        count = torch.where(items < 0, (labels != IGNORE_INDEX).sum().to(items.dtype), items)
        return total / count.clamp(min=1)
