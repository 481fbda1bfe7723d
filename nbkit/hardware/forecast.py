"""Bytes of one training step by part, predicted from sizes alone: what the planner and the panels ask before anything runs.

All counts are for LoRA on frozen weights with the fused layer (models/layer): N rows (batch times tokens), 16-bit activations.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 4096  # rows that go through the projections and the MLP at a time: GEMMs lose nothing at this size
HOST_SHARE = 0.75  # of the free host RAM that kept activations may take
WORKSPACES = 64 * 2**20  # of cuBLAS, for the stream of a recorded step
LOOSE = 0.03  # of a recorded step's memory lies between its tensors
CHUNK = 256 * 2**20  # the most bytes of logits that exist at a time
# Bytes of a double-quantised weight: 4 bits, an 8-bit absmax per 64 weights, a float32 scale per 256 of those (arXiv 2305.14314).
NF4_BYTES = 0.5 + 1 / 64 + 4 / 16384


@dataclass(frozen=True)
class Sizes:
    """What decides on a decoder's bytes. `lora`: LoRA parameters; `lora_bytes`, `size`: bytes of one, and of one activation."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    lora: int
    lora_bytes: int = 4
    size: int = 2

    @property
    def qkv(self) -> int:
        """Columns of [q | k | v]."""
        return (self.heads + 2 * self.kv_heads) * self.head

    @property
    def weights(self) -> int:
        """Weights of all decoder linears."""
        attention = self.hidden * self.qkv + self.heads * self.head * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


def kept(level: int, s: Sizes, normed: bool = False) -> int:
    """Bytes that one layer keeps for one token at `level` (models/layer/keep.py says which tensors)."""
    attention = s.heads * s.head
    columns = s.hidden
    columns += attention if level < 4 else 0
    columns += s.hidden if level < 3 else 0
    columns += s.qkv if level < 2 else 0
    columns += 2 * s.intermediate if level < 1 else 0
    columns += 2 * s.hidden if normed else 0
    return columns * s.size + (4 * s.heads if level < 4 else 0) + 8


def repeated(level: int, rows: int, s: Sizes) -> int:
    """Multiply-adds that one layer does a second time for one token at `level`; `rows` bound what attention looks at."""
    count = 2 * s.hidden * s.intermediate if level > 0 else 0
    count += s.hidden * s.qkv if level > 1 else 0
    count += s.hidden * s.heads * s.head if level > 2 else 0
    return count + (s.heads * s.head * rows if level > 3 else 0)


def working(level: int, rows: int, s: Sizes, tile: int | None = None) -> int:
    """The largest sum of temporaries of one layer: its backward, between down_proj's input gradient and the norm's."""
    mlp = (3 if level < 1 else 5) * s.intermediate + 4 * s.hidden  # dh, dgate, dup (gate, up again); h, g, g_mid, dh
    attention = 2 * s.qkv + 2 * s.heads * s.head + 3 * s.hidden  # dq, dk, dv and packed; dout; x's gradients
    again = (s.qkv if level >= 2 else 0) + (s.heads * s.head if level >= 4 else 0) + (s.hidden if level >= 3 else 0)
    return s.size * (max(min(tile or rows, rows) * mlp, rows * attention) + rows * again)


def by_head(rows: int, s: Sizes) -> int:
    """What attention's backward takes for one key/value head and its queries: do, dq, dk, dv, and its own float32 sums."""
    queries = s.heads // s.kv_heads
    return rows * s.head * (s.size * (2 * queries + 2) + 4 * queries)


def lean(level: int, rows: int, s: Sizes, tile: int, groups: int) -> int:
    """The same where the backward goes in tiles and head groups, in place: x, g, [q|k|v] and out stay whole."""
    whole = rows * s.size * ((2 if level > 2 else 3) * s.hidden + s.qkv + s.heads * s.head)
    by_tiles = min(tile, rows) * s.size * (5 * s.intermediate + 4 * s.hidden)
    return whole + max(min(groups, s.kv_heads) * by_head(rows, s), by_tiles)


def head(rows: int, s: Sizes) -> int:
    """The loss: hidden states, their gradient, one chunk of logits."""
    return rows * s.hidden * s.size * 3 + min(CHUNK, rows * s.vocab * s.size)


def host(level: int, rows: int, s: Sizes, layers: int) -> int:
    """Bytes of host RAM for the inputs of `layers` layers, and what else is kept of that width: attention outputs, x_mid."""
    return layers * rows * s.size * _wide(level, s)


def _wide(level: int, s: Sizes) -> int:
    """Columns that are kept at `level` and can lie in host RAM."""
    return s.hidden + (s.heads * s.head if level < 4 else 0) + (s.hidden if level < 3 else 0)


def scratch(s: Sizes) -> int:
    """What NF4 weights of one layer are dequantised into."""
    return s.weights // s.layers * s.size


def step(
    level: int,
    rows: int,
    s: Sizes,
    *,
    four_bit: bool,
    copy: bool = False,
    optimizer_bytes: float = 8,
    offload: bool = False,
    tile: int | None = None,
    groups: int | None = None,
    parked: bool = False,
    normed: bool = False,
    richer: tuple[int, int, bool] = (0, 0, False),
    recorded: bool = False,
) -> dict[str, int]:
    """Bytes by part that a training step adds to the loaded model.

    Args:
        level, offload, tile, groups, normed: as in models/layer/keep.py.
        copy: NF4 weights are held in 16 bits too.
        optimizer_bytes: of the optimizer's state, for one LoRA parameter.
        parked: the embedding is moved to host RAM, which gives its bytes back.
        richer: (layers, level, offload): so many of the layers keep what that level says instead, in host RAM or not.
        recorded: as a CUDA graph, which has memory, gradients and workspaces of its own.
    """
    on_device = kept(level, s, normed) - (s.size * _wide(level, s) if offload else 0)
    work = working(level, rows, s, tile) if groups is None else lean(level, rows, s, tile or rows, groups)
    some, theirs, away = richer
    of_richer = kept(theirs, s) - (s.size * _wide(theirs, s) if away else 0)
    if some and (theirs < 2 or groups is None):
        work = max(work, working(theirs, rows, s, tile))
    parts = {
        "kept activations": rows * ((s.layers - some) * on_device + some * of_richer),
        "working memory": max(work, head(rows, s) + (2 * rows * s.hidden * s.size if groups else 0)),
        "LoRA gradients": s.lora * s.lora_bytes,
        "optimizer": round(s.lora * optimizer_bytes),
    }
    if recorded:  # the gradients that its layers write beside the parameters' own: just these with ranks in steps of 16
        parts["recorded step"] = s.lora * s.lora_bytes + WORKSPACES + round(LOOSE * parts["kept activations"])
    if four_bit:
        parts["16-bit copy of the weights" if copy else "dequantised layer"] = s.weights * s.size if copy else scratch(s)
    if parked:
        parts["embedding in host RAM"] = -s.vocab * s.hidden * s.size
    return parts
