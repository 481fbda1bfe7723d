"""The NF4 GEMV: every number of rows by both kernels, at large and at odd sizes; its table, and its assembler without a GPU.

On this device as it is, and under the interpreter, which takes no assembler, through `test_interpreted.py`.
"""

from __future__ import annotations

import gc
import random
import re
from functools import lru_cache

import pytest
import torch

from nbkit.kernels import _launch, nf4
from nbkit.kernels import _nf4_pairs as pairs
from nbkit.kernels import nf4_gemv as gemv
from tests.closeness import assert_close

ON_GPU = torch.cuda.is_available() and not _launch.INTERPRETED
KERNELS = ON_GPU or _launch.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
kernels_only = pytest.mark.skipif(not KERNELS, reason="needs a GPU or Triton's interpreter")
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
HALVES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]  # bfloat16 is wrong in the interpreter
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


def packed_of(o: int, i: int, seed: int = 0, nested: bool = True, block: int = 64) -> nf4.Nf4:
    """A random packed weight with NF4's own table."""
    like = {"device": DEVICE, "generator": torch.Generator(DEVICE).manual_seed(seed)}
    blocks, lut = o * i // block, torch.tensor(NF4, device=DEVICE)
    data = torch.randint(0, 256, (o * i // 2,), dtype=torch.uint8, **like)
    if not nested:
        return nf4.Nf4(data, torch.rand(blocks, **like) + 0.1, lut, (o, i), block)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, **like)
    inner = torch.rand(-(-blocks // nf4.NESTED_BLOCK), **like) * 0.8 + 0.2
    offset = torch.tensor(0.37, device=DEVICE)
    return nf4.Nf4(data, codes, lut, (o, i), block, torch.linspace(-1, 1, 256, device=DEVICE), inner, offset)


def held(packed: nf4.Nf4, dtype: torch.dtype) -> nf4.Nf4:
    """The weight as the kernels have it: its table in 16 bits, times a factor."""
    table = pairs.table_of(packed.lut, dtype)
    values = table.words[8:].to(torch.int16).view(dtype).double() * table.gain
    return packed._replace(lut=values)


def rows(n: int, i: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    x = torch.randn(n, i, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))
    return (x / i**0.5).to(dtype)


def by_fma(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    if wanted:  # as on a GPU before Ampere
        monkeypatch.setattr(gemv, "_on_tensor_cores", lambda x: False)


@lru_cache(maxsize=1)
def large(o: int, i: int, dtype: torch.dtype) -> tuple[nf4.Nf4, torch.Tensor, torch.Tensor]:
    """(weight, eight rows, their product in float64)."""
    packed, x = packed_of(o, i), rows(8, i, dtype)
    return packed, x, x.double() @ nf4.dequantize_reference(packed).double().t()


@gpu_only
@pytest.mark.parametrize("fma", [False, True], ids=["as here", "fma"])
@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("o", "i"), [(14336, 4096), (4096, 14336), (6144, 4096), (512, 2048), (5003, 4160), (2049, 11008)])
def test_each_row_at_large_sizes(o: int, i: int, dtype: torch.dtype, n: int, fma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row: were one row another's, its error would be 1.4; weights rounded to 16 bits would leave 2.3e-3 in bfloat16."""
    by_fma(monkeypatch, fma)
    packed, x, truth = large(o, i, dtype)
    out = torch.full((9, o), float("nan"), device=DEVICE, dtype=dtype)
    gemv.nf4_gemv(x[:n], packed, out=out[:n])
    assert out[n:].isnan().all()
    error = (out[:n].double() - truth[:n]).norm(dim=1) / truth[:n].norm(dim=1)
    limit = 2.1e-3 * EPS[dtype] / EPS[torch.bfloat16]
    assert (error < limit).all(), f"errors by row {error.tolist()}, allowed {limit}"


@kernels_only
@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("o", "i", "fma"), [(11, 576, False), (17, 64, False), (1, 512, False), (11, 576, True)])
def test_each_element_at_odd_sizes(
    o: int, i: int, dtype: torch.dtype, n: int, fma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 with the table as it is held: nothing but y's rounding and that of float32 sums is left."""
    by_fma(monkeypatch, fma)
    packed, x = packed_of(o, i, nested=i > 64), rows(n, i, dtype)
    y = gemv.nf4_gemv(x, packed).double()
    exact = held(packed, dtype if n > 1 and not fma else torch.float16)
    weight = nf4.dequantize_reference(exact)
    truth = x.double() @ weight.t()
    allowed = 1.01 * EPS[dtype] * truth.abs() + 1e-6 * (x.double().abs() @ weight.abs().t())
    assert ((y - truth).abs() <= allowed).all()


@kernels_only
@pytest.mark.parametrize("fma", [False, True], ids=["as here", "fma"])
def test_each_column_and_each_code_is_in_its_place(fma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit rows give columns of the weight; every code stands in every column of a block."""
    by_fma(monkeypatch, fma)
    packed = packed_of(16, 64, nested=False)
    codes = (torch.arange(16)[:, None] + torch.arange(64)[None, :]) % 16
    packed = packed._replace(data=(codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8).reshape(-1).to(DEVICE))
    weight = nf4.dequantize_reference(held(packed, torch.float16))
    for first in range(0, 64, 8):
        x = torch.zeros(8, 64, dtype=torch.float16, device=DEVICE)
        x[range(8), range(first, first + 8)] = 1
        y = gemv.nf4_gemv(x, packed).double()
        expected = weight[:, first : first + 8].t()
        assert ((y - expected).abs() <= 1.01 * EPS[torch.float16] * expected.abs()).all()


@kernels_only
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_may_lie_anywhere(n: int, dtype: torch.dtype) -> None:
    packed = packed_of(21, 192)
    aligned = rows(n, 192, dtype)
    expected = gemv.nf4_gemv(aligned, packed)
    for offset, spare in ((1, 3), (4, 0), (0, 1), (2, 8)):
        buffer = torch.full((n, offset + 192 + spare), float("nan"), device=DEVICE, dtype=dtype)
        x = buffer[:, offset : offset + 192]
        x.copy_(aligned)
        assert torch.equal(gemv.nf4_gemv(x, packed), expected), f"{offset} columns before, {spare} behind"
    assert torch.equal(gemv.nf4_gemv(aligned[:1].expand(n, 192), packed), expected[:1].expand(n, 21))


@pytest.mark.parametrize("block", [32, 64, 128, 256])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_blocks_of_absmax_of_any_length(n: int, nested: bool, block: int) -> None:
    packed, x = packed_of(19, 768, nested=nested, block=block), rows(n, 768, torch.float16)
    truth = gemv.reference(x.double(), packed)
    assert_close("y", gemv.nf4_gemv(x, packed), gemv.reference(x, packed), truth)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("n", [1, 4, 9])
def test_lora_and_residual_are_added_where_y_is_written(n: int, dtype: torch.dtype) -> None:
    packed, x = packed_of(37, 128), rows(n, 128, dtype)
    buffer = torch.full((n, 40), 7.0, device=DEVICE, dtype=dtype)
    out = buffer[:, :37]
    out.copy_(rows(n, 37, dtype, 2))
    before, xa, b = out.double(), rows(n, 35, torch.float32, 3), rows(37, 35, dtype, 4)
    assert gemv.nf4_gemv(x, packed, lora=(xa, b, 0.3), residual=out, out=out) is out
    truth = gemv.reference(x.double(), packed, lora=(xa.double(), b.double(), 0.3), residual=before)
    assert_close("y", out, truth.to(dtype), truth)
    assert bool((buffer[:, 37:] == 7).all())
    assert gemv.nf4_gemv(x[:0], packed).shape == (0, 37)


@kernels_only
@pytest.mark.parametrize("fma", [False, True], ids=["as here", "fma"])
def test_what_is_not_finite_stays_in_its_row(fma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    by_fma(monkeypatch, fma)
    packed, x = packed_of(20, 192), rows(5, 192, torch.float16)
    expected = gemv.nf4_gemv(x, packed)
    x[2, 100], x[4, 3] = float("nan"), float("inf")
    y = gemv.nf4_gemv(x, packed)
    assert torch.equal(y[[0, 1, 3]], expected[[0, 1, 3]]) and y[2].isnan().all() and not y[4].isfinite().any()


def test_what_does_not_fit_is_refused() -> None:
    packed, x = packed_of(6, 128), rows(2, 128, torch.float32)
    with pytest.raises(ValueError, match=r"x \(2, 64\) do not fit a weight \(6, 128\)"):
        gemv.nf4_gemv(x[:, :64], packed)
    with pytest.raises(ValueError, match=r"xa \(2, 4\), b \(6, 5\) do not fit"):
        gemv.nf4_gemv(x, packed, lora=(x[:, :4], rows(6, 5, torch.float32), 1.0))
    with pytest.raises(ValueError, match=r"xa is \(1, 4\); for x \(2, 128\) it must be \(2, 4\)"):
        gemv.nf4_gemv(x, packed, lora=(x[:1, :4], rows(6, 4, torch.float32), 1.0))
    with pytest.raises(ValueError, match=r"out is \(3, 6\)"):
        gemv.nf4_gemv(x, packed, out=torch.empty(3, 6, device=DEVICE))
    with pytest.raises(ValueError, match=r"residual is \(2, 5\)"):
        gemv.nf4_gemv(x, packed, residual=torch.empty(2, 5, device=DEVICE))
    with pytest.raises(ValueError, match=r"out is torch.float16; it must be torch.float32"):
        gemv.nf4_gemv(x, packed, out=torch.empty(2, 6, device=DEVICE, dtype=torch.float16))


@gpu_only
def test_recorded_calls_read_what_is_there_when_they_run() -> None:
    packed, x = packed_of(100, 1024), rows(3, 1024, torch.float16)
    first = gemv.nf4_gemv(x, packed)
    torch.cuda.synchronize()
    graph, out = torch.cuda.CUDAGraph(), torch.zeros_like(first)
    with torch.cuda.graph(graph):
        gemv.nf4_gemv(x, packed, out=out)
    other = rows(3, 1024, torch.float16, 9)
    expected = gemv.nf4_gemv(other, packed)
    x.copy_(other)
    graph.replay()
    assert torch.equal(out, expected) and not torch.equal(out, first)


@gpu_only
def test_a_weight_that_was_not_seen_before_a_recording_is_named() -> None:
    packed, x = packed_of(100, 1024), rows(3, 1024, torch.float16)
    gemv.nf4_gemv(x, packed_of(100, 1024, 5))
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="call it once before recording"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)
        gemv.nf4_gemv(x, packed)


# -- the table -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.85e-3), (torch.float16, 1.1e-4)], ids=str)
def test_the_table_errs_less_than_rounded_weights(dtype: torch.dtype, most: float) -> None:
    lut = torch.tensor(NF4)
    table = pairs.table_of(lut, dtype)
    values = table.words[8:].to(torch.int16).view(dtype).double() * table.gain
    assert float((values - lut.double()).norm() / lut.double().norm()) < most


def test_a_table_is_made_once_and_goes_with_its_lut() -> None:
    one, other = torch.tensor(NF4), torch.tensor(NF4)
    before = len(pairs._TABLES)
    found = pairs.table_of(one, torch.float16)
    assert pairs.table_of(one, torch.float16) is found and pairs.table_of(other, torch.float16).words is found.words
    assert pairs.table_of(one, torch.bfloat16).words is not found.words and len(pairs._TABLES) == before + 2
    del one, other
    gc.collect()
    assert len(pairs._TABLES) == before


def simulated(assembler: str, inputs: list[int]) -> list[int]:
    """Outputs 0 to 3 of the assembler for inputs from 4 on, instruction by instruction as PTX's manual defines them."""
    held: dict[str, int] = {f"${4 + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> int:
        return held[name] if name in held else int(name, 0)

    for line in re.findall(r"^\s*([a-z]+3?)\.[bu]32 (.*);", assembler, re.MULTILINE):
        target, *rest = (part.strip() for part in line[1].split(","))
        a, b, *more = (value(name) for name in rest)
        if line[0] == "and":
            held[target] = a & b
        elif line[0] == "shr":
            held[target] = a >> b
        elif line[0] == "lop3":
            assert more[1] == 0xEA  # (a and b) or c
            held[target] = (a & b) | more[0]
        elif line[0] == "prmt":
            chosen = [more[0] >> (4 * i) & 15 for i in range(4)]
            assert max(chosen) < 8  # the eighth would repeat a sign
            both = (b << 32) | a
            held[target] = sum((both >> (8 * c) & 255) << (8 * i) for i, c in enumerate(chosen))
        else:
            raise AssertionError(f"{line[0]} is not known here")
    return [held[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_assembler_finds_each_code_s_value(dtype: torch.dtype) -> None:
    words = [int(v) & 0xFFFFFFFF for v in pairs.table_of(torch.tensor(NF4), dtype).words]
    make = random.Random(3)
    known = [int(f"{code:x}" * 8, 16) for code in range(16)]
    for word in known + [make.getrandbits(32) for _ in range(300)]:
        found = simulated(pairs.ASSEMBLER, [word, *words[:8]])
        codes = [(word >> (8 * i) & 15, word >> (8 * i + 4) & 15) for i in range(4)]
        assert found == [words[8 + high] | words[8 + low] << 16 for low, high in codes]
