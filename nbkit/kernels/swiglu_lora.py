"""SwiGLU together with LoRA's thin products around it, so that what it reads or writes is not read again for them.

    h = silu(gate) * up                      xa_NR = h a_RF^T                                            (forward)
    dgate, dup of dh (swiglu.py)             da_RF = u_NR^T h        u = dy (scale B) of the down projection
                                             db_gate_FR = sg dgate^T xa_gate     db_up_FR = su dup^T xa_up     (backward)

All are bound by memory: five streams of (N, F) backward, three forward; as separate GEMMs the products read four more. h, dgate
and dup enter the products rounded to 16 bits, as they are stored, and sums are float32. Backward, a program owns some columns
and walks down the rows, the thin matrix on the left: sums (R, columns) stay in registers. Forward, it owns some rows and walks
along the columns. Where that is too few programs, each way is cut into parts, whose sums a second kernel adds in fixed order:
the same inputs give the same bits. h itself is not written by the backward.
Shapes: dh, gate, up, dgate, dup, out (N, F), u (N, Rd), xa (N, Rg + Ru), a (R, F), all with stride 1 along the last dimension
and any row stride. Ranks up to 64, 16 bits, GPUs with tensor cores for them (capability 8.0); the same functions take the rest
through swiglu.py and torch's GEMMs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nbkit.kernels._gemm import accumulate
from nbkit.kernels._launch import (
    INTERPRETED,
    capability_of,
    cdiv,
    check_rows,
    jit,
    kernel,
    on_device,
    power_of_two,
    processors,
    tl,
    use_triton,
)
from nbkit.kernels._op import Case, KernelOp
from nbkit.kernels.swiglu import swiglu_backward, swiglu_forward

MAX_RANK = 64
MIN_CAPABILITY = (8, 0)

# -- kernels ---------------------------------------------------------------------------------------


@jit
def _sigmoid(x, one, FAST: tl.constexpr):
    """`one` is 1, which the compiler does not know: were all that leads to h a function of what is loaded, it would be computed
    twice, once as it is stored and once as products take it. FAST: 12 instructions an element less, for values below 1e-37."""
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.f32 e, e, $2; rcp.approx.ftz.f32 $0, e; }", "=f,f,f",
            [x * -1.4426950408889634, one], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return 1.0 / (one + tl.exp(-x))


@jit
def _product(left, right, total):
    """total (R, M) + left (K, R)^T right (K, M)."""
    return tl.dot(tl.trans(left), right, total, input_precision="ieee")


@jit
def _store_part(PART, total, first, ranks, col, F, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """`total` (BLOCK_R, columns) to rows first : first + R of a program's (ranks, F) share of PART."""
    r = tl.arange(0, BLOCK_R)
    place = PART + (tl.program_id(1).to(tl.int64) * ranks + first) * F + (r[:, None] * F + col[None, :])
    tl.store(place, total, mask=(r < R)[:, None] & (col < F)[None, :])


