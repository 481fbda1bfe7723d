"""SwiGLU's product (Shazeer 2020, arXiv:2002.05202), between the up and the down projection of a gated MLP.

    s = sigmoid(gate)      h = gate * s * up
    dup = dh * gate * s                           dgate = dh * up * s * (1 + gate * (1 - s))

Elementwise, in float32, rounded once. Shapes: gate, up, h (…, F) in any strides; the raw functions take (N, F) with stride 1
along F and any row stride, and write where they are told, also over what they read.
"""

from __future__ import annotations

from typing import Any

import torch

from nbkit.kernels._autograd import first_order
from nbkit.kernels._launch import as_rows, cdiv, check_rows, kernel, on_device, power_of_two, tl, use_triton
from nbkit.kernels._op import Case, KernelOp

_BLOCK = 2048

# -- reference -------------------------------------------------------------------------------------


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Plain torch, as transformers' gated MLPs with `silu`."""
    return torch.nn.functional.silu(gate) * up


# -- kernels ---------------------------------------------------------------------------------------


@kernel
def _swiglu_forward_kernel(GATE, UP, H, stride_gate, stride_up, stride_h, F, BLOCK: tl.constexpr):
    """BLOCK columns of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < F
    gate = tl.load(GATE + row * stride_gate + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * stride_up + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(H + row * stride_h + col, (gate * tl.sigmoid(gate) * up).to(H.dtype.element_ty), mask=inside)


@kernel
def _swiglu_backward_kernel(
    DH, GATE, UP, DGATE, DUP, H, stride_dh, stride_gate, stride_up, stride_dgate, stride_dup, stride_h, F,
    REBUILD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK columns of one row a program. REBUILD: h is written to H, which may be DH."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < F
    dh = tl.load(DH + row * stride_dh + col, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * stride_gate + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * stride_up + col, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    act = gate * s
    tl.store(DGATE + row * stride_dgate + col, (dh * up * (s + act * (1.0 - s))).to(DGATE.dtype.element_ty), mask=inside)
    tl.store(DUP + row * stride_dup + col, (dh * act).to(DUP.dtype.element_ty), mask=inside)
    if REBUILD:
        tl.store(H + row * stride_h + col, (act * up).to(H.dtype.element_ty), mask=inside)


def _launch_forward(
    gate: torch.Tensor, up: torch.Tensor, h: torch.Tensor, stride_gate: int, stride_up: int, stride_h: int, n: int, f: int
) -> None:
    """For n rows of f columns; strides are those between rows."""
    block = min(_BLOCK, power_of_two(f))
    with on_device(gate):
        _swiglu_forward_kernel[(n, cdiv(f, block))](gate, up, h, stride_gate, stride_up, stride_h, f, BLOCK=block, num_warps=4)


def _launch_backward(tensors: tuple[torch.Tensor, ...], strides: tuple[int, ...], n: int, f: int, rebuild: bool) -> None:
    """Tensors and the strides between their rows in the kernel's order."""
    block = min(_BLOCK, power_of_two(f))
    with on_device(tensors[0]):
        _swiglu_backward_kernel[(n, cdiv(f, block))](*tensors, *strides, f, REBUILD=rebuild, BLOCK=block, num_warps=4)


# -- raw functions, without autograd ---------------------------------------------------------------


def swiglu_forward(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """h (N, F) of gate and up (N, F), into `out` if given; `out` may be gate or up."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    for name, x in (("gate", gate), ("up", up), ("out", out)):
        check_rows(name, x)
    if not use_triton(gate, up, out):
        wide = torch.promote_types(gate.dtype, torch.float32)
        return out.copy_(reference(gate.to(wide), up.to(wide)))
    _launch_forward(gate, up, out, gate.stride(0), up.stride(0), out.stride(0), *gate.shape)
    return out


def swiglu_backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor | None = None,
    dup: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup) for dh, gate, up (N, F); written into `dgate` and `dup` if given, which may be gate and up.

    Args:
        h: (N, F), may be `dh` itself; gets h = silu(gate) * up again, for the gradient of the down projection's LoRA.
    """
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if dgate is None else dgate
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device) if dup is None else dup
    rebuilt = dh if h is None else h
    for name, x in (("dh", dh), ("gate", gate), ("up", up), ("dgate", dgate), ("dup", dup), ("h", rebuilt)):
        check_rows(name, x)
    if not use_triton(dh, gate, up, dgate, dup, rebuilt):
        wide = torch.promote_types(gate.dtype, torch.float32)
        g, u, d = gate.to(wide), up.to(wide), dh.to(wide)
        s = torch.sigmoid(g)
        act = g * s
        results = [(dgate, d * u * (s + act * (1 - s))), (dup, d * act)] + ([] if h is None else [(h, act * u)])
        for target, value in results:  # after all of them are computed: a target may be a source
            target.copy_(value)
        return dgate, dup
    tensors = (dh, gate, up, dgate, dup, rebuilt)
    _launch_backward(tensors, tuple(x.stride(0) for x in tensors), *gate.shape, h is not None)
    return dgate, dup


