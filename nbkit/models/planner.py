"""Which keep level the layers take, and whether NF4 weights get a 16-bit copy: from the memory that is free before the step.

Plans differ in speed and bytes alone, never in results. The planner takes the fastest that fits with a margin; a larger batch
later is planned again. Where a plan leaves room, the last layers keep more than the rest. In order of speed:

    level 0 with the normalised rows and a 16-bit copy of NF4 weights · without these rows · levels 0 to 3 · for long rows
    level 3 lean, what it keeps in host RAM · level 4 lean · the same with layer inputs in host RAM, with the embedding in host
    RAM too, in smaller tiles

"lean": token tiles, head groups in the attention backward, gradients in place. Where gradient checkpointing was asked for,
only the lean ones are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from nbkit.hardware import forecast
from nbkit.hardware.forecast import HOST_SHARE, TILE
from nbkit.hardware.probe import ram
from nbkit.models.layer.keep import DEFAULT, Keep

MARGIN = 0.03  # of the free memory: fragments, and what the forecast does not know
RESERVE = 128 * 2**20  # cuBLAS workspaces, cuDNN, other small users
LONG = 16384  # rows from which attention costs more than two copies over the bus
GROUP_BYTES = 256 * 2**20  # of one round of attention's backward
GIB = 2**30
LAUNCHES = 0.12  # of a small step, where no graph launches it: 6 % on an 8B model of 512 tokens, 13 to 28 on a 1B of 1,024
DEQUANTISED = 250  # rows whose products take as long as dequantising all weights, in both directions
NO_LIMIT = 2**62  # bytes free, where nobody says how many there are


@dataclass(frozen=True)
class Plan:
    """What was chosen for `rows` rows, the bytes it should take beyond the loaded model, and why.

    Attributes:
        copy: a 16-bit copy of the NF4 weights is held.
        park: the embedding lies in host RAM.
        host: bytes of host RAM for what layers keep.
        richer, count: the last `count` layers keep what `richer` says.
        records: steps may be recorded as CUDA graphs, as far as memory goes.
    """

    keep: Keep
    copy: bool
    rows: int
    needed: int
    free: int
    why: str
    park: bool = False
    host: int = 0
    richer: Keep | None = None
    count: int = 0
    records: bool = False

    def on_host(self, layers: int) -> tuple[int, int]:
        """Of how many of the `layers` layers the inputs, and of how many the attention outputs, lie in host RAM."""
        kinds = [(self.keep, layers - self.count), (self.richer or self.keep, self.count)]
        away = [(keep, count) for keep, count in kinds if keep.offload]
        return sum(count for _, count in away), sum(count for keep, count in away if keep.attention)

    def __str__(self) -> str:
        extra = f", the last {self.count} layers {self.richer}" if self.count else ""
        extra += ", a 16-bit copy of the NF4 weights" if self.copy else ""
        extra += ", the embedding in host RAM" if self.park else ""
        host = f", {self.host / GIB:.1f} GiB of host RAM" if self.host else ""
        of = f" of {self.free / GIB:.1f} GiB free" if self.free < NO_LIMIT else " GiB"
        need = f"{self.needed / GIB:.1f}{of}{host}"
        return f"keep {self.keep}{extra} for {self.rows:,} tokens a step ({need}): {self.why}"


class Planner:
    """Plans for one model. `plan` is the last one made, None before the first training step."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.checkpointed = False
        self.sizes: forecast.Sizes | None = None

    @property
    def keep(self) -> Keep:
        return self.plan.keep if self.plan else DEFAULT

    def keep_of(self, index: int, layers: int) -> Keep:
        """What layer `index` of `layers` keeps."""
        plan = self.plan
        return plan.richer if plan is not None and plan.richer is not None and index >= layers - plan.count else self.keep

    def due(self, rows: int, checkpointed: bool) -> bool:
        """Whether a step of so many rows needs a new plan."""
        return self.plan is None or rows > self.plan.rows or checkpointed != self.checkpointed

    def make(self, binding: Any, rows: int, checkpointed: bool) -> Plan:
        """Plan for `rows` rows of the model that `binding` binds."""
        sizes, four_bit = sizes_of(binding)
        device = binding.bound[0].parts.qkv.device
        copies = (g.buffer for b in binding.bound for g in b.parts.groups if g.copied and g.buffer is not None)
        held = sum(c.numel() * c.element_size() for c in copies)
        stepped = any(p.grad is not None for b in binding.bound for p in b.params)
        self.checkpointed, self.sizes = checkpointed, sizes
        self.plan = choose(
            sizes,
            rows,
            free_bytes(device) + held,
            four_bit=four_bit,
            checkpointed=checkpointed,
            stepped=stepped,
            host=free_host_bytes() + (binding.host.held if binding.host is not None else 0),
            optimizer_bytes=binding.optimizer_bytes,
            may_park=device.type == "cuda" and binding.may_park(),
            records=binding.records(rows),
        )
        return self.plan

    def stop_recording(self) -> None:
        """The plan holds for eager steps, which take less."""
        self.plan = replace(self.plan, records=False) if self.plan is not None else None

    def passing(self, rows: int) -> int:
        """Bytes that an eager step of so many rows takes by the plan and gives back; 0 without one."""
        plan, sizes = self.plan, self.sizes
        if plan is None or sizes is None:
            return 0
        parts = parts_of(replace(plan, rows=rows), sizes)
        return parts["kept activations"] + parts["working memory"]


