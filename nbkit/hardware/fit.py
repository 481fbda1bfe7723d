"""What a LoRA run needs in memory, part by part, and whether this machine has it.

The parts are formulas of the shape, not measurements; they err on the large side. On a GPU they are those of the engine's
leanest plan (hardware/forecast.py), which its planner falls back to; on a CPU gradient checkpointing is assumed. Sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from nbkit.config import SMALL_ADAPTER, LoraConfig
from nbkit.families import all_families
from nbkit.hardware import forecast
from nbkit.hardware.forecast import NF4_BYTES
from nbkit.hardware.probe import Machine, probe
from nbkit.hardware.shapes import ModelShape, shape_of

GIB = 2**30
MIB = 2**20
LOGIT_ROWS = 1024  # rows of logits that are in memory at once
CUDA_CONTEXT = 450 * MIB
LIBRARIES = 900 * MIB  # torch, transformers, PEFT, TRL, bitsandbytes and what malloc keeps back, in a process on CPU
RESERVE = 0.05  # of the free memory, for fragmentation
LONGEST = 2**22  # tokens, rows and ranks above are not asked for


@dataclass(frozen=True)
class Largest:
    """The most that fits of each, the other two as given; 0 where nothing does. `host_bytes`: host RAM at that context."""

    batch_size: int
    max_seq_length: int
    rank: int
    host_bytes: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """`parts` add up to `needed_bytes`. `reason` is one sentence; where it does not fit it ends with `instead`: what would."""

    ok: bool
    needed_bytes: int
    free_bytes: int
    reason: str
    instead: str
    parts: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """One checkpoint of the picker. `download_bytes`: 16-bit weights. `fit` is for rank 16, batch 1, 1024 tokens."""

    name: str
    family: str
    parameters: int
    context: int
    licence: str
    chat: str
    load_in_4bit: bool
    download_bytes: int
    fit: Fit

    @property
    def fits(self) -> bool:
        return self.fit.ok

    @property
    def needed_bytes(self) -> int:
        return self.fit.needed_bytes

    @property
    def free_bytes(self) -> int:
        return self.fit.free_bytes

    @property
    def reason(self) -> str:
        """Where it fits, what takes the most; else what would fit. The bytes needed and free stand beside it."""
        if not self.fits:
            return f"{self.fit.instead[0].upper()}{self.fit.instead[1:]}."
        largest = sorted(self.fit.parts.items(), key=lambda part: -part[1])[:3]
        return f"Most of it: {', '.join(f'{name} {_gib(size)}' for name, size in largest)}."


def weight_bytes(shape: ModelShape, *, load_in_4bit: bool, bytes_per_weight: int) -> int:
    """The base weights. 4-bit quantises the layers' linear modules; embeddings, head, norms and biases stay wide."""
    if not load_in_4bit:
        return shape.parameters * bytes_per_weight
    return round(shape.linear_parameters * NF4_BYTES) + (shape.parameters - shape.linear_parameters) * bytes_per_weight


def fit(
    shape: ModelShape,
    machine: Machine,
    lora: LoraConfig | None = None,
    *,
    load_in_4bit: bool = False,
    batch_size: int = 1,
    max_seq_length: int = 1024,
) -> Fit:
    """Whether a LoRA run of this shape fits into the machine's free memory.

    Args:
        lora: None is rank 16 on all linear modules.
        batch_size, max_seq_length: rows, and tokens a row, of one forward pass.
    """
    lora = lora or LoraConfig()
    parts = needs(shape, machine, lora, load_in_4bit=load_in_4bit, batch_size=batch_size, max_seq_length=max_seq_length)
    needed = sum(parts.values())
    free = int(machine.free_bytes * (1 - RESERVE))
    what = f"needs about {_gib(needed)}, {_gib(free)} of {machine.memory} are free"
    if needed <= free:
        return Fit(ok=True, needed_bytes=needed, free_bytes=free, reason=f"Fits: {what}.", instead="", parts=parts)
    instead = _instead(shape, machine, lora, load_in_4bit, batch_size, max_seq_length, free)
    reason = f"Does not fit: {what}; {instead}."
    return Fit(ok=False, needed_bytes=needed, free_bytes=free, reason=reason, instead=instead, parts=parts)


def needs(
    shape: ModelShape, machine: Machine, lora: LoraConfig, *, load_in_4bit: bool, batch_size: int, max_seq_length: int
) -> dict[str, int]:
    """Bytes by part of a run with gradient checkpointing."""
    gpu = machine.device == "cuda"
    wide = 2 if gpu else 4  # bytes of an activation, and of a weight that is not quantised
    trained = shape.lora_parameters(lora.rank, lora.targets)
    tokens = batch_size * max_seq_length
    optimizer = 8 if trained <= SMALL_ADAPTER else 2  # two moments in float32 or 8 bits, as optimizer="auto" has them
    return {
        "weights": weight_bytes(shape, load_in_4bit=load_in_4bit, bytes_per_weight=wide),
        "adapter": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": optimizer * trained,
        **(_on_gpu(shape, machine, tokens, load_in_4bit) if gpu else _on_cpu(shape, tokens, wide)),
        "libraries": CUDA_CONTEXT if gpu else LIBRARIES,
    }


