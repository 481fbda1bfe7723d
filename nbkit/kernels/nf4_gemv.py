"""y = x W^T for few rows straight from a packed NF4 weight, as decoding wants it: the 16-bit weight never exists.

    y_no = sum_blocks absmax_ob sum_{i in b} x_ni lut[code_oi]        (+ scale sum_r xa_nr b_or)        (+ residual_no)

Sums are float32 and y is rounded once; the table alone is held in 16 bits, times a constant factor (_nf4_pairs.py): in float16
for one row and before Ampere, in x's dtype otherwise. So the weights err by 0.8e-3 in bfloat16 and 1e-4 in float16, against
1.7e-3 and 2e-4 for a weight that is dequantised to 16 bits, as nf4.py and bitsandbytes do, and then multiplied.

What limits it is instructions for each weight, not memory (0.52 bytes a weight). So codes become values eight at a time in
registers, and absmax is multiplied to sums over a block (or a quarter of one), not to weights. For 2 to 8 rows tensor cores
multiply 16 rows of the weight by 16 columns by 8 rows of x. No value changes its lane for that: a product does not depend on the
order of the columns, so the columns that a lane has loaded are declared to be those that the instruction wants from it, for x
likewise. On an H200, 14,336 x 4,096 in bfloat16: 24 us for one row, 26 for two to eight.

More than 8 rows, float32 and weights that do not fit (`_fits`) are dequantised by nf4.py and multiplied.
Shapes: x (N, I), y and residual (N, O), xa (N, R), b (O, R), all with any row stride.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbkit.kernels import nf4
from nbkit.kernels._launch import capability_of, cdiv, check_rows, jit, kernel, on_device, processors, tl, use_triton
from nbkit.kernels._nf4_pairs import ASSEMBLED, eight_pairs, halves, table_of, widened
from nbkit.kernels._op import Case, KernelOp
from nbkit.kernels.nf4 import NESTED_BLOCK, Nf4, dequantize_reference

ROWS = 8  # of x, at most
_BLOCK = 64  # columns of the weight that a program takes together: 32 bytes
_AT_ONCE = 8  # of those, of each row
_DOT, _FMA = 16, 8  # rows of the weight a program

# -- reference -------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    packed: Nf4,
    *,
    lora: tuple[Tensor, Tensor, float] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """With the weights lut * absmax as float32 has them, multiplied in float32 or wider, y rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ dequantize_reference(packed).to(wide).t()
    if lora is not None:
        xa, b, scale = lora
        y = y + (xa.to(wide) @ b.to(wide).t()) * scale
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


# -- kernels ---------------------------------------------------------------------------------------


