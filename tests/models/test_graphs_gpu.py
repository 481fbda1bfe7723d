"""Recorded micro-steps on a GPU: the bits of eager ones, and steps that go on where a recording fails."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import nbkit
from nbkit.models.forwards import GRAPHS
from nbkit.models.graphs import EAGER_FIRST, Graphs
from nbkit.models.layer import backward
from nbkit.models.layer.arena import Arena
from nbkit.models.layer.forward import Call
from nbkit.models.layer.stack import Stacks
from tests.models.layer.rig import lora
from tests.models.layer.test_layer_gpu import SIZES, lora_on_gpu, on_gpu, packed_on_gpu

pytestmark = pytest.mark.gpu
EAGER = EAGER_FIRST + 1  # steps before one of their shape is recorded; in the first of them memory is planned
GIB = 2**30


@pytest.fixture(autouse=True)
def steps_that_repeat(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention that sums in one order, and eager steps that go layer by layer and project every row, as recorded ones do."""
    monkeypatch.setattr(Stacks, "call", lambda *_: None)
    monkeypatch.setattr("nbkit.models.head.host_sets_pace", lambda rows, weight: True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def adapted(dtype: torch.dtype = torch.bfloat16, family: str = "llama", **options: Any) -> Any:
    """LoRA in float32 on a toy model of `dtype`."""
    model = lora(family, **SIZES, **options)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.to(dtype)
    return model.cuda()


def graphs_of(model: Any) -> Graphs:
    return vars(model.get_base_model())[GRAPHS]


def gradients(model: Any, *batches: dict[str, Any], upstream: float = 1.0) -> dict[str, Tensor]:
    """After one micro-step for each of the batches; cleared."""
    for inputs in batches:
        (model(**inputs).loss * (upstream / len(batches))).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def repeats(model: Any, *batches: dict[str, Any], upstream: float = 1.0) -> dict[str, Tensor]:
    """The gradients of a step, which are the same bits in a second one."""
    want = gradients(model, *batches, upstream=upstream)
    again = gradients(model, *batches, upstream=upstream)
    assert all(torch.equal(again[n], want[n]) for n in want), "eager steps do not repeat themselves: this test is of no use"
    return want


def same_bits(model: Any, *steps: tuple[dict[str, Any], ...], upstream: float = 1.0) -> None:
    """Each step (its micro-batches) recorded and eager."""
    nbkit.patch(model, graphs=False)
    gradients(model, *steps[0], upstream=upstream)
    truth = [repeats(model, *one, upstream=upstream) for one in steps]
    nbkit.unpatch(model)
    nbkit.patch(model)
    graphs = graphs_of(model)
    for _ in range(EAGER):
        for one in steps:
            gradients(model, *one, upstream=upstream)
    assert graphs.recorded, graphs.note
    for one, want in zip(steps, truth, strict=True):
        got = gradients(model, *one, upstream=upstream)
        assert graphs.note.endswith(f"the last of shape {tuple(one[-1]['input_ids'].shape)}")
        assert got.keys() == want.keys() and all(g.isfinite().all() and g.any() for g in got.values())
        differ = [n for n in want if not torch.equal(got[n], want[n])]
        assert not differ, f"{len(differ)} of {len(want)} gradients differ, as {differ[0]}"
    nbkit.unpatch(model)


ADAPTERS: dict[str, dict[str, Any]] = {
    "rank 16": {"rank": 16},
    "rank 5": {"rank": 5},
    "rank 24": {"rank": 24},
    "q and v": {"rank": 12, "targets": ["q_proj", "v_proj"]},
    "k, o and up": {"rank": 8, "targets": ["k_proj", "o_proj", "up_proj"]},
    "a rank for each": {"rank": 3, "rank_pattern": {"q_proj": 9, "v_proj": 33, "gate_proj": 1, "down_proj": 70}},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_the_bits_of_eager_steps(options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every gradient is written where it is kept."""
    copied, bring = [], Arena.bring

    def counted(self: Arena, found: Any) -> None:
        places = zip(self.places, found, strict=True)
        copied.append(sum(place.of(self.flat).data_ptr() != one.data_ptr() for place, one in places))
        bring(self, found)

    monkeypatch.setattr(Arena, "bring", counted)
    same_bits(adapted(dtype, **options), *((on_gpu(tokens=64, seed=seed),) for seed in (1, 2)))
    assert copied == [0]


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_the_bits_of_eager_steps_of_other_families(family: str) -> None:
    same_bits(adapted(family=family, rank=5), *((on_gpu(tokens=64, seed=seed),) for seed in (1, 2)))


@pytest.mark.parametrize("rank", [16, 7])
def test_the_bits_of_eager_steps_on_nf4(rank: int) -> None:
    model = lora_on_gpu(dtype=torch.bfloat16, four_bit=True, rank=rank)
    same_bits(model, *((on_gpu(tokens=64, seed=seed),) for seed in (1, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bits_of_two_micro_steps_that_add_up(dtype: torch.dtype) -> None:
    upstream = 2.0**16 if dtype == torch.float16 else 1.0
    one, two, other = (on_gpu(tokens=64, seed=seed) for seed in (1, 2, 3))
    other["labels"][:, :20] = -100
    same_bits(adapted(dtype, rank=12), (one, two), (two, other), upstream=upstream)


@pytest.mark.parametrize("options", [{"rank": 5}, {"rank": 16, "targets": ["q_proj", "v_proj"]}], ids=str)
def test_the_bits_in_float16(options: dict[str, Any]) -> None:
    """Under the scale that a scaler begins with, which is inside the recorded step."""
    same_bits(adapted(torch.float16, **options), *((on_gpu(tokens=64, seed=seed),) for seed in (1, 2)), upstream=2.0**16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bits_of_packs(dtype: torch.dtype) -> None:
    upstream = 2.0**16 if dtype == torch.float16 else 1.0
    packs = [packed_on_gpu(lengths, seed) for seed, lengths in enumerate([[20, 44], [30, 34], [9, 9, 9, 37]])]
    same_bits(adapted(dtype, rank=5), *((one,) for one in packs), upstream=upstream)


# -- recordings that fail ------------------------------------------------------------------------------------------------


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Holds the allocator to so many bytes more than it has reserved."""
    total = torch.cuda.get_device_properties(0).total_memory

    def set_to(more: int) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield set_to
    torch.cuda.set_per_process_memory_fraction(1.0)


def out_of_memory(g: Tensor) -> Any:
    return torch.empty(GIB, dtype=torch.uint8, device=g.device)


def waits_for_the_device(g: Tensor) -> Any:
    return g.sum().item()


def fails_in_a_loss(monkeypatch: pytest.MonkeyPatch, what: Callable[[Tensor], Any]) -> None:
    real = Graphs.loss
    monkeypatch.setattr(Graphs, "loss", lambda self, hidden, *rest: (what(hidden), real(self, hidden, *rest))[1])


def fails_in_a_layers_backward(monkeypatch: pytest.MonkeyPatch, what: Callable[[Tensor], Any]) -> None:
    real, calls = backward._attention, []

    def attention(call: Call, g: Tensor, *rest: Any) -> Tensor:
        if call.arena is not None:
            calls.append(1)
            if len(calls) == 2:
                what(g)
        return real(call, g, *rest)

    monkeypatch.setattr(backward, "_attention", attention)


@pytest.mark.parametrize("what", [out_of_memory, waits_for_the_device])
@pytest.mark.parametrize("where", [fails_in_a_loss, fails_in_a_layers_backward])
def test_steps_go_on_where_a_recording_fails(
    where: Callable[..., None], what: Callable[..., Any], limit: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = adapted(rank=5), on_gpu(tokens=64, seed=1)
    nbkit.patch(model, graphs=False)
    gradients(model, inputs)
    want = gradients(model, inputs)
    nbkit.unpatch(model)
    nbkit.patch(model)
    graphs, stream = graphs_of(model), torch.cuda.current_stream()
    held, real = [], Graphs.record_if_due

    def watched(self: Graphs, *given: Any) -> Any:
        torch.cuda.synchronize()
        before = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
        one = real(self, *given)
        if self.failed:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            held.append((before, (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())))
        return one

    for _ in range(EAGER):
        assert all(torch.equal(g, want[n]) for n, g in gradients(model, inputs).items())
    with monkeypatch.context() as now:
        where(now, what)
        now.setattr(Graphs, "record_if_due", watched)
        limit(256 * 2**20)
        with pytest.warns(UserWarning, match="steps run without CUDA graphs, since recording one of 3 x 64 tokens failed: CUDA "):
            got = gradients(model, inputs)
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    ((before, after),) = held
    assert after[0] <= before[0] and after[1] <= before[1], "the recording's memory is still held"
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    for _ in range(EAGER):
        got = gradients(model, inputs)
        assert all(torch.equal(got[n], want[n]) for n in want)
    oom = r"out of memory; tried to allocate (1.00 GiB|1024.00 MiB); a smaller batch leaves room for it"  # torch's unit depends
    said = oom if what is out_of_memory else "error: "
    assert re.match(f"steps run without CUDA graphs, since recording one of 3 x 64 tokens failed: CUDA {said}", graphs.note)
    assert not graphs.recorded and not graphs.binding.recording
    nbkit.unpatch(model)
    torch.cuda.set_per_process_memory_fraction(1.0)
    same_bits(adapted(rank=5), (inputs,), (inputs,))  # another model is recorded as if nothing had been


def test_steps_go_on_in_just_the_memory_that_eager_ones_take(limit: Callable[[int], None]) -> None:
    """A recording needs workspaces of its own beside the eager steps'; whether it succeeds or not, no step may fail for it."""
    model, inputs = adapted(rank=5, num_hidden_layers=4), on_gpu(rows=32, tokens=64, seed=1)
    nbkit.patch(model, graphs=False)
    gradients(model, inputs)
    want = repeats(model, inputs)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    gradients(model, inputs)
    peak = torch.cuda.max_memory_reserved() - before
    nbkit.unpatch(model)
    nbkit.patch(model)
    gradients(model, inputs)  # memory is planned
    limit(peak + 8 * 2**20)
    for _ in range(EAGER + 2):
        got = gradients(model, inputs)
        assert all(torch.equal(got[n], want[n]) for n in want)
    graphs = graphs_of(model)
    assert bool(graphs.recorded) != bool(graphs.failed), graphs.note
    assert not graphs.failed or "failed: CUDA out of memory" in graphs.note
    nbkit.unpatch(model)


def test_a_recorded_step_makes_way_for_an_eager_one_of_another_shape(limit: Callable[[int], None]) -> None:
    model, inputs, others = adapted(num_hidden_layers=4), on_gpu(rows=32, tokens=64, seed=1), on_gpu(rows=28, tokens=64, seed=2)
    nbkit.patch(model, graphs=False)
    gradients(model, inputs)
    gradients(model, others)
    want = repeats(model, others)
    nbkit.unpatch(model)
    nbkit.patch(model)
    graphs = graphs_of(model)
    for _ in range(EAGER + 1):
        gradients(model, inputs)
    assert graphs.recorded and graphs.held > 0
    limit(graphs.binding.planner.passing(28 * 64) // 2)
    gradients(model, others)  # the first batch of a shape attends otherwise
    got = gradients(model, others)
    assert graphs.gave_way == 1 and not graphs.recorded and not graphs.failed
    assert all(torch.equal(got[n], want[n]) for n in want)
    nbkit.unpatch(model)
