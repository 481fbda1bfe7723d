"""RMSNorm of every head of q and k, then rotary positions, in one launch: what Qwen 3 and Gemma 3 do before attention.

For each head row x (K) of a token, with the weight w of q's or k's norm (`offset` added) and rope's rotation P of that token:

    rstd = (mean(x^2) + eps) ^ -1/2       xhat = x * rstd       y = P (xhat * w)
    n = P^-1 dy        dw = sum n * xhat        g = n * w       dx = rstd * (g - xhat * mean(g * xhat))

The backward takes x as it was before the norm, and computes rstd again: nothing else is kept. It can write dx into the rows
[dq | dk | dv] that the projection's backward reads, and copy dv there in the same launch. Pairs, partial rotation and tables
are rope.py's. All in float32, rounded once: between norm and rotation nothing is rounded, where the separate steps would.
Shapes: q (B, T, H, K), k and v (B, T, G, K) in any strides with stride 1 along K; weights (K,).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbkit.kernels import rms_norm as rms
from nbkit.kernels import rope as rp
from nbkit.kernels._autograd import first_order
from nbkit.kernels._launch import cdiv, jit, kernel, on_device, power_of_two, tl, use_triton
from nbkit.kernels._op import Case, KernelOp

_TILE = 2048  # elements of heads that a program holds
_TOKENS = 8  # tokens a program sums before it writes its share of the weights' gradients

# -- reference -------------------------------------------------------------------------------------


def reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    interleaved: bool = False,
    rotary: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(q, k) by the separate steps: rms_norm.py's reference, rounded last where there is an offset, then rope.py's."""
    cast = rms.LAST if offset else rms.BEFORE_WEIGHT
    turned = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = rms.reference(x, weight, eps, offset=offset, cast=cast)
        turned.append(rp.reference(y, cos, sin, interleaved=interleaved, rotary=rotary))
    return turned[0], turned[1]


# -- kernels ---------------------------------------------------------------------------------------


@jit
def _places(HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr):
    """Columns of the first and the second of each pair, and which pairs there are."""
    pair = tl.arange(0, BLOCK_P)[None, :]
    if INTERLEAVED:
        one, two = 2 * pair, 2 * pair + 1
    else:
        one, two = pair, pair + HALF
    return pair, one, two, pair < HALF


@jit
def _load(X, column, mask):
    return tl.load(X + column, mask=mask, other=0.0).to(tl.float32)


@jit
def _forward_heads(
    X, OUT, W, COS, SIN, x_h, out_h, eps, first_head, heads, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """BLOCK_H heads of one token."""
    head = first_head + tl.arange(0, BLOCK_H)[:, None]
    pair, one, two, there = _places(HALF, INTERLEAVED, BLOCK_P)
    inside = (head < heads) & there
    source, target = X + head * x_h, OUT + head * out_h
    a, b = _load(source, one, inside), _load(source, two, inside)
    total = tl.sum(a * a + b * b, axis=1)
    if K > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_R)[None, :]
        stays = (head < heads) & (rest < K)
        r = _load(source, rest, stays)
        total += tl.sum(r * r, axis=1)
    rstd = tl.rsqrt(total / K + eps)[:, None]
    a = a * rstd * (_load(W, one, there) + OFFSET)
    b = b * rstd * (_load(W, two, there) + OFFSET)
    c, s = _load(COS, pair, there), _load(SIN, pair, there)
    tl.store(target + one, (a * c - b * s).to(OUT.dtype.element_ty), mask=inside)
    tl.store(target + two, (b * c + a * s).to(OUT.dtype.element_ty), mask=inside)
    if K > 2 * HALF:
        r = r * rstd * (_load(W, rest, rest < K) + OFFSET)
        tl.store(target + rest, r.to(OUT.dtype.element_ty), mask=stays)


