"""LoRA's gradients in one launch: both orientations, columns of buffers, odd sizes, how work is cut, what the host pays.

On this device as it is, and under the interpreter through `test_interpreted.py`. Test names begin with the op's.
"""

from __future__ import annotations

import re
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nbkit.kernels import _launch
from nbkit.kernels import lora_gradients as lg
from nbkit.kernels.lora_gradients import Plan, Product
from tests.closeness import assert_close

ON_GPU = torch.cuda.is_available() and not _launch.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = [torch.float16, torch.float32] + ([] if _launch.INTERPRETED else [torch.bfloat16])
MARK = 7.0  # what spare elements hold, and must still hold afterwards
# ranks, columns, turned or not, scale: what the launch of a small layer's attention has, and what it never has
MIXED = [
    (16, 40, False, 1.0),
    (3, 33, True, 2.0),
    (48, 40, False, 0.5),
    (1, 1, True, 1.0),
    (64, 70, True, -1.0),
    (7, 129, False, 3.0),
]


def columns(n: int, width: int, dtype: torch.dtype, seed: int, before: int = 3, fill: float = float("inf")) -> Tensor:
    """(n, width) random columns of a buffer that holds `fill` in all others, and in rows past n."""
    buffer = torch.full((n + 2, before + width + 5), fill, dtype=dtype, device=DEVICE)
    buffer[:n, before : before + width] = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return buffer[:n, before : before + width]


def outs_of(kinds: list[Any], dtype: torch.dtype = torch.float32, spare: int = 3) -> list[tuple[Tensor, Tensor]]:
    """(buffer, out of the product within it), for each."""
    shapes = [(c, r) if turned else (r, c) for r, c, turned, _ in kinds]
    buffers = [torch.full((rows + 1, width + spare), MARK, dtype=dtype, device=DEVICE) for rows, width in shapes]
    return [(b, b[:-1, : b.shape[1] - spare]) for b in buffers]


def products_of(
    n: int, kinds: list[Any], dtype: torch.dtype, outs: list[tuple[Tensor, Tensor]], before: int = 3
) -> list[Product]:
    """Of thin matrices that are columns of one buffer each, like the borders of the fused layer."""
    found = []
    for k, ((r, c, turned, scale), (_, out)) in enumerate(zip(kinds, outs, strict=True)):
        thin, wide = columns(n, r, dtype, 2 * k, before), columns(n, c, dtype, 2 * k + 1, 2 * before)
        found.append(Product(thin.div_(max(n, 1) ** 0.5), wide, out, turned, scale))
    return found


def truth_of(p: Product) -> Tensor:
    found = p.scale * (p.thin.double().t() @ p.wide.double())
    return found.t() if p.turned else found


def close(name: str, ours: Tensor, truth: Tensor, like: torch.dtype) -> None:
    """By the rule for `like`: sums in float32 of factors of 16 bits."""
    assert_close(name, ours.to(like), truth.to(like), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 64, 150])
def test_lora_gradients_within_buffers(dtype: torch.dtype, n: int) -> None:
    """Six of all shapes at once; what lies beside the inputs is infinite, what lies beside the outputs stays."""
    outs = outs_of(MIXED)
    products = products_of(n, MIXED, dtype, outs)
    lg.thin_products(products)
    for k, (p, (buffer, out)) in enumerate(zip(products, outs, strict=True)):
        close(f"product {k}", out, truth_of(p), torch.float32)
        assert bool((buffer[-1] == MARK).all()) and bool((buffer[:, out.shape[1] :] == MARK).all())


