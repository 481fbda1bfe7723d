"""The buffer for the gradients of a recorded step: what lies in it, where, and that it holds the bits of an eager step's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nbkit.models.layer import Keep
from nbkit.models.layer.arena import ALIGNED, Arena
from tests.models.layer.rig import batch, lora
from tests.models.layer.test_layer import bound

ADAPTERS: dict[str, dict[str, Any]] = {
    "all linears, rank 4": {},
    "rank 16": {"rank": 16},
    "rank 5": {"rank": 5},
    "q and v": {"targets": ["q_proj", "v_proj"], "rank": 7},
    "k and up": {"targets": ["k_proj", "up_proj"], "rank": 17},
    "a rank for each": {"rank": 3, "rank_pattern": {"q_proj": 9, "gate_proj": 1, "down_proj": 20}},
}


def arena_of(binding: Any, dtype: torch.dtype = torch.float32) -> Arena:
    return Arena([b.parts for b in binding.bound], dtype, torch.device("cpu"))


def gradients(model: Any, binding: Any, arena: Arena | None = None) -> list[Tensor]:
    """As a recording takes them, layer by layer; with `arena` they are written there."""
    params = [p for b in binding.bound for p in b.params]
    if arena is None:
        handle = binding.bound[0].parts.layer.register_forward_hook(lambda *_: None)  # layer by layer, as in a recording
        found = torch.autograd.grad(model(**batch()).loss, params)
        handle.remove()
        return list(found)
    leaves = [p.detach().requires_grad_() for p in params]
    with binding.stand_ins(leaves, arena):
        assert binding.recording
        found = torch.autograd.grad(model(**batch()).loss, leaves)
    assert not binding.recording and all(b.params[0] is not leaves[0] for b in binding.bound)
    return list(found)


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_gradients_lie_side_by_side_with_the_bits_of_an_eager_step(options: dict[str, Any]) -> None:
    model = lora("llama", **options)
    binding = bound(model, Keep(0))
    model(**batch())
    arena = arena_of(binding)
    arena.flat.fill_(float("nan"))
    written = gradients(model, binding, arena)
    truth = gradients(model, binding)
    before = arena.flat.clone()
    arena.bring(written)
    assert torch.equal(arena.flat.nan_to_num(7.0), before.nan_to_num(7.0)), "nothing was left to copy"
    taken = torch.zeros(arena.flat.numel(), dtype=torch.int)
    for place, one, wanted in zip(arena.places, written, truth, strict=True):
        assert one.data_ptr() == place.of(arena.flat).data_ptr() and one.shape == wanted.shape and one.is_contiguous()
        assert torch.equal(place.of(arena.flat), wanted) and wanted.any()
        taken[place.start : place.start + wanted.numel()] += 1
    assert taken.max() == 1, "two gradients in one place"
    assert all(room.storage_offset() % ALIGNED == 0 for b in binding.bound for g in b.parts.groups for room in arena.rooms(g))
    binding.release()


@pytest.mark.parametrize("rank", [16, 32])
def test_ranks_in_steps_of_16_take_no_more_than_their_gradients(rank: int) -> None:
    model = lora("llama", rank=rank)
    binding = bound(model)
    model(**batch())
    arena = arena_of(binding)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained <= arena.flat.numel() <= trained + ALIGNED * len(arena.places)
    binding.release()


@pytest.mark.parametrize("keep", [Keep(0, 16), Keep(4, 16), Keep(2, 16, False, 1)], ids=str)
def test_tiles_are_summed_in_place_where_the_parameters_are_float32(keep: Keep) -> None:
    model = lora("llama")
    binding = bound(model, keep)
    model(**batch())
    arena = arena_of(binding)
    written, truth = gradients(model, binding, arena), gradients(model, binding)
    for place, one, wanted in zip(arena.places, written, truth, strict=True):
        assert one.data_ptr() == place.of(arena.flat).data_ptr() and torch.equal(one, wanted)
    binding.release()


@pytest.mark.parametrize("keep", [Keep(0), Keep(0, 16)], ids=str)
@pytest.mark.parametrize("half", ["lora_A", "lora_B", "lora_"])
def test_what_has_another_dtype_is_copied_in(keep: Keep, half: str) -> None:
    """Of parameters in bfloat16, the sums over tiles are float32."""
    model = lora("llama")
    for name, p in model.named_parameters():
        if half in name:
            p.data = p.data.bfloat16()
    binding = bound(model, keep)
    model(**batch())
    dtype = torch.bfloat16 if half == "lora_" else torch.float32
    arena = arena_of(binding, dtype)
    written, truth = gradients(model, binding, arena), gradients(model, binding)
    away = [one.data_ptr() != place.of(arena.flat).data_ptr() for place, one in zip(arena.places, written, strict=True)]
    assert any(away) == (half != "lora_" or keep.tile is not None)
    arena.bring(written)
    for place, wanted in zip(arena.places, truth, strict=True):
        assert torch.equal(place.of(arena.flat), wanted.to(dtype)) and wanted.any()
    binding.release()


def test_an_eager_step_takes_no_arena() -> None:
    """Also one whose backward runs while another step is recorded."""
    model = lora("llama")
    binding = bound(model, Keep(0))
    model(**batch())
    truth = gradients(model, binding)
    handle = binding.bound[0].parts.layer.register_forward_hook(lambda *_: None)
    loss = model(**batch()).loss
    handle.remove()
    arena = arena_of(binding)
    arena.flat.zero_()
    params = [p for b in binding.bound for p in b.params]
    with binding.stand_ins([p.detach().requires_grad_() for p in params], arena):
        found = torch.autograd.grad(loss, params)
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True)) and not arena.flat.any()
    binding.release()
