"""Rows of parquet and arrow files, of `datasets` objects and of pandas tables, a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nbkit.data.archives import Packed
from nbkit.data.files import fingerprint
from nbkit.data.findings import RowFault, shorten
from nbkit.data.rows import Row, Source, Streamed
from nbkit.errors import DataError, nearest

SUFFIXES = (".parquet", ".arrow", ".feather")
BATCH = 256  # rows taken out of a table together
BATCH_BYTES = 2**24  # and about so many bytes
ROWS_A_BYTE = 2000  # of a file; a row is at least a bit, and packs to no less than a 250th


def read_parquet(path: Path) -> Source:
    """Raises: DataError if the file is truncated or no parquet, or has a column twice."""
    metadata = _opened(path).metadata
    _distinct(list(metadata.schema.to_arrow_schema().names), str(path))
    return Source(
        str(path),
        Streamed(partial(_parquet_rows, path)),
        count=metadata.num_rows,
        identify=partial(fingerprint, Packed(path, ".parquet")),
        size=path.stat().st_size,
    )


def _opened(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is truncated or no parquet file ({_first(error)}); fetch or write it again.") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Row group by row group; where one is damaged, its rows that cannot be read become faults, and the next one is read."""
    with _opened(path) as file:
        number = 0
        for group in range(file.metadata.num_row_groups):
            facts = file.metadata.row_group(group)
            end = number + facts.num_rows
            rows = max(1, min(BATCH, BATCH_BYTES * facts.num_rows // max(facts.total_byte_size, 1)))
            reason = "it holds fewer rows than it says"
            try:
                for batch in file.iter_batches(batch_size=rows, row_groups=[group]):
                    for value in batch.to_pylist():
                        number += 1
                        yield Row(number, value)
            except Exception as error:  # arrow's kinds, and UnicodeDecodeError
                reason = _first(error)
            while number < end:
                number += 1
                what = f"block {group + 1} of {path.name} is damaged here ({reason}); fetch or write the file again"
                yield Row(number, fault=RowFault("broken_block", what))


def read_arrow(path: Path) -> Source:
    """Arrow's IPC files and streams (`datasets` keeps its sets in the latter), mapped into memory, not loaded."""
    _distinct(_names(path), str(path))
    return Source(
        str(path),
        Streamed(partial(_arrow_rows, path)),
        identify=partial(fingerprint, Packed(path, ".arrow")),
        size=path.stat().st_size,
    )


def _names(path: Path) -> list[str]:
    try:
        return _ipc(path).schema.names
    except ValueError as error:  # a name that is no UTF-8
        raise DataError(f"{path} has a damaged head ({_first(error)}); fetch or write it again.") from error


def _ipc(path: Path) -> Any:
    import pyarrow

    try:
        mapped = pyarrow.memory_map(str(path))
        try:
            return pyarrow.ipc.open_stream(mapped)
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(mapped)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is truncated or no arrow file ({_first(error)}); fetch or write it again.") from error


def _arrow_rows(path: Path) -> Iterator[Row]:
    reader = _ipc(path)
    many = getattr(reader, "num_record_batches", None)  # a stream does not know
    batches = reader if many is None else (reader.get_batch(i) for i in range(many))
    number = 0
    try:
        for batch in batches:
            if len(batch) > ROWS_A_BYTE * path.stat().st_size:
                raise ValueError(f"a block says that it has {len(batch):,} rows")
            batch.validate(full=True)  # arrow trusts what lies in memory, and would read beyond it
            step = max(1, min(BATCH, BATCH_BYTES * len(batch) // max(batch.nbytes, 1)))
            for start in range(0, len(batch), step):
                for value in batch.slice(start, step).to_pylist():
                    number += 1
                    yield Row(number, value)
    except (OSError, ValueError, KeyError, OverflowError) as error:  # arrow's kinds are sorts of these
        raise DataError(f"{path} is damaged after row {number:,} ({_first(error)}); fetch or write it again.") from error


# -- what the datasets library holds ---------------------------------------------------------------


def read_saved(folder: Path, split: str) -> Source:
    """A folder written by `save_to_disk`."""
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises many kinds for files that are missing or damaged
        raise DataError(f"{folder} is no whole data set of save_to_disk ({_first(error)}); write it again.") from error
    return read_dataset(data, split, str(folder))


def read_dataset(data: Any, split: str, name: str = "the data set") -> Source:
    """A `datasets.Dataset`, an `IterableDataset`, or a dictionary of splits."""
    if isinstance(data, Mapping):
        if split not in data:
            splits = ", ".join(map(str, data)) or "none"
            raise DataError(
                f"{name[0].upper() + name[1:]} has no split {split!r}, but {splits}; pass the one you want."
                f"{nearest(split, map(str, data))}"
            )
        data = data[split]
    count = len(data) if hasattr(data, "__len__") else None
    mark = getattr(data, "_fingerprint", None)
    return Source(name, Streamed(partial(_dataset_rows, data, name)), count=count, identify=lambda: mark)


def _dataset_rows(data: Iterable[Mapping[str, Any]], name: str) -> Iterator[Row]:
    number = 0
    rows = iter(data)
    while True:
        try:
            value = next(rows, None)
        except Exception as error:  # a stream fails as the network does, and decoding as the codecs do
            raise DataError(f"{name} cannot be read after row {number:,} ({type(error).__name__}: {_first(error)}).") from error
        if value is None:
            return
        number += 1
        yield Row(number, dict(value))


# -- pandas ----------------------------------------------------------------------------------------


def read_frame(frame: Any) -> Source:
    """A pandas DataFrame; cells that hold nothing (NaN, NaT, pandas.NA) are None. Raises: DataError for a column twice."""
    _distinct([str(column) for column in frame.columns], "the table")
    return Source("the table", Streamed(partial(_frame_rows, frame)), count=len(frame))


def _frame_rows(frame: Any) -> Iterator[Row]:
    names = [str(column) for column in frame.columns]
    for start in range(0, len(frame), BATCH):
        part = frame.iloc[start : start + BATCH]
        columns = [part.iloc[:, i].astype(object).where(part.iloc[:, i].notna(), None).tolist() for i in range(len(names))]
        for number, cells in enumerate(zip(*columns, strict=True), start + 1):
            yield Row(number, {name: _plain(cell) for name, cell in zip(names, cells, strict=True)})


def _plain(value: Any) -> Any:
    """numpy's arrays and numbers, as pandas holds the lists of a parquet file, as Python's own."""
    if type(value).__module__ == "numpy":
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _distinct(columns: Sequence[str], name: str) -> None:
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        places = ", ".join(str(place) for place, column in enumerate(columns, 1) if column == twice)
        raise DataError(f"{name} has the column {shorten(twice)} twice (columns {places}); rename one of them.")


def _first(error: BaseException) -> str:
    """The first line of what a library says."""
    return str(error).strip().split("\n")[0][:160] or type(error).__name__
