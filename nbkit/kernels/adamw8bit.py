"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over any number of tensors in one launch, its two states in 8 bits
(Dettmers et al. 2022, arXiv:2110.02861).

    g' = factor * g               p <- p (1 - lr * decay)
    m <- b1 m + (1 - b1) g'       v <- b2 v + (1 - b2) g'^2
    p <- p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

in float32 on dequantised states, which are quantised again afterwards in blocks of 256:

    absmax = max |m| of the block        code = the index of the nearest value of map to m / absmax        m ~ map[code] * absmax

The maps are the paper's dynamic trees: for each power of ten 10^-6 ... 10^0, values equally spaced in (0.1, 1) of it: 1, 2,
4 ... 64 of either sign for m, 2, 4 ... 128 positive ones for v; and 0 and 1. Values near the block's largest are thus kept to
1 % and small ones over seven decades. The nearest is found by bisection among the midpoints of neighbours, in 8 steps.
Memory: 2 bytes and 1/32 a parameter, against 8 bytes in float32. Each tensor begins a block of its own.
Steps t, the rate, the factor and whether to skip are read from device memory, so a recorded step stays true while they change.
1 - b^t is -expm1(t ln b), to 2e-7 relative; 1 - b^t itself would lose five digits at t = 1.
bitsandbytes' AdamW8bit differs on CUDA in three details: it decays after the update, gives a negative m that is nearest to 0
the smallest negative value, and keeps tensors below 4,096 elements in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nbkit.kernels._launch import cdiv, jit, kernel, on_device, tl, use_triton
from nbkit.kernels._op import Case, KernelOp
from nbkit.kernels._table import TYPES, Table

BLOCK = 256
_BLOCKS = 4  # of 256 a program
_CHUNK = 2**20  # elements that the plain path takes at a time


class Rates(NamedTuple):
    """What a step of AdamW is told.

    Attributes:
        lr: the learning rate, a number or one element on the device.
        factor: one float32 element on the device that gradients are multiplied by.
        skip: one element on the device; where it is not 0 nothing changes.
    """

    lr: float | Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    factor: Tensor | None = None
    skip: Tensor | None = None


class State8(NamedTuple):
    """Of n tensors: how many steps each has taken (n,) float32; codes (blocks * 256,) uint8 and absmax (blocks,) float32 of
    m, then of v."""

    steps: Tensor
    m: Tensor
    m_max: Tensor
    v: Tensor
    v_max: Tensor

    @staticmethod
    def zeros(sizes: Sequence[int], device: torch.device | str) -> State8:
        """The state before the first step of tensors of so many elements."""
        blocks = sum(cdiv(n, BLOCK) for n in sizes)
        m, v = (torch.zeros(blocks * BLOCK, dtype=torch.uint8, device=device) for _ in range(2))
        steps, m_max, v_max = (torch.zeros(n, dtype=torch.float32, device=device) for n in (len(sizes), blocks, blocks))
        return State8(steps, m, m_max, v, v_max)


def table_of(sizes: Sequence[int], device: torch.device | str) -> Table:
    """Where tensors of so many elements lie in a `State8`."""
    return Table(sizes, BLOCK, _BLOCKS, torch.device(device))


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


@cache
def _first_codes(device: torch.device, signed: bool) -> Tensor:
    """For each upper half of a float32 the code of the smallest value that has it; no two midpoints have the same."""
    upper = torch.arange(2**16, dtype=torch.int64, device="cpu") << 16
    smallest = torch.where(upper >= 2**31, upper + 0xFFFF - 2**32, upper).to(torch.int32).view(torch.float32)
    codes = torch.bucketize(smallest, _tables(torch.device("cpu"))[1 if signed else 3])
    return codes.clamp(max=255).to(torch.int32).to(device)


