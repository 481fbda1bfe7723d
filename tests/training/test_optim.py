"""8-bit AdamW in one launch: near AdamW and bitsandbytes', exact where a gradient is missing, and whole again from its state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nbkit.training.optim import BYTES, AdamW8bit

SHAPES = ((16, 40), (300,), (7, 3), (256, 2))


def params(seed: int = 0, shapes: Any = SHAPES, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    make = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=make).to(dtype)) for shape in shapes]


def give_gradients(found: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> None:
    make = torch.Generator().manual_seed(seed)
    for p in found:
        p.grad = (torch.randn(p.shape, generator=make) * scale).to(p)


def values(found: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in found]


def same(found: Any, others: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, others, strict=True))


def test_follows_adamw() -> None:
    mine, theirs = params(), params()
    first = values(mine)
    optimizers = AdamW8bit(mine, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for number in range(12):
        for found, optimizer in zip((mine, theirs), optimizers, strict=True):
            give_gradients(found, number)
            optimizer.step()
            optimizer.zero_grad()
    for a, b, start in zip(mine, theirs, first, strict=True):
        moved = float((b.detach() - start).norm())
        assert moved > 0 and float((a.detach() - b.detach()).norm()) < 0.05 * moved


def fitted(make: Callable[[list[torch.nn.Parameter]], Any], steps: int = 200) -> tuple[list[float], torch.Tensor]:
    """Losses, and the weights at the end, of a small network that learns a noisy function, the rate falling to zero."""
    draw = torch.Generator().manual_seed(3)
    first, second, third = (
        torch.nn.Parameter(torch.randn(shape, generator=draw) * 0.1) for shape in ((64, 32), (64, 64), (64, 64))
    )
    wanted = torch.randn(32, 64, generator=draw)
    optimizer = make([first, second, third])
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        x = torch.randn(48, 32, generator=draw)
        y = (x @ wanted).tanh() + 0.1 * torch.randn(48, 64, generator=draw)
        loss = ((torch.tanh(torch.tanh(x @ first.T) @ second.T) @ third.T - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, torch.cat([p.detach().flatten() for p in (first, second, third)])


def test_two_hundred_steps_end_where_adamw_and_bitsandbytes_do() -> None:
    bnb = pytest.importorskip("bitsandbytes.optim")
    exact, weights = fitted(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.05))
    theirs, their_weights = fitted(lambda p: bnb.AdamW8bit(p, lr=1e-2, weight_decay=0.05))
    ours, our_weights = fitted(lambda p: AdamW8bit(p, lr=1e-2, weight_decay=0.05))
    assert exact[-1] < 0.3 * exact[0]
    for start in range(0, 200, 20):  # 20 losses at a time: within 2 % of either
        means = [sum(losses[start : start + 20]) / 20 for losses in (ours, theirs, exact)]
        assert means[0] == pytest.approx(means[1], rel=0.02) and means[0] == pytest.approx(means[2], rel=0.02), (start, means)
    # No farther from 32-bit states than bitsandbytes is, and nearer to them than the weights themselves are large.
    ours_off, theirs_off = (float((w - weights).norm()) for w in (our_weights, their_weights))
    assert ours_off < 1.2 * theirs_off and ours_off < 0.1 * float(weights.norm())


def test_the_tensors_and_their_storage_stay() -> None:
    found = params()
    ids, places = [id(p) for p in found], [p.data_ptr() for p in found]
    optimizer = AdamW8bit(found)
    give_gradients(found, 0)
    optimizer.step()
    assert [p.data_ptr() for p in found] == places
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == ids


def test_a_state_takes_two_bytes_and_a_thirty_second_a_parameter() -> None:
    found = params(shapes=((16, 4096), (4096, 16), (1024, 16)))
    optimizer = AdamW8bit(found)
    give_gradients(found, 0)
    optimizer.step()
    held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    assert held == pytest.approx(BYTES * sum(p.numel() for p in found), rel=1e-3)


@pytest.mark.parametrize("missing", [(0,), (1, 2), (3,), (0, 3), (0, 1, 2, 3)])
def test_a_parameter_without_gradient_stays_as_it_is(missing: tuple[int, ...]) -> None:
    found, alone = params(), params()
    before = values(found)
    optimizer, rest = AdamW8bit(found, lr=0.1), [p for i, p in enumerate(alone) if i not in missing]
    other = AdamW8bit(rest, lr=0.1) if rest else None
    for number in range(3):
        give_gradients(found, number)
        give_gradients(alone, number)
        for i in missing:
            found[i].grad = None
        optimizer.step()
        if other is not None:
            other.step()
    for i, (p, q, value) in enumerate(zip(found, alone, before, strict=True)):
        assert torch.equal(p, value) if i in missing else torch.equal(p, q) and not torch.equal(p, value)


def test_each_tensor_counts_its_own_steps() -> None:
    """One that gets its first gradient in the third step is corrected as in a first step, as in torch's AdamW."""
    found, theirs = params(), params()
    optimizers = AdamW8bit(found, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for number in range(3):
        for some, optimizer in zip((found, theirs), optimizers, strict=True):
            give_gradients(some, number)
            if number < 2:
                some[1].grad = None
            optimizer.step()
    assert optimizers[0].state[found[0]]["steps"].tolist() == [3, 1, 3, 3]
    assert torch.allclose(found[1], theirs[1], atol=1e-6)


def test_its_state_makes_it_whole_again() -> None:
    found, others = params(), params()
    one, two = AdamW8bit(found, lr=0.05), AdamW8bit(others, lr=0.5)
    give_gradients(found, 0)
    one.step()
    saved = copy.deepcopy(one.state_dict())
    with torch.no_grad():
        for p, q in zip(found, others, strict=True):
            q.copy_(p)
    two.load_state_dict(saved)
    assert two.param_groups[0]["lr"] == 0.05 and two.param_groups[0]["betas"] == (0.9, 0.999)
    for number in range(1, 4):
        for optimizer, some in ((one, found), (two, others)):
            give_gradients(some, number)
            optimizer.step()
    assert same(found, others)


def test_a_state_before_the_first_step_is_empty_and_may_be_loaded() -> None:
    fresh, found = AdamW8bit(params(), lr=0.3), params()
    optimizer = AdamW8bit(found)
    give_gradients(found, 0)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(fresh.state_dict()))
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.3


