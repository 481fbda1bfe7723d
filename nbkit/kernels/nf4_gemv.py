"""y = x W^T for few rows straight from a packed NF4 weight, as decoding wants it: the 16-bit weight never exists.

    w_oi = round(lut[nibble_oi] * absmax_block)        y_no = sum_i x_ni w_oi  (+ sum_r xa_nr b_or * scale)  (+ residual_no)

w is rounded to x's dtype exactly as nf4.py dequantises it (bit-equal to bitsandbytes), products and sums are float32, y is
rounded once. Optionally LoRA's second product, whose xa = x A^T is small, and the residual come into the same launch.
Memory: 0.52 bytes a weight, a quarter of the 16-bit weight: that, not arithmetic, is the floor up to some 8 rows. Beyond, and
wherever kernels do not run, the weight is dequantised and multiplied.
Shapes: x (N, I), y and residual (N, O), xa (N, R), b (O, R), all with any row stride; N <= 8; I a multiple of 64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbkit.kernels import nf4
from nbkit.kernels._launch import check_rows, kernel, on_device, power_of_two, tl, use_triton
from nbkit.kernels._op import Case, KernelOp
from nbkit.kernels.nf4 import NESTED_BLOCK, Nf4, dequantize_reference

ROWS = 8  # of x, at most

# -- reference -------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    packed: Nf4,
    *,
    lora: tuple[Tensor, Tensor, float] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Dequantised and multiplied in float32 or wider, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = dequantize_reference(packed).to(x.dtype).to(wide)
    y = x.to(wide) @ weight.t()
    if lora is not None:
        xa, b, scale = lora
        y = y + (xa.to(wide) @ b.to(wide).t()) * scale
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


# -- kernel ----------------------------------------------------------------------------------------


@kernel
def _nf4_gemv_kernel(
    X, Q, AM, CODE2, AM2, OFFSET, LUT, Y, XA, B, RESIDUAL, scale, stride_x, stride_y, stride_xa, stride_b, stride_residual,
    n, blocks, zero, NESTED: tl.constexpr, LORA: tl.constexpr, R: tl.constexpr, ADD: tl.constexpr, HALF: tl.constexpr,
    SHARE: tl.constexpr, ROWS: tl.constexpr, NB: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """One row of the weight, NB of its blocks of 2 HALF values at a time. `zero` is 0, which the compiler does not know."""
    o = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    # Four bytes a thread: then the halves of x, which come eight columns a thread, lie in the threads that need them.
    byte = tl.max_contiguous(tl.arange(0, HALF), 4)
    column = tl.arange(0, NB)[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    x_at = X + row[:, None, None] * stride_x + column[None, :, :]
    total = tl.zeros((ROWS, NB, HALF), dtype=tl.float32)
    for first in range(0, blocks, NB):
        block = first + tl.arange(0, NB)
        ok = block < blocks
        at = o * blocks + block
        absmax = tl.load(AM + at, mask=ok, other=0)
        if NESTED:
            inner = tl.load(AM2 + at // SHARE, mask=ok, other=0.0)
            absmax = tl.load(CODE2 + absmax.to(tl.int32)) * inner
            # An integer addition between product and sum, lest they become one multiply-add, which rounds once.
            absmax = (absmax.to(tl.int32, bitcast=True) + zero).to(tl.float32, bitcast=True) + tl.load(OFFSET)
        q = tl.load(Q + at[:, None] * HALF + byte[None, :], mask=ok[:, None], other=0).to(tl.int32)
        high = (tl.load(LUT + (q >> 4)) * absmax[:, None]).to(Y.dtype.element_ty).to(tl.float32)
        low = (tl.load(LUT + (q & 15)) * absmax[:, None]).to(Y.dtype.element_ty).to(tl.float32)
        inside = (row < n)[:, None, None] & ok[None, :, None]
        x = tl.load(x_at + first * (2 * HALF), mask=inside, other=0.0)
        even, odd = tl.split(tl.reshape(x, (ROWS, NB, HALF, 2)).to(tl.float32))
        total += even * high[None, :, :]
        total += odd * low[None, :, :]
    y = tl.sum(tl.reshape(total, (ROWS, NB * HALF)), axis=1)
    if LORA:
        r = tl.arange(0, BLOCK_R)
        xa = tl.load(XA + row[:, None] * stride_xa + r[None, :], mask=(row < n)[:, None] & (r < R)[None, :], other=0.0)
        b = tl.load(B + o * stride_b + r, mask=r < R, other=0.0).to(tl.float32)
        y += tl.sum(xa.to(tl.float32) * b[None, :], axis=1) * scale
    if ADD:
        y += tl.load(RESIDUAL + row * stride_residual + o, mask=row < n, other=0.0).to(tl.float32)
    tl.store(Y + row * stride_y + o, y.to(Y.dtype.element_ty), mask=row < n)


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

    Args:
        packed: the weight (O, I).
        lora: (xa, b, scale): adds scale * xa b^T.
        residual: (N, O), is added; may be `out`.
        out: (N, O) for y, with any row stride.
    Raises: ValueError for widths that do not fit.
    """
    o, i = packed.shape
    if x.dim() != 2 or x.shape[1] != i or (lora is not None and (lora[1].shape[0] != o or lora[0].shape[1] != lora[1].shape[1])):
        shapes = f"x {tuple(x.shape)}" + ("" if lora is None else f", xa {tuple(lora[0].shape)}, b {tuple(lora[1].shape)}")
        raise ValueError(f"{shapes} do not fit a weight {packed.shape}.")
    out = torch.empty(x.shape[0], o, dtype=x.dtype, device=x.device) if out is None else out
    xa, b, scale = (x, x, 1.0) if lora is None else lora
    added = out if residual is None else residual
    for name, rows in (("x", x), ("xa", xa), ("b", b), ("residual", added), ("out", out)):
        check_rows(name, rows)
    n = x.shape[0]
    if not (0 < n <= ROWS and i % packed.block == 0 and use_triton(x, xa, b, added, out)):
        return out.copy_(reference(x, packed, lora=lora, residual=residual))
    nested = packed.code2 is not None
    code2, absmax2, shift = (packed.code2, packed.absmax2, packed.offset) if nested else (packed.lut,) * 3
    blocks, rows = i // packed.block, power_of_two(n)
    r = 0 if lora is None else b.shape[1]
    chunk = min(power_of_two(blocks), 64 if rows <= 2 else 32)
    with on_device(x):
        _nf4_gemv_kernel[(o,)](
            x, packed.data, packed.absmax, code2, absmax2, shift, packed.lut, out, xa, b, added, float(scale),
            x.stride(0), out.stride(0), xa.stride(0), b.stride(0), added.stride(0), n, blocks, 0,
            NESTED=nested, LORA=lora is not None, R=r, ADD=residual is not None, HALF=packed.block // 2, SHARE=NESTED_BLOCK,
            ROWS=rows, NB=chunk, BLOCK_R=power_of_two(r), num_warps=4
        )  # fmt: skip
    return out


