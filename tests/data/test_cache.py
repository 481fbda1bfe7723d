"""Prepared sets are found again, never taken for another, and made anew when damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from nbkit.config import DataRecipe
from nbkit.data import cache
from nbkit.data.cache import Cache
from nbkit.data.pipeline import prepare
from nbkit.data.report import DataReport
from tests.data.chats import tokenizer

TOKENIZER = tokenizer("chatml")


@pytest.fixture(autouse=True)
def small_sets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LEAST_TOKENS", 1)
    monkeypatch.setattr(Cache.__init__, "__defaults__", (cache.MOST_BYTES, 1))


def rows(count: int = 30, word: str = "Say") -> list[dict[str, Any]]:
    made = [{"instruction": f"{word} {i}.", "output": f"It is {i}."} for i in range(count)]
    made[3]["output"] = ""
    made[5] = dict(made[4])
    return made


def report(folder: Path, source: Any = None, limit: int = 256, made: Any = TOKENIZER, **settings: Any) -> DataReport:
    source = rows() if source is None else source
    held_out, seed = settings.pop("held_out", 4), settings.pop("seed", 3407)
    recipe = DataRecipe(**settings)
    return prepare(source, made, recipe, max_seq_length=limit, held_out=held_out, seed=seed, cache=folder)


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def read_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a report can only come from what was kept."""
    from nbkit.data import pipeline

    def fail(*_: Any) -> Any:
        raise AssertionError("the rows were mapped again")

    monkeypatch.setattr(pipeline, "collect", fail)


SETS: dict[str, dict[str, Any]] = {
    "split off": {},
    "none held out": {"held_out": None},
    "two sources": {"held_out": [{"instruction": "q", "output": "a"}, {"instruction": "q", "output": None}]},
    "kto": {"source": [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(9)], "held_out": 2},
    "pairs": {"source": [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(9)], "held_out": 2},
    "text": {"source": [{"text": "wind " * (30 * i)} for i in range(1, 9)], "limit": 64, "too_long": "split", "held_out": 2},
}


@pytest.mark.parametrize("which", SETS)
def test_what_was_kept_is_what_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    first = report(tmp_path, **SETS[which])
    assert len(entries(tmp_path)) == 1
    read_without_rows(monkeypatch)
    again = report(tmp_path, **SETS[which])
    for name in vars(first):
        if name not in ("reread", "row_numbers"):
            assert getattr(again, name) == getattr(first, name), name
    assert again.row_numbers.tolist() == first.row_numbers.tolist()
    assert [again.preview(i) for i in range(len(again.examples))] == [first.preview(i) for i in range(len(first.examples))]
    assert str(again) == str(first) and again.repairs == first.repairs


def test_everything_that_the_set_hangs_on_is_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tokenizer("chatml")
    other.chat_template = other.chat_template.replace("\n", "\n ", 1)
    added = tokenizer("chatml")
    added.add_tokens(["It is"])
    changes: list[dict[str, Any]] = [
        {},
        {"source": rows(word="Tell")},
        {"source": rows(31)},
        {"limit": 255},
        {"held_out": 5},
        {"held_out": None},
        {"held_out": 0.2},
        {"seed": 1},
        {"system": ""},
        {"duplicates": "drop"},
        {"train_on": "all"},
        {"made": other},
        {"made": added},
    ]
    for change in changes:
        report(tmp_path, **change)
    assert len(entries(tmp_path)) == len(changes)
    cache._code.cache_clear()
    monkeypatch.setattr(cache, "LIBRARIES", ("numpy",))
    report(tmp_path)
    assert len(entries(tmp_path)) == len(changes) + 1
    cache._code.cache_clear()


def test_an_entry_holds_on_another_day_and_under_another_template_of_the_tokenizers() -> None:
    other = tokenizer("chatml")
    other.chat_template = "{{ strftime_now('%Y') }}" + other.chat_template  # dates are frozen where rows are rendered
    named = DataRecipe(template="chatml")
    assert cache.key_of([], [], DataRecipe(), other) != cache.key_of([], [], DataRecipe(), TOKENIZER)
    assert cache.key_of([], [], named, other) == cache.key_of([], [], named, TOKENIZER)


def test_rows_without_a_fingerprint_are_not_kept(tmp_path: Path) -> None:
    found = report(tmp_path / "cache", [*rows(), {"instruction": "a", "output": {1, 2}}])
    assert found.refused == 2 and not (tmp_path / "cache").exists()


def test_small_sets_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache.__init__, "__defaults__", (cache.MOST_BYTES, 10**6))
    report(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def damages(entry: Path) -> list[tuple[str, str]]:
    return [(path.name, how) for path in entry.iterdir() for how in ("flip", "cut", "empty", "longer", "gone")]


def test_damage_to_any_file_is_seen_and_the_set_made_anew(tmp_path: Path) -> None:
    first = report(tmp_path)
    (entry,) = entries(tmp_path)
    for name, how in damages(entry):
        path = entry / name
        content = path.read_bytes()
        middle = len(content) // 2
        new = {
            "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "cut": content[:middle],
            "empty": b"",
            "longer": content + b"\0",
        }.get(how)
        path.unlink()
        if new is not None:
            path.write_bytes(new)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = report(tmp_path)
        assert again.fingerprint == first.fingerprint and again.findings == first.findings, (name, how)
        assert any("are damaged" in str(w.message) and "made anew" in str(w.message) for w in caught), (name, how)
        assert entries(tmp_path) == [entry] and path.read_bytes() == content


def test_the_least_read_go_when_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        report(tmp_path, seed=number)
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in entries(tmp_path)}
    for age, path in enumerate(entries(tmp_path)):
        os.utime(path / "manifest.json", (1_000_000 - age, 1_000_000 - age))
    stale = tmp_path / ".old.1234.tmp"
    stale.mkdir()
    os.utime(stale, (1, 1))
    before = entries(tmp_path)
    monkeypatch.setattr(Cache.__init__, "__defaults__", (2 * max(sizes.values()) + 100, 1))
    report(tmp_path, seed=9)
    left = entries(tmp_path)
    assert len(left) == 2 and before[0] in left and not stale.exists()


def test_a_folder_that_cannot_be_written_is_said_and_the_rows_are_there(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="prepared rows could not be kept in .*file"):
        found = report(blocked / "cache")
    assert found.used == 25


def test_a_disk_that_is_nearly_full_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.warns(UserWarning, match="could not be kept in .* MiB are needed"):
        assert report(tmp_path).used == 25
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys
from nbkit.data import cache
cache.Cache.__init__.__defaults__ = (cache.MOST_BYTES, 1)
from pathlib import Path
from tests.data.test_cache import report
print(report(Path(sys.argv[1])).fingerprint)
"""


def test_two_processes_may_write_at_once(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {process.communicate(timeout=120)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert said == {report(tmp_path).fingerprint} and len(entries(tmp_path)) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_large_arrays_are_read_through_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    first = report(tmp_path)
    monkeypatch.setattr(cache, "SPILL", 8)
    again = report(tmp_path)
    assert isinstance(again.examples.tokens.ids, np.memmap)
    assert again.examples == first.examples
    (entry,) = entries(tmp_path)
    with (entry / "tokens_ids.bin").open("r+b") as file:
        file.write(b"\xff")
    with pytest.warns(UserWarning, match="tokens_ids.bin is not what was written"):
        assert report(tmp_path).examples == first.examples