def bitsandbytes_state(found: list[torch.nn.Parameter]) -> dict[str, Any]:
    optimizer = pytest.importorskip("bitsandbytes.optim").AdamW8bit(found)
    give_gradients(found, 0)
    optimizer.step()
    return optimizer.state_dict()


def torchs_state(found: list[torch.nn.Parameter]) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(found)
    give_gradients(found, 0)
    optimizer.step()
    return optimizer.state_dict()


def damaged_state(found: list[torch.nn.Parameter]) -> dict[str, Any]:
    optimizer = AdamW8bit(found)
    give_gradients(found, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["m"] = saved["state"][0]["m"][:-1]
    return saved


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (bitsandbytes_state, "of bitsandbytes' AdamW8bit, not nbkit's AdamW8bit; go on with that one"),
        (torchs_state, "of another optimizer, not nbkit's"),
        (lambda found: AdamW8bit(found[:2]).state_dict(), r"other parameters: groups of \[2\] tensors, not \[4\]"),
        (lambda found: AdamW8bit(found[::-1]).state_dict(), "belongs to other parameters"),
        (damaged_state, "damaged"),
    ],
)
def test_what_is_no_state_of_its_own_is_refused_and_changes_nothing(make: Any, sentence: str) -> None:
    found = params()
    optimizer = AdamW8bit(found, lr=0.25)
    give_gradients(found, 5)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(make(params()))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][0][k], v) for k, v in before["state"][0].items() if k != "sizes")


