"""Rows of JSON Lines, JSON, CSV and text files, read in a stream with the standard library.

A broken line does not spoil the file: it becomes a row with a fault, so that the rows beside it are used and every row is
accounted for.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from nbkit.data.archives import Packed
from nbkit.data.findings import RowFault, shorten
from nbkit.data.rows import CELL_LIMIT, Row, Source, Streamed, in_memory
from nbkit.errors import DataError

LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
TEXTS = (".txt", ".md", ".text")
SUFFIXES = (*LINES, ".json", *TABLES, *TEXTS)
JSON_LIMIT = 2**30  # bytes of one JSON value, which is held whole
MARK = b"\xef\xbb\xbf"  # a byte order mark, which some editors put before UTF-8
BINARY = (b"\xff\xfe", b"\xfe\xff", b"PK\3\4", b"PAR1", b"ARROW1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd")
BATCH = 256


def read_file(packed: Packed) -> Source:
    """The rows of one file. Raises: DataError if it is empty, or not text."""
    name, size = packed.name, packed.path.stat().st_size if packed.path.exists() else None
    with packed.open() as stream:
        start = stream.read(512)
        if start.startswith(BINARY) or 10 * start.count(0) > len(start):
            raise DataError(f"{name} is not UTF-8 text (it looks like UTF-16 or a binary file); save it as UTF-8.")
        while start and not start.removeprefix(MARK).strip():
            start = stream.read(BATCH * 512)
        if not start:
            raise DataError(f"{name} is empty; give a file with at least one row.")

    def identify() -> str:
        return fingerprint(packed)

    if packed.suffix in LINES:
        rows: Any = Streamed(lambda: _json_lines(packed))
    elif packed.suffix == ".json":
        rows = _json(packed)
    elif packed.suffix in TABLES:
        rows = Streamed(lambda: _csv(packed))
    else:
        rows = [text_row(1, packed)]
    count = len(rows) if isinstance(rows, list) else None
    return Source(name, rows, count=count, identify=identify, size=None if packed.packing else size)


def fingerprint(*files: Packed) -> str:
    """SHA-256 of the files' bytes, each with the way it is read."""
    digest = hashlib.sha256()
    for packed in files:
        inner = hashlib.sha256()
        with open(packed.path, "rb") as stream:
            while data := stream.read(2**20):
                inner.update(data)
        digest.update(f"{packed.suffix}\0{packed.packing}\0{packed.member}\0".encode("utf-8", "surrogatepass") + inner.digest())
    return digest.hexdigest()


# -- JSON ------------------------------------------------------------------------------------------


def _json_lines(packed: Packed) -> Iterator[Row]:
    with packed.open() as stream:
        number = 0
        while line := stream.readline(CELL_LIMIT + 1):
            number += 1
            if len(line) > CELL_LIMIT and not line.endswith(b"\n"):
                size = len(line) + _skip_line(stream)
                yield Row(number, fault=RowFault("too_big", f"line {number} has {size:,} bytes; {CELL_LIMIT:,} are the most"))
                continue
            if number == 1:
                line = line.removeprefix(MARK)
            if line.strip():
                yield _json_line(number, line)