def candidates(sizes: forecast.Sizes, rows: int, *, four_bit: bool, checkpointed: bool) -> Iterator[tuple[Keep, bool, bool]]:
    """(keep, copy, park) from the fastest to the leanest."""
    if not checkpointed:
        if four_bit:
            yield Keep(0, normed=True), True, False
            yield Keep(0), True, False
        yield Keep(0, normed=True), False, False
        for level in range(4):
            yield Keep(level), False, False
    groups = min(sizes.kv_heads, max(1, GROUP_BYTES // forecast.by_head(rows, sizes)))
    tile = TILE if rows > TILE else max(256, -(-rows // 512) * 256)  # half the rows where they are few
    less = min(tile // 2, TILE // 2)
    if rows <= TILE and not checkpointed:  # rows that make one tile go whole at first: half of them double the launches
        yield Keep(4, None, False, groups), False, False
        yield Keep(4, None, True, groups), False, False
        yield Keep(4, None, True, groups), False, True
    # Attention is worth its two copies only where rows are many: on short ones the bus is slower than doing it again.
    if rows > LONG:
        yield Keep(3, tile, True, groups), False, False
    yield Keep(4, tile, False, groups), False, False
    yield Keep(4, tile, True, groups), False, False
    yield Keep(4, less, True, groups), False, False
    if rows > LONG:
        yield Keep(3, tile, True, groups), False, True
    yield Keep(4, tile, True, groups), False, True
    yield Keep(4, less, True, 1), False, True


def choose(
    sizes: forecast.Sizes,
    rows: int,
    free: int,
    *,
    four_bit: bool,
    checkpointed: bool = False,
    stepped: bool = False,
    host: int = 0,
    may_park: bool = False,
    optimizer_bytes: float = 8,
    records: bool = False,
) -> Plan:
    """The fastest plan for `rows` rows that fits into `free` bytes; the leanest if none does.

    Args:
        checkpointed: gradient checkpointing was asked for: only plans that save memory.
        stepped: gradients and optimizer state are there already and not to be counted.
        host: bytes of host RAM that are free.
        may_park: whether the embedding may lie in host RAM.
        records: steps of this size are recorded where memory allows it. Where it does not, a recorded step that repeats a
            little is weighed against launching all of one that repeats nothing.
    """
    asked = _Asked(sizes, rows, free, four_bit, checkpointed, stepped, host, may_park, optimizer_bytes)
    eager, _ = asked.first(recorded=False)
    if not records:
        return eager
    recorded, fits = asked.first(recorded=True)
    return recorded if fits and _extra(recorded, sizes, four_bit) <= _extra(eager, sizes, four_bit) + LAUNCHES else eager


@dataclass(frozen=True)
class _Asked:
    """What `choose` was given."""

    sizes: forecast.Sizes
    rows: int
    free: int
    four_bit: bool
    checkpointed: bool
    stepped: bool
    host: int
    may_park: bool
    optimizer_bytes: float

    def first(self, recorded: bool) -> tuple[Plan, bool]:
        """The first plan that fits, and True; or the leanest, and False. `recorded`: of those whose steps are recorded."""
        sizes, rows = self.sizes, self.rows
        room = int(self.free * (1 - MARGIN)) - RESERVE
        passed, least = [], None
        for keep, copy, park in candidates(sizes, rows, four_bit=self.four_bit, checkpointed=self.checkpointed):
            on_host = _host(keep, rows, sizes, sizes.layers)
            if (park and not self.may_park) or on_host > HOST_SHARE * self.host or (recorded and (park or keep.offload)):
                continue
            plan = Plan(keep, copy, rows, 0, self.free, "", park, on_host, records=recorded)
            plan = replace(plan, needed=self.needs(plan))
            if plan.needed <= room:
                if passed and not self.checkpointed:
                    plan = self.fill(plan, room)
                return _because(plan, passed, self.checkpointed), True
            passed.append(plan)
            least = plan if least is None or plan.needed < least.needed else least
        assert least is not None
        return _because(least, [], self.checkpointed, "nothing leaner is there; it may not fit"), False

    def needs(self, plan: Plan) -> int:
        """Bytes beyond the loaded model."""
        parts = parts_of(plan, self.sizes, self.four_bit, self.optimizer_bytes)
        return sum(n for name, n in parts.items() if not (self.stepped and name in ("LoRA gradients", "optimizer")))

    def fill(self, plan: Plan, room: int) -> Plan:
        """The plan whose last layers keep more, as many as there is room for: of the levels, the one that saves the most work.

        Long rows may keep their attention outputs in host RAM for as many layers as it takes.
        """
        sizes, rows, base, best, most = self.sizes, plan.rows, plan.keep, plan, 0
        richer = [Keep(level, base.tile, False, base.groups if level > 1 else None) for level in range(base.level)]
        if base.offload and base.level > 3 and rows > LONG:
            richer.append(replace(base, level=3))
        for keep in richer:
            more = _host(keep, rows, sizes, 1) - _host(base, rows, sizes, 1)
            most_here = (int(HOST_SHARE * self.host) - plan.host) // more if more > 0 else sizes.layers
            for count in range(min(most_here, sizes.layers - 1), 0, -1):
                filled = replace(plan, richer=keep, count=count, host=plan.host + count * more)
                filled = replace(filled, needed=self.needs(filled))
                if filled.needed <= room:
                    break
            else:
                continue
            saved = count * (forecast.repeated(base.level, rows, sizes) - forecast.repeated(keep.level, rows, sizes))
            if saved > most:
                most, best = saved, filled
        return best


def parts_of(plan: Plan, sizes: forecast.Sizes, four_bit: bool = False, optimizer_bytes: float = 8) -> dict[str, int]:
    """Bytes by part that a step of the plan adds to the loaded model."""
    keep, richer = plan.keep, plan.richer or plan.keep
    return forecast.step(
        keep.level, plan.rows, sizes, four_bit=four_bit, copy=plan.copy, offload=keep.offload, tile=keep.tile, groups=keep.groups,
        parked=plan.park, optimizer_bytes=optimizer_bytes, normed=keep.normed, richer=(plan.count, richer.level, richer.offload),
        recorded=plan.records,
    )  # fmt: skip


def _extra(plan: Plan, sizes: forecast.Sizes, four_bit: bool) -> float:
    """What a step does beside the products of its forward and backward, as a share of them: repeats, and dequantises."""
    levels = [(plan.keep, sizes.layers - plan.count), (plan.richer or plan.keep, plan.count)]
    again = sum(count * forecast.repeated(keep.level, plan.rows, sizes) for keep, count in levels)
    return again / (2 * sizes.weights) + (DEQUANTISED / plan.rows if four_bit and not plan.copy else 0.0)


def _host(keep: Keep, rows: int, sizes: forecast.Sizes, layers: int) -> int:
    """Bytes of host RAM for so many layers."""
    return forecast.host(keep.level, rows, sizes, layers) if keep.offload else 0


def _because(plan: Plan, passed: list[Plan], checkpointed: bool, why: str = "") -> Plan:
    faster = [p for p in passed if not p.copy]
    if not why and checkpointed:
        why = "gradient checkpointing was asked for"
    elif not why:
        why = f"{faster[-1].keep} needs {faster[-1].needed / GIB:.1f} GiB" if faster else "memory is free"
    return replace(plan, why=why)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: what the driver has free and what torch holds unused, within the process's own limit.

    Without a GPU: no limit.
    """
    if device.type != "cuda":
        return NO_LIMIT
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return min(free, int(share * total) - reserved) + reserved - allocated


def free_host_bytes() -> int:
    """Host RAM that is free, bytes; in a container what its limit leaves."""
    return ram()[1]


def sizes_of(binding: Any) -> tuple[forecast.Sizes, bool]:
    """The sizes of a bound model, and whether its weights are NF4 (all layers alike: the first one's are taken)."""
    p = binding.bound[0].parts
    lora = [t for b in binding.bound for t in b.params]
    vocab = int(binding.vocab)
    sizes = forecast.Sizes(
        len(binding.bound), p.d, p.f, p.h, p.g, p.k, vocab, sum(t.numel() for t in lora),
        lora_bytes=lora[0].element_size() if lora else 4, size=p.dtype.itemsize,
    )  # fmt: skip
    return sizes, p.qkv.nf4
