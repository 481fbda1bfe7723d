"""NF4 dequantisation in one launch, bit-equal to bitsandbytes, with LoRA matrices written into the border beside it.

A weight (O, I) is packed two values a byte, high nibble first; each block of 64 values has one absmax, itself quantised to
8 bits in blocks of 256 (double quantisation):

    absmax = code2[absmax8] * absmax2 + offset        w = lut[nibble] * absmax        both in float32, w rounded once

The product and the sum of absmax are rounded separately, as bitsandbytes does: a fused multiply-add would differ in the last
bit, so the kernel is compiled without contraction. Memory: 0.52 bytes read and 2 written per weight; that is the floor.

Source of the format: Dettmers et al., "QLoRA", arXiv 2305.14314, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NESTED_BLOCK = 256  # values of absmax that share one absmax2


class Nf4(NamedTuple):
    """A packed 4-bit weight. data (O*I/2,) uint8; absmax (O*I/block,) uint8 or float32; lut (16,) float32."""

    data: Tensor
    absmax: Tensor
    lut: Tensor
    shape: tuple[int, int]
    block: int
    code2: Tensor | None = None
    absmax2: Tensor | None = None
    offset: Tensor | None = None

    @staticmethod
    def of(weight: Tensor) -> Nf4 | None:
        """The parts of a bitsandbytes 4-bit parameter, or None for any other weight."""
        state = getattr(weight, "quant_state", None)
        if state is None or state.code is None or len(state.shape) != 2:
            return None
        data = weight.detach().view(torch.uint8).reshape(-1)
        shape = (int(state.shape[0]), int(state.shape[1]))
        if state.state2 is None:
            return Nf4(data, state.absmax, state.code, shape, state.blocksize)
        inner = state.state2
        if inner.blocksize != NESTED_BLOCK:
            return None
        return Nf4(data, state.absmax, state.code, shape, state.blocksize, inner.code, inner.absmax, state.offset)


def dequantize_reference(packed: Nf4) -> Tensor:
    """(O, I) float32, the formula above in plain torch."""
    absmax = packed.absmax
    if packed.code2 is not None:
        inner = packed.absmax2.repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
        absmax = packed.code2[absmax.long()] * inner + packed.offset
    nibbles = torch.stack([packed.data >> 4, packed.data & 15], dim=1).view(-1)
    values = packed.lut[nibbles.long()] * absmax.repeat_interleave(packed.block)[: nibbles.numel()]
    return values.view(packed.shape)


@triton.jit
def _dequantize_rows(
    Q, AM, CODE2, AM2, OFFSET, LUT, OUT, A, B, scale, so, sa, sb, row0, a_row, in_, off, r, rank, rows,
    NESTED: tl.constexpr, HALF: tl.constexpr, NB: tl.constexpr, RP: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: NB blocks of one row, or as many columns of one row of A. Row `rows + k` of the grid is row k of A."""
    row = tl.program_id(0)
    block = tl.program_id(1) * NB + tl.arange(0, NB)
    if row < rows:
        per_row = in_ // (2 * HALF)
        ok = block < per_row
        at = row.to(tl.int64) * per_row + block
        absmax = tl.load(AM + at, mask=ok, other=0)
        if NESTED:
            inner = tl.load(AM2 + at // NESTED_BLOCK, mask=ok, other=0.0)
            absmax = tl.load(CODE2 + absmax.to(tl.int32)) * inner + tl.load(OFFSET)
        byte = tl.arange(0, HALF)
        q = tl.load(Q + at[:, None] * HALF + byte[None, :], mask=ok[:, None], other=0).to(tl.int32)
        high = tl.load(LUT + (q >> 4)) * absmax[:, None]
        low = tl.load(LUT + (q & 15)) * absmax[:, None]
        values = tl.interleave(high, low)
        column = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
        base = OUT + (row0 + row).to(tl.int64) * so
        tl.store(base + column, values.to(OUT.dtype.element_ty), mask=ok[:, None])
        if RP > 0 and tl.program_id(1) == 0:
            c = tl.arange(0, RP)
            inside = (c >= off) & (c < off + r)
            b = tl.load(B + row.to(tl.int64) * sb + (c - off), mask=inside, other=0.0).to(tl.float32) * scale
            tl.store(base + in_ + c, b.to(OUT.dtype.element_ty), mask=c < rank)
    else:
        k = row - rows
        c = tl.program_id(1) * (NB * 2 * HALF) + tl.arange(0, NB * 2 * HALF)
        a = tl.load(A + k.to(tl.int64) * sa + c, mask=c < in_, other=0.0)
        tl.store(OUT + (a_row + k).to(tl.int64) * so + c, a.to(OUT.dtype.element_ty), mask=c < in_)


def _border_reference(out: Tensor, start: int, rows: int, inputs: int, outputs: int, rank: int, terms: Sequence) -> None:
    out[start : start + rows, inputs : inputs + rank] = 0
    for t in terms:
        _write_term(out, inputs, outputs, t)


def _write_term(out: Tensor, inputs: int, outputs: int, t: object) -> None:
    columns = slice(t.offset, t.offset + t.a.shape[0])
    out[outputs:, :inputs][columns] = t.a.detach()
    out[t.start : t.stop, inputs:][:, columns] = (t.b.detach().float() * t.scale).to(out.dtype)


def dequantize_nf4(packed: Nf4, out: Tensor, start: int = 0, outputs: int | None = None, rank: int = 0, terms: Sequence = ()) -> None:
    """Write the weight into rows start:start+O, columns :I of `out`, and its LoRA terms into the border.

    out: (>= outputs + rank, >= I + rank) in 16 bits or float32, rows contiguous; `outputs`: rows of the whole group (A's rows
    follow them); `rank`: border columns of the whole group, those of other linears are set to zero here. `terms`: objects with
    a (r, I), b (O, r), scale, start, stop, offset. Several terms on one linear cost two small copies each beyond the first.
    """
    o, i = packed.shape
    outputs = start + o if outputs is None else outputs
    used = sum(t.a.shape[0] for t in terms)
    if out.device.type != "cuda" or i % packed.block:
        out[start : start + o, :i] = dequantize_reference(packed).to(out.dtype)
        _border_reference(out, start, o, i, outputs, rank, terms)
    else:
        _launch(packed, out, start, outputs, rank, terms[0] if terms else None)
        for t in terms[1:]:
            _write_term(out, i, outputs, t)
    if start + o == outputs and rank > max((t.offset + t.a.shape[0] for t in terms), default=0) and used != rank:
        last = max((t.offset + t.a.shape[0] for t in terms), default=0)
        out[outputs + last : outputs + rank].zero_()  # padding of the rank: its rows of A must read as zero


def _launch(packed: Nf4, out: Tensor, start: int, outputs: int, rank: int, term: object | None) -> None:
    o, i = packed.shape
    half, blocks = packed.block // 2, 16
    lora = term is not None
    a, b = (term.a, term.b) if lora else (out, out)
    r = a.shape[0] if lora else 0
    nested = packed.code2 is not None
    grid = (o + r, triton.cdiv(i // packed.block, blocks))
    _dequantize_rows[grid](
        packed.data, packed.absmax, packed.code2 if nested else packed.lut, packed.absmax2 if nested else packed.lut,
        packed.offset if nested else packed.lut, packed.lut, out, a, b, term.scale if lora else 1.0,
        out.stride(0), a.stride(0), b.stride(0), start, outputs + (term.offset if lora else 0), i, term.offset if lora else 0, r, rank, o,
        NESTED=nested, HALF=half, NB=blocks, RP=triton.next_power_of_2(rank) if rank else 0, NESTED_BLOCK=NESTED_BLOCK, num_warps=2, enable_fp_fusion=False,
    )  # fmt: skip