def _skip_line(stream: BinaryIO) -> int:
    size = 0
    while part := stream.readline(2**20):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _json_line(number: int, line: bytes) -> Row:
    try:
        return Row(number, loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        where = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
        return Row(number, fault=RowFault("broken_text", f"line {number} is not UTF-8 text ({where}); save the file as UTF-8"))
    except _Twice as error:
        return Row(number, fault=RowFault("column_twice", f"line {number} has the column {shorten(error.key)} twice"))
    except (ValueError, RecursionError) as error:
        return Row(number, fault=RowFault("broken_line", f"line {number} is not JSON: {_reason(error)}"))


class _Twice(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(f"the column {shorten(key)} stands twice in one object")
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):  # plain `json.loads` would keep the last one and say nothing
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return made


def loads(text: str) -> Any:
    """JSON, in which no object may have one key twice."""
    return json.loads(text, object_pairs_hook=_object)


def _json(packed: Packed) -> list[Row] | Streamed:
    with packed.open() as stream:
        first = stream.readline(CELL_LIMIT).removeprefix(MARK)
        if isinstance(_json_line(1, first).value, dict):  # JSON Lines under the name .json is common
            return Streamed(lambda: _json_lines(packed))
    with packed.open() as stream:
        data = stream.read(JSON_LIMIT + 1).removeprefix(MARK)
    if len(data) > JSON_LIMIT:
        raise DataError(f"{packed.name} has more than {JSON_LIMIT:,} bytes of JSON in one list; save it as JSON Lines (.jsonl).")
    try:
        values = loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{packed.name} is not UTF-8 text (byte 0x{data[error.start]:02x} in line {line}); save it as UTF-8."
        ) from error
    except _Twice as error:
        raise DataError(f"In {packed.name} {error}; rename one of them.") from error
    except (ValueError, RecursionError) as error:
        lines = Streamed(lambda: _json_lines(packed))
        if not data.lstrip().startswith(b"[") and any(isinstance(row.value, dict) for row in Source("", lines).head):
            return lines
        raise DataError(
            f"{packed.name} is not JSON: {_reason(error)}; mend the file, or save it as JSON Lines (.jsonl)."
        ) from error
    return in_memory(packed.name, _listed(values, packed.name)).rows  # type: ignore[return-value]


def _listed(values: Any, name: str) -> list[Any]:
    if isinstance(values, list):
        return values
    if not isinstance(values, dict):
        raise DataError(f"{name} holds {shorten(values)}; a .json file must be a list of rows: [{{...}}, {{...}}].")
    inside = [value for value in values.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(inside) == 1:  # {"version": "1.1", "data": [{...}, {...}]}
        return inside[0]
    raise DataError(
        f"{name} holds an object with the keys {', '.join(map(str, values))[:200]}; "
        "a .json file must be a list of rows: [{...}, {...}]."
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"{error.msg} ({line}column {error.colno})"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]


# -- texts and tables ------------------------------------------------------------------------------


def text_row(number: int, packed: Packed, file: str | None = None) -> Row:
    """A whole text file as one row: {"text": ...}, and its name where `file` is given."""
    with packed.open() as stream:
        data = stream.read(CELL_LIMIT + 1).removeprefix(MARK)
    if len(data) > CELL_LIMIT:
        what = f"{packed.name} has more than {CELL_LIMIT:,} bytes; split it into several files"
        return Row(number, fault=RowFault("too_big", what))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at position {error.start + 1}"
        return Row(number, fault=RowFault("broken_text", f"{packed.name} is not UTF-8 text ({where}); save the file as UTF-8"))
    return Row(number, {"text": text} if file is None else {"file": file, "text": text})


class _Lines:
    """Feeds the csv module line by line and remembers the lines of the row under way, so that an unclosed quote costs the row
    that opens it and not the rest of the table."""

    def __init__(self, stream: BinaryIO) -> None:
        # Bytes that are not UTF-8 become lone surrogates, so that only the rows that hold them are refused.
        self._text = io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="")
        self._back: deque[str] = deque()
        self._size = 0
        self.row: list[str] = []
        self.number = 0  # of the line read last

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._back.popleft() if self._back else self._text.readline(CELL_LIMIT + 1)
        if not line:
            raise StopIteration
        if self.number == 0:
            line = line.removeprefix("\ufeff")
        self.number += 1
        self.row.append(line)
        self._size += len(line)
        if self._size > CELL_LIMIT:
            while line and not line.endswith(("\n", "\r")):
                line = self._text.readline(2**20)
            raise _TooBig(f"the row has more than {CELL_LIMIT:,} characters")
        return line

    def begin(self) -> None:
        self.row.clear()
        self._size = 0

    def give_up(self) -> int:
        """Only the first line of the row is given up, the lines after it are read again; its number."""
        first = self.number - len(self.row) + 1
        self._back.extendleft(reversed(self.row[1:]))
        self.number = first
        return first


