"""The held-out loss is a mean over tokens, however rows are batched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nbkit.errors import TrainingError
from nbkit.training import held_out_loss
from tests.training import rig


def by_hand(model: Any, rows: list[dict[str, list[int]]]) -> float:
    total, count = 0.0, 0
    model = model.double()
    for row in rows:
        with torch.no_grad():
            logp = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                total -= float(logp[position, label])
                count += 1
    return total / count


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_every_labelled_token_weighs_the_same(batch_size: int) -> None:
    rows = rig.examples(10)
    expected = by_hand(rig.lora_model(dropout=0.5).eval(), rows)
    model = rig.lora_model(dropout=0.5).train()
    assert held_out_loss(model, rows, 0, batch_size) == pytest.approx(expected, abs=2e-6)
    assert model.training  # the mode it came in


def test_rows_without_labels_weigh_nothing() -> None:
    rows = rig.examples(5)
    blank = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    model = rig.lora_model().eval()
    assert held_out_loss(model, [*rows, blank, blank], 0, 2) == pytest.approx(held_out_loss(model, rows, 0, 2), abs=1e-6)
    with pytest.raises(TrainingError, match="no labelled token"):
        held_out_loss(model, [blank], 0)


def test_it_can_be_stopped_between_batches() -> None:
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) > 2

    assert math.isnan(held_out_loss(rig.lora_model(), rig.examples(10), 0, 2, should_stop))
    assert len(asked) == 3


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(TrainingError, match="batch_size is 0"):
        held_out_loss(rig.lora_model(), rig.examples(2), 0, 0)
