"""The flat optimizer: against torch's own AdamW over many steps, clipping, skipped steps, rates on the device, copies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nbkit.kernels import _launch
from nbkit.kernels import adamw as ad
from nbkit.kernels import adamw8bit as a8
from tests.closeness import assert_close

ON_GPU = torch.cuda.is_available() and not _launch.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []


def scalar(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def close(name: str, ours: torch.Tensor, truth: torch.Tensor) -> None:
    assert_close(name, ours, truth.to(ours.dtype), truth)


def buffers(n: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """param, grad, exp_avg, exp_avg_sq; the states in float32 or wider, zero."""
    make = torch.Generator().manual_seed(seed)
    state = torch.promote_types(dtype, torch.float32)
    both = [torch.randn(n, generator=make).to(DEVICE, dtype) for _ in range(2)]
    return [*both, *(torch.zeros(n, dtype=state, device=DEVICE) for _ in range(2))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-4}], ids=["defaults", "others"])
def test_adamw_steps_equal_torchs(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Twenty steps with clipping and a falling learning rate; float64 to 1e-12, float32 as near to float64 as torch is."""
    n, max_norm = 1337, 3.0

    def torchs(kind: torch.dtype) -> torch.Tensor:
        param = torch.nn.Parameter(buffers(n, dtype)[0].to(kind).clone())
        optimizer = torch.optim.AdamW([param], lr=1.0, **options, foreach=False)
        for i in range(20):
            optimizer.param_groups[0]["lr"] = 0.05 / (i + 1)
            param.grad = buffers(n, dtype, i)[1].to(kind) * (10.0 if i % 3 else 0.01)
            torch.nn.utils.clip_grad_norm_([param], max_norm)
            optimizer.step()
        return param.detach()

    param, _, m, v = buffers(n, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    step, norm, factor, rate = scalar(0), scalar(0, wide), scalar(0, wide), scalar(0, wide)
    for i in range(20):
        rate.fill_(0.05 / (i + 1))
        grad = buffers(n, dtype, i)[1] * (10.0 if i % 3 else 0.01)
        ad.clip_factor_([grad], max_norm, norm, factor, step=step)
        assert math.isclose(float(norm), float(grad.double().norm()), rel_tol=1e-6)
        ad.adamw_(param, grad, m, v, step, ad.Rates(rate if i % 2 else float(rate), factor=factor, **options))
    assert int(step) == 20
    truth = torchs(torch.float64)
    if dtype == torch.float64:
        torch.testing.assert_close(param, truth, rtol=1e-12, atol=1e-12)
    else:
        assert_close("param", param, torchs(dtype), truth)


@pytest.mark.parametrize("t", [1, 2, 300, 400, 10_000])
def test_adamw_bias_corrections_keep_their_digits(t: int) -> None:
    """With m = v = g = 1 and no decay the update is lr * sqrt(1 - b2^t) / (1 - b1^t), known in double precision."""
    param, grad, m, v = torch.zeros(4), torch.ones(4), torch.ones(4), torch.ones(4)
    param, grad, m, v = (x.to(DEVICE) for x in (param, grad, m, v))
    ad.adamw_(param, grad, m, v, scalar(t, torch.int64), ad.Rates(1.0, eps=0.0, weight_decay=0.0))
    exact = -math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    assert abs(float(param[0]) / exact - 1) < 1e-6


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_adamw_skips_where_a_gradient_is_not_finite(bad: float) -> None:
    param, grad, m, v = buffers(3000, torch.float32)
    m.fill_(0.5)
    v.fill_(0.25)
    before = [x.clone() for x in (param, m, v)]
    grad[2900] = bad
    step, norm, factor, skip = scalar(4, torch.int32), scalar(0), scalar(0), scalar(0, torch.int32)
    copy = torch.zeros(3000, dtype=torch.float16, device=DEVICE)
    ad.clip_factor_([grad], 1.0, norm, factor, skip=skip, step=step)
    ad.adamw_(param, grad, m, v, step, ad.Rates(0.1, factor=factor, skip=skip), copy)
    assert int(skip) == 1 and int(step) == 4 and not math.isfinite(float(norm))
    assert all(torch.equal(a, b) for a, b in zip((param, m, v), before, strict=True))
    assert torch.equal(copy, param.half())
    grad[2900] = 0.0
    ad.clip_factor_([grad], 1.0, norm, factor, skip=skip, step=step)
    ad.adamw_(param, grad, m, v, step, ad.Rates(0.1, factor=factor, skip=skip), copy)
    assert int(skip) == 0 and int(step) == 5 and not torch.equal(param, before[0])
    assert torch.equal(copy, param.half())


def test_adamw_norm_spans_all_buffers_and_undoes_the_loss_scale() -> None:
    """Buffers of every size, one of 16 bits, values that would overflow in 16 bits when squared."""
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(DEVICE) * 300 for n in (1, 1023, 5000)]
    grads[2] = grads[2].half()
    norm, factor = scalar(0), scalar(0)
    ad.clip_factor_(grads, 2.0, norm, factor, inverse_scale=scalar(1 / 64))
    exact = torch.cat([g.double() for g in grads]).norm().item() / 64
    assert math.isclose(float(norm), exact, rel_tol=1e-6)
    assert math.isclose(float(factor), 2.0 / (exact + 1e-6) / 64, rel_tol=1e-6)
    ad.clip_factor_(grads, math.inf, norm, factor, inverse_scale=scalar(0.5))
    assert float(factor) == 0.5
    zeros = [torch.zeros(7, device=DEVICE)]
    ad.clip_factor_(zeros, 2.0, norm, factor)
    assert float(norm) == 0 and float(factor) == 1


