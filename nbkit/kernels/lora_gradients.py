"""The gradients of LoRA's matrices of a layer, all in one launch: thin matrices times wide ones, summed over the tokens.

    out_RC = scale * thin_NR^T wide_NC        dA_RI = u_NR^T x_NI                u = dy (scale B), the border columns of dy
                        or turned, out_CR     dB_OR = scale dy_NO^T xa_NR        xa = x A^T

Each is too small to fill a GPU, and cuBLAS gives it two launches: one that splits the sum over rows, one that adds the parts up.
Here the products lie side by side: a program owns some columns of one of them and walks down all rows, the thin matrix on the
left, with the sums (R, columns) in registers. So every wide matrix is read once, sums are float32 and in a fixed order: the same
inputs give the same bits. What tells a program which product it works for is known when it is compiled, except for addresses,
the number of rows and the scales, so few arguments are passed and a launch costs the host little; each layout of a layer (widths,
row strides, ranks) is compiled once, in a quarter of a second.
Shapes: thin (N, R), wide (N, C), out (R, C) or (C, R), all with stride 1 along the last dimension and any row stride. 16 bits,
GPUs with tensor cores for them (capability 8.0); the same function takes everything else through torch's GEMMs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nbkit.kernels._gemm import accumulate
from nbkit.kernels._launch import Prepared, capability_of, cdiv, jit, kernel, on_device, power_of_two, processors, tl, use_triton
from nbkit.kernels._op import Case, KernelOp
from nbkit.kernels.swiglu_lora import MIN_CAPABILITY

MOST = 6  # products of a launch
MAX_RANK = 256
BLOCK_RS = (16, 64)  # rows of `thin`^T that a program takes, at the least and the most: a higher rank is several programs' work

# -- reference -------------------------------------------------------------------------------------


def reference(thin: Tensor, wide: Tensor, *, spans: Sequence[Span], scale: float) -> Tensor:
    """Plain torch: the products one after another, in one vector."""
    parts = []
    for r, c, turned in spans:
        product = scale * (thin[:, r[0] : r[1]].t() @ wide[:, c[0] : c[1]])
        parts.append((product.t() if turned else product).reshape(-1))
    return torch.cat(parts)


# -- kernel ----------------------------------------------------------------------------------------


@jit
def _at(pid, CUTS: tl.constexpr, WHAT: tl.constexpr):
    """Entry WHAT of the cut that program `pid` belongs to."""
    value = CUTS[0][WHAT]
    for k in tl.static_range(1, len(CUTS)):
        value = tl.where(pid >= CUTS[k][0], CUTS[k][WHAT], value)
    return value


@jit
def _of(pid, CUTS: tl.constexpr, one, two, three, four, five, six):
    """The one of these that belongs to the program's product."""
    if len(CUTS) > 1:
        one = tl.where(pid >= CUTS[1][0], two, one)
    if len(CUTS) > 2:
        one = tl.where(pid >= CUTS[2][0], three, one)
    if len(CUTS) > 3:
        one = tl.where(pid >= CUTS[3][0], four, one)
    if len(CUTS) > 4:
        one = tl.where(pid >= CUTS[4][0], five, one)
    if len(CUTS) > 5:
        one = tl.where(pid >= CUTS[5][0], six, one)
    return one