@kernel
def _swiglu_lora_backward_kernel(
    DH, GATE, UP, DGATE, DUP, U, XA_GATE, XA_UP, PART, stride_dh, stride_gate, stride_up, stride_dgate, stride_dup, stride_u,
    stride_xa, N, F, one, RD: tl.constexpr, RG: tl.constexpr, RU: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """BLOCK_F columns of one part of the rows, BLOCK_N rows at a time. PART (parts, RD + RG + RU, F): da, db_gate^T, db_up^T."""
    col = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    line, r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    blocks = tl.cdiv(N, BLOCK_N)
    first = tl.program_id(1) * blocks // tl.num_programs(1)
    last = (tl.program_id(1) + 1) * blocks // tl.num_programs(1)
    begin = first.to(tl.int64) * BLOCK_N
    DH += begin * stride_dh
    GATE += begin * stride_gate
    UP += begin * stride_up
    DGATE += begin * stride_dgate
    DUP += begin * stride_dup
    U += begin * stride_u
    XA_GATE += begin * stride_xa
    XA_UP += begin * stride_xa
    da = tl.zeros((BLOCK_R, BLOCK_F), dtype=tl.float32)
    db_gate, db_up = da, da
    for k in range(first, last):
        row_ok = (k * BLOCK_N + line < N)[:, None]
        inside = row_ok & (col < F)[None, :]
        dh = tl.load(DH + (line[:, None] * stride_dh + col[None, :]), mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(GATE + (line[:, None] * stride_gate + col[None, :]), mask=inside, other=0.0).to(tl.float32)
        up = tl.load(UP + (line[:, None] * stride_up + col[None, :]), mask=inside, other=0.0).to(tl.float32)
        s = _sigmoid(gate, one, FAST)
        act = gate * s
        dgate = (dh * up * (s + act * (1.0 - s))).to(DGATE.dtype.element_ty)
        dup = (dh * act).to(DUP.dtype.element_ty)
        tl.store(DGATE + (line[:, None] * stride_dgate + col[None, :]), dgate, mask=inside)
        tl.store(DUP + (line[:, None] * stride_dup + col[None, :]), dup, mask=inside)
        if RD > 0:
            u = tl.load(U + (line[:, None] * stride_u + r[None, :]), mask=row_ok & (r < RD)[None, :], other=0.0)
            da = _product(u, (act * up).to(DUP.dtype.element_ty), da)
        at = line[:, None] * stride_xa + r[None, :]
        if RG > 0:
            db_gate = _product(tl.load(XA_GATE + at, mask=row_ok & (r < RG)[None, :], other=0.0), dgate, db_gate)
        if RU > 0:
            db_up = _product(tl.load(XA_UP + at, mask=row_ok & (r < RU)[None, :], other=0.0), dup, db_up)
        DH += BLOCK_N * stride_dh
        GATE += BLOCK_N * stride_gate
        UP += BLOCK_N * stride_up
        DGATE += BLOCK_N * stride_dgate
        DUP += BLOCK_N * stride_dup
        U += BLOCK_N * stride_u
        XA_GATE += BLOCK_N * stride_xa
        XA_UP += BLOCK_N * stride_xa
    if RD > 0:
        _store_part(PART, da, 0, RD + RG + RU, col, F, RD, BLOCK_R)
    if RG > 0:
        _store_part(PART, db_gate, RD, RD + RG + RU, col, F, RG, BLOCK_R)
    if RU > 0:
        _store_part(PART, db_up, RD + RG, RD + RG + RU, col, F, RU, BLOCK_R)


@jit
def _add_parts(
    PART, OUT, scale, stride_r, stride_f, first, ranks, F, parts, R: tl.constexpr, ADD: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr
):  # fmt: skip
    """BLOCK_F columns of the sum of rows first : first + R over the parts, scaled, to OUT (R, F) in any strides."""
    col = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    r = tl.arange(0, BLOCK_R)
    inside = (r < R)[:, None] & (col < F)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_F), dtype=tl.float32)
    for part in range(0, parts):
        total += tl.load(PART + (part * ranks + first + r)[:, None] * F + col[None, :], mask=inside, other=0.0)
    place = OUT + r[:, None] * stride_r + col[None, :] * stride_f
    total *= scale
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(OUT.dtype.element_ty), mask=inside)


