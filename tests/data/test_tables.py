"""Parquet, arrow, what `datasets` holds, and pandas tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbkit.config import DataRecipe
from nbkit.data.formats import detect, to_conversation
from nbkit.data.sources import read
from nbkit.errors import DataError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
ROWS = [{"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"A{i}" * 20}]} for i in range(1000)]


def parquet(path: Path, rows: list[Any] = ROWS, **settings: Any) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **settings)
    return path


def values(source: Any) -> list[Any]:
    return [row.value for row in read(source).rows]


def test_parquet_in_several_blocks(tmp_path: Path) -> None:
    found = read(parquet(tmp_path / "a.parquet", row_group_size=300))
    assert (found.count, found.estimate, found.columns) == (1000, 1000, ["messages"])
    rows = list(found.rows)
    assert [row.value for row in rows] == [row.value for row in found.rows] == ROWS
    assert [row.number for row in rows] == list(range(1, 1001))


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_parquet_file_is_told(tmp_path: Path, keep: float) -> None:
    path = parquet(tmp_path / "a.parquet")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(DataError, match=r"a.parquet is (truncated or no parquet file .*; fetch or write it again|empty)"):
        read(path)


def test_a_damaged_block_costs_its_rows_and_no_others(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", row_group_size=250, compression="none", use_dictionary=False)
    import pyarrow.parquet

    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(1)
    start = min(group.column(i).data_page_offset for i in range(group.num_columns))
    data = bytearray(path.read_bytes())
    data[start : start + 2000] = b"\xff" * 2000
    path.write_bytes(bytes(data))
    rows = list(read(path).rows)
    assert [row.number for row in rows] == list(range(1, 1001))
    bad = [row for row in rows if row.fault]
    assert {row.number for row in bad} <= set(range(251, 501)) and bad[-1].number == 500
    assert bad[0].fault is not None and "block 2 of a.parquet is damaged" in str(bad[0].fault)
    assert all(row.value == ROWS[row.number - 1] for row in rows if not row.fault)


def test_columns_twice(tmp_path: Path) -> None:
    import pandas
    import pyarrow.parquet

    table = pyarrow.table([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"the column 'a' twice \(columns 1, 2\); rename one"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the table has the column 'a' twice"):
        read(pandas.DataFrame([[1, 2]], columns=["a", "a"]))


def test_arrow_streams_and_files(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    with pyarrow.OSFile(str(tmp_path / "b.feather"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    for name in ("a.arrow", "b.feather"):
        assert values(tmp_path / name) == values(tmp_path / name) == ROWS
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a.arrow is (damaged after row \d+|truncated)"):
        values(tmp_path / "a.arrow")


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(tmp_path / "two")
    assert values(tmp_path / "one") == values(tmp_path / "two") == ROWS
    assert [row.value for row in read(tmp_path / "two", split="test").rows] == [ROWS[3]]
    with pytest.raises(DataError, match="no split 'tset', but train, test.*Did you mean test"):
        read(tmp_path / "two", split="tset")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"x")
    with pytest.raises(DataError, match="no whole data set of save_to_disk"):
        read(tmp_path / "one")


def test_data_sets_know_their_count_and_identity() -> None:
    data = datasets.Dataset.from_list(ROWS)
    found = read(data)
    assert (found.count, found.fingerprint) == (1000, data._fingerprint)
    assert [row.value for row in found.rows] == [row.value for row in found.rows] == ROWS
    assert read(data.select(range(10))).fingerprint != found.fingerprint


def test_a_stream_is_read_as_far_as_is_needed_and_its_failure_is_told() -> None:
    drawn = []

    def rows() -> Iterator[dict[str, Any]]:
        for i in range(2**40):
            drawn.append(i)
            if i == 1500:
                raise ConnectionError("the line is dead")
            yield {"instruction": str(i), "output": "x"}

    found = read(datasets.IterableDataset.from_generator(rows))
    assert found.count is None and found.fingerprint is None
    assert len(drawn) <= 1100
    with pytest.raises(DataError, match=r"cannot be read after row 1,500 \(.*the line is dead"):
        list(found.rows)


def test_pandas_tables(tmp_path: Path) -> None:
    import numpy
    import pandas

    frame = pandas.DataFrame(
        {
            "instruction": ["a", None, float("nan"), "d"],
            "output": pandas.array(["x", pandas.NA, "y", "z"], dtype="string"),
            "count": pandas.array([1, None, 2, 3], dtype="Int64"),
            "turns": [numpy.array([{"role": "user"}], dtype=object), [1], None, numpy.array([[1, 2]])],
        },
        index=[3, 3, 1, 0],
    )
    assert values(frame) == [
        {"instruction": "a", "output": "x", "count": 1, "turns": [{"role": "user"}]},
        {"instruction": None, "output": None, "count": None, "turns": [1]},
        {"instruction": None, "output": "y", "count": 2, "turns": None},
        {"instruction": "d", "output": "z", "count": 3, "turns": [[1, 2]]},
    ]
    assert read(frame).count == 4
    found = read(pandas.read_parquet(parquet(tmp_path / "a.parquet")))
    assert [row.value for row in found.rows] == ROWS
    recipe = detect(found, DataRecipe()).recipe
    assert to_conversation(found.head[0].value, recipe).messages == ROWS[0]["messages"]
    with pytest.raises(DataError, match="no rows in the table"):
        read(pandas.DataFrame({"a": []}))
    with pytest.raises(DataError, match="cannot be read from a Series"):
        read(frame["instruction"])
