"""The planner: the fastest level that fits, a copy where memory is free, level 4 where nothing fits or it was asked for."""

from __future__ import annotations

import pytest

from nbkit.hardware import forecast
from nbkit.models.layer.keep import LEVELS
from nbkit.models.planner import choose

GIB = 2**30
EIGHT = forecast.Sizes(32, 4096, 14336, 32, 8, 128, 128256, lora=41_943_040)


def test_weights_of_an_8b_model():
    assert EIGHT.weights == 6_979_321_856


def test_kept_bytes_are_those_of_the_table():
    table = [94.3, 37.0, 24.7, 16.5, 8.2]  # KB a token and layer
    for level, kb in zip(LEVELS, table, strict=True):
        assert forecast.kept(level, EIGHT) / 1000 == pytest.approx(kb, rel=0.01)


def test_less_memory_never_gives_a_faster_plan_and_the_plan_fits():
    last = -1
    for gib in (140, 60, 30, 20, 16, 12, 10, 8, 6, 4, 1):
        plan = choose(EIGHT, 4096, gib * GIB, four_bit=True)
        assert plan.keep.level >= last
        assert plan.needed <= gib * GIB or plan.keep.level == 4
        last = plan.keep.level
    assert last == 4


def test_a_copy_only_where_level_0_leaves_room_for_it():
    rich, poor = (choose(EIGHT, 4096, gib * GIB, four_bit=True) for gib in (140, 24))
    assert rich.copy and rich.keep.level == 0 and not poor.copy and poor.keep.level == 0
    assert rich.needed - poor.needed == EIGHT.weights * 2 - forecast.scratch(EIGHT)
    assert not choose(EIGHT, 4096, 140 * GIB, four_bit=False).copy


def test_checkpointing_takes_level_four():
    plan = choose(EIGHT, 4096, 140 * GIB, four_bit=True, checkpointed=True)
    assert plan.keep.level == 4 and not plan.copy and "checkpointing" in str(plan)


def test_gradients_and_optimizer_are_counted_once():
    first, later = (choose(EIGHT, 4096, 140 * GIB, four_bit=False, stepped=stepped) for stepped in (False, True))
    assert first.needed - later.needed == EIGHT.lora * (8 + 8)
