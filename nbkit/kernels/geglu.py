"""GeGLU's product (Shazeer 2020, arXiv:2002.05202; GELU: Hendrycks and Gimpel 2016, arXiv:1606.08415), exact and tanh form.

    exact:  c = (1 + erf(gate / sqrt 2)) / 2                          c' = exp(-gate^2 / 2) / sqrt(2 pi)
    tanh:   c = (1 + tanh u) / 2 = sigmoid(2u)                        c' = 2 u' c (1 - c)
            u = sqrt(2 / pi) (gate + 0.044715 gate^3)                 u' = sqrt(2 / pi) (1 + 3 * 0.044715 gate^2)

    h = gate * c * up         dup = dh * gate * c         dgate = dh * up * (c + gate * c')

The tanh form written as a sigmoid is one exponential and loses nothing near 0. Elementwise, in float32, rounded once.
Shapes: gate, up, h (…, F) in any strides; the raw functions take (N, F) with stride 1 along F and any row stride, and write
where they are told, also over what they read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbkit.kernels import swiglu
from nbkit.kernels._autograd import first_order
from nbkit.kernels._launch import as_rows, cdiv, check_rows, jit, kernel, on_device, power_of_two, tl, use_triton
from nbkit.kernels._op import Case, KernelOp

EXACT, TANH = "none", "tanh"  # torch's names in `gelu(approximate=...)`
_BLOCK = 2048

# -- reference -------------------------------------------------------------------------------------


def reference(gate: Tensor, up: Tensor, *, approximate: str = TANH) -> Tensor:
    """Plain torch, as transformers' gated MLPs with `gelu` or `gelu_pytorch_tanh`."""
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


# -- kernels ---------------------------------------------------------------------------------------


@jit
def _share(gate, TANH: tl.constexpr):
    """(c, c')."""
    if TANH:
        square = gate * gate
        c = tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * square))  # 2 sqrt(2 / pi)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * square) * c * (1.0 - c)
    else:
        c = 0.5 + 0.5 * tl.math.erf(gate * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return c, slope


@kernel
def _geglu_forward_kernel(GATE, UP, H, stride_gate, stride_up, stride_h, F, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < F
    gate = tl.load(GATE + row * stride_gate + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * stride_up + col, mask=inside, other=0.0).to(tl.float32)
    c, _ = _share(gate, TANH)
    tl.store(H + row * stride_h + col, (gate * c * up).to(H.dtype.element_ty), mask=inside)


@kernel
def _geglu_backward_kernel(
    DH, GATE, UP, DGATE, DUP, H, stride_dh, stride_gate, stride_up, stride_dgate, stride_dup, stride_h, F,
    TANH: tl.constexpr, REBUILD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK columns of one row a program. REBUILD: h is written to H, which may be DH."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < F
    dh = tl.load(DH + row * stride_dh + col, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * stride_gate + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * stride_up + col, mask=inside, other=0.0).to(tl.float32)
    c, slope = _share(gate, TANH)
    act = gate * c
    tl.store(DGATE + row * stride_dgate + col, (dh * up * (c + gate * slope)).to(DGATE.dtype.element_ty), mask=inside)
    tl.store(DUP + row * stride_dup + col, (dh * act).to(DUP.dtype.element_ty), mask=inside)
    if REBUILD:
        tl.store(H + row * stride_h + col, (act * up).to(H.dtype.element_ty), mask=inside)


# -- raw functions, without autograd ---------------------------------------------------------------


def geglu_forward(gate: Tensor, up: Tensor, out: Tensor | None = None, *, approximate: str = TANH) -> Tensor:
    """h (N, F) of gate and up (N, F), into `out` if given; `out` may be gate or up."""
    _check(approximate)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    for name, x in (("gate", gate), ("up", up), ("out", out)):
        check_rows(name, x)
    if not use_triton(gate, up, out):
        wide = torch.promote_types(gate.dtype, torch.float32)
        return out.copy_(reference(gate.to(wide), up.to(wide), approximate=approximate))
    n, f = gate.shape
    block = min(_BLOCK, power_of_two(f))
    with on_device(gate):
        _geglu_forward_kernel[(n, cdiv(f, block))](
            gate, up, out, gate.stride(0), up.stride(0), out.stride(0), f, TANH=approximate == TANH, BLOCK=block, num_warps=4
        )
    return out


def geglu_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    dgate: Tensor | None = None,
    dup: Tensor | None = None,
    h: Tensor | None = None,
    *,
    approximate: str = TANH,
) -> tuple[Tensor, Tensor]:
    """(dgate, dup) for dh, gate, up (N, F); written into `dgate` and `dup` if given, which may be gate and up.

    Args:
        h: (N, F), may be `dh` itself; gets h again, for the gradient of the down projection's LoRA.
    """
    _check(approximate)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if dgate is None else dgate
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device) if dup is None else dup
    rebuilt = dh if h is None else h
    for name, x in (("dh", dh), ("gate", gate), ("up", up), ("dgate", dgate), ("dup", dup), ("h", rebuilt)):
        check_rows(name, x)
    if not use_triton(dh, gate, up, dgate, dup, rebuilt):
        wide = torch.promote_types(gate.dtype, torch.float32)
        g, u, d = gate.to(wide), up.to(wide), dh.to(wide)
        c, slope = _plain_share(g, approximate)
        results = [(dgate, d * u * (c + g * slope)), (dup, d * g * c)] + ([] if h is None else [(h, g * c * u)])
        for target, value in results:  # after all of them are computed: a target may be a source
            target.copy_(value)
        return dgate, dup
    n, f = gate.shape
    block = min(_BLOCK, power_of_two(f))
    with on_device(gate):
        _geglu_backward_kernel[(n, cdiv(f, block))](
            dh, gate, up, dgate, dup, rebuilt, dh.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0),
            rebuilt.stride(0), f, TANH=approximate == TANH, REBUILD=h is not None, BLOCK=block, num_warps=4
        )  # fmt: skip
    return dgate, dup


