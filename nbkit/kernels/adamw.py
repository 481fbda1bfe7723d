"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over one flat buffer, in one launch that a CUDA graph can record.

    g' = factor * g               p <- p (1 - lr * decay)
    m <- b1 m + (1 - b1) g'       v <- b2 v + (1 - b2) g'^2
    p <- p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

and before it the norm of all gradients and the factor that clips them, in two launches whatever their number:

    norm = s * sqrt(sum g^2)      factor = s * min(1, max_norm / (norm + 1e-6))        s: one over the loss scale, or 1

The step t, the learning rate, the factor and whether to skip the step are read from device memory, so a recorded step stays
true while they change. Sums run in a fixed order: the norm is the same bit for bit in every run. Arithmetic is in float32.
1 - b^t is -expm1(t ln b), to 2e-7 relative; 1 - b^t itself would lose five digits at t = 1.
Shapes: param, grad, exp_avg, exp_avg_sq, copy (P,) contiguous, float32 or 16 bits each; step, factor, skip, norm one element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nbkit.kernels._launch import cdiv, jit, kernel, on_device, power_of_two, tl, use_triton
from nbkit.kernels._op import Case, KernelOp

_BLOCK = 1024
_SUMS = 512  # programs that sum the squares of one buffer
_TINY = 1e-6  # in the clipping factor, as torch.nn.utils.clip_grad_norm_ has it

# -- reference -------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """What a step of AdamW is told.

    Attributes:
        lr: the learning rate, a number or one element on the device.
        factor: one float32 element on the device that gradients are multiplied by, as `clip_factor_` writes it.
        skip: one element on the device; where it is not 0 nothing changes.
    """

    lr: float | Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    factor: Tensor | None = None
    skip: Tensor | None = None


def reference(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: Tensor, rates: Rates) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas above in plain torch, in the dtype of p: (p, m, v) after step t; `skip` is left to the caller."""
    b1, b2 = rates.betas
    if rates.factor is not None:
        g = g * rates.factor.to(p.dtype)
    lr, t = torch.as_tensor(rates.lr, dtype=p.dtype, device=p.device), t.to(p.dtype)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    first, second = (-torch.expm1(t * log(beta)) for beta in rates.betas)
    return p * (1 - lr * rates.weight_decay) - (lr / first) * m / ((v / second).sqrt() + rates.eps), m, v


def reference_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, rates: Rates, copy: Tensor | None = None
) -> None:
    """`adamw_` in plain torch, in float32 or wider."""
    wide = torch.promote_types(param.dtype, torch.float32)
    after = reference(*(x.to(wide) for x in (param, grad, exp_avg, exp_avg_sq)), step, rates)
    go = torch.ones((), dtype=torch.bool, device=param.device) if rates.skip is None else rates.skip == 0
    for target, value in zip((param, exp_avg, exp_avg_sq), after, strict=True):
        target.copy_(torch.where(go, value, target.to(wide)))
    if copy is not None:
        copy.copy_(param)


def log(beta: float) -> float:
    """ln beta, -inf for 0."""
    return math.log(beta) if beta > 0 else -math.inf


# -- kernels ---------------------------------------------------------------------------------------


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


