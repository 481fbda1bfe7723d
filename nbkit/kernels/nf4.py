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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nbkit.kernels._launch import cdiv, kernel, on_device, power_of_two, runs_on, tl
from nbkit.kernels._op import Case, KernelOp

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
        if getattr(state, "packing_format_for_cpu", False):  # for generation on a CPU
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


@kernel
def _dequantize_rows(
    Q, AM, CODE2, AM2, OFFSET, LUT, OUT, A, B, scale, so, sa, sb, row0, a_row, in_, off, r, rank, rows,
    NESTED: tl.constexpr, HALF: tl.constexpr, NB: tl.constexpr, RP: tl.constexpr, SHARE: tl.constexpr,
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
            inner = tl.load(AM2 + at // SHARE, mask=ok, other=0.0)
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


def _write_term(out: Tensor, inputs: int, outputs: int, term: Any) -> None:
    columns = slice(term.offset, term.offset + term.a.shape[0])
    out[outputs:, :inputs][columns] = term.a.detach()
    wide = torch.promote_types(term.b.dtype, torch.float32)
    out[term.start : term.stop, inputs:][:, columns] = (term.b.detach().to(wide) * term.scale).to(out.dtype)


def dequantize_nf4(
    packed: Nf4, out: Tensor, start: int = 0, outputs: int | None = None, rank: int = 0, terms: Sequence[Any] = ()
) -> None:
    """Write the weight into rows start:start+O, columns :I of `out`, and its LoRA terms into the border.

    out: (>= outputs + rank, >= I + rank) in 16 bits or float32, rows contiguous; `outputs`: rows of the whole group (A's rows
    follow them); `rank`: border columns of the whole group, those of other linears are set to zero here. `terms`: objects with
    a (r, I), b (O, r), scale, start, stop, offset. Each term beyond the first costs two small copies more.
    """
    o, i = packed.shape
    outputs = start + o if outputs is None else outputs
    if runs_on(out.device) and i % packed.block == 0 and out.dtype != torch.float64:
        _launch(packed, out, start, outputs, rank, terms[0] if terms else None)
        terms = terms[1:]
    else:
        out[start : start + o, :i] = dequantize_reference(packed).to(out.dtype)
        out[start : start + o, i : i + rank] = 0
    for term in terms:
        _write_term(out, i, outputs, term)


def _launch(packed: Nf4, out: Tensor, start: int, outputs: int, rank: int, term: Any | None) -> None:
    o, i = packed.shape
    blocks = 16
    a, b, scale, offset = (term.a, term.b, term.scale, term.offset) if term is not None else (out, out, 1.0, 0)
    r = a.shape[0] if term is not None else 0
    code2, absmax2, shift = (packed.code2, packed.absmax2, packed.offset) if packed.code2 is not None else (packed.lut,) * 3
    with on_device(out):
        _dequantize_rows[(o + r, cdiv(i // packed.block, blocks))](
            packed.data, packed.absmax, code2, absmax2, shift, packed.lut, out, a, b, scale,
            out.stride(0), a.stride(0), b.stride(0), start, outputs + offset, i, offset, r, rank, o,
            NESTED=packed.code2 is not None, HALF=packed.block // 2, NB=blocks, RP=power_of_two(rank) if rank else 0,
            SHARE=NESTED_BLOCK, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip


# -- op --------------------------------------------------------------------------------------------


def dequantize(
    data: Tensor,
    absmax: Tensor,
    lut: Tensor,
    inner: tuple[Tensor, Tensor, Tensor] | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """(O, I) in `dtype`. `inner`: code2 (256,), absmax2 and offset of double quantisation, or None."""
    packed = Nf4(data, absmax, lut, shape, 64, *(inner or ()))
    out = torch.empty(shape, dtype=dtype, device=data.device)
    dequantize_nf4(packed, out)
    return out


def reference(
    data: Tensor,
    absmax: Tensor,
    lut: Tensor,
    inner: tuple[Tensor, Tensor, Tensor] | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Same in plain torch."""
    return dequantize_reference(Nf4(data, absmax, lut, shape, 64, *(inner or ()))).to(dtype)


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    o, i = case.sizes["O"], case.sizes["I"]
    blocks = o * i // 64
    data = torch.randint(0, 256, (o * i // 2,), dtype=torch.uint8, generator=make)
    lut = torch.linspace(-1, 1, 16) + torch.rand(16, generator=make) * 0.1
    inner = None
    absmax = torch.rand(blocks, generator=make)
    if case.sizes.get("nested"):
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=make)
        inner = (torch.randn(256, generator=make), torch.rand(-(-blocks // NESTED_BLOCK), generator=make), torch.tensor(0.37))
        inner = tuple(t.to(device) for t in inner)
    return {
        "data": data.to(device),
        "absmax": absmax.to(device),
        "lut": lut.to(device),
        "inner": inner,
        "shape": (o, i),
        "dtype": dtype,
    }


OP = KernelOp(
    name="nf4",
    fn=dequantize,
    reference=reference,
    inputs=_inputs,
    gradients=(),
    cases=(
        Case("double quantisation, blocks of absmax end within a row", {"O": 7, "I": 5440, "nested": 1}),
        Case("one row of one block", {"O": 1, "I": 64, "nested": 1}),
        Case("plain absmax", {"O": 6, "I": 128}),
        Case("rows that are no whole number of blocks", {"O": 8, "I": 40, "nested": 1}),
    ),
    benchmark=(
        Case("Llama-3.2-1B gate", {"O": 8192, "I": 2048, "nested": 1}),
        Case("Llama-3.1-8B gate", {"O": 14336, "I": 4096, "nested": 1}),
        Case("Llama-3.1-8B down", {"O": 4096, "I": 14336, "nested": 1}),
    ),
)