def _nearest_codes(x: Tensor, signed: bool) -> Tensor:
    """The index of the map's value nearest to each element of x, within -1 and 1, or 0 and 1."""
    bounds = _tables(x.device)[1 if signed else 3]
    if x.dtype != torch.float32:
        return torch.bucketize(x, bounds.to(x.dtype)[:-1])
    # In float32 a table and one comparison find what bucketize searches for, five times as fast.
    code = _first_codes(x.device, signed)[(x.view(torch.int32) >> 16) & 0xFFFF]
    return code + (x > bounds[code])


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes (P,) uint8, absmax) of x (P,): the formula above in plain torch."""
    n = x.numel()
    blocks = pad(x, (0, -n % BLOCK)).view(-1, BLOCK)
    top = blocks.abs().amax(1)
    codes = _nearest_codes(blocks / top.clamp(min=1e-38)[:, None], signed)
    return codes.view(-1)[:n].to(torch.uint8), top


def dequantize(codes: Tensor, absmax: Tensor, signed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """(P,): map[code] * absmax."""
    values = _tables(codes.device)[0 if signed else 2].to(dtype)[codes.int()]
    return values * absmax.to(dtype).repeat_interleave(BLOCK)[: codes.numel()]


# -- reference -------------------------------------------------------------------------------------


def _log(beta: float) -> float:
    """ln beta, -inf for 0."""
    return math.log(beta) if beta > 0 else -math.inf


def stepped(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: Tensor, rates: Rates) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas above in plain torch, in the dtype of p: (p, m, v) after step t; `skip` is left to the caller."""
    b1, b2 = rates.betas
    if rates.factor is not None:
        g = g * rates.factor.to(p.dtype)
    lr, t = torch.as_tensor(rates.lr, dtype=p.dtype, device=p.device), t.to(p.dtype)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    first, second = (-torch.expm1(t * _log(beta)) for beta in rates.betas)
    return p * (1 - lr * rates.weight_decay) - (lr / first) * m / ((v / second).sqrt() + rates.eps), m, v


def reference8_(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], state: State8, rates: Rates, table: Table | None = None
) -> None:
    """The formulas in plain torch, on tensors side by side, some 2^20 elements at a time; arguments as `adamw8bit_`."""
    _count(state, grads, rates)
    table = table or table_of([p.numel() for p in params], state.m.device)
    waiting: list[int] = []
    for k in range(len(params)):
        if grads[k] is not None and params[k].numel():
            waiting.append(k)
        if waiting and (k + 1 == len(params) or sum(table.sizes[i] for i in waiting) >= _CHUNK):
            _step_of_some([params[i] for i in waiting], [grads[i] for i in waiting], state, rates, table, waiting)
            waiting = []


def _step_of_some(params: list[Tensor], grads: list[Any], state: State8, rates: Rates, table: Table, which: list[int]) -> None:
    counts = [cdiv(table.sizes[i], BLOCK) for i in which]
    blocks = torch.cat([torch.arange(table.first[i], table.first[i] + n) for i, n in zip(which, counts, strict=True)])
    blocks = blocks.to(state.m.device)
    wide = torch.promote_types(params[0].dtype, torch.float32)

    def beside(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(t.detach().reshape(-1).to(wide), (0, -t.numel() % BLOCK)) for t in tensors]).view(-1, BLOCK)

    m = dequantize(state.m.view(-1, BLOCK)[blocks].view(-1), state.m_max[blocks], True, wide).view(-1, BLOCK)
    v = dequantize(state.v.view(-1, BLOCK)[blocks].view(-1), state.v_max[blocks], False, wide).view(-1, BLOCK)
    steps = state.steps[which].repeat_interleave(torch.tensor(counts, device=state.m.device))[:, None]
    p, m, v = stepped(beside(params), beside(grads), m, v, steps, rates)
    go = torch.ones((), dtype=torch.bool, device=p.device) if rates.skip is None else rates.skip == 0
    for codes, top, value, signed in ((state.m, state.m_max, m, True), (state.v, state.v_max, v, False)):
        new, new_top = quantize(value.view(-1), signed)
        codes = codes.view(-1, BLOCK)
        codes[blocks] = torch.where(go, new.view(-1, BLOCK), codes[blocks])
        top[blocks] = torch.where(go, new_top.to(top.dtype), top[blocks])
    for old, new, n in zip(params, p.split(counts), (p.numel() for p in params), strict=True):
        new = new.reshape(-1)[:n].view(old.shape).to(old.dtype)
        old.copy_(torch.where(go, new, old))


def _count(state: State8, grads: Sequence[Tensor | None], rates: Rates, present: Tensor | None = None) -> None:
    """One more step for each tensor that has a gradient, unless the step is skipped. `present`: addresses of the gradients."""
    one: Any = 1
    if any(g is None for g in grads):
        there = [g is not None for g in grads]
        one = present != 0 if present is not None else torch.tensor(there, device=state.steps.device)
    if rates.skip is not None:
        one = (rates.skip == 0) * one
    state.steps.add_(one)


# -- kernel ----------------------------------------------------------------------------------------