@kernel
def _adamw_kernel(
    P, G, M, V, STEP, LR, FACTOR, SKIP, COPY, lr, b1, b2, w1, w2, log_b1, log_b2, eps, decay, n,
    LR_TENSOR: tl.constexpr, CLIP: tl.constexpr, MAY_SKIP: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK elements a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    go = inside
    if MAY_SKIP:
        go = inside & (tl.load(SKIP) == 0)
    if LR_TENSOR:
        lr = tl.load(LR).to(tl.float32)
    t = tl.load(STEP).to(tl.float32)
    g = tl.load(G + at, mask=go, other=0.0).to(tl.float32)
    if CLIP:
        g = g * tl.load(FACTOR).to(tl.float32)
    p = tl.load(P + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(M + at, mask=go, other=0.0).to(tl.float32)
    v = tl.load(V + at, mask=go, other=0.0).to(tl.float32)
    m, v = moments(g, m, v, b1, b2, w1, w2)
    p = tl.where(go, updated(p, m, v, t, lr, log_b1, log_b2, eps, decay), p)
    tl.store(P + at, p.to(P.dtype.element_ty), mask=go)
    tl.store(M + at, m.to(M.dtype.element_ty), mask=go)
    tl.store(V + at, v.to(V.dtype.element_ty), mask=go)
    if COPIES:
        tl.store(COPY + at, p.to(P.dtype.element_ty).to(COPY.dtype.element_ty), mask=inside)


@kernel
def _square_sums_kernel(G, SUMS, n, share, BLOCK: tl.constexpr):
    """The sum of squares of `share` elements a program; `share` is a multiple of BLOCK."""
    program = tl.program_id(0)
    start = program.to(tl.int64) * share
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for offset in range(0, share, BLOCK):
        at = start + offset + tl.arange(0, BLOCK)
        g = tl.load(G + at, mask=at < n, other=0.0).to(tl.float32)
        total += g * g
    tl.store(SUMS + program, tl.sum(total, axis=0))


@kernel
def _factor_kernel(
    SUMS, NORM, FACTOR, SCALE, SKIP, STEP, n, max_norm,
    UNSCALE: tl.constexpr, MAY_SKIP: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: norm and factor from all sums; `skip` where the norm is not finite; the step goes up by one unless skipped."""
    at = tl.arange(0, BLOCK)
    norm = tl.sqrt(tl.sum(tl.load(SUMS + at, mask=at < n, other=0.0), axis=0))
    scale = 1.0
    if UNSCALE:
        scale = tl.load(SCALE).to(tl.float32)
    norm = norm * scale
    tl.store(NORM, norm)
    clip = max_norm / (norm + 1e-6)
    tl.store(FACTOR, tl.where(clip < 1.0, clip, 1.0) * scale)
    ok = norm < float("inf")  # false for nan as well
    if MAY_SKIP:
        tl.store(SKIP, tl.where(ok, 0, 1).to(SKIP.dtype.element_ty))
    if COUNT:
        step = tl.load(STEP)
        if MAY_SKIP:
            tl.store(STEP, step + ok.to(STEP.dtype.element_ty))
        else:
            tl.store(STEP, step + 1)


# -- public functions, in place --------------------------------------------------------------------


def adamw_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, rates: Rates, copy: Tensor | None = None
) -> None:
    """One AdamW step in place on flat buffers (P,).

    Args:
        step: one element on the device, any dtype: the number of this step, 1 for the first.
        copy: (P,), gets the new parameter, rounded to param's dtype first: a 16-bit copy of a float32 master.
    Raises: ValueError for buffers that are not flat, contiguous and equally long.
    """
    buffers = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    n = check_flat(buffers if copy is None else buffers | {"copy": copy})
    if not use_triton(param, grad, exp_avg, exp_avg_sq):
        reference_(param, grad, exp_avg, exp_avg_sq, step, rates, copy)
        return
    lr, (b1, b2) = rates.lr, rates.betas
    by_tensor = isinstance(lr, Tensor)
    with on_device(param):
        _adamw_kernel[(cdiv(n, _BLOCK),)](
            param, grad, exp_avg, exp_avg_sq, step, lr if by_tensor else step, step if rates.factor is None else rates.factor,
            step if rates.skip is None else rates.skip, param if copy is None else copy,
            0.0 if by_tensor else float(lr), float(b1), float(b2), 1.0 - b1, 1.0 - b2, log(b1), log(b2), float(rates.eps),
            float(rates.weight_decay), n, LR_TENSOR=by_tensor, CLIP=rates.factor is not None, MAY_SKIP=rates.skip is not None,
            COPIES=copy is not None, BLOCK=_BLOCK, num_warps=4
        )  # fmt: skip


def clip_factor_(
    grads: Sequence[Tensor],
    max_norm: float,
    norm: Tensor,
    factor: Tensor,
    *,
    inverse_scale: Tensor | None = None,
    skip: Tensor | None = None,
    step: Tensor | None = None,
) -> None:
    """The norm of all `grads` (flat buffers) together, and the factor that clips it to `max_norm` (math.inf: no clipping).

    Args:
        norm, factor: one float32 element each, written to.
        inverse_scale: one element: one over the loss scale; norm is of the unscaled gradients, factor unscales them too.
        skip: one element, written to: 1 where the norm is not finite, else 0.
        step: one element that goes up by 1, unless the step is skipped.
    Raises: ValueError for a gradient that is not flat and contiguous, or for none at all.
    """
    if not grads:
        raise ValueError("There is no gradient to take the norm of.")
    for grad in grads:
        check_flat({"grad": grad})
    if not use_triton(*grads):
        _plain_factor(grads, max_norm, norm, factor, inverse_scale, skip, step)
        return
    shares = [cdiv(cdiv(grad.numel(), _SUMS), _BLOCK) * _BLOCK for grad in grads]
    programs = [cdiv(grad.numel(), share) for grad, share in zip(grads, shares, strict=True)]
    sums = torch.empty(sum(programs), dtype=torch.float32, device=norm.device)
    first = 0
    with on_device(norm):
        for grad, share, count in zip(grads, shares, programs, strict=True):
            _square_sums_kernel[(count,)](grad, sums[first:], grad.numel(), share, BLOCK=_BLOCK, num_warps=4)
            first += count
        _factor_kernel[(1,)](
            sums, norm, factor, norm if inverse_scale is None else inverse_scale, norm if skip is None else skip,
            norm if step is None else step, first, float(max_norm), UNSCALE=inverse_scale is not None,
            MAY_SKIP=skip is not None, COUNT=step is not None, BLOCK=power_of_two(first), num_warps=4
        )  # fmt: skip


def _plain_factor(
    grads: Sequence[Tensor],
    max_norm: float,
    norm: Tensor,
    factor: Tensor,
    inverse_scale: Tensor | None,
    skip: Tensor | None,
    step: Tensor | None,
) -> None:
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    scale = torch.ones((), dtype=wide, device=norm.device) if inverse_scale is None else inverse_scale.to(wide)
    norm.copy_(torch.stack([g.to(wide).square().sum() for g in grads]).sum().sqrt() * scale)
    factor.copy_((max_norm / (norm + _TINY)).nan_to_num(1.0, posinf=1.0).clamp(max=1.0) * scale)
    ok = torch.isfinite(norm)
    if skip is not None:
        skip.copy_(~ok)
    if step is not None:
        step.add_(ok.to(step.dtype) if skip is not None else 1)


def check_flat(buffers: dict[str, Tensor]) -> int:
    """The common length of buffers, by their names. Raises: ValueError unless every buffer is (P,) and contiguous."""
    lengths = {x.numel() for x in buffers.values()}
    odd = [name for name, x in buffers.items() if x.dim() != 1 or not x.is_contiguous()]
    if odd or len(lengths) != 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in buffers.items())
        raise ValueError(f"Buffers must be flat, contiguous and equally long, not {shapes}.")
    return lengths.pop()


# -- op --------------------------------------------------------------------------------------------


def _functional(step_: Any) -> Any:
    """What the parity tests call: (param, exp_avg, exp_avg_sq) after one step as one tensor, inputs left as they are."""

    def stepped(
        param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, max_norm: float = math.inf, **options: Any
    ) -> Tensor:
        p, m, v = param.clone(), exp_avg.clone(), exp_avg_sq.clone()
        wide = torch.promote_types(p.dtype, torch.float32)
        norm, factor = torch.zeros((), dtype=wide, device=p.device), torch.zeros((), dtype=wide, device=p.device)
        if step_ is reference_:
            _plain_factor([grad], max_norm, norm, factor, None, None, None)
        else:
            clip_factor_([grad], max_norm, norm, factor)
        step_(p, grad, m, v, step, Rates(factor=factor, **options))
        return torch.cat([p, m.to(p.dtype), v.to(p.dtype)])

    return stepped


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    n = case.sizes["P"]
    param, grad, m = (torch.randn(n, generator=make) * size for size in (1.0, case.sizes.get("scale", 1), 0.1))
    v = torch.rand(n, generator=make) * 0.01
    if case.sizes.get("zeros"):
        grad[::2], m[::2], v[::2] = 0, 0, 0
    state = dtype if case.sizes.get("narrow") else torch.promote_types(dtype, torch.float32)
    return {
        "param": param.to(device, dtype),
        "grad": grad.to(device, dtype),
        "exp_avg": m.to(device, state),
        "exp_avg_sq": v.to(device, state),
        "step": torch.tensor(case.sizes.get("t", 3), dtype=torch.int32, device=device),
    }


_RATE = {"lr": 1e-2, "weight_decay": 0.1}
OP = KernelOp(
    name="adamw",
    fn=_functional(adamw_),
    reference=_functional(reference_),
    inputs=_inputs,
    gradients=(),
    cases=(
        Case("no whole number of blocks", {"P": 2500}, _RATE),
        Case("first step", {"P": 300, "t": 1}, _RATE),
        Case("step 100000", {"P": 300, "t": 100_000}, _RATE),
        Case("one element", {"P": 1}, {"lr": 1e-2}),
        Case("clipped", {"P": 1500, "scale": 100}, {**_RATE, "max_norm": 1.0}),
        Case("no momentum", {"P": 100}, {"lr": 1e-2, "betas": (0.0, 0.99), "eps": 1e-5}),
        Case("zeros", {"P": 200, "zeros": 1}, {"lr": 1e-2}),
        Case("states in the parameter's dtype", {"P": 500, "narrow": 1}, _RATE),
    ),
    benchmark=(
        Case("LoRA of Llama-3.2-1B, r 16", {"P": 11_272_192}, _RATE),
        Case("LoRA of Llama-3.1-8B, r 16", {"P": 41_943_040}, _RATE),
    ),
)