def test_adamw_norm_is_the_same_in_every_run() -> None:
    grad = torch.randn(70_000, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    norm, factor = scalar(0), scalar(0)
    found = set()
    for _ in range(3):
        ad.clip_factor_([grad], 1.0, norm, factor)
        found.add(float(norm))
    assert len(found) == 1


def test_adamw_refuses_what_is_not_flat() -> None:
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"flat, contiguous and equally long, not param \(4, 2\)"):
        ad.adamw_(x, x, x, x, torch.tensor(1), ad.Rates(0.1))
    y = torch.zeros(8)
    with pytest.raises(ValueError, match=r"exp_avg \(7,\)"):
        ad.adamw_(y, y, y[:7], y, torch.tensor(1), ad.Rates(0.1))
    with pytest.raises(ValueError, match=r"grad \(4,\)"):
        ad.clip_factor_([y[::2]], 1.0, torch.tensor(0.0), torch.tensor(0.0))
    with pytest.raises(ValueError, match="no gradient"):
        ad.clip_factor_([], 1.0, torch.tensor(0.0), torch.tensor(0.0))


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_adamw_recorded_in_a_graph_follows_its_scalars() -> None:
    param, grad, m, v = buffers(50_000, torch.float32)
    step, norm, factor, rate = scalar(0), scalar(0), scalar(0), scalar(0.1)

    def once(p: torch.Tensor, first: torch.Tensor, second: torch.Tensor, count: torch.Tensor) -> None:
        ad.clip_factor_([grad], 1.0, norm, factor, step=count)
        ad.adamw_(p, grad, first, second, count, ad.Rates(rate, factor=factor))

    eager = [param.clone(), m.clone(), v.clone(), step.clone()]
    once(*(x.clone() for x in eager))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once(param, m, v, step)
    for i in range(5):
        grad.copy_(torch.randn_like(grad))
        rate.fill_(0.1 / (i + 1))
        graph.replay()
        once(*eager)
    assert int(step) == 5
    for ours, theirs in zip((param, m, v), eager, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# -- states in 8 bits ------------------------------------------------------------------------------


def test_adamw8bit_maps_are_bitsandbytes_own() -> None:
    """Spot values of the published map; the whole map where bitsandbytes is installed is in test_references.py."""
    for signed in (True, False):
        values = a8.dynamic_map(signed)
        assert values.shape == (256,) and values.dtype == torch.float32 and bool((values[1:] > values[:-1]).all())
        assert float(values[-1]) == 1.0 and int((values == 0).sum()) == 1
    assert int((a8.dynamic_map(True) < 0).sum()) == 127 and float(a8.dynamic_map(False)[0]) == 0.0
    assert math.isclose(float(a8.dynamic_map(True)[128]), 0.55e-6, rel_tol=1e-6)


def test_adamw8bit_codes_are_the_nearest_and_states_follow() -> None:
    """Ten steps: each state that is kept is the map's nearest to the state computed from what was kept before."""
    n = 1000
    param, grad, _, _ = buffers(n, torch.float32)
    state = a8.State8.zeros([n], DEVICE)
    for t in range(1, 11):
        grad.copy_(torch.randn(n, generator=torch.Generator().manual_seed(t)))
        grad[256:512] *= 1e-4
        m = 0.9 * a8.dequantize(state.m, state.m_max, True)[:n].double() + 0.1 * grad.double()
        v = 0.999 * a8.dequantize(state.v, state.v_max, False)[:n].double() + 0.001 * grad.double() ** 2
        expected = param.double() * (1 - 0.01 * 0.01)
        expected -= 0.01 / (1 - 0.9**t) * m / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        a8.adamw8bit_([param], [grad], state, ad.Rates(0.01))
        assert state.steps.tolist() == [t]
        close("param", param, expected)
        for codes, top, exact, signed in ((state.m, state.m_max, m, True), (state.v, state.v_max, v, False)):
            values = a8.dynamic_map(signed).double().to(DEVICE)
            for block in range(4):
                part = slice(256 * block, min(256 * block + 256, n))
                assert math.isclose(float(top[block]), float(exact[part].abs().max()), rel_tol=1e-5)
                scaled = exact[part] / exact[part].abs().max()
                best = (scaled[:, None] - values[None, :]).abs().amin(1)
                assert bool(((scaled - values[codes[part].long()]).abs() <= best + 1e-6).all())


@pytest.mark.parametrize("signed", [True, False])
def test_adamw8bit_plain_codes_are_those_of_a_search(signed: bool) -> None:
    """Every midpoint and its neighbours in float32, zeros, the smallest numbers, and random ones of all sizes."""
    bounds = a8._tables(torch.device("cpu"))[1 if signed else 3][:-1]
    make = torch.Generator().manual_seed(0)
    drawn = torch.rand(20_000, generator=make) ** torch.randint(1, 40, (20_000,), generator=make)
    edges = [bounds, torch.nextafter(bounds, torch.tensor(2.0)), torch.nextafter(bounds, torch.tensor(-2.0))]
    x = torch.cat([*edges, drawn, torch.tensor([0.0, -0.0, 1.0, 1e-45, 1e-38])])
    x = torch.cat([x, -x]) if signed else x.clamp(min=0)
    assert torch.equal(a8._nearest_codes(x, signed).long(), torch.bucketize(x, bounds))


def many(sizes: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=make).to(DEVICE) for n in sizes]


