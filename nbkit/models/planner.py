"""Which keep level the layers take, and whether NF4 weights get a 16-bit copy: from the memory that is free before the step.

Levels differ in speed and bytes alone, never in results. The planner takes the fastest that fits with a margin; a larger batch
later is planned again. Where gradient checkpointing was asked for it takes level 4 and no copy: the least memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nbkit.hardware import forecast
from nbkit.models.layer.keep import DEFAULT, LEVELS, Keep

MARGIN = 0.06  # of the free memory: fragments, and what the forecast does not know
RESERVE = 512 * 2**20  # cuBLAS workspaces, cuDNN, other small users
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What was chosen for `rows` rows, the bytes it should take beyond the loaded model, and why."""

    keep: Keep
    copy: bool
    rows: int
    needed: int
    free: int
    why: str

    def __str__(self) -> str:
        copy = ", a 16-bit copy of the NF4 weights" if self.copy else ""
        need = f"{self.needed / GIB:.1f} of {self.free / GIB:.1f} GiB free"
        return f"keep level {self.keep.level}{copy} for {self.rows:,} tokens a step ({need}): {self.why}"


class Planner:
    """Plans for one model. `plan` is the last one made, None before the first training step."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.checkpointed = False

    @property
    def keep(self) -> Keep:
        return self.plan.keep if self.plan else DEFAULT

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
        self.checkpointed = checkpointed
        self.plan = choose(sizes, rows, free_bytes(device) + held, four_bit=four_bit, checkpointed=checkpointed, stepped=stepped)
        return self.plan


def choose(
    sizes: forecast.Sizes, rows: int, free: int, *, four_bit: bool, checkpointed: bool = False, stepped: bool = False
) -> Plan:
    """The fastest plan for `rows` rows that fits into `free` bytes; level 4 if none does.

    Args:
        checkpointed: gradient checkpointing was asked for: level 4, no copy.
        stepped: gradients and optimizer state are there already and not to be counted.
    """

    def needed(level: int, copy: bool) -> int:
        parts = forecast.step(level, rows, sizes, four_bit=four_bit, copy=copy)
        return sum(n for name, n in parts.items() if not (stepped and name in ("LoRA gradients", "optimizer")))

    if checkpointed:
        return Plan(Keep(4), False, rows, needed(4, False), free, "gradient checkpointing was asked for")
    room = int(free * (1 - MARGIN)) - RESERVE
    for level in LEVELS:
        if needed(level, False) <= room or level == LEVELS[-1]:
            break
    why = "memory is free" if level == 0 else f"level {level - 1} needs {needed(level - 1, False) / GIB:.1f} GiB"
    copy = four_bit and level == 0 and needed(level, True) <= room
    return Plan(Keep(level), copy, rows, needed(level, copy), free, why)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: what the driver has free and what torch holds unused. Without a GPU: no limit."""
    if device.type != "cuda":
        return 2**62
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


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
