"""Levels: what a layer keeps between its forward and its backward, and what it computes a second time.

Bytes per token and layer for Llama-3.1-8B in 16 bits (D, F, KV: one row of the model width, MLP width, key or value):

    L0  x, q, k, v, out, lse, x_mid, gate, up      94 KB    nothing is repeated (norms and h = act(gate) up are rebuilt)
    L1  without gate, up                           37 KB    the gate/up projection
    L2  without q, k, v                            25 KB    + the q/k/v projection
    L3  without x_mid                              17 KB    + the o projection
    L4  x alone                                     8 KB    + attention; never down_proj: nothing in the backward reads its output

LoRA's products x A^T (R columns each) and one rstd a row are kept beside what they belong to. `normed`, at level 0: the two
normalised rows as well (16 KB more), which the gradients of LoRA's A read: nothing but h is rebuilt then.

Where memory is short, at levels 2 to 4: `offload` has x (and out, and x_mid) in host RAM until the backward; `tile` rows at a
time go through the projections and the MLP; `groups` key/value heads at a time go through attention's backward, whose gradients
take the place of q, k and v, and the gradient of the residual stream is updated in place. None of these changes a result.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """Which intermediates a layer keeps, and where. `level` names the combination."""

    level: int
    tile: int | None = None  # rows at a time in the projections and the MLP; None: all at once
    offload: bool = False  # what is kept with D columns lies in host RAM
    groups: int | None = None  # key/value heads at a time in attention's backward; None: all at once
    normed: bool = False  # level 0 with the normalised rows

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"keep level {self.level} is not one of {LEVELS}")
        if (self.offload or self.groups) and self.level < 2:
            raise ValueError(f"offload and head groups go with levels 2 to 4, not {self.level}")
        if self.normed and (self.level or self.tile):
            raise ValueError("normalised rows are kept at level 0 without tiles")

    def __str__(self) -> str:
        extra = ["with the normalised rows"] if self.normed else []
        extra += [f"tiles of {self.tile:,} tokens"] if self.tile else []
        extra += ["layer inputs in host RAM"] if self.offload else []
        extra += [f"{self.groups} key/value heads at a time"] if self.groups else []
        return ", ".join([f"level {self.level}", *extra])

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

    @property
    def in_place(self) -> bool:
        """Gradients overwrite what the backward has read: the least memory."""
        return self.groups is not None

    def tiles(self, rows: int) -> list[slice]:
        """Slices of `tile` rows that cover all of them."""
        step = self.tile or rows
        return [slice(a, min(a + step, rows)) for a in range(0, rows, step)]


LEVELS = (0, 1, 2, 3, 4)
DEFAULT = Keep(0)