def equal(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_adamw8bit_takes_each_tensor_as_if_it_were_alone() -> None:
    """Sizes around a block and a program's share, one empty, some without a gradient; one table, new addresses."""
    sizes = (1, 255, 0, 256, 257, 1024, 1025, 2500)
    params, alone = many(sizes, 0), many(sizes, 0)
    state, table = a8.State8.zeros(sizes, DEVICE), a8.table_of(sizes, DEVICE)
    states = [a8.State8.zeros([n], DEVICE) for n in sizes]
    for t in range(1, 5):
        grads = [None if (k + t) % 4 == 0 else g for k, g in enumerate(many(sizes, t))]
        a8.adamw8bit_(params, grads, state, ad.Rates(0.1), table)
        for p, g, own in zip(alone, grads, states, strict=True):
            if g is not None and g.numel():
                a8.adamw8bit_([p], [g], own, ad.Rates(0.1))
    assert equal(params, alone)
    taken = torch.cat([own.steps for own in states])
    assert torch.equal(state.steps[:2], taken[:2]) and torch.equal(state.steps[3:], taken[3:])
    for field in ("m", "m_max", "v", "v_max"):
        assert torch.equal(getattr(state, field), torch.cat([getattr(own, field) for own in states])), field


def test_adamw8bit_skips_and_clips() -> None:
    sizes = (700, 40)
    params = many(sizes, 0)
    state = a8.State8.zeros(sizes, DEVICE)
    a8.adamw8bit_(params, many(sizes, 1), state, ad.Rates(0.1))
    before, kept = [p.clone() for p in params], [x.clone() for x in state]
    a8.adamw8bit_(params, [g * math.nan for g in many(sizes, 2)], state, ad.Rates(0.1, skip=scalar(1)))
    assert equal(params, before) and equal(state, kept)
    others, twin = [p.clone() for p in params], a8.State8(*(x.clone() for x in state))
    a8.adamw8bit_(params, many(sizes, 2), state, ad.Rates(scalar(0.1), skip=scalar(0), factor=scalar(0.25)))
    a8.adamw8bit_(others, [g * 0.25 for g in many(sizes, 2)], twin, ad.Rates(0.1))
    assert equal(params, others) and equal(state, twin) and not equal(params, before)


def test_adamw8bit_refuses_what_does_not_fit() -> None:
    x = torch.zeros(512)
    with pytest.raises(ValueError, match="state is of 1 tensors in 1 blocks, the parameters are 1 in 2"):
        a8.adamw8bit_([x], [x], a8.State8.zeros([256], "cpu"), ad.Rates(0.1))
    with pytest.raises(ValueError, match="state is of 2 tensors"):
        a8.adamw8bit_([x], [x], a8.State8.zeros([256, 256], "cpu"), ad.Rates(0.1))
    for params, grads in (([x], [x.half()]), ([x.view(2, 256).t()], [x.view(2, 256).t()]), ([x, x.half()], [None, None])):
        with pytest.raises(ValueError, match="must be contiguous and of one dtype and device"):
            a8.adamw8bit_(params, grads, a8.State8.zeros([512] * len(params), "cpu"), ad.Rates(0.1))