def test_schedulers_and_groups() -> None:
    found = params()
    optimizer = AdamW8bit([{"params": found[:2]}, {"params": []}, {"params": found[2:], "lr": 0.0}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    before = values(found)
    give_gradients(found, 0)
    optimizer.step()
    assert not torch.equal(found[0], before[0]) and torch.equal(found[2], before[2])
    schedule.step()
    after = values(found)
    optimizer.step()
    assert same(found, after)
    late = params(9)
    optimizer.add_param_group({"params": late, "weight_decay": 0.5, "lr": 0.1})
    before = values(late)
    give_gradients(late, 1)
    optimizer.step()
    assert not torch.equal(late[0], before[0])


def test_weight_decay_is_the_groups_own() -> None:
    found = params()
    optimizer = AdamW8bit([{"params": found[:2], "weight_decay": 0.5}, {"params": found[2:], "weight_decay": 0.0}], lr=0.1)
    before = values(found)
    for p in found:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.allclose(p, b * 0.95) for p, b in zip(found[:2], before[:2], strict=True)) and same(found[2:], before[2:])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_scaler_skips_an_overflow_without_asking_and_unscales(bad: float) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    found, plain = params(), params()
    optimizer, other = AdamW8bit(found, lr=0.1), AdamW8bit(plain, lr=0.1)
    for number in range(3):
        before = values(found)
        give_gradients(found, number, scale=64.0 if number < 2 else 32.0)
        give_gradients(plain, number)
        if number == 1:
            found[2].grad[0, 0] = bad
        scaler.scale(torch.zeros(()))  # makes the scale
        scaler.step(optimizer)
        scaler.update()
        if number == 1:
            assert same(found, before) and scaler.get_scale() == 32.0
        else:
            other.step()
            assert same(found, plain)
    assert optimizer.state[found[0]]["steps"].tolist() == [2.0] * 4 and "found_inf" not in vars(optimizer)


def test_a_rate_on_the_device_and_a_closure() -> None:
    found, others = params(), params()
    rate = torch.tensor(0.1)
    one, two = AdamW8bit(found, lr=rate), AdamW8bit(others, lr=0.1)
    for number in range(2):
        rate.fill_(0.1 / (number + 1))
        two.param_groups[0]["lr"] = 0.1 / (number + 1)
        give_gradients(others, number)
        two.step()

        def closure(number: int = number) -> float:
            give_gradients(found, number)
            assert torch.is_grad_enabled()
            return 7.0

        assert one.step(closure) == 7.0
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(found, others, strict=True))


def test_parameters_may_change_dtype_and_differ_in_it() -> None:
    found = [*params(), *params(1, dtype=torch.bfloat16)]
    optimizer = AdamW8bit(found, lr=0.1)
    for number in range(2):
        before = values(found)
        give_gradients(found, number)
        optimizer.step()
        assert not any(torch.equal(p, b) for p, b in zip(found, before, strict=True))
        for p in found[:4]:
            p.grad = None
            p.data = p.data.half()
    found[0].data = found[0].data.float()
    give_gradients(found, 2)
    with pytest.raises(ValueError, match="now of 2 dtypes or devices; make the optimizer anew"):
        optimizer.step()


def test_parameters_and_gradients_may_lie_in_wider_rows() -> None:
    wide = torch.zeros(16, 50)
    wide[:, :40] = params()[0].detach()
    rows = torch.nn.Parameter(wide[:, :40])
    rows.data = wide[:, :40]
    dense = params()[0]
    optimizers = AdamW8bit([rows], lr=0.1), AdamW8bit([dense], lr=0.1)
    for number in range(2):
        give_gradients([dense], number)
        rows.grad = torch.nn.functional.pad(dense.grad, (0, 3))[:, :40]
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(rows, dense) and torch.equal(wide[:, :40], dense) and not wide[:, 40:].any()


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}])
def test_refuses_what_cannot_be(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        AdamW8bit(params(), **wrong)
    table = torch.nn.Embedding(8, 4, sparse=True)
    optimizer = AdamW8bit(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="takes dense gradients"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"not torch\.complex64"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))]).step()