@jit
def one_minus_exp(u):
    """1 - e^u for a scalar u <= 0, to 2e-7 relative: the series where 1 - e^u would cancel."""
    series = 1.0 + u * (1.0 / 2 + u * (1.0 / 6 + u * (1.0 / 24 + u * (1.0 / 120 + u * (1.0 / 720 + u * (1.0 / 5040))))))
    return tl.where(u > -0.35, -u * series, 1.0 - tl.exp(u))


@jit
def moments(g, m, v, b1, b2, w1, w2):
    """(m, v) after one gradient; w is 1 - b, rounded once."""
    return b1 * m + w1 * g, b2 * v + w2 * (g * g)


@jit
def updated(p, m, v, t, rate, log_b1, log_b2, eps, decay):
    """The parameter after its decay and step t."""
    first = one_minus_exp(t * log_b1)
    second = one_minus_exp(t * log_b2)
    return p * (1.0 - rate * decay) - (rate / first) * (m / (tl.sqrt(v / second) + eps))


@jit
def _nearest(x, BOUNDS):
    """The number of midpoints below x, which is the index of the map's value nearest to it."""
    code = tl.zeros_like(x).to(tl.int32)
    for k in tl.static_range(8):
        probe = code + (128 >> k)
        code = tl.where(tl.load(BOUNDS + probe - 1) < x, probe, code)
    return code


@jit
def _store_codes(x, CODES, MAX, BOUNDS, at, block, there):
    """x (blocks, 256) quantised and written, whole blocks: past a tensor's end x is 0, and the plain path reads it so."""
    top = tl.max(tl.abs(x), axis=1)
    code = _nearest(tl.div_rn(x, tl.where(top > 0.0, top, 1.0)[:, None]), BOUNDS)
    tl.store(CODES + at, code.to(tl.uint8), mask=there[:, None])
    tl.store(MAX + block, top, mask=there)


@kernel
def _adamw8bit_kernel(
    ADDRESS, PLACE, ENTRY, STEPS, M, M_MAX, V, V_MAX, MAP_M, BOUNDS_M, MAP_V, BOUNDS_V, LR, FACTOR, SKIP,
    lr, b1, b2, w1, w2, log_b1, log_b2, eps, decay, tensors,
    TYPE: tl.constexpr, LR_TENSOR: tl.constexpr, CLIP: tl.constexpr, MAY_SKIP: tl.constexpr, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr
):  # fmt: skip
    """BLOCKS blocks of WIDTH elements of one tensor a program; a tensor without a gradient is left as it is."""
    program = tl.program_id(0)
    k, part = tl.load(ENTRY + 2 * program), tl.load(ENTRY + 2 * program + 1)
    grad_at = tl.load(ADDRESS + tensors + k)
    go = grad_at != 0
    if MAY_SKIP:
        go = go & (tl.load(SKIP) == 0)
    if go:
        size, first = tl.load(PLACE + 2 * k), tl.load(PLACE + 2 * k + 1)
        block = part * BLOCKS + tl.arange(0, BLOCKS)
        at = block.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        inside, there = at < size, block.to(tl.int64) * WIDTH < size
        param = tl.load(ADDRESS + k).to(tl.pointer_type(TYPE)) + at
        block = first + block
        code_at = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        if LR_TENSOR:
            lr = tl.load(LR).to(tl.float32)
        p = tl.load(param, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_at.to(tl.pointer_type(TYPE)) + at, mask=inside, other=0.0).to(tl.float32)
        if CLIP:
            g = g * tl.load(FACTOR).to(tl.float32)
        m_max = tl.load(M_MAX + block, mask=there, other=0.0)
        v_max = tl.load(V_MAX + block, mask=there, other=0.0)
        m = tl.load(MAP_M + tl.load(M + code_at, mask=inside, other=0).to(tl.int32)) * m_max[:, None]
        v = tl.load(MAP_V + tl.load(V + code_at, mask=inside, other=0).to(tl.int32)) * v_max[:, None]
        m, v = moments(g, m, v, b1, b2, w1, w2)
        m, v = tl.where(inside, m, 0.0), tl.where(inside, v, 0.0)
        p = updated(p, m, v, tl.load(STEPS + k), lr, log_b1, log_b2, eps, decay)
        tl.store(param, p.to(TYPE), mask=inside)
        _store_codes(m, M, M_MAX, BOUNDS_M, code_at, block, there)
        _store_codes(v, V, V_MAX, BOUNDS_V, code_at, block, there)