@pytest.mark.parametrize(
    ("dtype", "kind"), [*product(DTYPES, (torch.float32, torch.float64)), (torch.float16, torch.float16)], ids=str
)
def test_lora_gradients_add_up_tiles_of_rows(dtype: torch.dtype, kind: torch.dtype) -> None:
    """Two tiles into the same outputs, as of all rows at once; outputs in 16 bits, float32 or wider."""
    kinds = [(16, 40, False, 1.0), (5, 33, True, 2.0)]
    outs = outs_of(kinds, kind)
    products = products_of(90, kinds, dtype, outs)
    for t in (slice(0, 50), slice(50, 90)):
        lg.thin_products([p._replace(thin=p.thin[t], wide=p.wide[t]) for p in products], add=t.start > 0)
    least = max((torch.float32, kind), key=lambda d: torch.finfo(d).eps)
    for k, p in enumerate(products):
        first = truth_of(p._replace(thin=p.thin[:50], wide=p.wide[:50])).to(kind)  # as it lies there between the two
        truth = first.double() + truth_of(p._replace(thin=p.thin[50:], wide=p.wide[50:]))
        close(f"product {k}", p.out, truth, least)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("r", [1, 2, 8, 15, 16, 17, 32, 33, 63, 64, 65, 100, 256, 257])
def test_lora_gradients_of_any_rank(r: int, turned: bool) -> None:
    """A rank above 64 is cut, one above 256 goes to torch."""
    kinds = [(r, 37, turned, 1.0), (4, 20, not turned, 0.5)]
    products = products_of(21, kinds, torch.float16, outs_of(kinds))
    lg.thin_products(products)
    for k, p in enumerate(products):
        close(f"product {k}", p.out, truth_of(p), torch.float32)