class _TooBig(Exception):
    pass


def _csv(packed: Packed) -> Iterator[Row]:
    with packed.open() as stream:
        lines = _Lines(stream)
        delimiter, columns = _header(lines, packed)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        number = 0
        while True:
            batch: list[Row] = []
            limit = csv.field_size_limit(CELL_LIMIT + 1)  # the module stops at 131,072 by itself, and asks only once for all
            try:
                for _ in range(BATCH):
                    lines.begin()
                    cells = next(reader, None)
                    if cells is None:
                        break
                    if cells:
                        number += 1
                        batch.append(_cells(number, columns, cells))
            except (csv.Error, _TooBig) as error:
                number += 1
                many = len(lines.row) > 1
                batch.append(Row(number, fault=_table_fault(lines.give_up(), many, error)))
                reader, cells = csv.reader(lines, delimiter=delimiter, strict=True), []
            finally:
                csv.field_size_limit(limit)
            yield from batch
            if cells is None:
                return


def _table_fault(line: int, many: bool, error: Exception) -> RowFault:
    if isinstance(error, _TooBig) and not many:
        return RowFault("too_big", f"in line {line} {error}")
    if isinstance(error, _TooBig) or "end of data" in str(error):
        return RowFault("broken_quotes", f"in line {line} a quote is opened that is not closed; double the quotes inside a cell")
    if "expected after" in str(error):
        return RowFault("broken_quotes", f"in line {line} text follows a closing quote; double the quotes inside a cell")
    return RowFault("broken_quotes", f"line {line} is no row of a table ({error})")


def _header(lines: _Lines, packed: Packed) -> tuple[str, list[str]]:
    """(delimiter, columns): of the usual delimiters the one that makes the most columns."""
    try:
        first = next(line for line in lines if line.strip())
        delimiter = max(",;\t", key=lambda mark: len(next(csv.reader([first], delimiter=mark))))
        columns = next(csv.reader(chain([first], lines), delimiter=delimiter, strict=True))
    except (csv.Error, _TooBig) as error:
        raise DataError(f"{packed.name} is not a CSV table: its header cannot be read ({error}); check its quotes.") from error
    if any("\udc80" <= letter <= "\udcff" for column in columns for letter in column):
        raise DataError(f"The header of {packed.name} (line {lines.number}) is not UTF-8 text; save the file as UTF-8.")
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        places = [str(place) for place, column in enumerate(columns, 1) if column == twice]
        raise DataError(
            f"{packed.name} has the column {shorten(twice)} twice (line {lines.number}, columns {', '.join(places)}); "
            "rename one of them in the file."
        )
    return delimiter, columns


def _cells(number: int, columns: list[str], cells: list[str]) -> Row:
    if len(cells) > len(columns):
        reason = f"it has {len(cells)} cells, the header has {len(columns)} columns; put texts with commas in quotes"
        return Row(number, fault=RowFault("ragged_row", reason))
    for column, cell in zip(columns, cells, strict=False):
        if not cell.isascii() and any("\udc80" <= letter <= "\udcff" for letter in cell):
            return Row(number, fault=RowFault("broken_text", f"the column {column!r} is not UTF-8 text; save the file as UTF-8"))
    return Row(number, dict(zip(columns, [*cells, *[None] * (len(columns) - len(cells))], strict=True)))


def beside(path: Path, suffixes: tuple[str, ...]) -> list[str]:
    """The names of files that can be read in the folder of a path that is not there."""
    if not path.parent.is_dir():
        return []
    return [other.name for other in path.parent.glob("*") if other.suffix.lower() in suffixes]
