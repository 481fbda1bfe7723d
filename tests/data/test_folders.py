"""Folders: the one file of rows, the parts of a set, a set of texts, and folders in which it is not clear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbkit.data.sources import read
from nbkit.errors import DataError

ROW = {"instruction": "a", "output": "b"}


def put(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def values(source: Any) -> list[Any]:
    return [row.value for row in read(source).rows]


def test_a_folder_as_kaggle_has_it(tmp_path: Path) -> None:
    line = json.dumps(ROW)
    assert values(put(tmp_path / "one", **{"README.md": "about", "deep/rows.jsonl": line, ".hidden/x.csv": "a"})) == [ROW]
    competition = put(
        tmp_path / "two", **{"train.csv": "instruction,output\na,b\n", "test.csv": "x\n1\n", "sample_submission.csv": "y\n"}
    )
    assert values(competition) == [ROW]
    assert read(competition).name == str(competition / "train.csv")
    assert values(str(competition)) == [ROW]


def test_the_parts_of_one_set_are_numbered_on(tmp_path: Path) -> None:
    folder = put(tmp_path, **{f"data/train-0000{i}-of-00003.jsonl": json.dumps({"text": str(i)}) + "\n" for i in range(3)})
    put(folder, **{"data/test-00000-of-00001.jsonl": "{}"})
    found = read(folder)
    assert [(row.number, row.value) for row in found.rows] == [(i + 1, {"text": str(i)}) for i in range(3)]
    assert "3 files from train-00000-of-00003.jsonl" in found.name
    before = found.fingerprint
    put(folder, **{"data/train-00001-of-00003.jsonl": "{}"})
    assert read(folder).fingerprint != before


def test_texts_are_rows_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path, **{"b.txt": "two\n", "a.md": "one", "c/d.txt": "three", "picture.png": "x"})
    (tmp_path / "e.txt").write_bytes(b"\xff")
    found = read(tmp_path)
    assert [row.value for row in found.rows] == [
        {"file": "a.md", "text": "one"},
        {"file": "b.txt", "text": "two\n"},
        None,
        {"file": "c/d.txt", "text": "three"},
    ]
    assert found.head[2].fault is not None and "e.txt is not UTF-8" in str(found.head[2].fault)
    assert found.count == 4


def test_folders_that_are_not_clear(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 2 files of rows: a.csv, b.jsonl; give the path of the one you want"):
        read(put(tmp_path / "one", **{"a.csv": "", "b.jsonl": ""}))
    with pytest.raises(DataError, match=r"holds 2 files of rows: train.csv, train.jsonl"):
        read(put(tmp_path / "two", **{"train.csv": "", "train.jsonl": ""}))
    with pytest.raises(DataError, match=r"nothing that can be read \(picture.png\)"):
        read(put(tmp_path / "three", **{"picture.png": "x"}))
    (tmp_path / "four").mkdir()
    with pytest.raises(DataError, match=r"nothing that can be read \(no files\)"):
        read(tmp_path / "four")