@jit
def _absmax(AM, CODE2, AM2, shift, at, ok, NESTED: tl.constexpr, SPAN: tl.constexpr, SHARE: tl.constexpr):
    """absmax of the blocks `at`, counted in 64 columns, of which SPAN share one. Where not ok: anything finite."""
    at = at // SPAN
    if NESTED:
        code = tl.load(AM + at, mask=ok, other=0).to(tl.int32)
        return tl.load(CODE2 + code) * tl.load(AM2 + at // SHARE, mask=ok, other=0.0) + shift
    else:
        return tl.load(AM + at, mask=ok, other=0.0)


@jit
def _finish(
    y, Y, XA, B, RESIDUAL, scale, stride_y, stride_xa, stride_b, stride_residual, o, row, outputs, n, rank,
    LORA: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """Stores y (rows of the weight, rows of x) with what is added to it."""
    o = o.to(tl.int64)
    if LORA:
        r = tl.arange(0, 16)
        for first in range(0, rank, 16):
            here = (first + r < rank)[None, :]
            b_at = B + o[:, None] * stride_b + (first + r)[None, :]
            b = tl.load(b_at, mask=(o < outputs)[:, None] & here, other=0.0).to(tl.float32)
            xa_at = XA + row[:, None] * stride_xa + (first + r)[None, :]
            xa = tl.load(xa_at, mask=(row < n)[:, None] & here, other=0.0).to(tl.float32)
            y += tl.sum(b[:, None, :] * xa[None, :, :], axis=2) * scale
    inside = (o < outputs)[:, None] & (row < n)[None, :]
    if ADD:
        y += tl.load(RESIDUAL + row[None, :] * stride_residual + o[:, None], mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row[None, :] * stride_y + o[:, None], y.to(Y.dtype.element_ty), mask=inside)


@jit
def _together(c0, c1, c2, c3):
    """Four (..., 4 lanes, 2 neighbours, 2 halves), of byte i of a half, as (..., i1, i0, lane, half, neighbour)."""
    return tl.join(tl.join(c0, c2), tl.join(c1, c3))


@kernel
def _dot_gemv(
    X, Q, AM, CODE2, AM2, OFFSET, T, Y, XA, B, RESIDUAL, gain, scale, stride_x, stride_y, stride_xa, stride_b, stride_residual,
    n, outputs, blocks, rank, odd, NESTED: tl.constexpr, SPAN: tl.constexpr, SHARE: tl.constexpr, LORA: tl.constexpr,
    ADD: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, BO: tl.constexpr, NB: tl.constexpr
):  # fmt: skip
    """BO rows of the weight, NB blocks of 64 columns at a time, all rows of x, on tensor cores: y^T = W x^T, a product a block.

    X is read as int64, 4 columns each; stride_x counts them. A lane keeps 8 bytes of a block of a row: column
    16 t + 8 h + 2 i + e stands at k = 16 i + 4 t + 2 h + e of the product. `odd` is 3, which the compiler does not know: thus it
    takes no more than 8 bytes a lane at a time, and lanes follow the last axis, which Triton takes for the fastest where it is
    told to be contiguous (of axes equally contiguous 3.6 takes the first, 3.7 the last). Stages would lead x by way of shared
    memory. EVEN: blocks are a multiple of NB.
    """
    D: tl.constexpr = X.dtype.element_ty
    X, Q = X.to(tl.pointer_type(tl.int64), bitcast=True), Q.to(tl.pointer_type(tl.int64), bitcast=True)
    zero = odd - 3
    t, b = tl.arange(0, 4) + zero, tl.arange(0, NB)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    o8 = tl.program_id(0) * BO + tl.arange(0, BO // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    o_read, o8_read = tl.minimum(o, outputs - 1).to(tl.int64), tl.minimum(o8, outputs - 1).to(tl.int64)
    row = tl.minimum(tl.arange(0, 8), n - 1)  # rows that are not there repeat the last, and are not stored
    q_at = Q + ((o8_read * blocks)[:, None, :] + b[None, :, None])[:, :, :, None] * 4 + t[None, None, None, :]
    x_at = X + ((row[None, :] * stride_x + b[:, None] * 16)[:, :, None] + (tl.arange(0, 4) * 4 + zero)[None, None, :])
    a_at = o_read[None, :] * blocks + b[:, None]
    table = T + (t * zero)[None, None, None, :]
    shift = tl.load(OFFSET)
    acc = tl.zeros((NB, BO, 8), tl.float32)
    ok = (b < blocks) | EVEN
    q = tl.load(tl.max_contiguous(q_at + 0, [1, 2, 4, 8]), mask=ok[None, :, None, None], other=0)
    for first in tl.range(0, blocks, NB, num_stages=1):
        ok = (first + b < blocks) | EVEN
        coming = q  # the next bytes are on their way while these are used
        if first + NB < blocks:
            ahead = ((first + NB) + b < blocks) | EVEN
            coming = tl.load(tl.max_contiguous(q_at + (first + NB) * 4, [1, 2, 4, 8]), mask=ahead[None, :, None, None], other=0)
        x_ok = ok[:, None, None]
        x0 = tl.load(tl.max_contiguous(x_at + first * 16, [2, 4, 8]), mask=x_ok, other=0)
        x1 = tl.load(tl.max_contiguous(x_at + (first * 16 + 1), [2, 4, 8]), mask=x_ok, other=0)
        x2 = tl.load(tl.max_contiguous(x_at + (first * 16 + 2), [2, 4, 8]), mask=x_ok, other=0)
        x3 = tl.load(tl.max_contiguous(x_at + (first * 16 + 3), [2, 4, 8]), mask=x_ok, other=0)
        absmax = _absmax(AM, CODE2, AM2, shift, a_at + first, ok[:, None], NESTED, SPAN, SHARE)
        a0, a1, a2, a3, b0, b1, b2, b3 = eight_pairs(q, table, ASM)
        w = _together(
            tl.join(halves(a0, D), halves(b0, D)), tl.join(halves(a1, D), halves(b1, D)),
            tl.join(halves(a2, D), halves(b2, D)), tl.join(halves(a3, D), halves(b3, D)),
        )  # fmt: skip
        w = tl.reshape(tl.permute(w, (1, 0, 2, 6, 7, 3, 5, 4)), (NB, BO, 64))
        x = _together(
            tl.join(halves(x0.to(tl.int32), D), halves(x2.to(tl.int32), D)),
            tl.join(halves((x0 >> 32).to(tl.int32), D), halves((x2 >> 32).to(tl.int32), D)),
            tl.join(halves(x1.to(tl.int32), D), halves(x3.to(tl.int32), D)),
            tl.join(halves((x1 >> 32).to(tl.int32), D), halves((x3 >> 32).to(tl.int32), D)),
        )
        x = tl.reshape(tl.permute(x, (0, 5, 6, 2, 4, 3, 1)), (NB, 64, 8))
        acc += tl.dot(w, x) * absmax[:, :, None]
        q = coming
    _finish(
        tl.sum(acc, axis=0) * gain, Y, XA, B, RESIDUAL, scale, stride_y, stride_xa, stride_b, stride_residual,
        o, tl.arange(0, 8), outputs, n, rank, LORA, ADD
    )  # fmt: skip


@jit
def _add_pair(s, pair, x, D: tl.constexpr):
    """s + the pair's products with two neighbouring columns of x, in float32; the pair is float16."""
    low, high = widened(pair, tl.float16)
    x_low, x_high = widened(x, D)
    return high * x_high[None, :, :] + (low * x_low[None, :, :] + s)


@kernel
def _fma_gemv(
    X, Q, AM, CODE2, AM2, OFFSET, T, Y, XA, B, RESIDUAL, gain, scale, stride_x, stride_y, stride_xa, stride_b, stride_residual,
    n, outputs, blocks, rank, odd, NESTED: tl.constexpr, SPAN: tl.constexpr, SHARE: tl.constexpr, LORA: tl.constexpr,
    ADD: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, BO: tl.constexpr, NB: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """BO rows of the weight, NB blocks at a time, one row of x or two, by multiply-add.

    absmax is multiplied to the sum over a lane's 16 columns. More rows of x: a program for each two of them, one after the other,
    so that L2 still has the weight's rows.
    """
    D: tl.constexpr = X.dtype.element_ty
    X, Q = X.to(tl.pointer_type(tl.int64), bitcast=True), Q.to(tl.pointer_type(tl.int64), bitcast=True)
    groups = tl.cdiv(n, ROWS)
    row0 = tl.program_id(0) % groups * ROWS
    zero = odd - 3
    t, b = tl.arange(0, 4) + zero, tl.arange(0, NB)
    o = tl.program_id(0) // groups * BO + tl.arange(0, BO)
    o_read = tl.minimum(o, outputs - 1).to(tl.int64)
    q_at = Q + ((o_read * blocks)[:, None] + b[None, :])[:, :, None] * 4 + t[None, None, :]
    x_at = X + (b[:, None] * 16 + (tl.arange(0, 4) * 4 + zero)[None, :])
    a_at = o_read[:, None] * blocks + b[None, :]
    table = T + (t * zero)[None, None, :]
    shift = tl.load(OFFSET)
    nothing = tl.zeros((BO, NB, 4), tl.float32)
    acc0, acc1 = nothing, nothing
    ok = (b < blocks) | EVEN
    q = tl.load(tl.max_contiguous(q_at + 0, [2, 4, 8]), mask=ok[None, :, None], other=0)
    for first in tl.range(0, blocks, NB, num_stages=1):
        ok = (first + b < blocks) | EVEN
        ahead = (first + NB) + b < blocks
        coming = tl.load(tl.max_contiguous(q_at + (first + NB) * 4, [2, 4, 8]), mask=ahead[None, :, None], other=0)
        absmax = _absmax(AM, CODE2, AM2, shift, a_at + first, ok[None, :], NESTED, SPAN, SHARE)[:, :, None]
        a0, a1, a2, a3, b0, b1, b2, b3 = eight_pairs(q, table, ASM)
        for r in tl.static_range(ROWS):
            at = x_at + (tl.minimum(row0 + r, n - 1) * stride_x + first * 16)
            x0 = tl.load(tl.max_contiguous(at + 0, [4, 8]), mask=ok[:, None], other=0)
            x1 = tl.load(tl.max_contiguous(at + 1, [4, 8]), mask=ok[:, None], other=0)
            x2 = tl.load(tl.max_contiguous(at + 2, [4, 8]), mask=ok[:, None], other=0)
            x3 = tl.load(tl.max_contiguous(at + 3, [4, 8]), mask=ok[:, None], other=0)
            s = _add_pair(nothing, a0, x0.to(tl.int32), D)
            s = _add_pair(s, a1, (x0 >> 32).to(tl.int32), D)
            s = _add_pair(s, a2, x1.to(tl.int32), D)
            s = _add_pair(s, a3, (x1 >> 32).to(tl.int32), D)
            s = _add_pair(s, b0, x2.to(tl.int32), D)
            s = _add_pair(s, b1, (x2 >> 32).to(tl.int32), D)
            s = _add_pair(s, b2, x3.to(tl.int32), D)
            s = _add_pair(s, b3, (x3 >> 32).to(tl.int32), D)
            if r == 0:
                acc0 += s * absmax
            else:
                acc1 += s * absmax
        q = coming
    y = tl.sum(tl.sum(acc0, axis=2), axis=1)
    y = y[:, None] if ROWS == 1 else tl.join(y, tl.sum(tl.sum(acc1, axis=2), axis=1))
    _finish(
        y * gain, Y, XA, B, RESIDUAL, scale, stride_y, stride_xa, stride_b, stride_residual,
        o, row0 + tl.arange(0, ROWS), outputs, n, rank, LORA, ADD
    )  # fmt: skip


# -- public function -------------------------------------------------------------------------------


def nf4_gemv(
    x: Tensor,
    packed: Nf4,
    *,
    lora: tuple[Tensor, Tensor, float] | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y (N, O) in x's dtype.

    The first call with a weight reads its table of 16 values back from the device, so make one before a CUDA graph is recorded.

    Args:
        packed: the weight (O, I).
        lora: (xa, b, scale): adds scale * xa b^T.
        residual: (N, O), is added; may be `out`.
        out: (N, O) for y in x's dtype, with any row stride.
    Raises: ValueError for widths or an `out` that do not fit; RuntimeError where the first call is recorded.
    """
    o, i = packed.shape
    if x.dim() != 2 or x.shape[1] != i or (lora is not None and (lora[1].shape[0] != o or lora[0].shape[1] != lora[1].shape[1])):
        shapes = f"x {tuple(x.shape)}" + ("" if lora is None else f", xa {tuple(lora[0].shape)}, b {tuple(lora[1].shape)}")
        raise ValueError(f"{shapes} do not fit a weight {packed.shape}.")
    n = x.shape[0]
    out = torch.empty(n, o, dtype=x.dtype, device=x.device) if out is None else out
    xa, b, scale = (x, x, 1.0) if lora is None else lora
    added = out if residual is None else residual
    for name, rows in (("x", x), ("xa", xa), ("b", b), ("residual", added), ("out", out)):
        check_rows(name, rows)
    for name, rows, width in (("out", out, o), ("residual", added, o), ("xa", xa, xa.shape[1])):
        if rows.shape != (n, width):
            raise ValueError(f"{name} is {tuple(rows.shape)}; for x {tuple(x.shape)} it must be ({n}, {width}).")
    if out.dtype != x.dtype:
        raise ValueError(f"out is {out.dtype}; it must be {x.dtype} as x is.")
    if not use_triton(x, xa, b, added, out):
        return out.copy_(reference(x, packed, lora=lora, residual=residual))
    if not (0 < n <= ROWS and _fits(x, packed)):
        return out.copy_(_multiplied(x, packed, lora, residual))
    if x.data_ptr() % 8 or (n > 1 and x.stride(0) % 4):  # it is read four columns at a time
        x = x.clone(memory_format=torch.contiguous_format)
    _launch(x, packed, out, xa, b, added, float(scale), lora is not None, residual is not None)
    return out


def _fits(x: Tensor, packed: Nf4) -> bool:
    """Whether the kernels take x's dtype and the weight: whole blocks of absmax in a row, each of a multiple of 64 columns."""
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and packed.block % _BLOCK == 0
        and packed.shape[1] % packed.block == 0
        and packed.data.data_ptr() % 8 == 0
    )


def _multiplied(x: Tensor, packed: Nf4, lora: Any, residual: Tensor | None) -> Tensor:
    """By way of the weight in x's dtype."""
    weight = torch.empty(packed.shape, dtype=x.dtype, device=x.device)
    nf4.dequantize_nf4(packed, weight)
    y = (x @ weight.t()).float()
    if lora is not None:
        xa, b, scale = lora
        y += (xa.float() @ b.float().t()) * scale
    return y if residual is None else y.add_(residual)


def _launch(
    x: Tensor, packed: Nf4, out: Tensor, xa: Tensor, b: Tensor, added: Tensor, scale: float, with_lora: bool, adds: bool
) -> None:
    n, (o, i) = x.shape[0], packed.shape
    dots = n > 1 and _on_tensor_cores(x)
    table = table_of(packed.lut, x.dtype if dots else torch.float16)
    nested = packed.code2 is not None
    code2, absmax2, offset = (packed.code2, packed.absmax2, packed.offset) if nested else (packed.lut,) * 3
    blocks = i // _BLOCK
    numbers = (
        x, packed.data, packed.absmax, code2, absmax2, offset, table.words, out, xa, b, added, table.gain, scale,
        x.stride(0) // 4, out.stride(0), xa.stride(0), b.stride(0), added.stride(0), n, o, blocks, b.shape[1], 3,
    )  # fmt: skip
    constants = {
        "NESTED": nested, "SPAN": packed.block // _BLOCK, "SHARE": NESTED_BLOCK, "LORA": with_lora, "ADD": adds,
        "EVEN": blocks % _AT_ONCE == 0, "ASM": ASSEMBLED, "NB": _AT_ONCE,
    }  # fmt: skip
    with on_device(x):
        if dots:
            programs = cdiv(o, _DOT)
            # Where few programs share the GPU, each gets more warps. Measured on 132 multiprocessors: 256 programs against 384.
            warps = 8 if programs <= 2 * processors(x.device) else 4
            _dot_gemv[(programs,)](*numbers, **constants, BO=_DOT, num_warps=warps)
        else:
            rows = min(n, 2)
            _fma_gemv[(cdiv(o, _FMA) * cdiv(n, rows),)](*numbers, **constants, BO=_FMA, ROWS=rows, num_warps=4)


def _on_tensor_cores(x: Tensor) -> bool:
    """Whether Triton multiplies on them: from Ampere on. Those of AMD want more rows than there are."""
    return torch.version.hip is None and (not x.is_cuda or capability_of(x) >= (8, 0))


# -- op --------------------------------------------------------------------------------------------


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    parts = nf4.OP.inputs(case, dtype, device, seed)
    make = torch.Generator().manual_seed(seed + 1)
    n, (o, i), r = case.sizes["N"], parts["shape"], case.sizes.get("R", 0)
    x, xa, b, residual = (torch.randn(*shape, generator=make) for shape in ((n, i), (n, max(r, 1)), (o, max(r, 1)), (n, o)))
    x = (x / i**0.5).to(device, dtype)
    if case.sizes.get("strided"):
        x = torch.cat([x, x], dim=1)[:, :i]
    if case.sizes.get("odd"):
        x = torch.cat([x, x[:, :3]], dim=1)[:, :i]
    found: dict[str, Any] = {
        "x": x,
        "packed": Nf4(parts["data"], parts["absmax"], parts["lut"], parts["shape"], 64, *(parts["inner"] or ())),
    }
    if r:
        found["lora"] = (xa.to(device, dtype), b.to(device, dtype), 0.5)
    if case.sizes.get("residual"):
        found["residual"] = residual.to(device, dtype)
    return found


OP = KernelOp(
    name="nf4_gemv",
    fn=nf4_gemv,
    reference=reference,
    inputs=_inputs,
    gradients=(),
    cases=(
        Case("one row, double quantisation", {"N": 1, "O": 7, "I": 1024, "nested": 1}),
        Case("two rows", {"N": 2, "O": 37, "I": 576, "nested": 1}),
        Case("three rows that lie apart, no whole number of chunks", {"N": 3, "O": 5, "I": 64 * 33, "nested": 1, "strided": 1}),
        Case("four rows, plain absmax", {"N": 4, "O": 33, "I": 512}),
        Case("five rows of an odd stride", {"N": 5, "O": 16, "I": 320, "nested": 1, "odd": 1}),
        Case("six rows and the residual", {"N": 6, "O": 17, "I": 64, "nested": 1, "residual": 1}),
        Case("seven rows", {"N": 7, "O": 31, "I": 832, "nested": 1}),
        Case("eight rows", {"N": 8, "O": 3, "I": 256, "nested": 1}),
        Case("plain absmax", {"N": 1, "O": 6, "I": 128}),
        Case("LoRA in the same launch, one row", {"N": 1, "O": 9, "I": 192, "nested": 1, "R": 6}),
        Case("LoRA and the residual in the same launch", {"N": 2, "O": 9, "I": 192, "nested": 1, "R": 21, "residual": 1}),
        Case("more rows than it takes", {"N": 9, "O": 4, "I": 64, "nested": 1, "R": 16, "residual": 1}),
        Case("a row of the weight that ends within a block", {"N": 1, "O": 8, "I": 40, "nested": 1}),
    ),
    benchmark=(
        Case("Llama-3.2-1B gate, one row", {"N": 1, "O": 8192, "I": 2048, "nested": 1}),
        Case("Llama-3.1-8B gate, one row", {"N": 1, "O": 14336, "I": 4096, "nested": 1}),
        Case("Llama-3.1-8B down, one row", {"N": 1, "O": 4096, "I": 14336, "nested": 1}),
        Case("Llama-3.1-8B down, one row, LoRA", {"N": 1, "O": 4096, "I": 14336, "nested": 1, "R": 16, "residual": 1}),
        Case("Llama-3.1-8B o, one row", {"N": 1, "O": 4096, "I": 4096, "nested": 1}),
        Case("Llama-3.1-8B qkv, one row", {"N": 1, "O": 6144, "I": 4096, "nested": 1}),
        Case("Llama-3.1-8B gate, 2 rows", {"N": 2, "O": 14336, "I": 4096, "nested": 1}),
        Case("Llama-3.1-8B gate, 4 rows", {"N": 4, "O": 14336, "I": 4096, "nested": 1}),
        Case("Llama-3.1-8B gate, 8 rows", {"N": 8, "O": 14336, "I": 4096, "nested": 1}),
        Case("Llama-3.1-8B down, 8 rows", {"N": 8, "O": 4096, "I": 14336, "nested": 1}),
    ),
)