@kernel
def _qk_norm_rope_forward(
    Q, KK, OUT_Q, OUT_K, WQ, WK, COS, SIN, q_b, q_t, q_h, k_b, k_t, k_h, oq_b, oq_t, oq_h, ok_b, ok_t, ok_h,
    table_b, table_t, eps, T, H, G, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr,
    Q_BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """One token; the first Q_BLOCKS programs of its row are q's, the others k's."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = n // T, n % T
    cos, sin = COS + b * table_b + t * table_t, SIN + b * table_b + t * table_t
    if part < Q_BLOCKS:
        _forward_heads(
            Q + b * q_b + t * q_t, OUT_Q + b * oq_b + t * oq_t, WQ, cos, sin, q_h, oq_h, eps, part * BLOCK_H, H,
            OFFSET, INTERLEAVED, HALF, K, BLOCK_H, BLOCK_P, BLOCK_R
        )  # fmt: skip
    else:
        _forward_heads(
            KK + b * k_b + t * k_t, OUT_K + b * ok_b + t * ok_t, WK, cos, sin, k_h, ok_h, eps, (part - Q_BLOCKS) * BLOCK_H, G,
            OFFSET, INTERLEAVED, HALF, K, BLOCK_H, BLOCK_P, BLOCK_R
        )  # fmt: skip


@jit
def _backward_heads(
    DY, X, OUT, W, COS, SIN, dy_h, x_h, out_h, eps, first_head, heads, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """dx of BLOCK_H heads of one token; returns their share of dw, at the pairs' first, second and the columns that stay."""
    head = first_head + tl.arange(0, BLOCK_H)[:, None]
    pair, one, two, there = _places(HALF, INTERLEAVED, BLOCK_P)
    inside = (head < heads) & there
    source, upstream, target = X + head * x_h, DY + head * dy_h, OUT + head * out_h
    rest = 2 * HALF + tl.arange(0, BLOCK_R)[None, :]
    stays = (head < heads) & (rest < K)
    a, b, r = _load(source, one, inside), _load(source, two, inside), _load(source, rest, stays)
    rstd = tl.rsqrt((tl.sum(a * a + b * b, axis=1) + tl.sum(r * r, axis=1)) / K + eps)[:, None]
    a, b, r = a * rstd, b * rstd, r * rstd
    c, s = _load(COS, pair, there), _load(SIN, pair, there)
    da, db, dr = _load(upstream, one, inside), _load(upstream, two, inside), _load(upstream, rest, stays)
    na, nb = da * c + db * s, db * c - da * s
    ga, gb = na * (_load(W, one, there) + OFFSET), nb * (_load(W, two, there) + OFFSET)
    gr = dr * (_load(W, rest, rest < K) + OFFSET)
    mean = ((tl.sum(ga * a + gb * b, axis=1) + tl.sum(gr * r, axis=1)) / K)[:, None]
    tl.store(target + one, (rstd * (ga - a * mean)).to(OUT.dtype.element_ty), mask=inside)
    tl.store(target + two, (rstd * (gb - b * mean)).to(OUT.dtype.element_ty), mask=inside)
    if K > 2 * HALF:
        tl.store(target + rest, (rstd * (gr - r * mean)).to(OUT.dtype.element_ty), mask=stays)
    return tl.sum(na * a, axis=0), tl.sum(nb * b, axis=0), tl.sum(dr * r, axis=0)


@jit
def _copy_heads(X, OUT, x_h, out_h, first_head, heads, K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):
    head = first_head + tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_K)[None, :]
    inside = (head < heads) & (column < K)
    tl.store(OUT + head * out_h + column, tl.load(X + head * x_h + column, mask=inside).to(OUT.dtype.element_ty), mask=inside)


