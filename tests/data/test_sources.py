"""Every kind of source, and every way in which one can be broken."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from nbkit.data import archives
from nbkit.data.sources import read
from nbkit.errors import DataError

ROWS = [{"instruction": "a", "output": "b"}, {"instruction": "ü\u2028😀", "output": 'say "c", d\nand e'}]


def values(source: Any) -> list[Any]:
    return [row.value for row in read(source).rows]


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def test_jsonl_is_numbered_by_its_lines(tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    found = read(write(tmp_path / "a.jsonl", "\ufeff" + lines[0] + "\r\n\n  \n" + lines[1]))
    assert [(row.number, row.value) for row in found.rows] == [(1, ROWS[0]), (4, ROWS[1])]
    assert found.name == str(tmp_path / "a.jsonl")
    assert found.columns == ["instruction", "output"]


def test_broken_lines_do_not_spoil_the_file(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0]).encode()
    deep = b"[" * 100_000
    rows = read(write(tmp_path / "a.jsonl", b"\n".join([good, b'{"instruction": "x"', b'{"a": "\xff"}', deep, good]))).head
    assert [row.value for row in rows] == [ROWS[0], None, None, None, ROWS[0]]
    faults = [row.fault for row in rows]
    assert [fault.kind if fault else None for fault in faults] == [None, "broken_line", "broken_text", "broken_line", None]
    assert "line 2 is not JSON" in str(faults[1])
    assert "line 3 is not UTF-8 text (byte 0xff at position 8)" in str(faults[2])
    assert "nested too deeply" in str(faults[3])


def test_json_lists_and_json_lines_under_the_name_json(tmp_path: Path) -> None:
    assert values(str(write(tmp_path / "a.json", json.dumps(ROWS, indent=2)))) == ROWS
    assert values(write(tmp_path / "b.json", "\n".join(map(json.dumps, ROWS)))) == ROWS
    assert values(write(tmp_path / "c.json", json.dumps(ROWS[0]))) == ROWS[:1]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_quotes_newlines_and_any_usual_delimiter(tmp_path: Path, delimiter: str) -> None:
    quoted = ROWS[1]["output"].replace('"', '""')
    text = f'instruction{delimiter}output\r\na{delimiter}b\r\n\r\n{ROWS[1]["instruction"]}{delimiter}"{quoted}"\r\n'
    assert values(write(tmp_path / "a.csv", "\ufeff" + text)) == ROWS
    assert values(write(tmp_path / "a.tsv", text)) == ROWS


def test_csv_with_the_line_ends_of_old(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.csv", 'a,b\r1,2\r"x\ry",3\r')) == [{"a": "1", "b": "2"}, {"a": "x\ry", "b": "3"}]


def test_csv_rows_with_too_few_and_too_many_cells_and_broken_bytes(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.csv", b"instruction,output\na\nb,c,d\ne,\xff\nf,g\n")).head
    assert [row.value for row in rows] == [{"instruction": "a", "output": None}, None, None, {"instruction": "f", "output": "g"}]
    assert [row.fault.kind if row.fault else None for row in rows] == [None, "ragged_row", "broken_text", None]
    assert "3 cells, the header has 2 columns" in str(rows[1].fault)


def test_csv_takes_cells_of_ten_megabytes_and_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    big = "x" * 10_000_000
    assert values(write(tmp_path / "a.csv", f"instruction,output\na,{big}\n")) == [{"instruction": "a", "output": big}]
    assert csv.field_size_limit() == before


def test_lists_datasets_and_split_dictionaries() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    assert values(ROWS) == values(tuple(ROWS)) == values(data) == ROWS
    assert values(datasets.DatasetDict({"train": data, "test": data.select([0])})) == ROWS
    with pytest.raises(DataError, match="no split 'train', but test"):
        read(datasets.DatasetDict({"test": data}))
    streamed = read(data.to_iterable_dataset())
    assert [row.value for row in streamed.rows] == [row.value for row in streamed.rows] == ROWS
    assert streamed.count is None


def test_samples_and_their_nearest_names() -> None:
    assert len(values("sample:ships-log")) >= 100
    assert len(values("sample:ships-log/held_out")) == 30
    assert values("sample:ships-log/train") == values("sample:ships-log")
    for wrong in ("sample:ship-log", "sample:", "sample:../../etc", "sample:ships-log/test", "sample:ships-log/../../secret"):
        with pytest.raises(DataError, match="sample:ships-log/held_out"):
            read(wrong)
    with pytest.raises(DataError, match="Did you mean sample:ships-log"):
        read("sample:ship-log")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.json", b"  \n", "is empty"),
        ("a.json", b"[]", "no rows in"),
        ("a.csv", b"instruction,output\n", "no rows in"),
        ("a.json", b'[{"a": 1},', "is not JSON: .*column"),
        ("a.json", b'{"a": 1,\n "b": [2]}', r"an object with the keys a, b; a .json file must be a list of rows"),
        ("a.json", b'[{"a": "\xff"}]', "byte 0xff in line 1"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16 or a binary file.*save it as UTF-8"),
        ("a.csv", b"PK\3\4\0\0\0\0", "UTF-16 or a binary file"),
        ("a.csv", b'a,"b', "not a CSV table: .*quotes"),
        ("a.csv", b"a,b,a\n1,2,3\n", "the column 'a' twice"),
        ("a.parquet", b"PAR1", "truncated or no parquet file"),
        ("a.arrow", b"ARROW1", "truncated or no arrow file"),
        ("a.parquet", b"", "is empty"),
        ("a.xls", b"x", r"ends in \.xls, which nbkit does not read; give a \.jsonl"),
        ("README", b"text", "ends in no suffix"),
    ],
)
def test_unusable_files_say_what_was_seen(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = write(tmp_path / name, data)
    for source in (path, str(path)):
        with pytest.raises(DataError, match=message) as caught:
            read(source)
        assert "a." in str(caught.value) or name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_files_offer_what_lies_beside(tmp_path: Path) -> None:
    write(tmp_path / "training.jsonl", "{}")
    with pytest.raises(DataError, match=r"no file .*traning.jsonl.*Did you mean training.jsonl\?"):
        read(str(tmp_path / "traning.jsonl"))
    with pytest.raises(DataError, match="no file"):
        read(tmp_path / "nowhere" / "x.csv")


def test_a_drive_that_is_not_mounted_is_said() -> None:
    if Path("/content/drive/MyDrive").is_dir():
        pytest.skip("it is mounted here")
    for source in ("/content/drive/MyDrive/rows.jsonl", Path("/content/drive/MyDrive/rows"), "/content/drive/My Drive"):
        with pytest.raises(DataError, match=r"Google Drive is not mounted; run .*`drive.mount\('/content/drive'\)`"):
            read(source)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes in folders there")
def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read(tmp_path / "a.jsonl")


def test_a_path_that_may_not_be_looked_at_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refused)
    for source in ("/locked/rows.jsonl", Path("/locked/rows.jsonl")):
        with pytest.raises(DataError, match="no usable file name .*Permission denied"):
            read(source)


@pytest.mark.skipif(sys.platform == "win32", reason="rights differ there")
def test_an_unreadable_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", "{}")

    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(archives, "open", refused, raising=False)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read(path)


@pytest.mark.parametrize(
    "name",
    ["", "mydata", "a\0b", "x" * 5000, "no such/thing/at all", "https://example.com/x", "$(rm -rf)", "../..x", "~nobody/x"],
)
def test_strings_that_are_no_source(name: str) -> None:
    with pytest.raises(DataError):
        read(name)


@pytest.mark.parametrize("source", [None, 3, b"bytes", {"a": [1]}, {1, 2}, object()])
def test_things_that_are_no_source(source: Any) -> None:
    with pytest.raises(DataError, match="cannot be read from a .*; give a .jsonl"):
        read(source)


def test_iterators_and_empty_lists() -> None:
    with pytest.raises(DataError, match=r"only once; pass list\(rows\)"):
        read(row for row in ROWS)
    with pytest.raises(DataError, match="no rows in the list of rows"):
        read([])
