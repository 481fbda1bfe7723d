"""AdamW with its two states in 8 bits, over one flat buffer in one launch (Dettmers et al. 2022, arXiv:2110.02861).

The update is adamw.py's, in float32, on dequantised states, which are quantised again afterwards in blocks of 256:

    absmax = max |m| of the block        code = the index of the nearest value of map to m / absmax        m ~ map[code] * absmax

The maps are the paper's dynamic trees: for each power of ten 10^-6 ... 10^0, values equally spaced in (0.1, 1) of it: 1, 2,
4 ... 64 of either sign for m, 2, 4 ... 128 positive ones for v; and 0 and 1. Values near the block's largest are thus kept to
1 % and small ones over seven decades. The nearest is found by bisection among the midpoints of neighbours, in 8 steps.
Memory: 2 bytes and 1/32 a parameter, against 8 bytes in float32.
Shapes: param, grad, copy (P,), codes (P,) uint8, absmax (P/256 rounded up,) float32. bitsandbytes' AdamW8bit differs on CUDA in
two details: it decays after the update, and gives a negative m that is nearest to 0 the smallest negative value.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nbkit.kernels._launch import cdiv, jit, kernel, on_device, tl, use_triton
from nbkit.kernels._op import Case, KernelOp
from nbkit.kernels.adamw import _log, check_flat, moments, reference_, updated

BLOCK = 256
_BLOCKS = 4  # of 256 a program


class Moments8(NamedTuple):
    """Both states: codes (P,) uint8 and absmax (blocks,) float32 of m, then of v."""

    m: Tensor
    m_max: Tensor
    v: Tensor
    v_max: Tensor

    @staticmethod
    def zeros(n: int, device: torch.device | str) -> Moments8:
        """Both states zero, for a buffer of n elements."""
        codes = (torch.zeros(n, dtype=torch.uint8, device=device) for _ in range(2))
        tops = (torch.zeros(cdiv(n, BLOCK), dtype=torch.float32, device=device) for _ in range(2))
        return Moments8(next(codes), next(tops), next(codes), next(tops))


# -- maps ------------------------------------------------------------------------------------------


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values, ascending, float32, as bitsandbytes' `create_dynamic_map` gives them."""
    values = [torch.tensor([0.0, 1.0], device="cpu")]
    for power in range(7):
        edges = torch.linspace(0.1, 1, (1 if signed else 2) * 2**power + 1, device="cpu")
        middles = 10 ** (power - 6) * ((edges[1:] + edges[:-1]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(map of m, midpoints of m's map, map of v, its midpoints), 256 each; the last midpoint is inf."""
    tables = []
    for signed in (True, False):
        values = dynamic_map(signed)
        tables += [values, torch.cat([(values[1:] + values[:-1]) / 2, torch.tensor([torch.inf], device="cpu")])]
    return tuple(table.to(device) for table in tables)  # type: ignore[return-value]


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes (P,) uint8, absmax) of x (P,): the formula above in plain torch."""
    n = x.numel()
    blocks = torch.nn.functional.pad(x, (0, -n % BLOCK)).view(-1, BLOCK)
    top = blocks.abs().amax(1)
    scaled = blocks / top.clamp(min=1e-38)[:, None]
    bounds = _tables(x.device)[1 if signed else 3].to(x.dtype)[:-1]
    return torch.bucketize(scaled, bounds).view(-1)[:n].to(torch.uint8), top


def dequantize(codes: Tensor, absmax: Tensor, signed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """(P,): map[code] * absmax."""
    values = _tables(codes.device)[0 if signed else 2].to(dtype)[codes.long()]
    return values * absmax.to(dtype).repeat_interleave(BLOCK)[: codes.numel()]


# -- reference -------------------------------------------------------------------------------------


def reference8_(
    param: Tensor,
    grad: Tensor,
    state: Moments8,
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    factor: Tensor | None = None,
    skip: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """adamw.py's reference between the two conversions; arguments as `adamw8bit_`."""
    wide = torch.promote_types(param.dtype, torch.float32)
    m, v = dequantize(state.m, state.m_max, True, wide), dequantize(state.v, state.v_max, False, wide)
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    reference_(param, grad, m, v, step, **options, factor=factor, skip=skip, copy=copy)
    for codes, top, value, signed in ((state.m, state.m_max, m, True), (state.v, state.v_max, v, False)):
        for target, new in zip((codes, top), quantize(value, signed), strict=True):
            target.copy_(new if skip is None else torch.where(skip == 0, new.to(target.dtype), target))


# -- kernel ----------------------------------------------------------------------------------------


@jit
def _nearest(x, BOUNDS):
    """The number of midpoints below x, which is the index of the map's value nearest to it."""
    code = tl.zeros_like(x).to(tl.int32)
    for k in tl.static_range(8):
        probe = code + (128 >> k)
        code = tl.where(tl.load(BOUNDS + probe - 1) < x, probe, code)
    return code


@jit
def _store_codes(x, CODES, MAX, BOUNDS, at, inside, block, count):
    """x (blocks, 256) quantised and written."""
    top = tl.max(tl.abs(x), axis=1)
    code = _nearest(tl.div_rn(x, tl.where(top > 0.0, top, 1.0)[:, None]), BOUNDS)
    tl.store(CODES + at, code.to(tl.uint8), mask=inside)
    tl.store(MAX + block, top, mask=block < count)


@kernel
def _adamw8bit_kernel(
    P, G, M, M_MAX, V, V_MAX, MAP_M, BOUNDS_M, MAP_V, BOUNDS_V, STEP, LR, FACTOR, SKIP, COPY,
    lr, b1, b2, w1, w2, log_b1, log_b2, eps, decay, n, count,
    LR_TENSOR: tl.constexpr, CLIP: tl.constexpr, MAY_SKIP: tl.constexpr, COPIES: tl.constexpr, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr
):  # fmt: skip
    """BLOCKS blocks of WIDTH elements a program."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    at = block.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = at < n
    go = True
    if MAY_SKIP:
        go = tl.load(SKIP) == 0
    p = tl.load(P + at, mask=inside, other=0.0).to(tl.float32)
    if go:
        if LR_TENSOR:
            lr = tl.load(LR).to(tl.float32)
        g = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
        if CLIP:
            g = g * tl.load(FACTOR).to(tl.float32)
        m_max = tl.load(M_MAX + block, mask=block < count, other=0.0)
        v_max = tl.load(V_MAX + block, mask=block < count, other=0.0)
        m = tl.load(MAP_M + tl.load(M + at, mask=inside, other=0).to(tl.int32)) * m_max[:, None]
        v = tl.load(MAP_V + tl.load(V + at, mask=inside, other=0).to(tl.int32)) * v_max[:, None]
        m, v = moments(g, m, v, b1, b2, w1, w2)
        m, v = tl.where(inside, m, 0.0), tl.where(inside, v, 0.0)
        p = updated(p, m, v, tl.load(STEP).to(tl.float32), lr, log_b1, log_b2, eps, decay)
        tl.store(P + at, p.to(P.dtype.element_ty), mask=inside)
        _store_codes(m, M, M_MAX, BOUNDS_M, at, inside, block, count)
        _store_codes(v, V, V_MAX, BOUNDS_V, at, inside, block, count)
    if COPIES:
        tl.store(COPY + at, p.to(P.dtype.element_ty).to(COPY.dtype.element_ty), mask=inside)


# -- public function, in place ---------------------------------------------------------------------


def adamw8bit_(
    param: Tensor,
    grad: Tensor,
    state: Moments8,
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    factor: Tensor | None = None,
    skip: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """One AdamW step in place on flat buffers (P,), states in 8 bits. Arguments as `adamw.adamw_`.

    Raises: ValueError for buffers that are not flat, contiguous and equally long, or a state of another length.
    """
    buffers = {"param": param, "grad": grad, "m": state.m, "v": state.v}
    n = check_flat(buffers if copy is None else buffers | {"copy": copy})
    count = cdiv(n, BLOCK)
    if state.m_max.numel() != count or state.v_max.numel() != count:
        raise ValueError(f"A state of {n} elements has {count} blocks, not {state.m_max.numel()} and {state.v_max.numel()}.")
    options: dict[str, Any] = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    if not use_triton(param, grad):
        reference8_(param, grad, state, step, lr=lr, **options, factor=factor, skip=skip, copy=copy)
        return
    b1, b2 = betas
    by_tensor = isinstance(lr, Tensor)
    with on_device(param):
        _adamw8bit_kernel[(cdiv(count, _BLOCKS),)](
            param, grad, *state, *_tables(param.device), step, lr if by_tensor else step,
            step if factor is None else factor, step if skip is None else skip, param if copy is None else copy,
            0.0 if by_tensor else float(lr), float(b1), float(b2), 1.0 - b1, 1.0 - b2, _log(b1), _log(b2), float(eps),
            float(weight_decay), n, count, LR_TENSOR=by_tensor, CLIP=factor is not None, MAY_SKIP=skip is not None,
            COPIES=copy is not None, BLOCKS=_BLOCKS, WIDTH=BLOCK, num_warps=4
        )  # fmt: skip


# -- op --------------------------------------------------------------------------------------------


def _functional(step_: Any) -> Any:
    """What the parity tests call: the parameter after one step, inputs left as they are."""

    def stepped(param: Tensor, grad: Tensor, state: Moments8, step: Tensor, **options: Any) -> Tensor:
        p, own = param.clone(), Moments8(*(x.clone() for x in state))
        step_(p, grad, own, step, **options)
        return p

    return stepped


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    n = case.sizes["P"]
    param, grad, m = (torch.randn(n, generator=make) * size for size in (1.0, case.sizes.get("scale", 1), 0.1))
    v = torch.rand(n, generator=make) * 0.01
    if case.sizes.get("zeros"):
        grad[:300], m[:300], v[:300] = 0, 0, 0
    state = Moments8(*quantize(m, True), *quantize(v, False))
    return {
        "param": param.to(device, dtype),
        "grad": grad.to(device, dtype),
        "state": Moments8(*(x.to(device) for x in state)),
        "step": torch.tensor(case.sizes.get("t", 3), dtype=torch.int32, device=device),
    }


_RATE = {"lr": 1e-2, "weight_decay": 0.1}
OP = KernelOp(
    name="adamw8bit",
    fn=_functional(adamw8bit_),
    reference=_functional(reference8_),
    inputs=_inputs,
    gradients=(),
    cases=(
        Case("no whole number of blocks", {"P": 1500}, _RATE),
        Case("first step", {"P": 300, "t": 1}, _RATE),
        Case("one element", {"P": 1}, {"lr": 1e-2}),
        Case("a block of zeros", {"P": 600, "zeros": 1}, {"lr": 1e-2}),
        Case("no momentum, step 100000", {"P": 100, "t": 100_000}, {"lr": 1e-2, "betas": (0.0, 0.99), "eps": 1e-5}),
    ),
    benchmark=(
        Case("LoRA of Llama-3.2-1B, r 16", {"P": 11_272_192}, _RATE),
        Case("LoRA of Llama-3.1-8B, r 16", {"P": 41_943_040}, _RATE),
    ),
)