@kernel
def _lora_gradients_kernel(
    THIN0, THIN1, THIN2, THIN3, THIN4, THIN5, WIDE0, WIDE1, WIDE2, WIDE3, WIDE4, WIDE5, OUT0, OUT1, OUT2, OUT3, OUT4, OUT5,
    scale0, scale1, scale2, scale3, scale4, scale5, N, CUTS: tl.constexpr, ADD: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """BLOCK_C columns and BLOCK_R ranks of one product, down all rows. CUTS: a `Cut` for each of them."""
    pid = tl.program_id(0)
    THIN = _of(pid, CUTS, THIN0, THIN1, THIN2, THIN3, THIN4, THIN5)
    WIDE = _of(pid, CUTS, WIDE0, WIDE1, WIDE2, WIDE3, WIDE4, WIDE5)
    OUT = _of(pid, CUTS, OUT0, OUT1, OUT2, OUT3, OUT4, OUT5)
    scale = _of(pid, CUTS, scale0, scale1, scale2, scale3, scale4, scale5)
    rank, columns = _at(pid, CUTS, 1), _at(pid, CUTS, 2)
    stride_thin, stride_wide, stride_out = _at(pid, CUTS, 3), _at(pid, CUTS, 4), _at(pid, CUTS, 5)
    own, chunks = pid - _at(pid, CUTS, 0), _at(pid, CUTS, 7)
    r = own % chunks * BLOCK_R + tl.arange(0, BLOCK_R)  # neighbours read the same columns
    col = own // chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    line = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        row_ok = start + line < N
        here = (r < rank)[:, None] & row_ok[None, :]  # as thin^T: under tl.trans it would go through registers
        thin_t = tl.load(THIN + (r[:, None] + line[None, :] * stride_thin), mask=here, other=0.0)
        here = row_ok[:, None] & (col < columns)[None, :]
        wide = tl.load(WIDE + (line[:, None] * stride_wide + col[None, :]), mask=here, other=0.0)
        total = tl.dot(thin_t, wide, total, input_precision="ieee")
        THIN += BLOCK_N * stride_thin
        WIDE += BLOCK_N * stride_wide
    total *= scale
    inside = (r < rank)[:, None] & (col < columns)[None, :]
    if _at(pid, CUTS, 6) > 0:
        _store(OUT + (col.to(tl.int64)[None, :] * stride_out + r[:, None]), total, inside, ADD)
    else:
        _store(OUT + (r.to(tl.int64)[:, None] * stride_out + col[None, :]), total, inside, ADD)


@jit
def _store(place, total, inside, ADD: tl.constexpr):
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(place.dtype.element_ty), mask=inside)


# -- how it is cut ---------------------------------------------------------------------------------


class Product(NamedTuple):
    """out (R, C), or (C, R) where `turned`, = scale * thin (N, R)^T wide (N, C)."""

    thin: Tensor
    wide: Tensor
    out: Tensor
    turned: bool = False
    scale: float = 1.0


class Cut(NamedTuple):
    """One product among the programs of a launch: its first program, sizes, row strides, and programs for the same columns."""

    first: int
    rank: int
    columns: int
    stride_thin: int
    stride_wide: int
    stride_out: int
    turned: int
    chunks: int


class Plan(NamedTuple):
    """Ranks, rows and columns of a block, and what the compiler is told."""

    block_r: int
    block_n: int
    block_c: int
    warps: int = 4
    stages: int = 4


class _Launch(NamedTuple):
    """What is known of a launch before there are addresses."""

    rows: int
    cuts: tuple[tuple[int, ...], ...]
    programs: int
    plan: Plan
    rest: tuple[None, ...]  # in the place of products that are not there
    scales: tuple[float, ...]


@lru_cache(256)
def plan_of(rank: int, columns: int, processors: int) -> Plan:
    """For the highest of the ranks and all columns together, on a GPU of so many multiprocessors."""
    block_r = min(max(power_of_two(rank), BLOCK_RS[0]), BLOCK_RS[1])
    block_c = 128 if columns >= 2 * 128 * processors else 64 if columns >= 0.75 * 64 * processors else 32
    block_c = min(block_c, 64) if block_r == 64 else block_c
    return Plan(block_r, 64, block_c, 4, 3 if block_r + block_c > 96 else 5)  # 48 KB of shared memory, so that all GPUs have it


_Kind = tuple[Any, ...]  # of a product: all but addresses, as `_kind` gives it


def _kind(p: Product) -> _Kind:
    thin, wide, out, turned, _ = p
    return (
        thin.shape,
        wide.shape,
        out.shape,
        thin.stride(),
        wide.stride(),
        out.stride(),
        thin.dtype,
        wide.dtype,
        out.dtype,
        turned,
    )


@lru_cache(1024)
def _launch_of(kinds: tuple[_Kind, ...], device: torch.device) -> _Launch | None:
    """None where they cannot be one launch: ranks too high, or several dtypes, or numbers of rows.

    Raises: ValueError for shapes or dtypes that do not fit, or columns that lie apart.
    """
    for k, kind in enumerate(kinds):
        _check(k, *kind)
    (n, _), dtypes = kinds[0][0], {kind[6:9] for kind in kinds}
    rank, columns = max(kind[0][1] for kind in kinds), sum(kind[1][1] for kind in kinds)
    if rank > MAX_RANK or len(dtypes) > 1 or any(kind[0][0] != n for kind in kinds):
        return None
    plan = plan_of(rank, columns, processors(device))
    cuts, first = [], 0
    for thin, wide, _, *strides, _, _, _, turned in kinds:
        chunks = cdiv(thin[1], plan.block_r)
        cuts.append(tuple(Cut(first, thin[1], wide[1], *(s[0] for s in strides), int(turned), chunks)))
        first += chunks * cdiv(wide[1], plan.block_c)
    rest = (None,) * (MOST - len(kinds))
    return _Launch(n, tuple(cuts), first, plan, rest, (0.0,) * len(rest))