# -- on a GPU --------------------------------------------------------------------------------------


def near(found: Any, others: Any, loose: float, rate: float) -> bool:
    """Within `loose` but for one element in a thousand: a value half-way between two codes may get either, and then its next
    update differs by some hundredths of the rate."""
    off = torch.cat(
        [(p.detach().cpu().float() - q.detach().cpu().float()).abs().flatten() for p, q in zip(found, others, strict=True)]
    )
    return float((off > loose).float().mean()) < 1e-3 and float(off.max()) < max(rate, loose)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_it_equals_the_cpu(dtype: torch.dtype) -> None:
    shapes = ((16, 4096), (1024, 16), (300,), (7, 3), (1,))
    here, there = params(0, shapes, dtype), [torch.nn.Parameter(p.detach().cuda()) for p in params(0, shapes, dtype)]
    optimizers = AdamW8bit(here, lr=1e-2), AdamW8bit(there, lr=1e-2)
    for number in range(4):
        give_gradients(here, number)
        for p, q in zip(here, there, strict=True):
            q.grad = p.grad.cuda()
        if number == 2:
            here[1].grad = there[1].grad = None
        for optimizer in optimizers:
            optimizer.step()
    assert near(here, there, {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype], rate=1e-2)
    assert torch.equal(optimizers[0].state[here[0]]["steps"], optimizers[1].state[there[0]]["steps"].cpu())


@pytest.mark.gpu
def test_on_a_gpu_448_tensors_are_one_launch_that_nobody_waits_for() -> None:
    found = [torch.nn.Parameter(p.detach().cuda()) for p in params(0, ((16, 256), (512, 16)) * 224)]
    optimizer = AdamW8bit(found, lr=1e-2)
    for number in range(2):  # what is compiled is compiled here
        for p in found:
            p.grad = torch.full_like(p, number + 1.0)
        optimizer.found_inf = torch.zeros((), device="cuda")
        optimizer.step()
    torch.cuda.synchronize()
    for p in found:
        p.grad = torch.ones_like(p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rate in (1e-2, 5e-3):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.found_inf = torch.zeros((), device="cuda")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    on_gpu = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_gpu if not name.startswith(("Memcpy", "Memset", "Optimizer."))]
    assert sum("_adamw8bit_kernel" in name for name in kernels) == 1 and len(kernels) <= 6, kernels


@pytest.mark.gpu
def test_on_a_gpu_a_recorded_step_is_the_step() -> None:
    def made() -> tuple[list[torch.nn.Parameter], AdamW8bit, torch.Tensor]:
        found = [torch.nn.Parameter(p.detach().cuda()) for p in params()]
        rate = torch.tensor(0.1, device="cuda")
        for p in found:
            p.grad = torch.ones_like(p)
        optimizer = AdamW8bit(found, lr=rate)
        optimizer.step()
        return found, optimizer, rate

    (found, optimizer, rate), (others, other, other_rate) = made(), made()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for number in range(4):
        for r in (rate, other_rate):
            r.fill_(0.1 / (number + 1))
        for p, q in zip(found, others, strict=True):
            draw = torch.randn(p.shape, generator=torch.Generator().manual_seed(number)).cuda()
            p.grad.copy_(draw)
            q.grad.copy_(draw)
        graph.replay()
        other.step()
    assert same(found, others) and optimizer.state[found[0]]["steps"].tolist() == [5.0] * 4
    for p in found:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="gradients that stay where they are"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.gpu
def test_on_a_gpu_the_state_follows_to_another_device() -> None:
    found, others = params(), params()
    one, two = AdamW8bit(found, lr=0.1), AdamW8bit(others, lr=0.1)
    for number in range(5):
        give_gradients(found, number)
        give_gradients(others, number)
        one.step()
        two.step()
        for p in found:  # there and back again
            p.grad = None
            p.data = p.data.cuda() if number % 2 == 0 else p.data.cpu()
    assert near(found, others, 1e-4, rate=0.1)
