"""Recorded micro-steps without a GPU: what stands for a graph here runs the recorded function again on every replay."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import nbkit
from nbkit.models import graphs as room
from nbkit.models import patch as patching
from nbkit.models import running
from nbkit.models.forwards import GRAPHS
from nbkit.models.graphs import EAGER_FIRST, Graphs
from nbkit.models.layer import backward
from nbkit.models.layer import binding_of as nbkit_binding
from nbkit.models.layer.forward import Call
from nbkit.models.untouched import levels_kept
from tests.closeness import assert_all_like_stock
from tests.models.layer.rig import batch, fill, lora, step

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1.07 GiB is free. "
    "Of the allocated memory 137.50 GiB is allocated by PyTorch.\nA second line."
)


HELD = 1000  # bytes that a Tape says its pool grew by
EAGER = EAGER_FIRST + 1  # steps before one of their shape is recorded; in the first of them memory is planned


class Tape:
    """In place of a CUDA graph."""

    made = 0

    def __init__(self, run: Callable[[], tuple[Tensor, Tensor]], pool: Any, device: torch.device) -> None:
        self.run, self.results, self.shared = run, run(), pool or object()
        Tape.made += 1

    def pool(self) -> Any:
        return self.shared

    def replay(self) -> None:
        for old, new in zip(self.results, self.run(), strict=True):
            old.copy_(new)


@pytest.fixture(autouse=True)
def recorded_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = Graphs.fits
    monkeypatch.setattr(patching, "_fuses", lambda device: True)
    monkeypatch.setattr(Graphs, "fits", lambda self, ids: fits(self, SimpleNamespace(is_cuda=True, numel=ids.numel)))  # type: ignore[arg-type]

    def capture(*given: Any) -> tuple[Tape, tuple[Tensor, Tensor], int]:
        tape = Tape(*given)
        return tape, tape.results, HELD

    monkeypatch.setattr(room, "capture", capture)
    monkeypatch.setattr(Tape, "made", 0)


def patched(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Graphs]:
    model = lora(family, **options)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.to(dtype)
    nbkit.patch(model)
    return model, vars(model.get_base_model())[GRAPHS]


def packed(lengths: list[int], seed: int = 1) -> dict[str, Any]:
    inputs: dict[str, Any] = dict(batch(1, sum(lengths), seed=seed))
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    inputs["labels"][0, starts[:-1].long()] = -100
    longest = max(lengths)
    inputs["use_cache"] = False  # with a cache the stock decoder takes a pack for one document
    return {**inputs, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


# -- replays -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 5}, {"rank": 16}, {"rank": 7, "targets": ["q_proj", "v_proj"]}, {"rank": 3, "rank_pattern": {"up_proj": 18}}],
    ids=str,
)
def test_replays_give_the_eager_gradients_and_follow_the_adapters(options: dict[str, Any]) -> None:
    model, graphs = patched(**options)
    truth = lora("llama", **options)
    for seed in range(EAGER + 3):
        for one in (model, truth):
            fill(one, seed)
        (loss, grads), (wanted, want) = step(model, **batch(seed=seed)), step(truth, **batch(seed=seed))
        assert loss == pytest.approx(wanted, abs=1e-5)
        assert_all_like_stock(grads, want)
    assert Tape.made == 1 and graphs.note == "1 CUDA graphs, the last of shape (3, 19)"
    assert all(p.grad is None for p in model.parameters())


def test_packs_of_other_lengths_take_one_recording() -> None:
    model, _ = patched()
    truth = lora("llama")
    packs = [[9, 10], [4, 15], [19], [1] * 5 + [14], [2, 2, 15], [6, 13]]
    for seed, lengths in enumerate(packs):
        inputs = packed(lengths, seed)
        plain = {k: v for k, v in inputs.items() if "_length" not in k and "_lens" not in k}  # stock goes by the positions
        assert_all_like_stock(step(model, **inputs)[1], step(truth, **plain)[1])
    assert Tape.made == 1


def test_micro_steps_add_up_and_wait_for_their_backward() -> None:
    model, _ = patched()
    truth = lora("llama")
    one, two = batch(seed=1), batch(seed=2)
    for _ in range(EAGER + 1):
        step(model, **one)
    assert Tape.made == 1
    for together in (False, True):
        found = []
        for each in (model, truth):
            if together:
                first, second = each(**one).loss, each(**two).loss
                (first + 2 * second).backward()
            else:
                each(**one).loss.backward()
                (2 * each(**two).loss).backward()
            found.append({n: p.grad.clone() for n, p in each.named_parameters() if p.grad is not None})
            each.zero_grad()
        assert_all_like_stock(*found)
    assert Tape.made == 1


def test_in_float16_the_scale_follows_the_upstream_gradient() -> None:
    model, graphs = patched(dtype=torch.float16)
    params = [p for p in model.parameters() if p.requires_grad]
    for seed in range(EAGER + 3):
        upstream = 2.0 ** (14 - seed)
        wanted = torch.autograd.grad(model.train()(**batch(seed=1)).loss * upstream, params)
        (one,) = graphs.recorded.values() if graphs.recorded else (None,)
        if one is None:
            eager = [w / upstream for w in wanted]
            continue
        assert one.follows and one.upstream is not None and one.upstream.item() == upstream
        assert one.scale.item() == (2.0**16 if seed == EAGER else 2 * upstream)
        for got, want in zip(wanted, eager, strict=True):
            assert torch.allclose(got / upstream, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
    assert Tape.made == 1


def test_gradients_lie_in_one_buffer_and_as_parts_of_one_at_the_parameters() -> None:
    """Nothing is put together: what a replay leaves is scaled once, and the parts of that are p.grad."""
    model, graphs = patched(rank=16)
    for _ in range(EAGER):
        step(model, **batch())
    model(**batch()).loss.backward()
    (one,) = graphs.recorded.values()
    held = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in one.params if p.grad is not None}
    assert list(held.values()) == [one.flat.untyped_storage().nbytes()] and one.flat.data_ptr() not in held
    trained = sum(p.numel() * p.element_size() for p in one.params)
    assert one.flat.untyped_storage().nbytes() == pytest.approx(trained, rel=0.02)


def test_a_replay_looks_once_whether_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = patched()
    for _ in range(EAGER + 1):
        step(model, **batch())
    asked, fits = [], Graphs.fits
    monkeypatch.setattr(Graphs, "fits", lambda self, ids: asked.append(1) or fits(self, ids))
    step(model, **batch())
    assert len(asked) == 1
    graphs.binding.version += 1
    step(model, **batch())
    assert len(asked) == 2 and not graphs.recorded


def test_a_weight_that_was_moved_is_not_read_where_it_was() -> None:
    model, graphs = patched()
    head = model.get_base_model().lm_head
    for _ in range(EAGER + 1):
        step(model, **batch())
    assert Tape.made == 1 and graphs.recorded
    head.weight.data = head.weight.data * 1.5
    step(model, **batch())
    assert not graphs.recorded
    for _ in range(EAGER_FIRST):
        step(model, **batch())
    assert Tape.made == 2 and graphs.recorded


# -- recordings that fail ------------------------------------------------------------------------------------------------


def failing(error: BaseException, inside: list[weakref.ref[Any]], calls: list[int]) -> Callable[..., Any]:
    """A capture whose function fails in the backward of the first layer. `inside` gets what was alive then."""

    def capture(run: Callable[[], Any], pool: Any, device: torch.device) -> Any:
        calls.append(1)
        real, layers = backward._attention, []

        def attention(call: Call, g: Tensor, *rest: Any) -> Tensor:
            layers.append(call.parts.index)
            inside.extend(weakref.ref(x) for x in (call.arena, call.arena.flat, g) if x is not None)  # type: ignore[union-attr]
            if len(layers) == 2:
                raise error
            return real(call, g, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backward, "_attention", attention)
            return run()

    return capture


def test_a_recording_that_fails_leaves_an_eager_step_its_reason_and_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora("llama")
    report = nbkit.patch(model)
    graphs = vars(model.get_base_model())[GRAPHS]
    wanted, want = step(lora("llama"), **batch())
    inside: list[weakref.ref[Any]] = []
    calls: list[int] = []
    monkeypatch.setattr(room, "capture", failing(torch.OutOfMemoryError(OUT_OF_MEMORY), inside, calls))
    for _ in range(EAGER):
        step(model, **batch())
    with pytest.warns(UserWarning, match="Slower than it could be: steps run without CUDA graphs"):
        loss = model(**batch()).loss
    assert len(inside) == 6 and not [x for x in inside if x() is not None], "the recording's tensors are still held"
    assert graphs.binding.arena is None and graphs.binding.rows.handed is None and graphs.pool is None and not graphs.recorded
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert loss.item() == pytest.approx(wanted, abs=1e-5)
    assert_all_like_stock(grads, want)
    model.zero_grad()
    why = (
        "steps run without CUDA graphs, since recording one of 3 x 19 tokens failed: CUDA out of memory; tried to allocate "
        "2.00 GiB; a smaller batch leaves room for it"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for shape in ((3, 19), (2, 7)):
            for _ in range(EAGER + 1):
                step(model, **batch(*shape))
                assert graphs.note == why and running.recorded(model) == f"CUDA graphs: {why}."
                assert f"  graphs        {why}" in str(report).splitlines()
        step(model, **batch(), position_ids=torch.arange(19)[None])
        assert graphs.note == "steps that are given position_ids run eagerly"
        step(model, **batch())
    assert graphs.note == why and len(calls) == 1


def test_a_recording_that_fails_gives_back_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro-step that was replayed before still has its gradients."""
    model, graphs = patched()
    _, want = step(model, **batch(seed=4))
    for _ in range(EAGER):
        step(model, **batch(seed=4))
    assert graphs.recorded
    small = batch(2, 7, seed=3)
    for _ in range(EAGER_FIRST):
        _, more = step(model, **small)
    monkeypatch.setattr(room, "capture", failing(RuntimeError("it waits for the device. And more."), [], []))
    waiting = model(**batch(seed=4)).loss
    flat = weakref.ref(next(iter(graphs.recorded.values())).flat)
    with pytest.warns(UserWarning, match=r"recording one of 2 x 7 tokens failed: it waits for the device\.$"):
        loss = model(**small).loss
    assert not graphs.recorded and flat() is not None
    (waiting + loss).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_all_like_stock(found, {n: want[n] + more[n] for n in want})
    del waiting, loss, found
    assert flat() is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a fault")], ids=repr)
