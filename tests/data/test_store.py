"""Examples in flat arrays read like the lists they stand for, in memory and from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbkit.data import store
from nbkit.data.store import Examples, RaggedBuilder, fingerprint

ROWS = [([1, 2, 3], [False, True, True]), ([4], [True]), ([5, 6, 7, 8], [False, False, False, True]), ([9, 10], [False, True])]


def built(rows: Any = ROWS, folder: Path | None = None) -> store.Ragged:
    builder = RaggedBuilder(folder)
    for ids, trained in rows:
        builder.add(np.asarray(ids, np.int32), np.asarray(trained, bool))
    assert (len(builder), builder.tokens) == (len(rows), sum(len(ids) for ids, _ in rows))
    return builder.finish()


def plain(rows: Any) -> list[dict[str, list[int]]]:
    return [{"input_ids": ids, "labels": [i if t else -100 for i, t in zip(ids, trained, strict=True)]} for ids, trained in rows]


@pytest.mark.parametrize("spill", [1, 4, 1 << 20])
def test_examples_are_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spill: int) -> None:
    monkeypatch.setattr(store, "SPILL", spill)
    tokens = built(folder=tmp_path / "new")
    assert isinstance(tokens.ids, np.memmap) == (spill < 10)
    examples = Examples(tokens, np.asarray([7, 8, 8, 9]), np.arange(4))
    assert list(examples) == plain(ROWS) == examples
    assert (
        examples[-1] == plain(ROWS)[-1] and list(examples[1:3]) == plain(ROWS)[1:3] and list(examples[::-2]) == plain(ROWS)[::-2]
    )
    assert examples.lengths.tolist() == [3, 1, 4, 2] and examples.trained_counts.tolist() == [2, 1, 1, 1]
    assert all(isinstance(number, int) for number in examples[0]["input_ids"])
    some = examples.taken(np.asarray([3, 1]))
    assert list(some) == [plain(ROWS)[3], plain(ROWS)[1]] and some.row_numbers.tolist() == [9, 8]
    assert [ids.tolist() for ids, _ in map(some.arrays, range(2))] == [[9, 10], [4]]
    assert fingerprint(examples, some) == fingerprint(plain(ROWS), list(some))
    for index in (4, -5):
        with pytest.raises(IndexError):
            examples[index]
    assert (tmp_path / "new").exists() == (spill < 10)
    assert not list(tmp_path.glob("new/*"))  # the file of a large set has no name


def test_pairs_and_labels() -> None:
    examples = Examples(built(), np.arange(4), np.arange(4), built(ROWS[::-1]), np.asarray([True, False, True, True]))
    first, worse = plain(ROWS)[0], plain(ROWS)[3]
    assert examples[0] == first | {"rejected_input_ids": worse["input_ids"], "rejected_labels": worse["labels"], "label": True}
    assert examples[1]["label"] is False
    assert examples.lengths.tolist() == [5, 5, 5, 5] and examples.trained_counts.tolist() == [3, 2, 2, 3]
    others = [examples.taken(np.arange(3)), Examples(built(), np.arange(4), np.arange(4), built(ROWS[::-1]))]
    assert len({fingerprint(one) for one in (examples, *others, list(examples)[:2])}) == 4
    assert fingerprint(examples) == fingerprint(list(examples))


def test_parts_make_the_same_examples() -> None:
    for rejected, liked in ((None, None), (built(ROWS[::-1]), None), (None, np.asarray([True, False, True, True]))):
        examples = Examples(built(), np.arange(4), np.asarray([2, 0]), rejected, liked)
        assert Examples.of_parts(examples.parts()) == examples
    assert examples != examples[:1] and examples != 3


def test_an_empty_set() -> None:
    examples = Examples(built([]), np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert len(examples) == 0 and list(examples) == [] and examples.lengths.tolist() == []