def _on_cpu(shape: ModelShape, tokens: int, wide: int) -> dict[str, int]:
    """Each layer's input is kept; live at once are one layer, recomputed, its gradients, and some rows of logits."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = 6 * shape.hidden + 3 * queries + 4 * keys + 6 * shape.intermediate
    return {
        "activations": tokens * wide * (shape.layers * shape.hidden + layer),
        "logits": 3 * 4 * min(tokens, LOGIT_ROWS) * shape.vocab,  # logits, their float32 softmax, their gradient
    }


def _on_gpu(shape: ModelShape, machine: Machine, tokens: int, load_in_4bit: bool) -> dict[str, int]:
    """The engine's leanest plan: layer inputs in host RAM where that has room, token tiles, one key/value head at a time."""
    s = _sizes(shape)
    offload = forecast.host(4, tokens, s, s.layers) <= forecast.HOST_SHARE * machine.ram_free_bytes
    parts = forecast.step(
        4, tokens, s, four_bit=load_in_4bit, offload=offload, tile=forecast.TILE, groups=1, parked=not shape.tied
    )
    return {
        "activations": parts["kept activations"] + parts["working memory"],
        "dequantised": parts.get("dequantised layer", 0),
        "embedding in host RAM": parts.get("embedding in host RAM", 0),
    }


def _sizes(shape: ModelShape) -> forecast.Sizes:
    return forecast.Sizes(
        shape.layers, shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.head_dim, shape.vocab, lora=0
    )


def largest(
    shape: ModelShape,
    machine: Machine,
    lora: LoraConfig | None = None,
    *,
    load_in_4bit: bool = False,
    batch_size: int = 1,
    max_seq_length: int = 1024,
) -> Largest:
    """The largest batch, context and rank that fit, each with the other two as given. Arguments as `fit`."""
    lora = lora or LoraConfig()
    free = int(machine.free_bytes * (1 - RESERVE))

    def most(asked: Callable[[int], dict[str, int]]) -> int:
        low, high = 0, LONGEST
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if sum(asked(middle).values()) <= free else (low, middle - 1)
        return low

    def with_(rank: int = lora.rank, batch: int = batch_size, length: int = max_seq_length) -> dict[str, int]:
        return needs(shape, machine, replace(lora, rank=rank), load_in_4bit=load_in_4bit, batch_size=batch, max_seq_length=length)

    context = most(lambda n: with_(length=max(n, 1)))
    host = forecast.host(4, context * batch_size, _sizes(shape), shape.layers) if machine.device == "cuda" else 0
    ranks = min(most(lambda n: with_(rank=max(n, 1))), shape.hidden)
    offloaded = host if host <= forecast.HOST_SHARE * machine.ram_free_bytes else 0
    return Largest(most(lambda n: with_(batch=max(n, 1))), context, ranks, offloaded)


def _instead(shape: ModelShape, machine: Machine, lora: LoraConfig, four: bool, batch: int, length: int, free: int) -> str:
    """The mildest change that would fit, or the largest checkpoint that does."""
    changes = [(four, batch, n) for n in _halves(length)] + [(four, 1, n) for n in (length, *_halves(length))]
    changes.sort(key=lambda change: -change[1] * change[2])
    if not four:
        changes = [(True, batch, length), *changes, *((True, 1, n) for n in (length, *_halves(length)))]
    for bits, rows, tokens in changes:
        parts = needs(shape, machine, lora, load_in_4bit=bits, batch_size=rows, max_seq_length=tokens)
        if sum(parts.values()) <= free:
            words = ["load_in_4bit=True"] if bits and not four else []
            words += [f"batch_size={rows}"] if rows != batch else []
            words += [f"max_seq_length={tokens}"] if tokens != length else []
            return f"{' and '.join(words)} would bring it to {_gib(sum(parts.values()))}"
    best = largest_that_fits(machine)
    return f"{best} fits here" if best else "free some memory, or use a machine with more"


def _halves(length: int) -> list[int]:
    found = []
    while length > 256:
        length = max(256, length // 2)
        found.append(length)
    return found


def largest_that_fits(machine: Machine) -> str:
    """The largest checkpoint of the catalog that a small LoRA run fits for, in 4-bit on a GPU; "" if there is none."""
    best, size = "", 0
    free = int(machine.free_bytes * (1 - RESERVE))
    for family in all_families():
        for entry in family.checkpoints:
            shape = shape_of(family.config_of(entry))
            four = machine.device == "cuda"
            parts = needs(shape, machine, LoraConfig(), load_in_4bit=four, batch_size=1, max_seq_length=512)
            if sum(parts.values()) <= free and shape.parameters > size:
                best, size = entry.name, shape.parameters
    return best


def catalog(load_in_4bit: bool | None = None, machine: Machine | None = None) -> list[CatalogEntry]:
    """Every declared checkpoint, smallest first, with whether a small LoRA run of it fits.

    Args:
        load_in_4bit: None is 4-bit on a GPU and full precision on CPU.
        machine: None looks at this one.
    """
    machine = machine or probe()
    four = machine.device == "cuda" if load_in_4bit is None else load_in_4bit
    entries = []
    for family in all_families():
        for entry in family.checkpoints:
            shape = shape_of(family.config_of(entry))
            entries.append(
                CatalogEntry(
                    name=entry.name,
                    family=family.title,
                    parameters=shape.parameters,
                    context=entry.context,
                    licence=entry.licence,
                    chat=entry.chat.name if entry.chat else "",
                    load_in_4bit=four,
                    download_bytes=2 * shape.parameters,
                    fit=fit(shape, machine, load_in_4bit=four),
                )
            )
    return sorted(entries, key=lambda entry: entry.parameters)


def with_free(machine: Machine, free_bytes: int) -> Machine:
    """The same machine with other free memory, to ask what would fit there."""
    key = "vram_free_bytes" if machine.device == "cuda" else "ram_free_bytes"
    return replace(machine, **{key: free_bytes})


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