def _plain_share(gate: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    if approximate == TANH:
        c = torch.sigmoid(1.5957691216057308 * gate * (1 + 0.044715 * gate * gate))
        return c, 1.5957691216057308 * (1 + 0.134145 * gate * gate) * c * (1 - c)
    c = 0.5 + 0.5 * torch.erf(gate * 0.7071067811865476)
    return c, 0.3989422804014327 * torch.exp(-0.5 * gate * gate)


def _check(approximate: str) -> None:
    if approximate not in (EXACT, TANH):
        raise ValueError(f"approximate is {approximate!r}; it must be {EXACT!r} or {TANH!r}.")


# -- with autograd ---------------------------------------------------------------------------------


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.approximate = approximate
        return geglu_forward(as_rows(gate), as_rows(up), approximate=approximate).view(gate.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dgate, dup = geglu_backward(as_rows(dh), as_rows(gate), as_rows(up), approximate=ctx.approximate)
        return dgate.view(gate.shape), dup.view(up.shape), None


def geglu(gate: Tensor, up: Tensor, *, approximate: str = TANH) -> Tensor:
    """gelu(gate) * up for gate and up (…, F) of one shape and dtype.

    Args:
        approximate: "tanh" (Gemma's `gelu_pytorch_tanh`) or "none", the exact form by erf.
    Raises: ValueError for another form, or if shapes or dtypes differ.
    """
    _check(approximate)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must be alike.")
    if use_triton(gate, up):
        return _GeGLU.apply(gate, up, approximate)  # type: ignore[no-any-return]
    return reference(gate, up, approximate=approximate)


# -- op --------------------------------------------------------------------------------------------

OP = KernelOp(
    name="geglu",
    fn=geglu,
    reference=reference,
    inputs=swiglu.OP.inputs,
    gradients=("gate", "up"),
    cases=(
        Case("one element", {"B": 1, "T": 1, "F": 1}),
        Case("up expanded over tokens", {"B": 2, "T": 4, "F": 48, "expanded": 1}),
        *(
            Case(f"{reason}, {name}", sizes, {"approximate": form})
            for form, name in ((TANH, "tanh"), (EXACT, "exact"))
            for reason, sizes in (
                ("odd sizes", {"B": 3, "T": 5, "F": 37}),
                ("more columns than a block", {"B": 1, "T": 2, "F": 2500}),
                ("columns that lie apart", {"B": 2, "T": 3, "F": 40, "turned": 1}),
                ("saturated gates", {"B": 1, "T": 4, "F": 64, "scale": 100}),
                ("zeros", {"B": 1, "T": 2, "F": 32, "zeros": 1}),
            )
        ),
    ),
    benchmark=(
        Case("Gemma-2-2B, 2 x 2048", {"B": 2, "T": 2048, "F": 9216}),
        Case("Gemma-2-9B, 2 x 2048", {"B": 2, "T": 2048, "F": 14336}),
        Case("exact form, 2 x 2048", {"B": 2, "T": 2048, "F": 14336}, {"approximate": EXACT}),
    ),
)
