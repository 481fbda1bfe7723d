"""Packed files: read in a stream, refused where they are damaged, locked, unclear, or a bomb."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from nbkit.data import archives
from nbkit.data.sources import read
from nbkit.errors import DataError

ROWS = [{"instruction": f"Say {i}.", "output": "ü" * i or "-"} for i in range(50)]
FREE = 2**22  # what unpacks to less is no bomb; 64 MiB outside of tests
LINES = "\n".join(map(json.dumps, ROWS)).encode()
CSV = ("instruction,output\n" + "".join(f"{r['instruction']},{r['output']}\n" for r in ROWS)).encode()


def values(source: Any) -> list[Any]:
    return [row.value for row in read(source).rows]


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
@pytest.mark.parametrize(("name", "data"), [("a.jsonl", LINES), ("a.csv", CSV), ("a.json", json.dumps(ROWS).encode())])
def test_packed_files_give_their_rows_again_and_again(tmp_path: Path, ending: str, pack: Any, name: str, data: bytes) -> None:
    path = tmp_path / f"{name}.{ending}"
    path.write_bytes(pack(data))
    found = read(path)
    assert [row.value for row in found.rows] == [row.value for row in found.rows] == ROWS
    assert found.fingerprint == read(path).fingerprint


def test_zstandard_comes_with_arrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.jsonl.zst"
    with pyarrow.CompressedOutputStream(str(path), "zstd") as out:
        out.write(LINES)
    assert values(path) == ROWS


def test_an_archive_with_one_file_of_rows(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", **{"README": b"x", "__MACOSX/._a.jsonl": b"x", "deep/a.jsonl": LINES})
    assert values(path) == ROWS
    assert read(path).name == f"{path}, deep/a.jsonl"
    assert values(zipped(tmp_path / "b.zip", **{"train.csv": CSV, "test.csv": b"a,b\n1,2\n"})) == ROWS


def locked(path: Path) -> Path:
    data = bytearray(zipped(path, **{"a.jsonl": LINES}).read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(bytes(data))
    return path


def test_archives_that_are_not_clear(tmp_path: Path) -> None:
    two = zipped(tmp_path / "two.zip", **{"a.csv": CSV, "b.csv": CSV})
    with pytest.raises(DataError, match=r"two.zip holds a.csv, b.csv; unpack it"):
        read(two)
    with pytest.raises(DataError, match="holds picture.png; unpack it"):
        read(zipped(tmp_path / "none.zip", **{"picture.png": b"x"}))
    with pytest.raises(DataError, match="holds nothing"):
        read(zipped(tmp_path / "empty.zip"))
    with pytest.raises(DataError, match="locked with a password"):
        read(locked(tmp_path / "locked.zip"))
    (tmp_path / "no.zip").write_bytes(b"not a zip")
    with pytest.raises(DataError, match="no zip archive that can be read"):
        read(tmp_path / "no.zip")
    with pytest.raises(DataError, match="10,001 files"):
        read(zipped(tmp_path / "many.zip", **{f"{i}.csv": b"" for i in range(10_001)}))
    inside = zipped(tmp_path / "table.zip", **{"a.parquet": b"PAR1"})
    with pytest.raises(DataError, match=r"packed .parquet file, which cannot be read in place; unpack it"):
        read(inside)


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zip"])
@pytest.mark.parametrize("cut", [0.5, 0.95])
def test_files_that_break_off_are_told(tmp_path: Path, ending: str, cut: float) -> None:
    lines = "\n".join(json.dumps({"instruction": str(i), "output": str(i * 7919 % 99991)}) for i in range(6_000)).encode()
    path = tmp_path / f"a.jsonl.{ending}"
    if ending == "zip":
        zipped(path, **{"a.jsonl": lines})
    else:
        path.write_bytes({"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[ending](lines))
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    with pytest.raises(DataError, match="damaged or cut off after|no zip archive"):
        for row in read(path).rows:
            assert row.fault is None


def test_a_damaged_member_of_an_archive_is_told(tmp_path: Path) -> None:
    data = bytearray(zipped(tmp_path / "a.zip", **{"a.jsonl": LINES}).read_bytes())
    data[60:70] = b"\xff" * 10
    (tmp_path / "a.zip").write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"a.zip, a.jsonl is damaged or cut off"):
        values(tmp_path / "a.zip")


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zip", "zst"])
def test_bombs_are_refused_quickly(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", FREE)
    path = tmp_path / f"a.jsonl.{ending}"
    nothing = b" " * (3 * FREE)
    if ending == "zip":
        zipped(path, **{"a.jsonl": nothing})
    elif ending == "zst":
        pyarrow = pytest.importorskip("pyarrow")
        with pyarrow.CompressedOutputStream(str(path), "zstd") as out:
            out.write(nothing)
    else:
        path.write_bytes({"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[ending](nothing))
    assert path.stat().st_size < FREE / 200
    began = time.monotonic()
    with pytest.raises(DataError, match=r"unpacks to more than 4,194,304, as a zip bomb.*if you trust it, unpack it yourself"):
        read(path)
    assert time.monotonic() - began < 20


def test_a_zip_that_lies_about_its_size_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", FREE)
    path = zipped(tmp_path / "a.zip", **{"a.jsonl": b" " * (2 * FREE)})
    data = bytearray(path.read_bytes())
    for mark, at in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        place = data.index(mark) + at
        data[place : place + 4] = (1000).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="zip bomb|damaged or cut off"):
        read(path)
