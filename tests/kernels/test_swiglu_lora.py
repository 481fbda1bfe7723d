"""SwiGLU with LoRA's thin products: where it writes, real ranks in padded columns, sums over tiles, how work is cut.

On this device as it is, and under the interpreter through `test_interpreted.py`. Test names begin with the op's.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nbkit.kernels import _launch, swiglu
from nbkit.kernels import swiglu_lora as sl
from tests.closeness import assert_close

ON_GPU = torch.cuda.is_available() and not _launch.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = [torch.float16, torch.float32] + ([] if _launch.INTERPRETED else [torch.bfloat16])
MARK = 7.0  # what spare columns hold, and must still hold afterwards


def rows(n: int, width: int, dtype: torch.dtype, seed: int, spare: int = 5, fill: float = MARK) -> tuple[Tensor, Tensor]:
    """(buffer (n, width + spare), its first `width` columns filled with random values)."""
    buffer = torch.full((n, width + spare), fill, dtype=dtype, device=DEVICE)
    buffer[:, :width] = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return buffer, buffer[:, :width]


def truth_of(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dgate, dup) in float64, rounded to the inputs' dtype as they enter the products."""
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    h = swiglu.reference(g, u)
    h.backward(dh.double())
    assert g.grad is not None and u.grad is not None
    return tuple(x.detach().to(gate.dtype).double() for x in (h, g.grad, u.grad))  # type: ignore[return-value]