# -- public function, in place ---------------------------------------------------------------------


def adamw8bit_(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], state: State8, rates: Rates, table: Table | None = None
) -> None:
    """One AdamW step in place, states in 8 bits.

    Args:
        params: contiguous, of one dtype and device; float32, float16 or bfloat16, on the plain path float64 as well.
        grads: of the same shapes and dtype, contiguous; None leaves that tensor, its state and its steps as they are.
        table: of these tensors, as `table_of` makes it: kept from step to step, it spares the host most of its work.
    Raises: ValueError for tensors that are not contiguous or differ in dtype, or a state of other tensors.
    """
    kinds = {(t.dtype, t.device, t.is_contiguous()) for t in (*params, *grads) if t is not None}
    if len(kinds) != 1 or not next(iter(kinds))[2]:
        raise ValueError(f"Parameters and gradients must be contiguous and of one dtype and device, not of {len(kinds)} kinds.")
    table = table or table_of([p.numel() for p in params], params[0].device)
    if state.m_max.numel() != table.blocks or state.steps.numel() != len(params):
        raise ValueError(
            f"The state is of {state.steps.numel()} tensors in {state.m_max.numel()} blocks, "
            f"the parameters are {len(params)} in {table.blocks}."
        )
    if not use_triton(params[0]):
        reference8_(params, grads, state, rates, table)
        return
    address = table.addresses(params, grads)
    _count(state, grads, rates, address[len(params) :])
    lr, (b1, b2), steps = rates.lr, rates.betas, state.steps
    by_tensor = isinstance(lr, Tensor)
    with on_device(params[0]):
        _adamw8bit_kernel[(table.programs,)](
            address, table.place, table.entry, *state, *_tables(steps.device), lr if by_tensor else steps,
            steps if rates.factor is None else rates.factor, steps if rates.skip is None else rates.skip,
            0.0 if by_tensor else float(lr), float(b1), float(b2), 1.0 - b1, 1.0 - b2, _log(b1), _log(b2), float(rates.eps),
            float(rates.weight_decay), len(params), TYPE=TYPES[params[0].dtype], LR_TENSOR=by_tensor,
            CLIP=rates.factor is not None, MAY_SKIP=rates.skip is not None, BLOCKS=_BLOCKS, WIDTH=BLOCK, num_warps=4
        )  # fmt: skip


# -- op --------------------------------------------------------------------------------------------


def _functional(step_: Any) -> Any:
    """What the parity tests call: tensors of `sizes` side by side in `param` after one step, inputs left as they are."""

    def after(param: Tensor, grad: Tensor, state: State8, sizes: list[int], missing: int, **rates: Any) -> Tensor:
        own = param.clone()
        grads: list[Tensor | None] = [g for g in grad.split(sizes)]
        if missing:
            grads[missing - 1] = None
        step_(own.split(sizes), grads, State8(*(x.clone() for x in state)), Rates(**rates))
        return own

    return after


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    sizes = [case.sizes["P"] + 7 * k for k in range(case.sizes.get("tensors", 1))]
    param, grad = (torch.randn(sum(sizes), generator=make) for _ in range(2))
    blocks = sum(cdiv(n, BLOCK) for n in sizes)
    m, v = torch.randn(blocks * BLOCK, generator=make) * 0.1, torch.rand(blocks * BLOCK, generator=make) * 0.01
    if case.sizes.get("zeros"):
        grad[:300], m[:300], v[:300] = 0, 0, 0
    steps = torch.full((len(sizes),), case.sizes.get("t", 3) - 1.0)
    state = State8(steps, *quantize(m, True), *quantize(v, False))
    return {
        "param": param.to(device, dtype),
        "grad": grad.to(device, dtype),
        "state": State8(*(x.to(device) for x in state)),
        "sizes": sizes,
        "missing": case.sizes.get("missing", 0),
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
        Case("five tensors, the third without a gradient", {"P": 250, "tensors": 5, "missing": 3}, _RATE),
        Case("no momentum, step 100000", {"P": 100, "t": 100_000}, {"lr": 1e-2, "betas": (0.0, 0.99), "eps": 1e-5}),
    ),
    benchmark=(
        Case("LoRA of Llama-3.2-1B, r 16, in 224 tensors", {"P": 50_322, "tensors": 224}, _RATE),
        Case("LoRA of Llama-3.1-8B, r 16, in 448 tensors", {"P": 93_623, "tensors": 448}, _RATE),
    ),
)
