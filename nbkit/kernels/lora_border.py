"""Many small matrices cast, scaled and copied in one launch: LoRA's A and B into the borders of all weight buffers.

    destination_k[i, j] = factor_k * source_k[i, j]            for every k at once

A step of an 8B model has 448 such copies of some microseconds each; launched one by one they cost more than their bytes.
The table of addresses is built once and holds the tensors, so no address in it can go stale while it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nbkit.kernels._launch import cdiv, kernel, on_device, runs_on, tl
from nbkit.kernels._op import Case, KernelOp

Copy = tuple[Tensor, Tensor, float]  # source (rows, columns), destination (rows, columns), factor
TILE = 4096


def write_borders(copies: Sequence[Copy]) -> None:
    """Do all copies now, one by one; on the CPU, and where the table below would not pay."""
    for source, destination, factor in copies:
        source = source.detach()
        if factor == 1.0:
            destination.copy_(source)
        else:
            torch.mul(source, factor, out=destination)


@kernel
def _copy_tiles(TABLE, FACTOR, ENTRY, S: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    """One program: TILE elements of one copy, counted along its rows. TABLE rows: source, destination, rows, columns, strides."""
    tile = tl.program_id(0)
    k = tl.load(ENTRY + 2 * tile)
    part = tl.load(ENTRY + 2 * tile + 1)
    source = tl.load(TABLE + 6 * k).to(tl.pointer_type(S))
    destination = tl.load(TABLE + 6 * k + 1).to(tl.pointer_type(D))
    rows, columns = tl.load(TABLE + 6 * k + 2), tl.load(TABLE + 6 * k + 3)
    s_stride, d_stride = tl.load(TABLE + 6 * k + 4), tl.load(TABLE + 6 * k + 5)
    n = part.to(tl.int64) * TILE + tl.arange(0, TILE)
    row, column = n // columns, n % columns
    ok = row < rows
    x = tl.load(source + row * s_stride + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(destination + row * d_stride + column, (x * tl.load(FACTOR + k)).to(D), mask=ok)


_TYPES = {} if tl is None else {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class BorderWriter:
    """The copies of a whole model as one launch. All sources share a dtype, all destinations share a dtype."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self.copies = list(copies)
        self.addresses = [s.data_ptr() for s, _, _ in self.copies]
        self.fused = bool(self.copies) and self._fusable()
        if not self.fused:
            return
        rows = [(s.data_ptr(), d.data_ptr(), *s.shape, s.stride(0), d.stride(0)) for s, d, _ in self.copies]
        tiles = [(k, p) for k, (s, _, _) in enumerate(self.copies) for p in range(cdiv(s.numel(), TILE))]
        device = self.copies[0][1].device
        self.table = torch.tensor(rows, dtype=torch.int64, device=device)
        self.factor = torch.tensor([f for _, _, f in self.copies], dtype=torch.float32, device=device)
        self.entry = torch.tensor(tiles, dtype=torch.int32, device=device)

    def _fusable(self) -> bool:
        (s0, d0, _), kinds = self.copies[0], set()
        for s, d, _ in self.copies:
            kinds.add((s.dtype, d.dtype, s.device, d.device, s.stride(1), d.stride(1)))
        return (
            kinds == {(s0.dtype, d0.dtype, d0.device, d0.device, 1, 1)}
            and runs_on(d0.device)
            and s0.dtype in _TYPES
            and d0.dtype in _TYPES
        )

    def stale(self) -> bool:
        """Whether a source was given other storage since (`parameter.data = ...`)."""
        return any(s.data_ptr() != at for (s, _, _), at in zip(self.copies, self.addresses, strict=True))

    def write(self) -> None:
        """Bring every destination up to date."""
        if not self.fused:
            write_borders(self.copies)
            return
        (s, d, _), tiles = self.copies[0], self.entry.shape[0]
        with on_device(d):
            _copy_tiles[(tiles,)](
                self.table, self.factor, self.entry, S=_TYPES[s.dtype], D=_TYPES[d.dtype], TILE=TILE, num_warps=4
            )


# -- op --------------------------------------------------------------------------------------------


def scaled_copies(sources: Sequence[Tensor], factors: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Every source times its factor in `dtype`, side by side in the columns of one (rows, columns) matrix filled with zeros."""
    out, copies = _places(sources, factors, dtype)
    BorderWriter(copies).write()
    return out


def reference(sources: Sequence[Tensor], factors: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Same in plain torch."""
    out, copies = _places(sources, factors, dtype)
    write_borders(copies)
    return out


def _places(sources: Sequence[Tensor], factors: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, list[Copy]]:
    rows, columns = max(s.shape[0] for s in sources), sum(s.shape[1] for s in sources)
    out = torch.zeros(rows, columns, dtype=dtype, device=sources[0].device)
    copies, column = [], 0
    for source, factor in zip(sources, factors, strict=True):
        copies.append((source, out[: source.shape[0], column : column + source.shape[1]], factor))
        column += source.shape[1]
    return out, copies


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    r, i, o = case.sizes["R"], case.sizes["I"], case.sizes["O"]
    shapes = [(r, i), (o, r)] * case.sizes.get("pairs", 1)
    sources = [torch.randn(*shape, generator=make).to(device, torch.float32) for shape in shapes]
    return {"sources": sources, "factors": [1.0 if k % 2 == 0 else 1.7 for k in range(len(shapes))], "dtype": dtype}


OP = KernelOp(
    name="lora_border",
    fn=scaled_copies,
    reference=reference,
    inputs=_inputs,
    gradients=(),
    cases=(
        Case("odd sizes", {"R": 3, "I": 37, "O": 11, "pairs": 2}),
        Case("more than one tile a copy", {"R": 16, "I": 1031, "O": 700}),
        Case("rank one", {"R": 1, "I": 5, "O": 1}),
    ),
    benchmark=(Case("a layer of Llama-3.1-8B", {"R": 16, "I": 4096, "O": 4096, "pairs": 7}),),
)