@kernel
def _qk_norm_rope_backward(
    DQ, DK, DV, Q, KK, OUT_Q, OUT_K, OUT_V, WQ, WK, DW, COS, SIN, dq_b, dq_t, dq_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h,
    q_b, q_t, q_h, k_b, k_t, k_h, oq_b, oq_t, oq_h, ok_b, ok_t, ok_h, ov_b, ov_t, ov_h, table_b, table_t, eps, T, H, G, N,
    OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, Q_BLOCKS: tl.constexpr,
    K_BLOCKS: tl.constexpr, WEIGHT_GRAD: tl.constexpr, TOKENS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """TOKENS tokens; q's programs come first, then k's, then those that copy dv. DW: (token blocks, Q_BLOCKS + K_BLOCKS, K)."""
    part = tl.program_id(1)
    wa = tl.zeros((BLOCK_P,), dtype=tl.float32)
    wb = tl.zeros((BLOCK_P,), dtype=tl.float32)
    wr = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for i in range(TOKENS):
        n = tl.program_id(0).to(tl.int64) * TOKENS + i
        b, t = n // T, n % T
        cos, sin = COS + b * table_b + t * table_t, SIN + b * table_b + t * table_t
        if n < N:
            if part < Q_BLOCKS:
                a, c, r = _backward_heads(
                    DQ + b * dq_b + t * dq_t, Q + b * q_b + t * q_t, OUT_Q + b * oq_b + t * oq_t, WQ, cos, sin, dq_h, q_h, oq_h,
                    eps, part * BLOCK_H, H, OFFSET, INTERLEAVED, HALF, K, BLOCK_H, BLOCK_P, BLOCK_R
                )  # fmt: skip
                wa, wb, wr = wa + a, wb + c, wr + r
            elif part < Q_BLOCKS + K_BLOCKS:
                a, c, r = _backward_heads(
                    DK + b * dk_b + t * dk_t, KK + b * k_b + t * k_t, OUT_K + b * ok_b + t * ok_t, WK, cos, sin, dk_h, k_h, ok_h,
                    eps, (part - Q_BLOCKS) * BLOCK_H, G, OFFSET, INTERLEAVED, HALF, K, BLOCK_H, BLOCK_P, BLOCK_R
                )  # fmt: skip
                wa, wb, wr = wa + a, wb + c, wr + r
            else:
                first = (part - Q_BLOCKS - K_BLOCKS) * BLOCK_H
                _copy_heads(DV + b * dv_b + t * dv_t, OUT_V + b * ov_b + t * ov_t, dv_h, ov_h, first, G, K, BLOCK_H, BLOCK_K)
    if WEIGHT_GRAD and part < Q_BLOCKS + K_BLOCKS:
        share = DW + (tl.program_id(0).to(tl.int64) * (Q_BLOCKS + K_BLOCKS) + part) * K
        pair = tl.arange(0, BLOCK_P)
        if INTERLEAVED:
            one, two = 2 * pair, 2 * pair + 1
        else:
            one, two = pair, pair + HALF
        rest = 2 * HALF + tl.arange(0, BLOCK_R)
        tl.store(share + one, wa, mask=pair < HALF)
        tl.store(share + two, wb, mask=pair < HALF)
        tl.store(share + rest, wr, mask=rest < K)


# -- raw functions, without autograd ---------------------------------------------------------------


def qk_norm_rope_forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    interleaved: bool = False,
    rotary: int | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(q, k) normalised and rotated, into `out` of the same shapes and any strides if given; `out` may be q and k themselves.

    Args: as `qk_norm_rope`.
    Raises: ValueError for tables or strides that do not fit.
    """
    rotary = q.shape[-1] if rotary is None else rotary
    for x in (q, k):
        rp.check_tables(x, cos, sin, None, rotary)
    out = (torch.empty_like(q), torch.empty_like(k)) if out is None else out
    _check_columns(*out)
    if not use_triton(q, k, q_weight, k_weight, cos, sin, *out):
        wide = torch.promote_types(q.dtype, torch.float32)
        ins = (x.to(wide) for x in (q, k, q_weight, k_weight, cos, sin))
        found = reference(*ins, eps, offset=offset, interleaved=interleaved, rotary=rotary)
        return out[0].copy_(found[0]), out[1].copy_(found[1])
    cos, sin, table_b = _tables(cos, sin)
    t, h, width = q.shape[1:]
    g, sizes = k.shape[2], _blocks(q.shape[2], k.shape[2], width, rotary)
    with on_device(q):
        _qk_norm_rope_forward[(q.shape[0] * t, sizes["Q_BLOCKS"] + cdiv(g, sizes["BLOCK_H"]))](
            q, k, *out, q_weight, k_weight, cos, sin, *q.stride()[:3], *k.stride()[:3], *out[0].stride()[:3],
            *out[1].stride()[:3], table_b, cos.stride(-2), float(eps), t, h, g, OFFSET=float(offset), INTERLEAVED=interleaved,
            HALF=rotary // 2, K=width, **sizes, num_warps=4
        )  # fmt: skip
    return out


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    interleaved: bool = False,
    rotary: int | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    dv: tuple[Tensor, Tensor] | None = None,
    weight_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk before norm and rope, dq_weight, dk_weight); q and k as they were before the norm.

    Args:
        out: where dq and dk go, any strides; may be dq and dk, or q and k, themselves.
        dv: (from, to), both (B, T, G, K): copied in the same launch.
        weight_grad: whether to compute the weights' gradients (K,), float32; None is returned for both otherwise.
    """
    rotary = q.shape[-1] if rotary is None else rotary
    out = (torch.empty_like(q), torch.empty_like(k)) if out is None else out
    for x in (dq, dk, q, k):
        rp.check_tables(x, cos, sin, None, rotary)
    _check_columns(*out, *(dv or ()))
    b, t, h, width = q.shape
    if not use_triton(dq, dk, q, k, q_weight, k_weight, cos, sin, *out):
        return _plain_backward(
            (dq, dk), (q, k), (q_weight, k_weight), cos, sin, eps, offset, interleaved, rotary, out, dv, weight_grad
        )
    cos, sin, table_b = _tables(cos, sin)
    g, sizes = k.shape[2], _blocks(h, k.shape[2], width, rotary)
    k_blocks = cdiv(g, sizes["BLOCK_H"])
    parts, tokens = sizes["Q_BLOCKS"] + k_blocks, _TOKENS if weight_grad else 1
    groups = cdiv(b * t, tokens)
    shares = torch.empty((groups, parts, width) if weight_grad else (1,), dtype=torch.float32, device=q.device)
    v, to = (k, k) if dv is None else dv
    with on_device(q):
        _qk_norm_rope_backward[(groups, parts + (0 if dv is None else k_blocks))](
            dq, dk, v, q, k, *out, to, q_weight, k_weight, shares, cos, sin, *dq.stride()[:3], *dk.stride()[:3],
            *v.stride()[:3], *q.stride()[:3], *k.stride()[:3], *out[0].stride()[:3], *out[1].stride()[:3], *to.stride()[:3],
            table_b, cos.stride(-2), float(eps), t, h, g, b * t, OFFSET=float(offset), INTERLEAVED=interleaved,
            HALF=rotary // 2, K=width, K_BLOCKS=k_blocks, WEIGHT_GRAD=weight_grad, TOKENS=tokens, **sizes,
            BLOCK_K=power_of_two(width), num_warps=4
        )  # fmt: skip
    if not weight_grad:
        return *out, None, None
    total = shares.sum(0)
    return *out, total[: sizes["Q_BLOCKS"]].sum(0), total[sizes["Q_BLOCKS"] :].sum(0)


def _plain_backward(
    upstream: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor,
    eps: float, offset: float, interleaved: bool, rotary: int, out: tuple[Tensor, Tensor], dv: tuple[Tensor, Tensor] | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    wide = torch.promote_types(before[0].dtype, torch.float32)
    c, s = cos.to(wide), sin.to(wide)
    results, shares = [], []
    for dy, x, w in zip(upstream, before, weights, strict=True):
        n = rp.reference(dy.to(wide), c, s, inverse=True, interleaved=interleaved, rotary=rotary)
        rstd = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
        xhat, g = x.to(wide) * rstd, n * (w.to(wide) + offset)
        results.append(rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True)))
        shares.append((n * xhat).sum((0, 1, 2)) if weight_grad else None)
    for target, value in zip(out, results, strict=True):
        target.copy_(value)
    if dv is not None:
        dv[1].copy_(dv[0])
    return *out, shares[0], shares[1]


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int]:
    """Tables with neighbouring columns next to each other and like strides, and their stride over the batch."""
    if cos.stride(-1) != 1 or sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0


