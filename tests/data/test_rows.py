"""Rows that can be read again and again, and the few that are looked at."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from nbkit.data import rows
from nbkit.data.findings import RowFault
from nbkit.data.rows import Row, Source, Streamed


def test_streamed_rows_begin_anew_and_end_where_they_are_told() -> None:
    drawn: list[int] = []

    def start() -> Iterator[Row]:
        for number in range(1, 10):
            drawn.append(number)
            yield Row(number, {"a": number})

    made = Streamed(start, most=3)
    assert [row.number for row in made] == [row.number for row in made] == [1, 2, 3]
    assert drawn == [1, 2, 3] * 2


def test_what_the_rows_need_lives_as_long_as_they_are_read() -> None:
    class Folder:
        pass

    made = Streamed(lambda: iter([Row(1), Row(2)]))
    made.keeps = Folder()
    alive = weakref.ref(made.keeps)
    reading = iter(made)
    assert next(reading).number == 1
    del made
    gc.collect()
    assert alive() is not None
    assert next(reading).number == 2
    del reading
    gc.collect()
    assert alive() is None


def test_few_rows_are_looked_at_and_fewer_of_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    many = Source("many", Streamed(lambda: (Row(i, {f"c{i % 3}": "x"}) for i in range(10**9))))
    assert len(many.head) == 1000
    assert many.columns == ["c0", "c1", "c2"]
    assert many.estimate is None
    monkeypatch.setattr(rows, "LOOKED_AT_CHARACTERS", 10_000)
    large = Source("large", Streamed(lambda: (Row(i, {"a": [{"b": "x" * 3000}]}) for i in range(10**9))))
    assert len(large.head) == 4
    faulty = Source("faulty", [Row(1, fault=RowFault("broken_line", "x")), Row(2, [1]), Row(3, {"a": 1, 5: 2})])
    assert faulty.columns == ["a", "5"]


def test_the_fingerprint_is_taken_once_when_it_is_asked_for() -> None:
    asked: list[int] = []

    def identify() -> str:
        asked.append(1)
        return "f"

    source = Source("x", [], identify=identify)
    assert asked == []
    assert source.fingerprint == source.fingerprint == "f"
    assert asked == [1]
