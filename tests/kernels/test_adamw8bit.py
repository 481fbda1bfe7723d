"""The 8-bit optimizer: its codes and states step by step, many tensors as if each were alone, skipped and clipped steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nbkit.kernels import _launch
from nbkit.kernels import adamw8bit as a8
from tests.closeness import assert_close

ON_GPU = torch.cuda.is_available() and not _launch.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=DEVICE)


def close(name: str, ours: torch.Tensor, truth: torch.Tensor) -> None:
    assert_close(name, ours, truth.to(ours.dtype), truth)


def many(sizes: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=make).to(DEVICE) for n in sizes]


def equal(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("t", [1, 2, 300, 400, 10_000])
def test_adamw8bit_bias_corrections_keep_their_digits(t: int) -> None:
    """With m = v = g = 1, which 8 bits hold exactly, and no decay the update is known in double precision."""
    param, grad = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    ones = torch.full((256,), 255, dtype=torch.uint8, device=DEVICE)  # the code of 1
    state = a8.State8(scalar(t - 1).view(1), ones, scalar(1).view(1), ones.clone(), scalar(1).view(1))
    a8.adamw8bit_([param], [grad], state, a8.Rates(1.0, eps=0.0, weight_decay=0.0))
    exact = -math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    assert abs(float(param[0]) / exact - 1) < 1e-6


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
    (param,), (grad,) = many((n,), 0), many((n,), 1)
    state = a8.State8.zeros([n], DEVICE)
    for t in range(1, 11):
        grad.copy_(torch.randn(n, generator=torch.Generator().manual_seed(t)))
        grad[256:512] *= 1e-4
        m = 0.9 * a8.dequantize(state.m, state.m_max, True)[:n].double() + 0.1 * grad.double()
        v = 0.999 * a8.dequantize(state.v, state.v_max, False)[:n].double() + 0.001 * grad.double() ** 2
        expected = param.double() * (1 - 0.01 * 0.01)
        expected -= 0.01 / (1 - 0.9**t) * m / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        a8.adamw8bit_([param], [grad], state, a8.Rates(0.01))
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


def test_adamw8bit_takes_each_tensor_as_if_it_were_alone() -> None:
    """Sizes around a block and a program's share, one empty, some without a gradient; one table, new addresses."""
    sizes = (1, 255, 0, 256, 257, 1024, 1025, 2500)
    params, alone = many(sizes, 0), many(sizes, 0)
    state, table = a8.State8.zeros(sizes, DEVICE), a8.table_of(sizes, DEVICE)
    states = [a8.State8.zeros([n], DEVICE) for n in sizes]
    for t in range(1, 5):
        grads = [None if (k + t) % 4 == 0 else g for k, g in enumerate(many(sizes, t))]
        a8.adamw8bit_(params, grads, state, a8.Rates(0.1), table)
        for p, g, own in zip(alone, grads, states, strict=True):
            if g is not None and g.numel():
                a8.adamw8bit_([p], [g], own, a8.Rates(0.1))
    assert equal(params, alone)
    taken = torch.cat([own.steps for own in states])
    assert torch.equal(state.steps[:2], taken[:2]) and torch.equal(state.steps[3:], taken[3:])
    for field in ("m", "m_max", "v", "v_max"):
        assert torch.equal(getattr(state, field), torch.cat([getattr(own, field) for own in states])), field


def test_adamw8bit_keeps_zeros_past_the_end_of_a_tensor() -> None:
    """So that kernel and plain path go on from each other's state: a resume on another machine."""
    sizes = (300, 1, 2000)
    params, state = many(sizes, 0), a8.State8.zeros(sizes, DEVICE)
    for t in range(2):
        a8.adamw8bit_(params, many(sizes, t + 1), state, a8.Rates(0.1))
    first = 0
    for n in sizes:
        last = first + -(-n // 256) * 256
        assert state.m[first + n : last].unique().tolist() == [127] and state.v[first + n : last].unique().tolist() == [0]
        first = last


def test_adamw8bit_skips_and_clips() -> None:
    sizes = (700, 40)
    params = many(sizes, 0)
    state = a8.State8.zeros(sizes, DEVICE)
    a8.adamw8bit_(params, many(sizes, 1), state, a8.Rates(0.1))
    before, kept = [p.clone() for p in params], [x.clone() for x in state]
    a8.adamw8bit_(params, [g * math.nan for g in many(sizes, 2)], state, a8.Rates(0.1, skip=scalar(1)))
    assert equal(params, before) and equal(state, kept)
    others, twin = [p.clone() for p in params], a8.State8(*(x.clone() for x in state))
    a8.adamw8bit_(params, many(sizes, 2), state, a8.Rates(scalar(0.1), skip=scalar(0), factor=scalar(0.25)))
    a8.adamw8bit_(others, [g * 0.25 for g in many(sizes, 2)], twin, a8.Rates(0.1))
    assert equal(params, others) and equal(state, twin) and not equal(params, before)


def test_adamw8bit_refuses_what_does_not_fit() -> None:
    x = torch.zeros(512)
    with pytest.raises(ValueError, match="state is of 1 tensors in 1 blocks, the parameters are 1 in 2"):
        a8.adamw8bit_([x], [x], a8.State8.zeros([256], "cpu"), a8.Rates(0.1))
    with pytest.raises(ValueError, match="state is of 2 tensors"):
        a8.adamw8bit_([x], [x], a8.State8.zeros([256, 256], "cpu"), a8.Rates(0.1))
    for params, grads in (([x], [x.half()]), ([x.view(2, 256).t()], [x.view(2, 256).t()]), ([x, x.half()], [None, None])):
        with pytest.raises(ValueError, match="must be contiguous and of one dtype and device"):
            a8.adamw8bit_(params, grads, a8.State8.zeros([512] * len(params), "cpu"), a8.Rates(0.1))
