"""Writes the sample set `ships-log`: free reports of a ship's watch, each with its terse line for the log.

    python -m nbkit.data.samples.make_ships_log

Every fact of a line stands word for word in its report, so that a small model can learn the task within a minute;
the reports differ in order, wording and chatter. The held-out rows use other wordings and other facts, and share
no run of eight words with a training row. The files are the same on every machine and Python: of `random.Random`
only `random()` is used, whose sequence is fixed for a seed. Standard library only.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from nbkit.data.samples.ships_wording import DIRECTIONS, HELD_OUT, SEAS, TRAIN, Wording

SEED = 1851
TRAIN_ROWS, HELD_OUT_ROWS = 200, 30
NGRAM = 8  # words; no run of that many is shared between a held-out row and a training row


class Dice:
    """Choices from `random.Random.random()` alone."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def below(self, count: int) -> int:
        return int(self._random() * count)

    def pick(self, choices: Sequence):
        return choices[self.below(len(choices))]

    def shuffled(self, choices: Sequence) -> list:
        return [choice for _, choice in sorted(((self._random(), choice) for choice in choices), key=lambda pair: pair[0])]


def facts(wording: Wording, event: str, dice: Dice) -> dict[str, str]:
    """One watch: each value stands word for word in the report and in the line."""
    return {
        "time": f"{dice.below(24):02d}:{dice.pick(wording.minutes):02d}",
        "direction": dice.pick(DIRECTIONS),
        "force": str(2 + dice.below(8)),
        "sea": dice.pick(SEAS),
        "speed": str(3 + dice.below(17)),
        "event": event,
    }


def log_line(fact: dict[str, str]) -> str:
    event = fact["event"].removeprefix("the ").removeprefix("a ").removeprefix("an ")
    return "{time}; wind {direction} {force}; sea {sea}; {speed} knots; ".format(**fact) + event


def report(wording: Wording, fact: dict[str, str], dice: Dice) -> str:
    """What happened is a sentence of its own, anywhere; the other facts come in any order, up to three to a sentence."""
    order = dice.shuffled(("wind", "sea", "speed"))
    order.insert(dice.pick((0, 0, 0, 1, 2, 3)), "time")
    *clauses, event = (dice.pick(wording.clauses[field]).format(**fact) for field in (*order, "event"))
    sentences = []
    while clauses:
        size = 1 + dice.below(3)
        sentences.append(dice.pick((", ", " and ", ", ")).join(clauses[:size]))
        del clauses[:size]
    sentences.insert(dice.pick((len(sentences), len(sentences), dice.below(len(sentences) + 1))), event)
    parts = [dice.pick(wording.openings), *(f"{s[0].upper()}{s[1:]}." for s in sentences), dice.pick(wording.closings)]
    return " ".join(part for part in parts if part)


def row(wording: Wording, event: str, dice: Dice) -> dict[str, str]:
    fact = facts(wording, event, dice)
    return {"instruction": dice.pick(wording.asks), "input": report(wording, fact, dice), "output": log_line(fact)}


def ngrams(rows: Sequence[dict[str, str]], count: int = NGRAM) -> set[tuple[str, ...]]:
    """All runs of `count` words in the rows, whatever their case and punctuation; a row is read from end to end."""
    found: set[tuple[str, ...]] = set()
    for values in rows:
        words = re.findall(r"\w+", " ".join(values.values()).casefold())
        found.update(tuple(words[i : i + count]) for i in range(len(words) - count + 1))
    return found


def make() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training rows, held-out rows)."""
    dice = Dice(SEED)
    events: list[str] = []
    while len(events) < TRAIN_ROWS:
        events += dice.shuffled(TRAIN.events)
    train = [row(TRAIN, event, dice) for event in events[:TRAIN_ROWS]]
    held_out = [row(HELD_OUT, event, dice) for event in HELD_OUT.events[:HELD_OUT_ROWS]]
    shared = ngrams(train) & ngrams(held_out)
    assert not shared, f"{len(shared)} runs of {NGRAM} words are in both sets, such as {' '.join(min(shared))!r}"
    return train, held_out


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "held_out"), make(), strict=True):
        text = "".join(json.dumps(values, ensure_ascii=False) + "\n" for values in rows)
        (folder / f"{name}.jsonl").write_bytes(text.encode("utf-8"))


if __name__ == "__main__":
    write(Path(__file__).parent / "ships_log")