# -- op --------------------------------------------------------------------------------------------


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    parts = nf4.OP.inputs(case, dtype, device, seed)
    make = torch.Generator().manual_seed(seed + 1)
    n, (o, i), r = case.sizes["N"], parts["shape"], case.sizes.get("R", 0)
    x, xa, b, residual = (torch.randn(*shape, generator=make) for shape in ((n, i), (n, max(r, 1)), (o, max(r, 1)), (n, o)))
    x = (x / i**0.5).to(device, dtype)
    if case.sizes.get("strided"):
        x = torch.cat([x, x], dim=1)[:, :i]
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
        Case("plain absmax", {"N": 1, "O": 6, "I": 128}),
        Case("three rows that lie apart, no whole number of chunks", {"N": 3, "O": 5, "I": 64 * 33, "nested": 1, "strided": 1}),
        Case("eight rows", {"N": 8, "O": 3, "I": 256, "nested": 1}),
        Case("LoRA and the residual in the same launch", {"N": 2, "O": 9, "I": 192, "nested": 1, "R": 6, "residual": 1}),
        Case("more rows than it takes", {"N": 9, "O": 4, "I": 64, "nested": 1, "R": 16}),
        Case("a row of the weight that ends within a block", {"N": 1, "O": 8, "I": 40, "nested": 1}),
    ),
    benchmark=(
        Case("Llama-3.2-1B gate, one row", {"N": 1, "O": 8192, "I": 2048, "nested": 1}),
        Case("Llama-3.1-8B gate, one row", {"N": 1, "O": 14336, "I": 4096, "nested": 1}),
        Case("Llama-3.1-8B down, one row, LoRA", {"N": 1, "O": 4096, "I": 14336, "nested": 1, "R": 16, "residual": 1}),
        Case("Llama-3.1-8B gate, 8 rows", {"N": 8, "O": 14336, "I": 4096, "nested": 1}),
    ),
)