@kernel
def _swiglu_lora_sums_kernel(
    PART, DA, DB_GATE, DB_UP, scale_gate, scale_up, stride_da, stride_gate, stride_up, F, parts, RD: tl.constexpr,
    RG: tl.constexpr, RU: tl.constexpr, ADD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """PART (parts, RD + RG + RU, F) summed into da (RD, F), db_gate (F, RG) or db_up (F, RU), by the program's second index."""
    which = tl.program_id(1)
    if which == 0:
        _add_parts(PART, DA, 1.0, stride_da, 1, 0, RD + RG + RU, F, parts, RD, ADD, BLOCK_R, BLOCK_F)
    if which == 1:
        _add_parts(PART, DB_GATE, scale_gate, 1, stride_gate, RD, RD + RG + RU, F, parts, RG, ADD, BLOCK_R, BLOCK_F)
    if which == 2:
        _add_parts(PART, DB_UP, scale_up, 1, stride_up, RD + RG, RD + RG + RU, F, parts, RU, ADD, BLOCK_R, BLOCK_F)


@kernel
def _swiglu_lora_forward_kernel(
    GATE, UP, A, OUT, PART, stride_gate, stride_up, stride_a, stride_out, N, F, one, R: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """BLOCK_N rows of one part of the columns, BLOCK_F columns at a time. PART (parts, N, R) gets the products."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    line, r, step = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_F)
    row_ok = (start + line < N)[:, None]
    blocks = tl.cdiv(F, BLOCK_F)
    first = tl.program_id(1) * blocks // tl.num_programs(1)
    last = (tl.program_id(1) + 1) * blocks // tl.num_programs(1)
    total = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for k in range(0, last - first):
        col = (first + k) * BLOCK_F + step
        inside = row_ok & (col < F)[None, :]
        gate = tl.load(GATE + start * stride_gate + (line[:, None] * stride_gate + col[None, :]), mask=inside, other=0.0)
        up = tl.load(UP + start * stride_up + (line[:, None] * stride_up + col[None, :]), mask=inside, other=0.0).to(tl.float32)
        a = tl.load(A + r[:, None] * stride_a + col[None, :], mask=(r < R)[:, None] & (col < F)[None, :], other=0.0)
        gate = gate.to(tl.float32)
        h = (gate * _sigmoid(gate, one, FAST) * up).to(OUT.dtype.element_ty)
        tl.store(OUT + start * stride_out + (line[:, None] * stride_out + col[None, :]), h, mask=inside)
        total = _product(tl.trans(a), tl.trans(h), total)
    row = start + line
    place = PART + (tl.program_id(1).to(tl.int64) * N + row)[None, :] * R + r[:, None]
    tl.store(place, total, mask=(r < R)[:, None] & (row < N)[None, :])


@kernel
def _swiglu_lora_xa_kernel(
    PART, XA, KEPT, stride_xa, stride_kept, N, parts, R: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK elements of the sum of PART (parts, N, R), to XA and, where KEEP, to KEPT."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, r = at // R, at % R
    inside = row < N
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(0, parts):
        total += tl.load(PART + at, mask=inside, other=0.0)
        PART += N * R
    tl.store(XA + row * stride_xa + r, total.to(XA.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(KEPT + row * stride_kept + r, total.to(KEPT.dtype.element_ty), mask=inside)


# -- how it is cut ---------------------------------------------------------------------------------

LEAST_BLOCKS = (8, 4)  # of rows (backward) and of columns (forward) that a program walks over, at the least
ROUNDS = (6, 2)  # programs for each multiprocessor, where there is work enough


class Plan(NamedTuple):
    """Rows and columns of a block, into how many parts the walk is cut, and what the compiler is told."""

    block_n: int
    block_f: int
    parts: int
    warps: int = 4
    stages: int = 3


@lru_cache(256)
def backward_plan(n: int, f: int, rank: int, processors: int) -> Plan:
    """For (n, f) matrices and the largest of the ranks, on a GPU of so many multiprocessors."""
    block_n, block_f = 32, (128 if rank <= 32 else 32)
    parts = parts_of(cdiv(f, block_f), cdiv(n, block_n), ROUNDS[0] * processors, LEAST_BLOCKS[0])
    return Plan(block_n, block_f, parts, *((4, 2) if rank <= 16 else (8, 3) if rank <= 32 else (4, 3)))


@lru_cache(256)
def forward_plan(n: int, f: int, rank: int, processors: int) -> Plan:
    """The same for the forward."""
    block_n, block_f = 32, (128 if rank <= 32 else 64)
    return Plan(block_n, block_f, parts_of(cdiv(n, block_n), cdiv(f, block_f), ROUNDS[1] * processors, LEAST_BLOCKS[1]))


def parts_of(tiles: int, blocks: int, programs: int, least: int) -> int:
    """Into how many parts each tile's `blocks` are cut, for so many programs: at the most, and of `least` blocks each."""
    return max(min(programs // tiles, blocks // least), 1)


# -- public functions ------------------------------------------------------------------------------


def fits(x: Tensor, *ranks: int) -> bool:
    """True if the fused kernels take matrices of x's dtype and device with these ranks; the functions below take all."""
    return (
        0 < max(ranks, default=0) <= MAX_RANK
        and x.dtype in (torch.float16, torch.bfloat16)
        and use_triton(x)
        and (not x.is_cuda or (capability_of(x) >= MIN_CAPABILITY and torch.version.hip is None))
    )


def swiglu_lora_forward(
    gate: Tensor, up: Tensor, a: Tensor, out: Tensor, xa: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, xa): out (N, F) = silu(gate) * up, xa (N, R) = out a^T, both rounded to their dtype.

    Args:
        gate, up: (N, F), any row stride.
        a: (R, F), A of the down projection, any row stride.
        out: (N, F); may be gate or up.
        xa: (N, R), say the columns of out's buffer that follow out.
        kept: (N, R), gets xa as well.
    Raises: ValueError for shapes or dtypes that do not fit, or columns that lie apart.
    """
    n, f = gate.shape
    r = a.shape[0]
    copies = [xa] if kept is None else [xa, kept]
    _check({"gate": gate, "up": up, "out": out}, (n, f), gate.dtype)
    _check({"a": a}, (r, f), gate.dtype)
    _check(dict(zip(("xa", "kept"), copies, strict=False)), (n, r), gate.dtype)
    if n == 0 or not fits(gate, r):
        swiglu_forward(gate, up, out)
        if r:
            torch.mm(out, a.t(), out=xa)
        if kept is not None:
            kept.copy_(xa)
        return out, xa
    plan = forward_plan(n, f, r, processors(gate.device))
    part = torch.empty(plan.parts, n, r, dtype=torch.float32, device=gate.device)
    with on_device(gate):
        _swiglu_lora_forward_kernel[(cdiv(n, plan.block_n), plan.parts)](
            gate, up, a, out, part, gate.stride(0), up.stride(0), a.stride(0), out.stride(0), n, f, 1.0,
            R=r, BLOCK_R=_block_r(r), BLOCK_N=plan.block_n, BLOCK_F=plan.block_f, FAST=not INTERPRETED,
            num_warps=plan.warps, num_stages=plan.stages
        )  # fmt: skip
        _swiglu_lora_xa_kernel[(cdiv(n * r, 512),)](
            part, xa, copies[-1], xa.stride(0), copies[-1].stride(0), n, plan.parts, R=r, KEEP=kept is not None, BLOCK=512,
            num_warps=4
        )  # fmt: skip
    return out, xa


def swiglu_lora_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    u: Tensor,
    xa: Tensor,
    dgate: Tensor,
    dup: Tensor,
    *,
    gate_rank: int,
    scales: tuple[float, float] = (1.0, 1.0),
    da: Tensor | None = None,
    db_gate: Tensor | None = None,
    db_up: Tensor | None = None,
    add: bool = False,
) -> tuple[Tensor, Tensor]:
    """(dgate, dup), and what LoRA's matrices get: da = u^T h, db_gate = sg dgate^T xa_gate, db_up = su dup^T xa_up.

    Args:
        dh: (N, F); may be overwritten.
        gate, up: (N, F), any row stride.
        u: (N, >= r), dy (scale B) of the down projection; (N, 0) where it has no LoRA.
        xa: (N, >= gate_rank + r), x A^T of gate in its first `gate_rank` columns, of up in those that follow.
        dgate, dup: (N, F); may be gate and up.
        scales: (sg, su).
        da: (r, F), the first r columns of u; None: not wanted. In float32 or any other dtype, any row stride, like the next two.
        db_gate, db_up: (F, r) each, r at most the columns that xa has for it; None: not wanted.
        add: the three are added to what the outputs hold.
    Raises: ValueError for shapes or dtypes that do not fit, or columns that lie apart.
    """
    n, f = gate.shape
    rd, rg, ru = (0 if x is None else x.shape[k] for x, k in ((da, 0), (db_gate, 1), (db_up, 1)))
    _check({"dh": dh, "gate": gate, "up": up, "dgate": dgate, "dup": dup}, (n, f), gate.dtype)
    _check({"u": u, "xa": xa}, (n, None), gate.dtype)
    _check({} if da is None else {"da": da}, (rd, f))
    _check({k: x for k, x in (("db_gate", db_gate), ("db_up", db_up)) if x is not None}, (f, None))
    _check_ranks(rd, rg, ru, u.shape[1], gate_rank, xa.shape[1] - gate_rank)
    xa_gate, xa_up = xa[:, :gate_rank], xa[:, gate_rank:]
    if n == 0 or not fits(gate, rd, rg, ru):
        swiglu_backward(dh, gate, up, dgate, dup, h=None if da is None else dh)  # dh holds h by now
        _products((da, u, dh, 1.0), (db_gate, dgate, xa_gate[:, :rg], scales[0]), (db_up, dup, xa_up[:, :ru], scales[1]), add=add)
        return dgate, dup
    plan, block_r = backward_plan(n, f, max(rd, rg, ru), processors(gate.device)), _block_r(max(rd, rg, ru))
    part = torch.empty(plan.parts, rd + rg + ru, f, dtype=torch.float32, device=gate.device)
    outs = [part if x is None else x for x in (da, db_gate, db_up)]
    ranks = {"RD": rd, "RG": rg, "RU": ru}
    with on_device(gate):
        _swiglu_lora_backward_kernel[(cdiv(f, plan.block_f), plan.parts)](
            dh, gate, up, dgate, dup, u, xa_gate, xa_up, part, dh.stride(0), gate.stride(0), up.stride(0), dgate.stride(0),
            dup.stride(0), u.stride(0), xa.stride(0), n, f, 1.0, **ranks, BLOCK_R=block_r, BLOCK_N=plan.block_n,
            BLOCK_F=plan.block_f, FAST=not INTERPRETED, num_warps=plan.warps, num_stages=plan.stages
        )  # fmt: skip
        _swiglu_lora_sums_kernel[(cdiv(f, 64), 3)](
            part, *outs, float(scales[0]), float(scales[1]), *(x.stride(0) for x in outs), f, plan.parts, **ranks, ADD=add,
            BLOCK_R=block_r, BLOCK_F=64, num_warps=4
        )  # fmt: skip
    return dgate, dup


def _products(*products: tuple[Tensor | None, Tensor, Tensor, float], add: bool) -> None:
    """out = scale left^T right of each (out, left, right, scale) whose out is wanted; left may have columns to spare."""
    for out, left, right, scale in products:
        if out is not None:
            accumulate(out, left[:, : out.shape[0]].t(), right, scale, add)


def _block_r(rank: int) -> int:
    return max(power_of_two(rank), 16)  # tensor cores take 16 rows at the least


def _check(matrices: dict[str, Tensor], shape: tuple[int | None, int | None], dtype: torch.dtype | None = None) -> None:
    """Raises: ValueError unless all are of this shape (None: any) and dtype, with neighbouring columns side by side."""
    for name, x in matrices.items():
        check_rows(name, x)
        if any(want not in (None, got) for want, got in zip(shape, x.shape, strict=True)) or dtype not in (None, x.dtype):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            wanted = f"({wanted})" if dtype is None else f"({wanted}) {dtype}"
            raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}; it must be {wanted}.")


def _check_ranks(rd: int, rg: int, ru: int, down: int, gate: int, up: int) -> None:
    """Raises: ValueError if there are more ranks than columns for them."""
    if rd > down or rg > gate or ru > up:
        raise ValueError(
            f"da of rank {rd}, db_gate of {rg} and db_up of {ru} need as many columns of u, of which there are {down}, "
            f"and of xa, which has {gate} for gate and {up} for up."
        )


# -- op --------------------------------------------------------------------------------------------


def swiglu_lora(
    dh: Tensor, gate: Tensor, up: Tensor, u: Tensor, xa: Tensor, a: Tensor, *, gate_rank: int, scales: tuple[float, float]
) -> Tensor:
    """Both ways, all results one after another in one vector: h, h a^T, dgate, dup, da, db_gate, db_up."""
    (n, f), r = gate.shape, a.shape[0]
    like = {"dtype": gate.dtype, "device": gate.device}
    buffer, d = torch.empty(n, f + r, **like), torch.empty(n, 2 * f, **like)
    sums = [torch.empty(*s, **like) for s in ((u.shape[1], f), (f, gate_rank), (f, xa.shape[1] - gate_rank))]
    swiglu_lora_forward(gate, up, a, buffer[:, :f], buffer[:, f:])
    names = dict(zip(("da", "db_gate", "db_up"), sums, strict=True))
    swiglu_lora_backward(dh.clone(), gate, up, u, xa, d[:, :f], d[:, f:], gate_rank=gate_rank, scales=scales, **names)
    return _flat([buffer[:, :f], buffer[:, f:], d[:, :f], d[:, f:], *sums])


def reference(
    dh: Tensor, gate: Tensor, up: Tensor, u: Tensor, xa: Tensor, a: Tensor, *, gate_rank: int, scales: tuple[float, float]
) -> Tensor:
    """Same in plain torch."""
    s = torch.sigmoid(gate)
    h, dup = gate * s * up, dh * gate * s
    dgate = dh * up * s * (1 + gate * (1 - s))
    db_gate, db_up = scales[0] * (dgate.t() @ xa[:, :gate_rank]), scales[1] * (dup.t() @ xa[:, gate_rank:])
    return _flat([h, h @ a.t(), dgate, dup, u.t() @ h, db_gate, db_up])


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    n, f, r = (case.sizes[letter] for letter in "NFR")
    both, scale = torch.randn(n, 2 * f, generator=make), case.sizes.get("scale", 1)
    both[:, :f] *= scale
    both[:, f:] /= scale
    dh, u, xa, a = (torch.randn(*s, generator=make) for s in ((n, f), (n, r), (n, case.options["gate_rank"] + r), (r, f)))
    both, dh, u, xa, a = (x.to(device, dtype) for x in (both, dh / scale, u / n**0.5, xa / n**0.5, a / f**0.5))
    return {"dh": dh, "gate": both[:, :f], "up": both[:, f:], "u": u, "xa": xa, "a": a}


def _options(gate_rank: int) -> dict[str, Any]:
    return {"gate_rank": gate_rank, "scales": (0.5, 0.25)}


OP = KernelOp(
    name="swiglu_lora",
    fn=swiglu_lora,
    reference=reference,
    inputs=_inputs,
    gradients=(),
    cases=(
        Case("odd sizes", {"N": 37, "F": 75, "R": 5}, _options(3)),
        Case("one row", {"N": 1, "F": 40, "R": 16}, _options(16)),
        Case("many rows in parts", {"N": 550, "F": 40, "R": 16}, _options(8)),
        Case("many columns in parts", {"N": 9, "F": 1100, "R": 8}, _options(16)),
        Case("ranks of 64 and of 20", {"N": 33, "F": 70, "R": 64}, _options(20)),
        Case("a rank beyond it", {"N": 9, "F": 40, "R": 65}, _options(65)),
        Case("saturated gates", {"N": 16, "F": 64, "R": 16, "scale": 100}, _options(16)),
    ),
    benchmark=(
        Case("Llama-3.1-8B, r 16, 2 x 2048", {"N": 4096, "F": 14336, "R": 16}, _options(16)),
        Case("Llama-3.1-8B, r 16, 1 x 512", {"N": 512, "F": 14336, "R": 16}, _options(16)),
        Case("Llama-3.1-8B, r 32, 2 x 2048", {"N": 4096, "F": 14336, "R": 32}, _options(32)),
        Case("Llama-3.2-1B, r 16, 2 x 512", {"N": 1024, "F": 8192, "R": 16}, _options(16)),
    ),
)