def test_what_is_no_failure_of_the_device_is_raised_and_the_next_step_is_as_ever(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graphs = patched()
    wanted, want = step(lora("llama"), **batch())
    for _ in range(EAGER):
        step(model, **batch())
    with monkeypatch.context() as now:
        now.setattr(room, "capture", failing(error, [], []))
        with pytest.raises(type(error)):
            step(model, **batch())
    assert graphs.binding.arena is None and not graphs.failed
    loss, grads = step(model, **batch())
    assert loss == pytest.approx(wanted, abs=1e-5) and Tape.made == 1
    assert_all_like_stock(grads, want)


def test_a_plan_without_room_for_it_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = patched()
    step(model, **batch())
    planner = graphs.binding.planner
    assert planner.plan is not None and planner.plan.records
    for change, why in (
        ({"park": True}, "the embedding is in host RAM"),
        ({"records": False}, "memory is too short for a record"),
    ):
        with monkeypatch.context() as now:
            now.setattr(planner, "plan", replace(planner.plan, **change))
            for _ in range(EAGER + 1):
                step(model, **batch())
            assert graphs.note.startswith(why) and not Tape.made


def test_the_plan_of_a_step_that_could_not_be_recorded_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = patched()
    planner = graphs.binding.planner
    with monkeypatch.context() as now, pytest.warns(UserWarning, match="failed: no"):
        now.setattr(room, "capture", failing(RuntimeError("no"), [], []))
        for _ in range(EAGER + 2):
            step(model, **batch())
            assert planner.plan is not None and planner.plan.records is not bool(graphs.failed)
    assert graphs.failed and not planner.plan.records


def test_only_steps_that_are_recorded_are_planned_with_memory_for_it() -> None:
    model, graphs = patched()
    assert graphs.records(64) and not graphs.records(2**60)
    nbkit.unpatch(model)
    assert not graphs.binding.records(64)
    nbkit.patch(model, graphs=False)
    step(model, **batch())
    binding = nbkit_binding(model)
    assert not binding.records(64) and not binding.planner.plan.records


def test_a_recording_that_fails_in_a_comparison_says_nothing_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = patched()
    with levels_kept(graphs.binding, graphs), monkeypatch.context() as now, pytest.warns(UserWarning, match=r"failed: no\.$"):
        now.setattr(room, "capture", failing(RuntimeError("no"), [], []))
        for _ in range(EAGER + 1):
            step(model, **batch())
        assert graphs.failed
    for _ in range(EAGER + 1):
        step(model, **batch())
    assert graphs.recorded and not graphs.failed


def test_what_a_comparison_recorded_is_not_counted_as_held() -> None:
    model, graphs = patched()
    with levels_kept(graphs.binding, graphs):
        for _ in range(EAGER + 1):
            step(model, **batch())
        assert graphs.recorded and graphs.held == HELD
    assert not graphs.recorded and (graphs.held, graphs.pool) == (0, None)


# -- memory --------------------------------------------------------------------------------------------------------------


def test_graphs_make_way_for_an_eager_step_that_would_not_fit_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = patched()
    truth = lora("llama")
    planner = graphs.binding.planner

    def train(tokens: int, times: int) -> None:
        for seed in range(times):
            inputs = batch(tokens=tokens, seed=seed)
            assert_all_like_stock(step(model, **inputs)[1], step(truth, **inputs)[1])

    def free(tokens: int, spare: int) -> None:
        """So much beside what the pools hold and a step of so many tokens."""
        monkeypatch.setattr(room, "free_bytes", lambda device: planner.passing(3 * tokens) + graphs.held + spare)

    train(19, EAGER + 1)
    assert (Tape.made, graphs.held) == (1, HELD) and 0 < planner.passing(3 * 11) < planner.passing(3 * 19)
    free(11, 0)
    train(11, EAGER + 1)  # there is room: both are recorded
    assert (Tape.made, graphs.held, graphs.gave_way) == (2, 2 * HELD, 0)
    free(11, -1)
    train(11, 1)  # a replay needs none
    assert (Tape.made, graphs.held, graphs.gave_way) == (2, 2 * HELD, 0)
    for times in (1, 2):
        free(7, -1)
        train(7, 1)
        assert (len(graphs.recorded), graphs.held, graphs.gave_way) == (0, 0, times)
        train(19, EAGER + 1)  # and they are recorded again
        assert (len(graphs.recorded), graphs.held, graphs.gave_way) == (1, HELD, times)
    free(7, -1)
    with pytest.warns(UserWarning, match="memory holds no recorded step beside eager ones of other shapes"):
        train(7, 1)
    assert graphs.failed and not graphs.recorded and (made := Tape.made)
    train(19, EAGER + 2)
    assert Tape.made == made