@pytest.mark.parametrize("plan", [Plan(16, 16, 16), Plan(16, 32, 64), Plan(64, 16, 32), Plan(32, 128, 128)], ids=str)
def test_lora_gradients_in_blocks_of_any_size(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks of columns, of ranks and of rows: each program finds its own."""
    monkeypatch.setattr(lg, "plan_of", lambda *sizes: plan)
    lg._launch_of.cache_clear()
    outs = outs_of(MIXED)
    products = products_of(77, MIXED, torch.float16, outs)
    try:
        lg.thin_products(products)
    finally:
        lg._launch_of.cache_clear()
    for k, (p, (buffer, out)) in enumerate(zip(products, outs, strict=True)):
        close(f"product {k}", out, truth_of(p), torch.float32)
        assert bool((buffer[-1] == MARK).all()) and bool((buffer[:, out.shape[1] :] == MARK).all())


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 13])
def test_lora_gradients_of_any_number(count: int) -> None:
    """More than a launch takes, and fewer."""
    kinds = [MIXED[k % len(MIXED)] for k in range(count)]
    products = products_of(40, kinds, torch.float16, outs_of(kinds), before=8)
    lg.thin_products(products)
    for k, p in enumerate(products):
        close(f"product {k}", p.out, truth_of(p), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_gradients_have_the_same_bits_again(dtype: torch.dtype) -> None:
    runs = []
    for _ in range(2):
        outs = outs_of(MIXED)
        lg.thin_products(products_of(333, MIXED, dtype, outs))
        runs.append([out for _, out in outs])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_lora_gradients_of_several_dtypes_and_numbers_of_rows() -> None:
    """What cannot share a launch takes one each."""
    kinds = [(16, 40, False, 1.0), (5, 33, True, 2.0), (8, 24, True, 1.0), (8, 20, False, 1.0)]
    outs = outs_of(kinds)
    products = [
        products_of(n, kinds, d, outs)[k]
        for k, (n, d) in enumerate(((20, 0), (30, 0), (20, 1), (30, 2)))
        for d in [DTYPES[d % len(DTYPES)]]
    ]
    products[0] = products[0]._replace(out=torch.empty(16, 40, dtype=torch.float16, device=DEVICE))
    lg.thin_products(products)
    for k, p in enumerate(products):
        close(f"product {k}", p.out, truth_of(p), p.out.dtype)


def test_lora_gradients_without_rows_ranks_or_columns() -> None:
    for dtype in DTYPES:
        like: dict[str, Any] = {"dtype": dtype, "device": DEVICE}
        out = torch.full((4, 40), MARK, device=DEVICE)
        lg.thin_products([Product(torch.empty(0, 4, **like), torch.empty(0, 40, **like), out)])
        assert not out.any()
        out = torch.full((4, 40), MARK, device=DEVICE)
        lg.thin_products([Product(torch.empty(0, 4, **like), torch.empty(0, 40, **like), out)], add=True)
        assert bool((out == MARK).all())
        x, y = torch.ones(5, 3, **like), torch.ones(5, 40, **like)
        empty = Product(x[:, :0], y, torch.empty(0, 40, device=DEVICE))
        narrow = Product(x, y[:, :0], torch.empty(0, 3, device=DEVICE), True)
        full = Product(x, y, torch.empty(40, 3, device=DEVICE), True)
        lg.thin_products([empty, narrow])
        lg.thin_products([empty, full, narrow])
        assert bool((full.out == 5).all())


def test_lora_gradients_are_those_of_autograd() -> None:
    """A linear with LoRA in float64: dA = (dy scale B)^T x and dB = scale dy^T (x A^T)."""
    like: dict[str, Any] = {"dtype": torch.float64, "device": DEVICE}
    torch.manual_seed(0)
    n, i, o, r, scale = 9, 7, 5, 3, 1.5
    x, dy = torch.randn(n, i, **like), torch.randn(n, o, **like)
    a, b = torch.randn(r, i, **like, requires_grad=True), torch.randn(o, r, **like, requires_grad=True)
    (scale * (x @ a.t()) @ b.t()).backward(dy)
    da, db = torch.empty(r, i, **like), torch.empty(o, r, **like)
    with torch.no_grad():
        lg.thin_products([Product(dy @ b * scale, x, da), Product(x @ a.t(), dy, db, True, scale)])
    torch.testing.assert_close(da, a.grad)
    torch.testing.assert_close(db, b.grad)


def test_lora_gradients_say_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.empty(2, 2, dtype=torch.float16, device=DEVICE)
    here = _launch.runs_on(half.device) and (not half.is_cuda or _launch.capability_of(half) >= (8, 0))
    assert lg.fits(half, 16) is lg.fits(half.bfloat16(), 64, 1, 0) is lg.fits(half, 256) is here
    assert not any(lg.fits(x, *ranks) for x, ranks in ((half, (257,)), (half, (0, 0)), (half, ()), (half.float(), (16,))))
    monkeypatch.setattr(lg, "use_triton", lambda *tensors: True)
    monkeypatch.setattr(lg, "capability_of", lambda x: x.capability)
    for capability, taken in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        assert lg.fits(SimpleNamespace(dtype=torch.float16, is_cuda=True, capability=capability), 16) is taken


def test_lora_gradients_refuse_what_does_not_fit() -> None:
    thin, wide, out = (torch.zeros(*s, device=DEVICE) for s in ((4, 2), (4, 6), (2, 6)))
    good = Product(thin, wide, out)
    for bad, message in (
        (
            Product(thin[:3], wide, out),
            r"Product 1: thin is \(3, 2\) torch.float32 and wide \(4, 6\) torch.float32; they must be",
        ),
        (Product(thin, wide.half(), out), r"wide \(4, 6\) torch.float16; they must be \(N, R\) and \(N, C\) of one dtype"),
        (Product(thin, wide, out, True), r"Product 1: out is \(2, 6\); it must be \(6, 2\), as it is turned"),
        (Product(thin, wide, out.t()), r"out is \(6, 2\); it must be \(2, 6\)\."),
        (Product(thin, wide, out.t().contiguous().t()), r"out must have stride 1 along its last dimension, not strides \(1, 2\)"),
        (Product(thin.t().contiguous().t(), wide, out), "thin must have stride 1"),
        (Product(thin, wide[:, ::2], out[:, :3]), "wide must have stride 1"),
    ):
        for _ in range(2):  # nothing of a refusal is remembered
            with pytest.raises(ValueError, match=message):
                lg.thin_products([good, bad])


def test_lora_gradients_are_cut_to_fill_the_gpu() -> None:
    """Programs for every multiprocessor at Llama's sizes, without a product read more often than its rank asks."""
    for processors in (20, 40, 84, 108, 132, 148):
        for rank in (1, 16, 32, 48, 64, 96, 256):
            for width in (1, 100, 4096, 8192, 18432, 50000):
                plan = lg.plan_of(rank, width, processors)
                assert 16 <= plan.block_r <= 64 and plan.block_r >= min(rank, 64) and plan.block_c in (32, 64, 128)
    for width in (4096, 8192, 9216, 18432):
        for rank in (32, 48):
            assert -(-width // lg.plan_of(rank, width, 132).block_c) >= 0.75 * 132


# -- what is launched, and what that costs ---------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lean launches of CPU tensors as if on device -1, written down instead of made."""
    calls: list[Any] = []
    hooks = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)

    class Jitted:
        arg_names = lg._lora_gradients_kernel.jit.arg_names
        params = lg._lora_gradients_kernel.jit.params
        __name__ = "fake"

        def __getitem__(self, grid: Any) -> Any:
            made = SimpleNamespace(packed_metadata=(), function="function", run=lambda *args: calls.append(args))
            return lambda *args, **constants: calls.append("compiled") or made

    monkeypatch.setattr(_launch, "_driver", lambda: (lambda: -1, lambda device: 77, hooks))
    monkeypatch.setattr(lg, "_lora_gradients_kernel", _launch.Launcher(Jitted()))
    monkeypatch.setattr(lg, "use_triton", lambda *tensors: True)
    return calls


NEEDS_COMPILING = pytest.mark.skipif(
    _launch.INTERPRETED or _launch.triton is None or not _launch.LEAN or ON_GPU,
    reason="needs a process that compiles, without a GPU",
)


@NEEDS_COMPILING
def test_lora_gradients_are_one_launch(launched: list[Any]) -> None:
    """Compiled once for any number of rows of a kind and for any scales; absent products are None."""
    kinds = [(16, 64, False, 1.0), (16, 32, True, 2.0)]
    outs = outs_of(kinds, spare=4)
    products = products_of(48, kinds, torch.float16, outs, before=8)
    lg.thin_products(products)
    lg.thin_products([p._replace(thin=p.thin[:32], wide=p.wide[:32], scale=4) for p in products])
    first, (x, y, z, stream, *_, add, block_r, block_n, block_c) = launched
    passed = launched[1][9:]
    assert first == "compiled" and (y, z, stream, add) == (1, 1, 77, False)
    pointers = [[getattr(p, name).data_ptr() for p in products] + [None] * 4 for name in ("thin", "wide", "out")]
    assert list(passed[:25]) == [*sum(pointers, []), 4.0, 4.0, 0.0, 0.0, 0.0, 0.0, 32]
    assert x == -(-64 // block_c) + -(-32 // block_c) and block_r == 16 and block_n % 16 == 0
    lg.thin_products([*products] * 4)
    assert len(launched) == 4, "eight products are two launches"


@NEEDS_COMPILING
def test_lora_gradients_prepared(launched: list[Any]) -> None:
    """Outputs may lie elsewhere in every call; the launch is the one that was seen, with their addresses."""
    kinds = [(16, 64, False, 1.0), (16, 32, True, 2.0)]
    run = lg.prepared_products([k[2] for k in kinds], [k[3] for k in kinds])
    for call in range(4):
        products = products_of(48, kinds, torch.float16, outs_of(kinds, spare=4), before=8)
        run(*(t for p in products for t in (p.thin, p.wide, p.out)))
        assert len(launched) == call + 1
        if call:
            assert launched[-1][9:11] == tuple(p.thin.data_ptr() for p in products)
            assert launched[-1][21:23] == tuple(p.out.data_ptr() for p in products)
            assert launched[-1][27:29] == (1.0, 2.0)
    assert run.found is not None


def test_lora_gradients_prepared_where_nothing_is_launched() -> None:
    kinds = [(16, 64, False, 1.0), (16, 32, True, 2.0)]
    run = lg.prepared_products([k[2] for k in kinds], [k[3] for k in kinds], add=True)
    outs = outs_of(kinds)
    products = products_of(48, kinds, torch.float32, outs)
    for _ in range(5):
        run(*(t for p in products for t in (p.thin, p.wide, p.out)))
    for p in products:
        close("five times", p.out - MARK, 5 * truth_of(p), torch.float32)


@pytest.mark.skipif(_launch.INTERPRETED or _launch.triton is None, reason="needs a process that compiles")
@pytest.mark.parametrize("capability", [86, 90])
@pytest.mark.parametrize(("name", "r"), [("attention", 16), ("attention", 8), ("mlp", 32)])
def test_lora_gradients_fetch_ahead_in_16_bytes(
    name: str, r: int, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """As compiled for Llama 8B: all loads of the loop run ahead, 16 bytes each, and shared memory fits everywhere."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(lg, "processors", lambda device: 132)
    spans = (lg._attention(4096, 1024, r) if name == "attention" else lg._mlp(4096, r))["spans"]
    width = max(c[1] for _, c, _ in spans)
    thin, wide = (torch.empty(1, w, dtype=torch.float16) for w in (8 * r, width))
    products = lg.products_of(thin, wide, torch.empty(width * 6 * r), spans, 1.0)
    lg._launch_of.cache_clear()
    launch = lg._launch_of(tuple(lg._kind(p) for p in products), torch.device("cpu"))
    lg._launch_of.cache_clear()
    assert launch is not None
    plan, fn = launch.plan, getattr(lg._lora_gradients_kernel, "jit", lg._lora_gradients_kernel)
    constants = {"CUTS": launch.cuts, "ADD": False, "BLOCK_R": plan.block_r, "BLOCK_N": plan.block_n, "BLOCK_C": plan.block_c}
    constants |= {n: None for n in fn.arg_names if n[-1].isdigit() and int(n[-1]) >= len(products)}
    types = {
        n: "i32" if n == "N" else "fp32" if n.startswith("scale") else "*fp32" if n.startswith("OUT") else "*bf16"
        for n in fn.arg_names
    }
    signature = {n: "constexpr" if n in constants else types[n] for n in fn.arg_names}
    aligned = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(fn.arg_names) if signature[n] not in ("constexpr", "fp32")}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": plan.warps, "num_stages": plan.stages}
    )
    ptx, before = made.asm["ptx"], plan.stages - 1  # iterations whose loads are issued before the loop
    chunks = plan.block_n * (plan.block_r + plan.block_c) // 8 // (32 * plan.warps)
    assert len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10,", ptx)) == chunks * (before + 1)
    assert not re.findall(r"ld\.global", ptx) and ("wgmma.mma_async" in ptx or "mma.sync" in ptx)
    assert made.metadata.shared <= 99 * 1024
    assert set(re.findall(r"st\.global[\w.]*", ptx)) == {"st.global.v4.b32"}


@pytest.mark.gpu
@pytest.mark.parametrize("r", [8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lora_gradients_at_real_sizes(dtype: torch.dtype, r: int) -> None:
    """Against float64 at Llama 8B's widths, with the numbers of rows that differ in how they are compiled, and recorded."""
    for options in (lg._attention(4096, 1024, r), lg._mlp(4096, r)):
        for n in (512, 1000, 4099):
            width, thinnest = (max(span[k][1] for span in options["spans"]) for k in (1, 0))
            thin = torch.randn(n, thinnest, device="cuda", dtype=torch.float32).div_(n**0.5).to(dtype)
            wide = torch.randn(n, width, device="cuda", dtype=torch.float32).to(dtype)
            total = sum((s[0][1] - s[0][0]) * (s[1][1] - s[1][0]) for s in options["spans"])
            flat, again = (torch.full((total,), float("nan"), device="cuda") for _ in range(2))
            lg.thin_products(lg.products_of(thin, wide, flat, options["spans"], 2.0))
            truth = lg.reference(thin.double(), wide.double(), spans=options["spans"], scale=2.0)
            assert float((flat - truth).abs().max() / truth.abs().max()) < 1e-4  # tensor cores cut sums off
            products = lg.products_of(thin, wide, again, options["spans"], 2.0)
            lg.thin_products(products)
            assert torch.equal(flat, again), "the same bits again"
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                lg.thin_products(products)
            again.zero_()
            graph.replay()
            assert torch.equal(flat, again), "and recorded"
