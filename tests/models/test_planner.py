"""The planner: the fastest level that fits, a copy where memory is free, level 4 where nothing fits or it was asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nbkit.hardware import forecast
from nbkit.models.layer.keep import LEVELS
from nbkit.models.planner import candidates, choose, free_bytes

GIB = 2**30
EIGHT = forecast.Sizes(32, 4096, 14336, 32, 8, 128, 128256, lora=41_943_040)


def test_weights_of_an_8b_model():
    assert EIGHT.weights == 6_979_321_856


def test_kept_bytes_are_those_of_the_table():
    table = [94.3, 37.0, 24.7, 16.5, 8.2]  # KB a token and layer
    for level, kb in zip(LEVELS, table, strict=True):
        assert forecast.kept(level, EIGHT) / 1000 == pytest.approx(kb, rel=0.01)


def test_less_memory_never_gives_a_faster_plan_and_the_plan_fits():
    order = [p[0] for p in candidates(EIGHT, 4096, four_bit=True, checkpointed=False)]
    last = -1
    for gib in (140, 60, 30, 20, 16, 12, 10, 8, 6, 4, 2.5, 1, 0.3):
        plan = choose(EIGHT, 4096, int(gib * GIB), four_bit=True, host=100 * GIB, may_park=True)
        assert order.index(plan.keep) >= last
        assert plan.needed <= gib * GIB or "may not fit" in plan.why
        last = order.index(plan.keep)
    assert "may not fit" in plan.why and plan.park


def test_every_candidate_needs_less_than_the_ones_it_replaces():
    for rows in (512, 4096, 32768, 131072):
        needs = []
        for keep, copy, park in candidates(EIGHT, rows, four_bit=True, checkpointed=False):
            parts = forecast.step(
                keep.level, rows, EIGHT, four_bit=True, copy=copy,
                offload=keep.offload, tile=keep.tile, groups=keep.groups, parked=park,
            )  # fmt: skip
            needs.append(sum(parts.values()))
        assert needs[-1] == min(needs) and needs[0] == max(needs)


def test_host_memory_is_taken_only_where_it_is_there():
    rich = choose(EIGHT, 32768, 10 * GIB, four_bit=True, host=64 * GIB)
    poor = choose(EIGHT, 32768, 10 * GIB, four_bit=True, host=2 * GIB)
    assert rich.keep.offload and "host RAM" in str(rich) and not rich.richer.offload
    assert rich.host == forecast.host(rich.keep.level, 32768, EIGHT, EIGHT.layers - rich.count)
    assert not poor.keep.offload


def test_rows_that_make_one_tile_go_whole_as_long_as_they_fit():
    whole, tiled, asked = (
        choose(EIGHT, 4096, int(gib * GIB), four_bit=True, checkpointed=asked, host=64 * GIB, may_park=True)
        for gib, asked in ((1.3, False), (0.6, False), (140, True))
    )
    assert whole.keep.level == tiled.keep.level == asked.keep.level == 4 and whole.park and tiled.park
    assert whole.keep.tile is None and tiled.keep.tile == asked.keep.tile == 2048
    assert all("may not fit" not in plan.why for plan in (whole, tiled))


def test_the_embedding_is_parked_only_where_it_may_be():
    free = 200 * GIB
    while (plan := choose(EIGHT, 131072, free, four_bit=True, host=400 * GIB, may_park=True)) and not plan.park:
        free = int(free * 0.95)
    assert "may not fit" not in plan.why and plan.needed < free
    assert not choose(EIGHT, 131072, free, four_bit=True, host=400 * GIB, may_park=False).park


def test_a_copy_only_where_level_0_leaves_room_for_it():
    rich, poor = (choose(EIGHT, 4096, gib * GIB, four_bit=True) for gib in (140, 24))
    assert rich.copy and rich.keep.level == 0 and not poor.copy and poor.keep.level == 0
    assert rich.needed - poor.needed == EIGHT.weights * 2 - forecast.scratch(EIGHT)
    assert not choose(EIGHT, 4096, 140 * GIB, four_bit=False).copy


def test_checkpointing_saves_memory_whatever_is_free():
    plan = choose(EIGHT, 4096, 140 * GIB, four_bit=True, checkpointed=True, host=64 * GIB)
    assert plan.keep.level == 4 and plan.keep.in_place and not plan.copy and "checkpointing" in str(plan)
    assert choose(EIGHT, 4096, 140 * GIB, four_bit=True, checkpointed=True).keep.level == 4


def test_gradients_and_optimizer_are_counted_once():
    first, later = (choose(EIGHT, 4096, 140 * GIB, four_bit=False, stepped=stepped) for stepped in (False, True))
    assert first.needed - later.needed == EIGHT.lora * (4 + 8)
    recorded = choose(EIGHT, 512, 140 * GIB, four_bit=False, records=True)
    eager = choose(EIGHT, 512, 140 * GIB, four_bit=False)
    assert recorded.records and not eager.records and recorded.keep == eager.keep
    assert EIGHT.lora * 4 < recorded.needed - eager.needed < EIGHT.lora * 4 + 200 * 2**20


def test_a_small_step_is_recorded_as_far_as_that_does_not_cost_more_than_launches():
    seen = []
    for tenth in range(400, 8, -1):
        plan = choose(
            EIGHT, 512, tenth * GIB // 10, four_bit=True, host=100 * GIB, may_park=True, optimizer_bytes=2, records=True
        )
        eager = choose(EIGHT, 512, tenth * GIB // 10, four_bit=True, host=100 * GIB, may_park=True, optimizer_bytes=2)
        room = 0.97 * tenth * GIB / 10 - 128 * 2**20
        assert plan.needed <= room or "may not fit" in plan.why
        assert plan.records or plan == eager
        if plan.records:  # in place of it: the same, or little is done again for it
            assert not plan.keep.offload and not plan.park
            assert plan.keep.level == 0 or eager.keep.level > 0 or plan.richer.level == 0
            assert plan.copy or not eager.copy
        seen.append((plan.records, plan.copy, plan.keep.level))
    assert seen[0] == (True, True, 0) and (False, True, 0) in seen and (True, False, 0) in seen and (True, False, 1) in seen
    assert seen[-1][0] is False


def test_room_that_is_left_goes_to_the_last_layers():
    for gib in (13, 9, 5, 3, 2.5, 1.6, 1.2):
        plan = choose(EIGHT, 4096, int(gib * GIB), four_bit=True, host=100 * GIB, may_park=True, optimizer_bytes=2)
        assert plan.richer is not None and plan.richer.level < plan.keep.level and not plan.richer.offload
        assert 0 < plan.count < EIGHT.layers and f"the last {plan.count} layers level {plan.richer.level}" in str(plan)
        each = 4096 * (forecast.kept(plan.richer.level, EIGHT) - forecast.kept(plan.keep.level, EIGHT))
        assert plan.needed <= 0.97 * gib * GIB - 128 * 2**20 < plan.needed + max(each, 4096 * 2 * 4096) + 400 * 2**20
    assert choose(EIGHT, 4096, 13 * GIB, four_bit=True).count > choose(EIGHT, 4096, 9 * GIB, four_bit=True).count
    assert choose(EIGHT, 4096, 140 * GIB, four_bit=True).count == 0
    assert choose(EIGHT, 4096, 9 * GIB, four_bit=True, checkpointed=True).count == 0


def test_long_rows_keep_as_many_attention_outputs_as_host_memory_takes():
    rows, each = 262144, 262144 * 4096 * 2
    counts = []
    for gib in (86, 100, 120, 160, 172):
        plan = choose(EIGHT, rows, 17 * GIB, four_bit=True, host=gib * GIB, may_park=True, optimizer_bytes=2)
        inputs, outputs = plan.on_host(EIGHT.layers)
        counts.append(outputs)
        assert plan.host == (inputs + outputs) * each <= forecast.HOST_SHARE * gib * GIB
        if outputs:
            assert inputs == EIGHT.layers and plan.needed <= 17 * GIB
            assert plan.richer is None or plan.richer == replace(plan.keep, level=3)
            assert plan.host + each > forecast.HOST_SHARE * gib * GIB or outputs == EIGHT.layers
    assert counts[0] == 0 < counts[1] < counts[2] < counts[3] < counts[4] == EIGHT.layers
    short = choose(EIGHT, 4096, int(1.2 * GIB), four_bit=True, host=100 * GIB, may_park=True, optimizer_bytes=2)
    assert short.on_host(EIGHT.layers) == (EIGHT.layers - short.count, 0)  # on short rows attention is cheaper done again


def test_more_repeated_work_for_less_memory():
    work = [forecast.repeated(level, 4096, EIGHT) for level in LEVELS]
    assert work[0] == 0 and work == sorted(work) and len(set(work)) == len(work)


def test_a_plan_says_what_is_free_only_where_that_is_known():
    assert " of 140.0 GiB free): " in str(choose(EIGHT, 4096, 140 * GIB, four_bit=True))
    plan = choose(EIGHT, 4096, free_bytes(torch.device("cpu")) + GIB, four_bit=True)
    assert f" tokens a step ({plan.needed / GIB:.1f} GiB): memory is free" in str(plan) and "free)" not in str(plan)
