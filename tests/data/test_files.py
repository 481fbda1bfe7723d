"""Text files line by line: broken rows beside good ones, rows too large, and streams that are never held whole."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from nbkit.data import files
from nbkit.data.rows import Row
from nbkit.data.sources import read
from nbkit.errors import DataError


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def kinds(rows: Any) -> list[str | None]:
    return [row.fault.kind if row.fault else None for row in rows]


def test_a_key_twice_in_an_object_is_told(tmp_path: Path) -> None:
    lines = ['{"a": 1, "b": 2}', '{"a": 1, "a": 2}', '{"m": [{"role": "x", "role": "y"}]}', '{"b": 3}']
    rows = list(read(write(tmp_path / "a.jsonl", "\n".join(lines))).rows)
    assert kinds(rows) == [None, "column_twice", "column_twice", None]
    assert str(rows[1].fault) == "line 2 has the column 'a' twice"
    with pytest.raises(DataError, match="the column 'a' stands twice in one object; rename one"):
        read(write(tmp_path / "a.json", '[{"a": 1, "a": 2}]'))


def test_rows_that_are_too_large_are_told_and_the_rest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CELL_LIMIT", 100)
    big = json.dumps({"a": "x" * 200})
    path = write(tmp_path / "a.jsonl", f'{{"a": 1}}\n{big}\n{{"a": 2}}\n{big}')
    rows = list(read(path).rows)
    assert [(row.number, row.value) for row in rows if not row.fault] == [(1, {"a": 1}), (3, {"a": 2})]
    assert str(rows[1].fault) == "line 2 has 210 bytes; 100 are the most"
    assert kinds(rows) == [None, "too_big", None, "too_big"]
    table = write(tmp_path / "a.csv", f"a,b\n1,2\n{'x' * 300},3\n4,5\n6,{'y' * 101}")
    assert kinds(read(table).rows) == [None, "too_big", None, "too_big"]
    assert [row.value for row in read(table).rows][2] == {"a": "4", "b": "5"}
    text = write(tmp_path / "a.txt", "x" * 101)
    assert "split it into several files" in str(read(text).head[0].fault)


def test_a_cell_of_ten_megabytes_is_a_cell_like_others(tmp_path: Path) -> None:
    row = {"instruction": "a", "output": "x" * 10_000_000}
    path = write(tmp_path / "a.jsonl", "\n".join([json.dumps(row)] * 3))
    assert [found.value == row for found in read(path).rows] == [True] * 3


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_is_never_held_whole(tmp_path: Path, kind: str) -> None:
    row = {"instruction": "q", "output": "y" * 20_000}
    line = json.dumps(row) if kind == "jsonl" else f"q,{row['output']}"
    head = "" if kind == "jsonl" else "instruction,output\n"
    path = write(tmp_path / f"a.{kind}", head + f"{line}\n" * 4000)  # 80 MB
    tracemalloc.start()
    count = sum(found.value == row for found in files.read_file(files.Packed(path, f".{kind}")).rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4000
    assert peak < 30_000_000


def test_an_unclosed_quote_costs_one_row(tmp_path: Path) -> None:
    lines = ["a,b", "1,2", '3,"never closed', "5,6", '7,"two', 'lines"', "8,9"]
    rows = list(read(write(tmp_path / "a.csv", "\n".join(lines))).rows)
    # The quote of line 3 is closed by that of line 5, after which text follows: line 3 is given up and line 4 is read again.
    assert kinds(rows) == [None, "broken_quotes", None, None, None]
    assert [row.value for row in rows if not row.fault] == [
        {"a": "1", "b": "2"},
        {"a": "5", "b": "6"},
        {"a": "7", "b": "two\nlines"},
        {"a": "8", "b": "9"},
    ]
    assert "in line 3 text follows a closing quote; double the quotes" in str(rows[1].fault)
    rows = list(read(write(tmp_path / "b.csv", 'a,b\n1,"x\n2,3\n4,5\n')).rows)
    assert kinds(rows) == ["broken_quotes", None, None]
    assert str(rows[0].fault).startswith("in line 2 a quote is opened that is not closed")


def test_a_header_of_several_lines_and_one_with_other_marks_in_quotes(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.csv", '"a\nb",c\n1,2\n'))
    assert [row.value for row in rows.rows] == [{"a\nb": "1", "c": "2"}]
    rows = read(write(tmp_path / "b.csv", '"x, y, z";c\n1;2\n'))
    assert rows.columns == ["x, y, z", "c"]
    with pytest.raises(DataError, match=r"the column 'a' twice \(line 2, columns 1, 3\); rename one"):
        read(write(tmp_path / "c.csv", "\na,b,a\n1,2,3\n"))
    with pytest.raises(DataError, match=r"header of .*c.csv \(line 1\) is not UTF-8"):
        read(write(tmp_path / "c.csv", b"a,\xff\n1,2\n"))


def test_json_with_one_list_inside_an_object(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.json", '{"version": "1",\n "data": [{"a": 1}, {"a": 2}]}'))
    assert [row.value for row in found.rows] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match="an object with the keys x, y; a .json file must be a list"):
        read(write(tmp_path / "b.json", '{"x": [{"a": 1}],\n "y": [{"a": 2}]}'))
    with pytest.raises(DataError, match="holds 'text'; a .json file must be a list"):
        read(write(tmp_path / "c.json", '"text"'))


def test_json_lines_under_the_name_json_stream_and_keep_their_faults(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.json", '{"a": 1}\nnot json\n{"a": 2}\n'))
    assert kinds(found.rows) == [None, "broken_line", None]
    found = read(write(tmp_path / "a.json", 'not json\n{"a": 2}\n'))
    assert kinds(found.rows) == ["broken_line", None]


def test_a_text_file_is_a_row(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", "\ufeffOne\ntwo.\n")).rows == [Row(1, {"text": "One\ntwo.\n"})]
    fault = read(write(tmp_path / "a.md", b"caf\xe9")).head[0].fault
    assert fault is not None and fault.kind == "broken_text" and "byte 0xe9 at position 4" in str(fault)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_told_with_what_to_do(tmp_path: Path, encoding: str) -> None:
    for name in ("a.csv", "a.jsonl", "a.txt"):
        with pytest.raises(DataError, match="not UTF-8 text .*UTF-16.*save it as UTF-8"):
            read(write(tmp_path / name, "instruction,output\na,b\n".encode(encoding)))


def test_the_fingerprint_follows_the_content_and_the_way_it_is_read(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", '{"a": 1}'), write(tmp_path / "b.jsonl", '{"a": 1}')
    assert read(one).fingerprint == read(two).fingerprint
    assert read(write(tmp_path / "a.txt", '{"a": 1}')).fingerprint != read(one).fingerprint
    before = read(one).fingerprint
    write(one, '{"a": 2}')
    assert read(one).fingerprint != before
    assert read([{"a": 1}]).fingerprint is None


def test_a_limit_and_an_estimate(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"a": "x" * 90}) + "\n" for _ in range(5000)))
    found = read(path)
    assert found.count is None and 4000 < (found.estimate or 0) < 7000
    few = read(path, limit=7)
    assert len(list(few.rows)) == len(list(few.rows)) == 7
    assert few.fingerprint == f"{found.fingerprint}[:7]"
    assert [row.value for row in read([{"a": 1}, {"a": 2}], limit=1).rows] == [{"a": 1}]
    with pytest.raises(DataError, match="limit is 0"):
        read(path, limit=0)
