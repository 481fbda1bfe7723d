"""Levels: what a layer keeps between its forward and its backward, and what it computes a second time.

Bytes per token and layer for Llama-3.1-8B in 16 bits (D, F, KV: one row of the model width, MLP width, key or value):

    L0  x, q, k, v, out, lse, x_mid, gate, up      94 KB    nothing is repeated (norms and h = act(gate) up are rebuilt)
    L1  without gate, up                           37 KB    the gate/up projection
    L2  without q, k, v                            25 KB    + the q/k/v projection
    L3  without x_mid                              17 KB    + the o projection
    L4  x alone                                     8 KB    + attention; never down_proj: nothing in the backward reads its output

LoRA's products x A^T (R columns each) and one rstd a row are kept beside what they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """Which intermediates a layer keeps. `level` names the combination; `tile`: rows at a time in the projections and the MLP."""

    level: int
    tile: int | None = None  # None: all rows at once

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"keep level {self.level} is not one of {LEVELS}")

    @property
    def gate_up(self) -> bool:
        return self.level < 1

    @property
    def qkv(self) -> bool:
        return self.level < 2

    @property
    def mid(self) -> bool:
        return self.level < 3

    @property
    def attention(self) -> bool:
        return self.level < 4

    def tiles(self, rows: int) -> list[slice]:
        """Slices of `tile` rows that cover all of them."""
        step = self.tile or rows
        return [slice(a, min(a + step, rows)) for a in range(0, rows, step)]


LEVELS = (0, 1, 2, 3, 4)
DEFAULT = Keep(0)
