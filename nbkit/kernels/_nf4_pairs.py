"""Sixteen 4-bit codes to sixteen 16-bit values in registers: the table's bytes are permuted, nothing is loaded.

By loads each weight takes a shift, a mask, an address and a load. The 16 values in 16 bits are eight registers, and PRMT picks
any four bytes of two of them: 21 instructions give eight values. They come in pairs, as a byte of the packed weight has them: the
high nibble's value, which is the first column, in the low half of a register.

What 16 bits hold of a table depends on where its values lie between two powers of two, so the table is kept times the s in [1, 2)
for which the squared error is least, and the sums are multiplied by 1 / s. For NF4 in bfloat16 the weights' error is 0.8e-3,
where rounding each weight leaves 1.7e-3.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nbkit.kernels._launch import INTERPRETED, jit, tl

ASSEMBLED = not INTERPRETED and torch.version.hip is None  # elsewhere: a load a value, the same values


class Table(NamedTuple):
    """words (24,) int32: four registers of the values' low bytes, four of their high bytes, the 16 values; gain: 1 / s."""

    words: Tensor
    gain: float


_TABLES: Any = WeakTensorKeyDictionary()  # lut -> {dtype: its table}, for as long as the lut lives: recorded graphs read it


def table_of(lut: Tensor, dtype: torch.dtype) -> Table:
    """The table of lut (16,) float32 in 16 bits, on its device. Made once, which waits for the device; a lut is not written to.

    Raises: RuntimeError where it has to be made while a CUDA graph is recorded.
    """
    kept = _TABLES.get(lut)
    if kept is None:
        kept = _TABLES[lut] = {}
    found = kept.get(dtype)
    if found is None:
        if lut.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("nf4_gemv of a weight that it has not seen cannot be recorded: call it once before recording.")
        found = kept[dtype] = _made(tuple(lut.tolist()), dtype, lut.device)
    return found


@lru_cache(maxsize=32)  # every weight of a model has a lut of its own, all with the same values
def _made(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Table:
    wide = torch.tensor(values, dtype=torch.float64)
    scales = torch.linspace(1, 2, 4097, dtype=torch.float64)[:-1]
    errors = ((wide * scales[:, None]).to(dtype).double() / scales[:, None] - wide).square().sum(1)
    s = scales[errors.argmin()]
    bits = (wide * s).to(dtype).view(torch.int16).long() & 0xFFFF
    registers = [sum(((bits[4 * r + i] >> shift) & 255) << (8 * i) for i in range(4)) for shift in (0, 8) for r in range(4)]
    words = torch.cat([torch.stack(registers), bits])
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return Table(words.to(device), float(1 / s))


# $4 is the word, $5 to $8 the low bytes of values 0 to 15, $9 to $12 the high ones; $0 to $3 are the pairs of bytes 0 to 3.
# Three bits of a code choose among eight bytes of two registers, once for each half of the table; the fourth, shifted to where
# it turns selector 0123 into 4567, chooses between the halves.
ASSEMBLER = """{
    .reg .b32 s, u, d, v, a, b, e, f, h, k;
    and.b32 s, $4, 0x77777777;
    shr.u32 d, s, 16;
    shr.u32 u, $4, 1;
    lop3.b32 u, u, 0x44444444, 0x32103210, 0xEA;
    shr.u32 v, u, 16;
    prmt.b32 a, $5, $6, s;
    prmt.b32 b, $7, $8, s;
    prmt.b32 e, a, b, u;
    prmt.b32 a, $9, $10, s;
    prmt.b32 b, $11, $12, s;
    prmt.b32 f, a, b, u;
    prmt.b32 a, $5, $6, d;
    prmt.b32 b, $7, $8, d;
    prmt.b32 h, a, b, v;
    prmt.b32 a, $9, $10, d;
    prmt.b32 b, $11, $12, d;
    prmt.b32 k, a, b, v;
    prmt.b32 $0, e, f, 0x4051;
    prmt.b32 $1, e, f, 0x6273;
    prmt.b32 $2, h, k, 0x4051;
    prmt.b32 $3, h, k, 0x6273;
}"""
_ASSEMBLER: Any = None if tl is None else tl.constexpr(ASSEMBLER)


@jit
def four_pairs(word, T, ASM: tl.constexpr):
    """Of each 32-bit word the pairs of its bytes 0, 1, 2, 3, int32. T: the table's address, a tensor that has it for each lane.

    It is the same in all; but a table that the compiler knows to be the same in all lanes it keeps in uniform registers, and
    copies out of them at each use.
    """
    if ASM:
        t0, t1, t2, t3 = tl.load(T), tl.load(T + 1), tl.load(T + 2), tl.load(T + 3)
        t4, t5, t6, t7 = tl.load(T + 4), tl.load(T + 5), tl.load(T + 6), tl.load(T + 7)
        return tl.inline_asm_elementwise(
            _ASSEMBLER, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r", [word, t0, t1, t2, t3, t4, t5, t6, t7],
            (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
        )  # fmt: skip
    else:
        return _pair(word, T + 8), _pair(word >> 8, T + 8), _pair(word >> 16, T + 8), _pair(word >> 24, T + 8)


@jit
def _pair(byte, VALUES):
    """The same by two loads."""
    return (tl.load(VALUES + ((byte >> 4) & 15)) & 0xFFFF) | (tl.load(VALUES + (byte & 15)) << 16)


@jit
def eight_pairs(q, T, ASM: tl.constexpr):
    """Of each int64, which is eight bytes of the packed weight, its eight pairs in the order of the columns."""
    a0, a1, a2, a3 = four_pairs(q.to(tl.int32), T, ASM)
    b0, b1, b2, b3 = four_pairs((q >> 32).to(tl.int32), T, ASM)
    return a0, a1, a2, a3, b0, b1, b2, b3


@jit
def halves(pair, D: tl.constexpr):
    """(…, 2): the two values of dtype D in a 32-bit register."""
    return tl.join((pair & 0xFFFF).to(tl.int16).to(D, bitcast=True), (pair >> 16).to(tl.int16).to(D, bitcast=True))


@jit
def widened(pair, D: tl.constexpr):
    """(the low half's value, the high half's) in float32; bfloat16 is the upper half of a float32."""
    if tl.bfloat16 == D:
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low = (pair & 0xFFFF).to(tl.int16).to(D, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.int16).to(D, bitcast=True).to(tl.float32)
    return low, high
