"""What every source gives: numbered rows that can be read again and again, and a few facts about them. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from nbkit.data.findings import RowFault
from nbkit.errors import DataError

LOOKED_AT = 1000  # rows that are looked at to find the columns and the format
LOOKED_AT_CHARACTERS = 2**26  # and no more text than this, however large the rows are
CELL_LIMIT = 2**26  # characters of one line or one text file; what is larger is told, not read


@dataclass(frozen=True)
class Row:
    """One row as it was read; `fault` instead of a value where the line itself is broken."""

    number: int  # 1-based; the line number for JSONL
    value: Any = None
    fault: RowFault | None = None


class Streamed:
    """Rows that are read anew each time they are iterated over, one after the other, and never held together.

    Args:
        start: called for each pass; gives the rows in order.
        most: rows after which a pass ends; None for all.

    Attributes:
        keeps: what has to live as long as the rows can be read, such as a temporary folder.
    """

    def __init__(self, start: Callable[[], Iterable[Row]], most: int | None = None) -> None:
        self._start, self._most = start, most
        self.keeps: Any = None

    def __iter__(self) -> Iterator[Row]:
        yield from islice(self._start(), self._most)  # a generator, which holds on to `self` and so to `keeps`


@dataclass
class Source:
    """Where rows come from.

    Attributes:
        name: as messages call it.
        rows: `Row`s in order, to be iterated over as often as one likes. A list where the rows are in memory anyway; `Streamed`
            where they are in a file, so that a set larger than memory is never held whole.
        count: how many rows there are, where that is known without reading them.
        identify: gives the `fingerprint`; called once, when it is asked for.
    """

    name: str
    rows: list[Row] | Streamed
    count: int | None = None
    identify: Callable[[], str | None] | None = None
    size: int | None = None  # bytes, where the rows lie in a file

    @cached_property
    def head(self) -> list[Row]:
        """The first 1,000 rows, fewer where they are very large."""
        rows: list[Row] = []
        room = LOOKED_AT_CHARACTERS
        for row in islice(iter(self.rows), LOOKED_AT):
            rows.append(row)
            room -= _characters(row.value)
            if room < 0:
                break
        return rows

    @cached_property
    def columns(self) -> list[str]:
        """The columns seen in `head`, in order of first appearance."""
        seen: dict[str, None] = {}
        for row in self.head:
            if isinstance(row.value, Mapping):
                seen.update(dict.fromkeys(str(key) for key in row.value))
        return list(seen)

    @cached_property
    def fingerprint(self) -> str | None:
        """A cheap identity of the content (SHA-256 of a file's bytes, the fingerprint of a `datasets.Dataset`), or None where
        there is none. It is the same only where the rows are."""
        return self.identify() if self.identify else None

    @cached_property
    def estimate(self) -> int | None:
        """About how many rows there are, for a progress bar: `count`, or the file's size by that of the first rows."""
        if self.count is not None or self.size is None:
            return self.count
        if len(self.head) < LOOKED_AT:
            return len(self.head)
        characters = sum(_characters(row.value) for row in self.head)
        return max(len(self.head), round(self.size * len(self.head) / max(characters, 1)))


def in_memory(name: str, values: Iterable[Any], limit: int | None = None) -> Source:
    rows = [Row(number, value) for number, value in enumerate(islice(values, limit), 1)]
    return Source(name, rows, count=len(rows))


def checked(source: Source) -> Source:
    """The source, if it has a row. Raises: DataError."""
    if not source.head:
        raise DataError(f"There are no rows in {source.name}; give a source with at least one row.")
    return source


def _characters(value: Any, depth: int = 4) -> int:
    """About how much text a value holds."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if depth and isinstance(value, Mapping):
        return sum(_characters(key, 0) + _characters(inner, depth - 1) for key, inner in value.items()) + 8
    if depth and isinstance(value, (list, tuple)):
        return sum(_characters(inner, depth - 1) for inner in value) + 8
    return 8
