"""The sample set that comes with nbkit: what the README of it claims."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nbkit.config import DataRecipe
from nbkit.data.pipeline import prepare
from nbkit.data.samples import make_ships_log
from nbkit.data.samples.ships_wording import HELD_OUT, TRAIN
from nbkit.data.sources import SAMPLES, read
from tests.data.chats import tokenizer

FOLDER = SAMPLES / "ships_log"
TRAINED = [row.value for row in read("sample:ships-log").rows]
HELD = [row.value for row in read("sample:ships-log/held_out").rows]


def test_the_generator_makes_exactly_the_shipped_files(tmp_path: Path) -> None:
    make_ships_log.write(tmp_path)
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_size_count_and_licence() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 200_000
    assert (len(TRAINED), len(HELD)) == (200, 30)
    assert "Apache-2.0" in (FOLDER / "README.md").read_text(encoding="utf-8")


def words(text: str) -> list[str]:
    return re.sub(r"[^0-9a-z]+", " ", text.lower()).split()


def test_no_run_of_eight_words_is_shared() -> None:
    def runs(rows: list[dict[str, str]]) -> set[str]:
        found = set()
        for row in rows:
            for text in (*row.values(), "\n".join(row.values())):
                said = words(text)
                found |= {" ".join(said[i : i + 8]) for i in range(len(said) - 7)}
        return found

    assert len(runs(HELD)) > 500
    assert runs(TRAINED).isdisjoint(runs(HELD))


def test_held_out_rows_have_other_wordings_and_other_facts() -> None:
    for field in TRAIN.clauses:
        assert set(TRAIN.clauses[field]).isdisjoint(HELD_OUT.clauses[field])
    assert set(TRAIN.asks).isdisjoint(HELD_OUT.asks)
    for place in (0, 4):  # time, event
        assert {row["output"].split("; ")[place] for row in TRAINED}.isdisjoint(row["output"].split("; ")[place] for row in HELD)
    assert len({row["output"].split("; ")[4] for row in HELD}) == 30


def test_no_stock_phrase_opens_or_closes_the_replies() -> None:
    for rows in (TRAINED, HELD):
        for place in (0, -1):
            seen = [row["output"].split()[place] for row in rows]
            assert max(map(seen.count, seen)) <= len(rows) / 10
        assert len({row["output"] for row in rows}) == len(rows)


@pytest.mark.parametrize("rows", [TRAINED, HELD], ids=["train", "held_out"])
def test_every_fact_stands_word_for_word_in_the_report(rows: list[dict[str, str]]) -> None:
    for row in rows:
        fields = row["output"].split("; ")
        assert len(fields) == 5
        time, wind, sea, speed, event = fields
        assert re.fullmatch(r"([01]\d|2[0-3]):\d\d", time)
        assert re.fullmatch(r"wind (north|south)?(east|west)? [2-9]|wind (north|south) [2-9]", wind)
        assert re.fullmatch(r"\d\d? knots", speed)
        for said in (time, *wind.split()[1:], sea.removeprefix("sea "), speed, event):
            assert said in row["input"] or said.capitalize() in row["input"], (said, row)


def test_it_maps_without_a_finding() -> None:
    found = prepare(
        "sample:ships-log", tokenizer("chatml"), DataRecipe(), max_seq_length=2048, held_out="sample:ships-log/held_out"
    )
    assert (found.used, len(found.held_out_examples), found.findings) == (200, 30, ())
    assert (
        json.loads((FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[0])["output"]
        == found.held_out_rows[0][-1]["content"]
    )