def close(name: str, ours: Tensor, truth: Tensor, like: torch.dtype) -> None:
    """By the rule for `like`: sums in float32 of 16-bit factors, any of which may have been rounded to its neighbour."""
    assert_close(name, ours.to(like), truth.to(like), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "f", "gate_rank", "real"), [(150, 70, 16, (16, 16, 16)), (35, 40, 3, (5, 3, 7)), (20, 64, 48, (33, 40, 1))]
)
def test_swiglu_lora_backward_in_place_within_buffers(
    dtype: torch.dtype, n: int, f: int, gate_rank: int, real: tuple[int, int, int]
) -> None:
    """gate and up side by side are written over, u is a border, outputs are float32 of the real ranks, spare columns infinite."""
    rd, rg, ru = real
    held, both = rows(n + 1, 2 * f, dtype, 1)
    below, both = held[n].clone(), both[:n]
    _, dh = rows(n, f, dtype, 2)
    _, u = rows(n, 64, dtype, 3, fill=float("inf"))
    _, xa = rows(n, gate_rank + 16, dtype, 4, spare=3, fill=float("nan"))
    u = (u / n**0.5).contiguous() if dtype == torch.float32 else u.div_(n**0.5)
    gate, up = both[:, :f], both[:, f:]
    h, dgate, dup = truth_of(dh, gate, up)
    da, db_up = (torch.full(s, MARK, device=DEVICE) for s in ((rd + 2, f), (f, ru)))
    db_gate = torch.full((f, rg + 3), MARK, device=DEVICE)
    found = sl.swiglu_lora_backward(
        dh, gate, up, u, xa, gate, up, gate_rank=gate_rank, scales=(2.0, 0.5), da=da[:rd], db_gate=db_gate[:, :rg], db_up=db_up
    )
    assert found[0] is gate and found[1] is up and bool((held[:, 2 * f :] == MARK).all()) and torch.equal(held[n], below)
    assert bool((da[rd:] == MARK).all()) and bool((db_gate[:, rg:] == MARK).all())
    close("dgate", gate, dgate, dtype)
    close("dup", up, dup, dtype)
    wide, right = xa.double(), xa.double()[:, gate_rank:]
    close("da", da[:rd], u[:, :rd].double().t() @ h, dtype)
    close("db_gate", db_gate[:, :rg] / n**0.5, 2.0 * dgate.t() @ wide[:, :rg] / n**0.5, dtype)
    close("db_up", db_up / n**0.5, 0.5 * dup.t() @ right[:, :ru] / n**0.5, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", ["da", "db_gate", "db_up", "none"])
def test_swiglu_lora_backward_gives_only_what_is_wanted(dtype: torch.dtype, wanted: str) -> None:
    n, f, r = 70, 33, 16
    _, gate = rows(n, f, dtype, 1)
    _, up = rows(n, f, dtype, 2)
    _, dh = rows(n, f, dtype, 3)
    _, u = rows(n, r if wanted == "da" else 0, dtype, 4)
    _, xa = rows(n, r if wanted.startswith("db") else 0, dtype, 5)
    h, dgate, dup = truth_of(dh, gate, up)
    out = torch.zeros((r, f) if wanted == "da" else (f, r), device=DEVICE)
    d = torch.empty(n, 2 * f, dtype=dtype, device=DEVICE)
    given: dict[str, Any] = {} if wanted == "none" else {wanted: out}
    sl.swiglu_lora_backward(dh, gate, up, u, xa, d[:, :f], d[:, f:], gate_rank=r if wanted == "db_gate" else 0, **given)
    close("dgate", d[:, :f], dgate, dtype)
    close("dup", d[:, f:], dup, dtype)
    truth = {"da": u.double().t() @ h, "db_gate": dgate.t() @ xa.double(), "db_up": dup.t() @ xa.double(), "none": out.double()}
    close(wanted, out / n**0.5, truth[wanted] / n**0.5, dtype)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_lora_backward_adds_up_tiles_of_rows(dtype: torch.dtype, kind: torch.dtype) -> None:
    """Two tiles into one output, as of all rows at once; outputs in float32 or wider."""
    n, f, r = 64, 40, 8
    _, both = rows(n, 3 * f, dtype, 1)
    _, thin = rows(n, 3 * r, dtype, 2)
    outs = {"da": torch.full((r, f), MARK, device=DEVICE, dtype=kind)}
    outs |= {k: torch.full((f, r), MARK, device=DEVICE, dtype=kind) for k in ("db_gate", "db_up")}
    thin /= n**0.5
    h, dgate, dup = truth_of(both[:, :f], both[:, f : 2 * f], both[:, 2 * f :])
    for t in (slice(0, 40), slice(40, n)):
        x, y = both[t], thin[t]
        dh, gate, up = x[:, :f], x[:, f : 2 * f], x[:, 2 * f :]
        sl.swiglu_lora_backward(
            dh, gate, up, y[:, :r], y[:, r:], gate, up, gate_rank=r, scales=(1.5, 3.0), add=t.start > 0, **outs
        )
    least = max((dtype, kind), key=lambda d: torch.finfo(d).eps)
    wide = thin.double()
    close("da", outs["da"], wide[:, :r].t() @ h, least)
    close("db_gate", outs["db_gate"], 1.5 * dgate.t() @ wide[:, r : 2 * r], least)
    close("db_up", outs["db_up"], 3.0 * dup.t() @ wide[:, 2 * r :], least)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "f", "r"), [(35, 700, 16), (3, 130, 5), (40, 64, 64), (9, 50, 0)])
