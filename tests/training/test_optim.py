"""8-bit AdamW over flat buffers: near AdamW, exact where a gradient is missing, and whole again from its state."""

from __future__ import annotations

import copy

import pytest
import torch

from nbkit.training.optim import AdamW8bit


def params(seed: int = 0) -> list[torch.nn.Parameter]:
    make = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=make)) for shape in ((16, 40), (300,), (7, 3), (256, 2))]


def give_gradients(found: list[torch.nn.Parameter], seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    for p in found:
        p.grad = torch.randn(p.shape, generator=make)


def test_follows_adamw() -> None:
    mine, theirs = params(), params()
    first = [p.detach().clone() for p in mine]
    optimizers = AdamW8bit(mine, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for number in range(12):
        for found, optimizer in zip((mine, theirs), optimizers, strict=True):
            give_gradients(found, number)
            optimizer.step()
            optimizer.zero_grad()
    for a, b, start in zip(mine, theirs, first, strict=True):
        moved = float((b.detach() - start).norm())
        assert moved > 0 and float((a.detach() - b.detach()).norm()) < 0.05 * moved


def test_the_tensors_stay_and_one_buffer_holds_them() -> None:
    found = params()
    values, ids = [p.detach().clone() for p in found], [id(p) for p in found]
    optimizer = AdamW8bit(found)
    assert [id(p) for p in found] == ids and all(torch.equal(p, v) for p, v in zip(found, values, strict=True))
    assert len({p.untyped_storage().data_ptr() for p in found}) == 1
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == ids


@pytest.mark.parametrize("missing", [(0,), (1, 2), (3,), (0, 3), (0, 1, 2, 3)])
def test_a_parameter_without_gradient_stays_as_it_is(missing: tuple[int, ...]) -> None:
    found, alone = params(), params()
    values = [p.detach().clone() for p in found]
    optimizer, rest = AdamW8bit(found, lr=0.1), [p for i, p in enumerate(alone) if i not in missing]
    give_gradients(found, 1)
    give_gradients(alone, 1)
    for i in missing:
        found[i].grad = None
    optimizer.step()
    if rest:
        AdamW8bit(rest, lr=0.1).step()
    for i, (p, q, value) in enumerate(zip(found, alone, values, strict=True)):
        assert torch.equal(p, value) if i in missing else torch.equal(p, q) and not torch.equal(p, value)


def test_its_state_makes_it_whole_again() -> None:
    found, others = params(), params()
    one, two = AdamW8bit(found, lr=0.05), AdamW8bit(others, lr=0.5)
    give_gradients(found, 0)
    one.step()
    saved = copy.deepcopy(one.state_dict())
    for p, q in zip(found, others, strict=True):
        q.data.copy_(p.data)
    two.load_state_dict(saved)
    assert two.param_groups[0]["lr"] == 0.05
    for optimizer, some in ((one, found), (two, others)):
        give_gradients(some, 1)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(found, others, strict=True))
    with pytest.raises(ValueError, match="other parameters"):
        AdamW8bit(params()[:2]).load_state_dict(saved)


def test_schedulers_and_groups() -> None:
    found = params()
    optimizer = AdamW8bit([{"params": found[:2]}, {"params": found[2:], "lr": 0.0}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    values = [p.detach().clone() for p in found]
    give_gradients(found, 0)
    optimizer.step()
    assert not torch.equal(found[0], values[0]) and torch.equal(found[2], values[2])
    schedule.step()
    after = found[0].detach().clone()
    optimizer.step()
    assert torch.equal(found[0], after)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}])
def test_refuses_what_cannot_be(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        AdamW8bit(params(), **wrong)
    with pytest.raises(ValueError, match="2 kinds"):
        AdamW8bit([*params(), torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))])


@pytest.mark.gpu
def test_on_a_gpu_it_equals_the_cpu() -> None:
    here, there = params(), [torch.nn.Parameter(p.detach().cuda()) for p in params()]
    optimizers = AdamW8bit(here, lr=1e-2), AdamW8bit(there, lr=1e-2)
    for number in range(4):
        give_gradients(here, number)
        for p, q in zip(here, there, strict=True):
            q.grad = p.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.allclose(p, q.cpu(), rtol=1e-4, atol=2e-4) for p, q in zip(here, there, strict=True))
