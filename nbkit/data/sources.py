"""Rows from a JSONL, JSON or CSV file, a list of dicts, a `datasets.Dataset`, a hub id, or `sample:NAME`.

Files are read with the standard library. A broken line does not spoil the file: it becomes a row with a fault,
so that the rows beside it are used and every row is accounted for.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbkit.data.findings import RowFault
from nbkit.errors import DataError, nearest

SAMPLES = Path(__file__).parent / "samples"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
ACCEPTED = "a .jsonl, .json or .csv file, a list of dicts, a datasets.Dataset, a hub id such as org/name, or sample:ships-log"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CELL_LIMIT = 2**31 - 1  # characters; the csv module stops at 131,072 by itself, and takes a C long


@dataclass(frozen=True)
class Row:
    """One row as it was read; `fault` instead of a value where the line itself is broken."""

    number: int  # 1-based; the line number for JSONL
    value: Any = None
    fault: RowFault | None = None


@dataclass(frozen=True)
class Source:
    name: str
    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        """All columns, in order of first appearance."""
        seen: dict[str, None] = {}
        for row in self.rows:
            if isinstance(row.value, Mapping):
                seen.update(dict.fromkeys(str(key) for key in row.value))
        return list(seen)


def read(source: Any) -> Source:
    """All rows of a source, in order.

    Raises: DataError if the source cannot be opened, is of an unknown kind, or has no rows.
    """
    if isinstance(source, (str, os.PathLike)):
        found = _named(str(source)) if isinstance(source, str) else _file(Path(source))
    elif type(source).__module__.split(".")[0] == "datasets":
        found = _dataset(source)
    elif isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray)):
        found = Source("the list of rows", [Row(i, value) for i, value in enumerate(source, 1)])
    elif isinstance(source, Iterator):
        raise DataError("The rows come from an iterator, which can be read only once; pass list(rows) instead.")
    else:
        raise DataError(f"Rows cannot be read from a {type(source).__name__}; give {ACCEPTED}.")
    if not found.rows:
        raise DataError(f"There are no rows in {found.name}; give a source with at least one row.")
    return found


def _named(name: str) -> Source:
    if name.startswith("sample:"):
        return _sample(name)
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{name[:80]!r} is no usable file name ({error}); give {ACCEPTED}.") from error
    if exists or path.suffix.lower() in SUFFIXES:
        return _file(path)
    if HUB_ID.fullmatch(name):
        return _hub(name)
    raise DataError(f"There is no file {name[:200]!r}, and it is no hub id (org/name); give {ACCEPTED}.")


def _sample(name: str) -> Source:
    folder, _, part = name.removeprefix("sample:").partition("/")
    known = {p.parent.name.replace("_", "-"): p.parent for p in sorted(SAMPLES.glob("*/train.jsonl"))}
    if folder not in known or (part or "train") not in ("train", "held_out"):
        names = [f"sample:{n}{tail}" for n in known for tail in ("", "/held_out")]
        raise DataError(f"There is no sample set {name[:80]!r}; there are {', '.join(names)}.{nearest(name, names)}")
    return Source(name, _jsonl((known[folder] / f"{part or 'train'}.jsonl").read_bytes()))


def _file(path: Path) -> Source:
    suffix = path.suffix.lower()
    if path.is_dir():
        raise DataError(f"{path} is a folder; give one file in it ({', '.join(SUFFIXES)}).")
    if suffix not in SUFFIXES:
        raise DataError(f"{path} ends in {suffix or 'no suffix'}, which nbkit does not read; give {ACCEPTED}.")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        beside = [p.name for p in path.parent.glob("*") if p.suffix.lower() in SUFFIXES] if path.parent.is_dir() else []
        raise DataError(f"There is no file {path}; check the name and the folder.{nearest(path.name, beside)}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; check the file and its rights.") from error
    if not data.strip():
        raise DataError(f"{path} is empty; give a file with at least one row.")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:512]:
        raise DataError(f"{path} is not UTF-8 text (it looks like UTF-16 or a binary file); save it as UTF-8.")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if suffix in (".csv", ".tsv"):
        return Source(str(path), _csv(data, path))
    return Source(str(path), _json(data, path) if suffix == ".json" else _jsonl(data))


def _jsonl(data: bytes) -> list[Row]:
    from tqdm.auto import tqdm

    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    return [_json_line(number, line) for number, line in tqdm(lines, desc="Reading rows", unit=" rows", delay=1, leave=False)]


def _json_line(number: int, line: bytes) -> Row:
    try:
        return Row(number, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        where = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
        return Row(number, fault=RowFault("broken_text", f"line {number} is not UTF-8 text ({where}); save the file as UTF-8"))
    except (ValueError, RecursionError) as error:
        return Row(number, fault=RowFault("broken_line", f"line {number} is not JSON: {_reason(error)}"))


def _json(data: bytes, path: Path) -> list[Row]:
    try:
        values = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} is not UTF-8 text (byte 0x{data[error.start]:02x} in line {line}); save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        rows = _jsonl(data)  # JSON Lines under the name .json is common
        if any(row.fault is None for row in rows) and not data.lstrip().startswith(b"["):
            return rows
        raise DataError(f"{path} is not JSON: {_reason(error)}; mend the file, or save it as JSON Lines (.jsonl).") from error
    if isinstance(values, dict) and data.strip().count(b"\n") == 0:
        return [Row(1, values)]  # one JSON line
    if not isinstance(values, list):
        seen = f"an object with the keys {', '.join(map(str, values))[:200]}" if isinstance(values, dict) else f"{values!r:.80}"
        raise DataError(f"{path} holds {seen}; a .json file must be a list of rows: [{{...}}, {{...}}].")
    return [Row(number, value) for number, value in enumerate(values, 1)]


def _reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"{error.msg} ({line}column {error.colno})"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]


def _csv(data: bytes, path: Path) -> list[Row]:
    # Bytes that are not UTF-8 become lone surrogates, so that only the rows that hold them are refused.
    text = data.decode("utf-8", "surrogateescape")
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    limit = csv.field_size_limit(CELL_LIMIT)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV table: {error}; check its quotes.") from error
    finally:
        csv.field_size_limit(limit)
    columns = lines[0] if lines else []
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise DataError(f"{path} has the column {twice[0]!r} twice; rename one of them.")
    return [_cells(number, columns, cells) for number, cells in enumerate((line for line in lines[1:] if line), 1)]


def _cells(number: int, columns: list[str], cells: list[str]) -> Row:
    if len(cells) > len(columns):
        reason = f"it has {len(cells)} cells, the header has {len(columns)} columns; put texts with commas in quotes"
        return Row(number, fault=RowFault("ragged_row", reason))
    for column, cell in zip(columns, cells, strict=False):
        if any("\udc80" <= letter <= "\udcff" for letter in cell):
            return Row(number, fault=RowFault("broken_text", f"the column {column!r} is not UTF-8 text; save the file as UTF-8"))
    return Row(number, dict(zip(columns, [*cells, *[None] * (len(columns) - len(cells))], strict=True)))


def _hub(name: str) -> Source:
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # the library raises many kinds: not found, gated, no network, no known file
        reason = str(error).strip().split("\n")[0][:200]
        raise DataError(
            f"The data set {name!r} is no file here and could not be loaded from the hub ({type(error).__name__}: {reason}); "
            f"check the name and the network, or give {ACCEPTED}."
        ) from error
    return Source(name, _dataset(splits).rows)


def _dataset(data: Any) -> Source:
    if isinstance(data, Mapping):  # a DatasetDict
        if "train" not in data:
            splits = ", ".join(map(str, data)) or "none"
            raise DataError(f"The data set has no split 'train', but {splits}; load one of them and pass it as the source.")
        data = data["train"]
    if not hasattr(data, "__len__"):
        raise DataError("A streamed data set has no length; pass a list of the rows you want: list(data.take(10_000)).")
    from tqdm.auto import tqdm

    rows: Iterable[Any] = tqdm(data, desc="Reading rows", unit=" rows", delay=1, leave=False)
    return Source("the data set", [Row(number, dict(value)) for number, value in enumerate(rows, 1)])