def _check(k: int, thin: _Kind, wide: _Kind, out: _Kind, *rest: Any) -> None:
    """Raises: ValueError unless product k is thin (N, R), wide (N, C), out (R, C) or (C, R), with stride 1 along the last."""
    *strides, thin_dtype, wide_dtype, _, turned = rest
    if len(thin) != 2 or len(wide) != 2 or thin[0] != wide[0] or thin_dtype != wide_dtype:
        what = f"thin is {tuple(thin)} {thin_dtype} and wide {tuple(wide)} {wide_dtype}"
        raise ValueError(f"Product {k}: {what}; they must be (N, R) and (N, C) of one dtype.")
    wanted = (wide[1], thin[1]) if turned else (thin[1], wide[1])
    if tuple(out) != wanted:
        raise ValueError(f"Product {k}: out is {tuple(out)}; it must be {wanted}{', as it is turned' if turned else ''}.")
    for name, shape, stride in zip(("thin", "wide", "out"), (thin, wide, out), strides, strict=True):
        if stride[1] != 1 and shape[1] > 1:
            raise ValueError(f"Product {k}: {name} must have stride 1 along its last dimension, not strides {tuple(stride)}.")


# -- public functions ------------------------------------------------------------------------------


def fits(x: Tensor, *ranks: int) -> bool:
    """True if the kernel takes matrices of x's dtype and device with these ranks; the functions below take all."""
    return (
        0 < max(ranks, default=0) <= MAX_RANK
        and x.dtype in (torch.float16, torch.bfloat16)
        and use_triton(x)
        and (not x.is_cuda or (capability_of(x) >= MIN_CAPABILITY and torch.version.hip is None))
    )


def thin_products(products: Sequence[Product], add: bool = False) -> None:
    """Each product's out = scale * thin^T wide, one launch for up to MOST of them.

    Args:
        products: thin and wide in one dtype, any row stride; out in float32 or any other dtype, any row stride. No two outs may
            overlap. Products of several dtypes, or of several numbers of rows, take a launch each.
        add: the products are added to what the outputs hold.
    Raises: ValueError for shapes or dtypes that do not fit, or columns that lie apart.
    """
    if len(products) > MOST:
        thin_products(products[:MOST], add)
        thin_products(products[MOST:], add)
        return
    if not products:
        return
    x = products[0].wide
    launch = _launch_of(tuple([_kind(p) for p in products]), x.device)
    if launch is None and len(products) > 1:
        for p in products:
            thin_products((p,), add)
    elif launch is None or not fits(x, 1):
        for p in products:
            one_product(p, add)
    elif launch.programs:
        n, cuts, programs, plan, rest, scales = launch
        thins, wides, outs, _, given = zip(*products, strict=True)
        with on_device(x):
            _lora_gradients_kernel[(programs,)](
                *thins, *rest, *wides, *rest, *outs, *rest, *map(float, given), *scales, n, CUTS=cuts, ADD=add,
                BLOCK_R=plan.block_r, BLOCK_N=plan.block_n, BLOCK_C=plan.block_c, num_warps=plan.warps, num_stages=plan.stages
            )  # fmt: skip


def one_product(p: Product, add: bool = False) -> None:
    """One product by torch's GEMM; from 16 bits into float32, on a GPU, without a rounding between."""
    left, right = (p.wide, p.thin) if p.turned else (p.thin, p.wide)
    accumulate(p.out, left.t(), right, p.scale, add)


def prepared_products(turned: Sequence[bool], scales: Sequence[float], add: bool = False) -> Prepared:
    """`thin_products` for tensors that keep shapes, strides and dtypes: takes thin, wide, out of the first, then of the next.

    Args:
        turned, scales: of each product.
    """

    def run(*tensors: Tensor) -> None:
        each = zip(tensors[::3], tensors[1::3], tensors[2::3], turned, scales, strict=True)
        thin_products([Product(*p) for p in each], add)

    return Prepared(run)


# -- op --------------------------------------------------------------------------------------------

Span = tuple[tuple[int, int], tuple[int, int], bool]  # columns of thin, columns of wide, turned or not