def _blocks(h: int, g: int, width: int, rotary: int) -> dict[str, int]:
    """Sizes of the tiles: as many heads as fit."""
    heads = min(power_of_two(max(h, g)), max(_TILE // power_of_two(width), 1))
    sizes = {"BLOCK_H": heads, "BLOCK_P": power_of_two(rotary // 2), "BLOCK_R": power_of_two(width - rotary)}
    return {"Q_BLOCKS": cdiv(h, heads), **sizes}


def _check_columns(*tensors: Tensor) -> None:
    for x in tensors:
        if x.stride(-1) != 1:
            raise ValueError(f"out and dv must have stride 1 along K, not strides {x.stride()}.")


# -- with autograd ---------------------------------------------------------------------------------


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor, eps: float, how: Any) -> Any:
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        ctx.save_for_backward(q, k, wq, wk, cos, sin)
        ctx.eps, ctx.how = eps, how
        return qk_norm_rope_forward(q, k, wq, wk, cos, sin, eps, **how, out=(q.new_empty(q.shape), k.new_empty(k.shape)))

    @staticmethod
    @first_order
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        q, k, wq, wk, cos, sin = ctx.saved_tensors
        dq, dk = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk))
        trained = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        out = (q.new_empty(q.shape), k.new_empty(k.shape))
        dq, dk, dwq, dwk = qk_norm_rope_backward(
            dq, dk, q, k, wq, wk, cos, sin, ctx.eps, **ctx.how, out=out, weight_grad=trained
        )  # fmt: skip
        dwq = None if dwq is None or not ctx.needs_input_grad[2] else dwq.to(wq.dtype)
        dwk = None if dwk is None or not ctx.needs_input_grad[3] else dwk.to(wk.dtype)
        return dq, dk, dwq, dwk, None, None, None, None


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    interleaved: bool = False,
    rotary: int | None = None,
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, K) and k (B, T, G, K), each head normalised over K and rotated by its token's position.

    Args:
        q_weight, k_weight: (K,) of the norms; `offset` is added to them: 0 for Qwen 3, 1 for Gemma 3.
        cos, sin, interleaved, rotary: as `rope`.
    Raises: ValueError for tables that do not fit.
    """
    if use_triton(q, k, q_weight, k_weight, cos, sin):
        how = {"offset": offset, "interleaved": interleaved, "rotary": rotary}
        return _QKNormRope.apply(q, k, q_weight, k_weight, cos, sin, eps, how)  # type: ignore[no-any-return]
    return reference(q, k, q_weight, k_weight, cos, sin, eps, offset=offset, interleaved=interleaved, rotary=rotary)


# -- op --------------------------------------------------------------------------------------------


def _joined(fn: Any) -> Any:
    """q and k in one tensor (B, T, H + G, K), which the parity tests want."""

    def joined(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Tensor:
        return torch.cat(fn(q, k, q_weight, k_weight, cos, sin, **options), dim=2)

    return joined


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    b, t, h, g, k = (case.sizes[letter] for letter in "BTHGK")
    both = torch.randn(b, t, h + 2 * g, k, generator=make) * case.sizes.get("scale", 1)
    if case.sizes.get("zero_heads"):
        both[:, 0] = 0
    both = both.to(device, dtype)  # as one projection gives q, k and v
    q, kk = both[:, :, :h], both[:, :, h : h + g]
    if case.sizes.get("heads_first"):
        q, kk = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, kk))
    weights = torch.randn(2, k, generator=make) * 0.2 + 1 - case.options.get("offset", 0.0)
    turning = case.options.get("rotary") or k
    angle = torch.rand(case.sizes.get("tables", 1), t, turning // 2, generator=make) * 6.3
    angle = torch.cat((angle, angle), dim=-1)
    table = dtype if case.sizes.get("narrow") else torch.float32
    tables = {"cos": angle.cos().to(device, table), "sin": angle.sin().to(device, table)}
    return {"q": q, "k": kk, "q_weight": weights[0].to(device, dtype), "k_weight": weights[1].to(device, dtype), **tables}


_SMALL = {"B": 2, "T": 5, "H": 4, "G": 2, "K": 16}
OP = KernelOp(
    name="qk_norm_rope",
    fn=_joined(qk_norm_rope),
    reference=_joined(reference),
    inputs=_inputs,
    gradients=("q", "k", "q_weight", "k_weight"),
    cases=(
        Case("Qwen 3's way, tables in the model's dtype", {**_SMALL, "narrow": 1}),
        Case("Gemma 3's way, weight offset", {**_SMALL, "tables": 2}, {"offset": 1.0}),
        Case("one token of one head", {"B": 1, "T": 1, "H": 1, "G": 1, "K": 2}),
        Case("head width 80, odd numbers of heads", {"B": 1, "T": 3, "H": 7, "G": 3, "K": 80}),
        Case("more heads than a program holds", {"B": 1, "T": 2, "H": 40, "G": 5, "K": 128}),
        Case("a part of the head, interleaved", {**_SMALL, "K": 20}, {"rotary": 12, "interleaved": True}),
        Case("a part of the head", {**_SMALL, "K": 12}, {"rotary": 4}),
        Case("heads before tokens in memory", {**_SMALL, "heads_first": 1}),
        Case("heads of zeros", {**_SMALL, "zero_heads": 1}, {"eps": 1e-2}),
        Case("large values", {**_SMALL, "scale": 300}),
    ),
    benchmark=(
        Case("Qwen3-0.6B, 2 x 2048", {"B": 2, "T": 2048, "H": 16, "G": 8, "K": 128}),
        Case("Qwen3-8B, 2 x 2048", {"B": 2, "T": 2048, "H": 32, "G": 8, "K": 128}),
    ),
)
