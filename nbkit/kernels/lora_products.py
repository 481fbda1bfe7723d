"""LoRA's two small products around cuBLAS's large one: xa = x A^T, tall and skinny, and y += scale * xa B^T, an epilogue.

    xa_NR = x_NI a_RI^T  (rounded to x's dtype)              y_NO += scale * xa_NR b_OR^T

Both are bound by memory: the first reads x once, the second reads and writes y once; A, B and xa are R wide. The first is
cuBLAS's own: it splits I over the GPU, and was 2 to 8 times as fast on an H200 as a Triton kernel that does (docs/log.md). Below
capability 8.0, where Triton has no tensor cores, both are. The fused layer puts both products into its large GEMMs
(lora_border.py); these are for linears that stand alone.
Shapes: x (N, I), a (R, I), b (O, R), y (N, O) with any row stride; R <= 128.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbkit.kernels._launch import capability_of, cdiv, check_rows, kernel, on_device, power_of_two, tl, use_triton
from nbkit.kernels._op import Case, KernelOp

MAX_RANK = 128

# -- reference -------------------------------------------------------------------------------------


def reference(x: Tensor, a: Tensor, b: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
    """Plain torch: two GEMMs, y left as it is."""
    return torch.addmm(y, x @ a.t(), b.t(), alpha=scale)


# -- kernel ----------------------------------------------------------------------------------------


@kernel
def _add_outer_kernel(
    XA, B, Y, scale, stride_xa, stride_b, stride_y, N, columns, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr
):  # fmt: skip
    """BLOCK_N rows and BLOCK_O columns of y, in place."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, BLOCK_R)
    xa = tl.load(XA + row[:, None] * stride_xa + r[None, :], mask=(row < N)[:, None] & (r < R)[None, :], other=0.0)
    b = tl.load(B + column[None, :] * stride_b + r[:, None], mask=(column < columns)[None, :] & (r < R)[:, None], other=0.0)
    inside = (row < N)[:, None] & (column < columns)[None, :]
    place = Y + row[:, None] * stride_y + column[None, :]
    y = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    y += tl.dot(xa, b, input_precision="ieee") * scale
    tl.store(place, y.to(Y.dtype.element_ty), mask=inside)


# -- public functions ------------------------------------------------------------------------------


def lora_in(x: Tensor, a: Tensor, out: Tensor | None = None) -> Tensor:
    """xa (N, R) = x a^T in x's dtype, into `out` (N, R, any row stride) if given.

    Raises: ValueError for widths that do not fit.
    """
    if x.dim() != 2 or a.dim() != 2 or x.shape[1] != a.shape[1] or x.dtype != a.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and a {tuple(a.shape)} {a.dtype} must be (N, I) and (R, I) of one dtype.")
    return torch.mm(x, a.t(), out=out)


def lora_out_(y: Tensor, xa: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """y (N, O) += scale * xa b^T, in place.

    Raises: ValueError for widths that do not fit.
    """
    if y.dim() != 2 or xa.shape != (y.shape[0], b.shape[1]) or b.shape[0] != y.shape[1] or xa.dtype != b.dtype:
        shapes = f"y {tuple(y.shape)}, xa {tuple(xa.shape)} {xa.dtype} and b {tuple(b.shape)} {b.dtype}"
        raise ValueError(f"{shapes} must be (N, O), (N, R) and (O, R), the last two of one dtype.")
    (n, o), r = y.shape, b.shape[1]
    for name, rows in (("y", y), ("xa", xa), ("b", b)):
        check_rows(name, rows)
    if not (0 < r <= MAX_RANK and n and use_triton(y, xa, b) and _tensor_cores(y)):
        return y.addmm_(xa.to(y.dtype), b.to(y.dtype).t(), alpha=scale)
    block_n, block_o = (16 if n <= 16 else 64), 128
    with on_device(y):
        _add_outer_kernel[(cdiv(n, block_n), cdiv(o, block_o))](
            xa, b, y, float(scale), xa.stride(0), b.stride(0), y.stride(0), n, o, R=r, BLOCK_N=block_n, BLOCK_O=block_o,
            BLOCK_R=max(power_of_two(r), 16), num_warps=4
        )  # fmt: skip
    return y


def _tensor_cores(x: Tensor) -> bool:
    return x.dtype != torch.float32 and (not x.is_cuda or capability_of(x) >= (8, 0))


# -- op --------------------------------------------------------------------------------------------


def lora_products(x: Tensor, a: Tensor, b: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
    """y + scale * (x a^T) b^T, y left as it is."""
    return lora_out_(y.clone(), lora_in(x, a), b, scale)


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    n, i, o, r = (case.sizes[letter] for letter in "NIOR")
    x, a, b, y = (torch.randn(*shape, generator=make) for shape in ((n, i), (r, i), (o, r), (n, o)))
    x, a, b, y = (t.to(device, dtype) for t in (x, a / i**0.5, b / r**0.5, y))
    if case.sizes.get("strided"):
        x, y = (torch.cat([t, t], dim=1)[:, : t.shape[1]] for t in (x, y))
    return {"x": x, "a": a, "b": b, "y": y}


OP = KernelOp(
    name="lora_products",
    fn=lora_products,
    reference=reference,
    inputs=_inputs,
    gradients=(),
    cases=(
        Case("odd sizes", {"N": 19, "I": 150, "O": 131, "R": 5}, {"scale": 2.0}),
        Case("one row", {"N": 1, "I": 300, "O": 40, "R": 16}),
        Case("rows that lie apart", {"N": 34, "I": 64, "O": 64, "R": 8, "strided": 1}),
        Case("a rank that is no power of two", {"N": 17, "I": 1000, "O": 16, "R": 20}),
        Case("a rank beyond it", {"N": 5, "I": 160, "O": 16, "R": 130}),
    ),
    benchmark=(
        Case("Llama-3.1-8B gate, r 16, 2 x 2048", {"N": 4096, "I": 4096, "O": 14336, "R": 16}),
        Case("Llama-3.1-8B down, r 16, 1 x 512", {"N": 512, "I": 14336, "O": 4096, "R": 16}),
        Case("Llama-3.2-1B q, r 16, 2 x 512", {"N": 1024, "I": 2048, "O": 2048, "R": 16}),
        Case("Llama-3.1-8B q, r 64, one row", {"N": 1, "I": 4096, "O": 4096, "R": 64}),
    ),
)