def lora_gradients(thin: Tensor, wide: Tensor, *, spans: Sequence[Span], scale: float) -> Tensor:
    """Products of columns of two matrices, one after another in one vector."""
    sizes = [((r[1] - r[0]), (c[1] - c[0])) for r, c, _ in spans]
    flat = torch.empty(sum(r * c for r, c in sizes), dtype=thin.dtype, device=thin.device)
    thin_products(products_of(thin, wide, flat, spans, scale))
    return flat


def products_of(thin: Tensor, wide: Tensor, flat: Tensor, spans: Sequence[Span], scale: float) -> list[Product]:
    """The products of these columns, their outs side by side in the vector `flat`."""
    found, at = [], 0
    for r, c, turned in spans:
        rank, columns = r[1] - r[0], c[1] - c[0]
        out = flat[at : at + rank * columns].view((columns, rank) if turned else (rank, columns))
        found.append(Product(thin[:, r[0] : r[1]], wide[:, c[0] : c[1]], out, turned, scale))
        at += rank * columns
    return found


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    n, r, c = (case.sizes[letter] for letter in "NRC")
    thin, wide = torch.randn(n, r, generator=make), torch.randn(n, c, generator=make)
    return {"thin": (thin / n**0.5).to(device, dtype), "wide": wide.to(device, dtype)}


def _attention(d: int, kv: int, r: int) -> dict[str, Any]:
    """dA, dB of o and dA, dB of q, k, v, for layers of `d` columns: wide is [out | dy of o | x | dq | dk | dv]."""
    ends = [0, d, 2 * d, 3 * d, 4 * d, 4 * d + kv, 4 * d + 2 * kv]
    wide = list(zip(ends, ends[1:], strict=False))
    thin = [(0, r), (r, 2 * r), (2 * r, 5 * r), *((k * r, (k + 1) * r) for k in (5, 6, 7))]
    return {"spans": tuple(zip(thin, wide, (False, True, False, True, True, True), strict=True)), "scale": 2.0}


def _mlp(d: int, r: int) -> dict[str, Any]:
    """dB of down, dA of gate and up."""
    return {"spans": (((0, r), (0, d), True), ((r, 3 * r), (d, 2 * d), False)), "scale": 2.0}


def _single(r: int, c: int, turned: bool = False) -> dict[str, Any]:
    return {"spans": (((0, r), (0, c), turned),), "scale": 0.5}


OP = KernelOp(
    name="lora_gradients",
    fn=lora_gradients,
    reference=reference,
    inputs=_inputs,
    gradients=(),
    cases=(
        Case("attention's", {"N": 70, "R": 40, "C": 160}, _attention(32, 16, 5)),
        Case("the MLP's, of many rows", {"N": 300, "R": 48, "C": 130}, _mlp(65, 16)),
        Case("one row, one rank, odd columns", {"N": 1, "R": 1, "C": 37}, _single(1, 37)),
        Case("turned, ranks of two blocks", {"N": 33, "R": 96, "C": 70}, _single(96, 70, True)),
        Case("ranks of two blocks", {"N": 33, "R": 65, "C": 70}, _single(65, 70)),
        Case("seven products", {"N": 20, "R": 7, "C": 30}, {"spans": (((1, 6), (3, 20), True),) * 7, "scale": 3.0}),
        Case("a rank beyond it", {"N": 9, "R": 257, "C": 40}, _single(257, 40)),
    ),
    benchmark=(
        Case("Llama-3.1-8B attention, r 16, 2 x 2048", {"N": 4096, "R": 128, "C": 18432}, _attention(4096, 1024, 16)),
        Case("Llama-3.1-8B MLP, r 16, 2 x 2048", {"N": 4096, "R": 48, "C": 8192}, _mlp(4096, 16)),
        Case("Llama-3.1-8B attention, r 16, 1 x 512", {"N": 512, "R": 128, "C": 18432}, _attention(4096, 1024, 16)),
        Case("Llama-3.1-8B attention, r 32, 2 x 2048", {"N": 4096, "R": 256, "C": 18432}, _attention(4096, 1024, 32)),
        Case("Llama-3.2-1B attention, r 16, 2 x 512", {"N": 1024, "R": 128, "C": 9216}, _attention(2048, 512, 16)),
        Case("Llama-3.2-1B MLP, r 16, 2 x 512", {"N": 1024, "R": 48, "C": 4096}, _mlp(2048, 16)),
    ),
)