# -- with autograd ---------------------------------------------------------------------------------


def _with_stride(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(x, the stride between its rows), x copied unless all rows lie at one distance.

    No view is made where none is needed: as_rows of three tensors costs the host half as much as a launch.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.dim() == 3 and x.stride(2) == 1 and x.stride(0) == x.stride(1) * x.shape[1]:
        return x, x.stride(1)
    x = as_rows(x)
    return x, x.stride(0)


class _SwiGLU(torch.autograd.Function):
    """Past the raw functions and their checks: `swiglu` has looked at gate and up, and autograd gives dh as h is."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        h, f = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device), gate.shape[-1]
        (gate, stride_gate), (up, stride_up) = _with_stride(gate), _with_stride(up)
        _launch_forward(gate, up, h, stride_gate, stride_up, f, h.numel() // f, f)
        return h

    @staticmethod
    @first_order
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        f = gate.shape[-1]
        (dh, stride_dh), (gate, stride_gate), (up, stride_up) = _with_stride(dh), _with_stride(gate), _with_stride(up)
        strides = (stride_dh, stride_gate, stride_up, f, f, f)
        _launch_backward((dh, gate, up, dgate, dup, dh), strides, dgate.numel() // f, f, False)
        return dgate, dup


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for gate and up (…, F) of one shape and dtype.

    Raises: ValueError if shapes or dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must be alike.")
    if use_triton(gate, up) and gate.numel():
        return _SwiGLU.apply(gate, up)  # type: ignore[no-any-return]
    return reference(gate, up)


# -- op --------------------------------------------------------------------------------------------


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    b, t, f = (case.sizes[letter] for letter in "BTF")
    both = torch.randn(b, t, 2 * f, generator=make) * case.sizes.get("scale", 1)
    if case.sizes.get("zeros"):
        both[..., ::2] = 0
    both = both.to(device, dtype)
    gate, up = both[..., :f], both[..., f:]  # halves of one buffer, as one stacked projection gives them
    if case.sizes.get("turned"):  # neighbouring columns lie apart
        gate, up = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (gate, up))
    if case.sizes.get("expanded"):
        up = up[:, :1].expand(b, t, f)
    return {"gate": gate, "up": up}


OP = KernelOp(
    name="swiglu",
    fn=swiglu,
    reference=reference,
    inputs=_inputs,
    gradients=("gate", "up"),
    cases=(
        Case("odd sizes", {"B": 3, "T": 5, "F": 37}),
        Case("one element", {"B": 1, "T": 1, "F": 1}),
        Case("more columns than a block", {"B": 1, "T": 2, "F": 2500}),
        Case("columns that lie apart", {"B": 2, "T": 3, "F": 40, "turned": 1}),
        Case("up expanded over tokens", {"B": 2, "T": 4, "F": 48, "expanded": 1}),
        Case("saturated gates", {"B": 1, "T": 4, "F": 64, "scale": 100}),
        Case("zeros", {"B": 1, "T": 2, "F": 32, "zeros": 1}),
        Case("no tokens", {"B": 2, "T": 0, "F": 8}),
    ),
    benchmark=(
        Case("Llama-3.2-1B, 2 x 512", {"B": 2, "T": 512, "F": 8192}),
        Case("Llama-3.1-8B, 2 x 2048", {"B": 2, "T": 2048, "F": 14336}),
        Case("Llama-3.3-70B, 1 x 8192", {"B": 1, "T": 8192, "F": 28672}),
    ),
)