def test_swiglu_lora_forward_fills_a_border_and_what_is_kept(dtype: torch.dtype, n: int, f: int, r: int) -> None:
    both, _ = rows(n, 2 * f, dtype, 1)
    _, a = rows(r, f, dtype, 2, fill=float("nan"))
    a /= f**0.5
    buffer = torch.full((n + 1, f + r + 4), MARK, dtype=dtype, device=DEVICE)
    kept = torch.full((n, r), MARK, dtype=dtype, device=DEVICE)
    gate, up, out, xa = both[:, :f], both[:, f : 2 * f], buffer[:n, :f], buffer[:n, f : f + r]
    found = sl.swiglu_lora_forward(gate, up, a, out, xa, kept)
    assert found[0] is out and found[1] is xa and torch.equal(kept, xa)
    assert bool((buffer[:, f + r :] == MARK).all() and (buffer[n] == MARK).all())
    h = swiglu.reference(gate.double(), up.double()).to(dtype).double()
    close("h", out, h, dtype)
    close("xa", xa, h @ a.double().t(), dtype)
    alone = torch.full_like(buffer, MARK)
    sl.swiglu_lora_forward(gate, up, a, alone[:n, :f], alone[:n, f : f + r])
    assert torch.equal(alone, buffer), "the same bits again, without `kept`"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_lora_equals_swiglu_and_itself(dtype: torch.dtype) -> None:
    """Against swiglu.py, from the same inputs: the same numbers up to a last bit here and there; run again: the same bits."""
    n, f, r = 200, 130, 16
    _, x = rows(n, 3 * f, dtype, 1)
    _, thin = rows(n, 3 * r, dtype, 2)
    dh, gate, up = x[:, :f], x[:, f : 2 * f], x[:, 2 * f :]
    runs = []
    for _ in range(2):
        outs = [torch.empty(s, device=DEVICE) for s in ((r, f), (f, r), (f, r))]
        d = [torch.empty(n, f, dtype=dtype, device=DEVICE) for _ in range(2)]
        da, db_gate, db_up = outs
        sl.swiglu_lora_backward(
            dh.clone(), gate, up, thin[:, :r], thin[:, r:], *d, gate_rank=r, da=da, db_gate=db_gate, db_up=db_up
        )
        runs.append([*d, *outs])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
    for one, two in zip(runs[0], swiglu.swiglu_backward(dh, gate, up), strict=False):
        assert float((one != two).float().mean()) <= 5e-3 and torch.allclose(one, two, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_swiglu_lora_in_any_number_of_parts(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five blocks of rows and of columns in fewer parts, and in more than there are: some of these have nothing to do."""
    n, f, r = 70, 150, 16
    monkeypatch.setattr(sl, "backward_plan", lambda *sizes: sl.Plan(16, 64, parts))
    monkeypatch.setattr(sl, "forward_plan", lambda *sizes: sl.Plan(32, 32, parts))
    _, x = rows(n, 3 * f, torch.float16, 1)
    _, thin = rows(n, 3 * r, torch.float16, 2)
    _, a = rows(r, f, torch.float16, 3)
    thin /= n**0.5
    a /= f**0.5
    dh, gate, up = x[:, :f], x[:, f : 2 * f], x[:, 2 * f :]
    h, dgate, dup = truth_of(dh, gate, up)
    buffer = torch.empty(n, f + r, dtype=torch.float16, device=DEVICE)
    sl.swiglu_lora_forward(gate, up, a, buffer[:, :f], buffer[:, f:])
    close("xa", buffer[:, f:], h @ a.double().t(), torch.float16)
    outs = {"da": torch.empty(r, f, device=DEVICE)} | {k: torch.empty(f, r, device=DEVICE) for k in ("db_gate", "db_up")}
    sl.swiglu_lora_backward(dh, gate, up, thin[:, :r], thin[:, r:], gate, up, gate_rank=r, **outs)
    wide = thin.double()
    for name, truth in (
        ("da", wide[:, :r].t() @ h),
        ("db_gate", dgate.t() @ wide[:, r : 2 * r]),
        ("db_up", dup.t() @ wide[:, 2 * r :]),
    ):
        close(name, outs[name], truth, torch.float16)


def test_swiglu_lora_gradients_are_those_of_autograd() -> None:
    """An MLP with LoRA on all three linears, in float64: dA of down, dB of gate and up, and what flows on."""
    torch.manual_seed(0)
    n, d, f, r = 6, 5, 9, 3
    like: dict[str, Any] = {"dtype": torch.float64, "device": DEVICE}
    g0, u0, xg, xu = (torch.randn(*s, **like) for s in ((n, f), (n, f), (n, r), (n, r)))
    bg, bu, a, b, w = (torch.randn(*s, **like, requires_grad=True) for s in ((f, r), (f, r), (r, f), (d, r), (d, f)))
    dy, sg, su, sd = torch.randn(n, d, **like), 0.7, 1.3, 2.0
    gate, up = g0 + sg * xg @ bg.t(), u0 + su * xu @ bu.t()
    gate.retain_grad()
    h = swiglu.reference(gate, up)
    (h @ w.t() + sd * (h @ a.t()) @ b.t()).backward(dy)
    with torch.no_grad():
        u = dy @ b * sd
        da, db_gate, db_up = (torch.empty(s, **like) for s in ((r, f), (f, r), (f, r)))
        outs = {"da": da, "db_gate": db_gate, "db_up": db_up}
        dh, xa = dy @ w + u @ a, torch.cat([xg, xu], dim=1)
        dgate, _ = sl.swiglu_lora_backward(dh, gate, up, u, xa, g0, u0, gate_rank=r, scales=(sg, su), **outs)
    for ours, leaf in ((da, a), (db_gate, bg), (db_up, bu), (dgate, gate)):
        torch.testing.assert_close(ours, leaf.grad)


def test_swiglu_lora_without_rows() -> None:
    for dtype in DTYPES:
        x = torch.empty(0, 40, dtype=dtype, device=DEVICE)
        da = torch.full((4, 40), MARK, device=DEVICE)
        sl.swiglu_lora_backward(x, x, x, x[:, :4], x[:, :0], x, x, gate_rank=0, da=da)
        assert not da.any()
        sl.swiglu_lora_forward(x, x, torch.ones(4, 40, dtype=dtype, device=DEVICE), x, x[:, :4])


def test_swiglu_lora_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.empty(2, 2, dtype=torch.float16, device=DEVICE)
    here = _launch.runs_on(half.device) and (not half.is_cuda or _launch.capability_of(half) >= (8, 0))
    assert sl.fits(half, 16) is sl.fits(half.bfloat16(), 64, 1, 0) is here
    assert not any(
        sl.fits(x, *ranks)
        for x, ranks in ((half, (65,)), (half, (0, 0)), (half, ()), (half.float(), (16,)), (half.double(), (16,)))
    )
    monkeypatch.setattr(sl, "use_triton", lambda *tensors: True)
    monkeypatch.setattr(sl, "capability_of", lambda x: x.capability)
    for capability, taken in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        assert sl.fits(SimpleNamespace(dtype=torch.float16, is_cuda=True, capability=capability), 16) is taken


def test_swiglu_lora_refuses_what_does_not_fit() -> None:
    x, thin = torch.zeros(4, 6, device=DEVICE), torch.zeros(4, 2, device=DEVICE)
    out = torch.zeros(2, 6, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"da of rank 3, db_gate of 0 and db_up of 0 need as many columns of u, of which there are 2"
    ):
        sl.swiglu_lora_backward(x, x, x, thin, thin, x, x, gate_rank=2, da=torch.zeros(3, 6, device=DEVICE))
    with pytest.raises(ValueError, match="which has 1 for gate and 1 for up"):
        sl.swiglu_lora_backward(x, x, x, thin, thin, x, x, gate_rank=1, db_up=out.t().contiguous())
    with pytest.raises(ValueError, match=r"db_gate is \(2, 6\) torch.float32; it must be \(6, any\)"):
        sl.swiglu_lora_backward(x, x, x, thin, thin, x, x, gate_rank=2, db_gate=out)
    with pytest.raises(ValueError, match=r"u is \(3, 2\) torch.float32; it must be \(4, any\) torch.float32"):
        sl.swiglu_lora_backward(x, x, x, thin[:3], thin, x, x, gate_rank=2)
    with pytest.raises(ValueError, match=r"up is \(4, 6\) torch.float16; it must be \(4, 6\) torch.float32"):
        sl.swiglu_lora_backward(x, x, x.half(), thin, thin, x, x, gate_rank=2)
    with pytest.raises(ValueError, match="xa must be .N, D. with stride 1 along D"):
        sl.swiglu_lora_forward(x, x, out, x, thin.t().contiguous().t())
    with pytest.raises(ValueError, match=r"kept is \(4, 1\)"):
        sl.swiglu_lora_forward(x, x, out, x, thin, thin[:, :1])


def test_swiglu_lora_is_cut_to_fill_the_gpu() -> None:
    """Parts never outnumber what there is to walk over; at Llama's sizes there are programs for every multiprocessor."""
    for n in (1, 31, 512, 1024, 4096, 8192, 262144):
        for f in (1, 100, 8192, 14336, 28672):
            for processors in (4, 40, 108, 132, 148):
                for rank in (1, 16, 32, 64):
                    back, fore = sl.backward_plan(n, f, rank, processors), sl.forward_plan(n, f, rank, processors)
                    assert 1 <= back.parts <= -(-n // back.block_n) and 1 <= fore.parts <= -(-f // fore.block_f)
                    assert back.parts <= 65535 and fore.parts <= 65535
    by_rows, by_columns = (next(c.sizes for c in sl.OP.cases if c.reason == f"many {k} in parts") for k in ("rows", "columns"))
    assert sl.backward_plan(by_rows["N"], by_rows["F"], 16, 4).parts > 1
    assert sl.forward_plan(by_columns["N"], by_columns["F"], 8, 4).parts > 1
    for n, f in ((4096, 14336), (8192, 14336), (1024, 8192)):
        for plan, tiles in ((sl.backward_plan(n, f, 16, 132), f), (sl.forward_plan(n, f, 16, 132), n)):
            programs = plan.parts * -(-tiles // (plan.block_f if tiles == f else plan.block_n))
            assert 1.6 * 132 <= programs <= 6 * 132


@pytest.mark.skipif(_launch.INTERPRETED or _launch.triton is None, reason="needs a process that compiles")
@pytest.mark.parametrize("rank", [16, 64])
def test_swiglu_lora_computes_each_element_once_and_fetches_ahead(
    rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """As compiled for Ampere, pointers aligned: exp once an element, loads that run ahead, shared memory that fits everywhere."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    back, fore = sl.backward_plan(4096, 14336, rank, 132), sl.forward_plan(4096, 14336, rank, 132)
    block = {"BLOCK_R": rank, "FAST": True}
    for kernel, plan, ranks in (
        (sl._swiglu_lora_backward_kernel, back, {"RD": rank, "RG": rank, "RU": rank}),
        (sl._swiglu_lora_forward_kernel, fore, {"R": rank}),
    ):
        fn = getattr(kernel, "jit", kernel)
        constants = {**ranks, **block, "BLOCK_N": plan.block_n, "BLOCK_F": plan.block_f}
        types = {
            n: "fp32" if n == "one" else "i32" if n == n.lower() or n in "NF" else "*fp32" if n == "PART" else "*bf16"
            for n in fn.arg_names
        }
        signature = {n: "constexpr" if n in constants else types[n] for n in fn.arg_names}
        aligned = {
            (k,): [["tt.divisibility", 16]] for k, n in enumerate(fn.arg_names) if signature[n] not in ("constexpr", "fp32")
        }
        source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=aligned)
        options = {"num_warps": plan.warps, "num_stages": plan.stages}
        made = triton.compile(source, target=GPUTarget("cuda", 86, 32), options=options)
        elements = plan.block_n * plan.block_f // (32 * plan.warps)
        assert len(re.findall(r"\bex2\.approx", made.asm["ptx"])) == elements
        assert "cp.async.cg.shared.global" in made.asm["ptx"] and "mma.sync" in made.asm["ptx"]
        assert made.metadata.shared <= 99 * 1024
