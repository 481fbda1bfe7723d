"""Rows that are too long: cut and split where one message ends, every token and every row accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbkit.config import IGNORE_INDEX, DataRecipe
from nbkit.data.pipeline import prepare
from nbkit.data.report import DataReport
from nbkit.errors import DataError
from tests.data.chats import tokenizer

TOKENIZER = tokenizer("chatml")


def report(rows: Any, limit: int, **recipe: Any) -> DataReport:
    return prepare(rows, TOKENIZER, DataRecipe(**recipe), max_seq_length=limit)


def chat(sizes: list[int], system: str | None = None, names: str = "u{}", reply: str = "a{}") -> dict[str, Any]:
    """A conversation whose turns are of so many words; each turn begins with its own name."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    for number, size in enumerate(sizes):
        role, name = (("user", names), ("assistant", reply))[number % 2]
        messages.append({"role": role, "content": " ".join([name.format(number), *["wind"] * size])})
    return {"messages": messages}


def texts(found: DataReport) -> list[str]:
    return ["".join(text for text, _ in found.preview(index).pieces) for index in range(len(found.examples))]


def tokens(row: dict[str, Any]) -> int:
    return int(report([row], 100_000).lengths[0])


def check(found: DataReport, rows_in: int, limit: int) -> None:
    assert found.rows_in == rows_in == found.used + found.dropped + found.refused
    assert len(set(found.row_numbers.tolist())) == found.used
    assert found.total_tokens == sum(len(e["input_ids"]) for e in found.examples) == found.lengths.sum()
    assert found.trained_tokens == found.trained_counts.sum()
    for example in found.examples:
        assert len(example["input_ids"]) == len(example["labels"]) <= limit
        assert any(label != IGNORE_INDEX for label in example["labels"][1:])
        assert all(label in (IGNORE_INDEX, token) for label, token in zip(example["labels"], example["input_ids"], strict=True))


def test_a_row_is_cut_after_the_last_reply_that_fits() -> None:
    row = chat([3, 5, 3, 40, 3, 5])
    two, four = tokens(chat([3, 5])), tokens(chat([3, 5, 3, 40]))
    for limit, kept in ((four - 1, two), (four, four), (two, two)):
        found = report([row, chat([1, 1])], limit, too_long="cut")
        check(found, 2, limit)
        assert found.examples[0]["input_ids"] == report([row], 10_000).examples[0]["input_ids"][:kept]
        (finding,) = (f for f in found.findings if f.kind == "cut")
        turns = 2 if kept == four else 4
        lost = tokens(row) - kept
        assert finding.outcome == "used" and finding.sentence.startswith(f"the last {turns} of 6 turns are cut off, {lost} of ")
    found = report([row, chat([1, 1])], two - 1, too_long="cut")
    check(found, 2, two - 1)
    assert found.refused == 1 and "cut after its first reply it would still be too long" in found.findings[0].sentence


def test_a_single_turn_that_does_not_fit_is_refused_whatever_the_recipe_says() -> None:
    for way, why in (("cut", "it is a single turn"), ("split", "no turns between which it could be split")):
        found = report([chat([1, 100]), chat([1, 1])], 60, too_long=way)
        check(found, 2, 60)
        assert (found.used, found.refused) == (1, 1) and why in found.findings[0].sentence


def test_a_row_is_split_into_conversations_with_the_system_message() -> None:
    row = chat([3, 20, 3, 20, 3, 20, 3, 5], system="Be brief.")
    limit = tokens(chat([3, 20, 3, 20], system="Be brief."))
    found = report([chat([1, 1]), row, chat([2, 2])], limit, too_long="split")
    check(found, 3, limit)
    assert (found.rows_in, found.used, len(found.examples)) == (3, 3, 4)
    assert found.row_numbers.tolist() == [1, 2, 2, 3] and found.example_row(2) == 2
    first, second = texts(found)[1:3]
    assert all("Be brief." in text for text in (first, second))
    assert [name in first for name in ("u0", "a1", "u2", "a3", "u4")] == [True, True, True, True, False]
    assert [name in second for name in ("a3", "u4", "a5", "u6", "a7")] == [False, True, True, True, True]
    (finding,) = found.findings
    assert "is made into 2 conversations, each with the system message" in finding.sentence and finding.kind == "split"
    assert "rows that were split make 4 examples of 3 rows" in str(found)


def test_a_turn_that_fits_nowhere_is_left_out_and_told() -> None:
    found = report([chat([3, 5, 3, 200, 3, 5])], 80, too_long="split")
    check(found, 1, 80)
    assert len(found.examples) == 2 and "the turns 3 to 4 are too long alone and are left out" in found.findings[0].sentence
    with pytest.raises(DataError, match="each of its turns alone is too long"):
        report([chat([3, 200, 3, 200])], 80, too_long="split")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(
        st.lists(st.integers(0, 30), min_size=2, max_size=12).map(lambda s: s[: len(s) // 2 * 2]), min_size=1, max_size=4
    ),
    limit=st.integers(20, 150),
    way=st.sampled_from(["cut", "split", "drop", "refuse"]),
    system=st.sampled_from([None, "Be brief."]),
)
def test_no_token_is_trained_twice_or_lost_untold(sizes: list[list[int]], limit: int, way: str, system: str | None) -> None:
    rows = [chat(turns, system) for turns in sizes]
    try:
        found = report(rows, limit, too_long=way)
    except DataError:
        assert all(tokens(row) > limit for row in rows)
        return
    check(found, len(rows), limit)
    whole = report(rows, 100_000)
    told = {finding.row: finding.sentence for finding in found.findings if finding.kind in ("cut", "split")}
    for number in range(1, len(rows) + 1):
        mine = [found.trained_counts[i] for i in range(len(found.examples)) if found.example_row(i) == number]
        complete = whole.lengths[number - 1] <= limit
        assert complete == (number in found.row_numbers and number not in told)
        if complete or (way == "split" and mine and "left out" not in told[number]):
            assert sum(mine) == whole.trained_counts[number - 1]
        elif mine:
            assert 0 < sum(mine) < whole.trained_counts[number - 1]
    if way == "cut":  # nothing longer would have fitted
        for number in told:
            kept = next(found.lengths[i] for i in range(len(found.examples)) if found.example_row(i) == number)
            messages = rows[number - 1]["messages"]
            longer = [
                tokens({"messages": messages[:end]})
                for end in range(2, len(messages) + 1)
                if messages[end - 1]["role"] == "assistant"
            ]
            assert kept == max(size for size in longer if size <= limit)


@pytest.mark.parametrize("way", ["cut", "split"])
def test_raw_text_ends_between_words_and_no_token_is_lost(way: str) -> None:
    text = " ".join(f"word{i}" for i in range(300))
    whole = report([{"text": text}], 100_000, format="text")
    found = report([{"text": text}, {"text": "short"}], 64, format="text", too_long=way)
    check(found, 2, 64)
    pieces = [found.examples[i]["input_ids"] for i in range(len(found.examples)) if found.example_row(i) == 1]
    ids = whole.examples[0]["input_ids"]
    if way == "cut":
        (piece,) = pieces
        assert piece == ids[: len(piece)] and len(piece) > 50 and "so that it has no stop token" in found.findings[0].sentence
    else:
        assert [token for piece in pieces for token in piece] == ids
        assert min(map(len, pieces)) > 32 and f"is made into {len(pieces)} pieces" in found.findings[0].sentence
    for text_of_piece in texts(found)[:-1]:
        assert text_of_piece.split()[0].startswith("word")


def test_pieces_of_text_begin_with_bos_where_the_text_does() -> None:
    from tokenizers import processors

    made = tokenizer("chatml")
    bos = made.bos_token_id
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{made.bos_token} $A", special_tokens=[(made.bos_token, bos)]
    )
    text = " ".join(f"word{i}" for i in range(200))
    recipe = DataRecipe(format="text", too_long="split")
    whole = prepare([{"text": text}], made, DataRecipe(format="text"), max_seq_length=5_000).examples[0]["input_ids"]
    assert whole[0] == bos
    for limit in (*range(40, 60), len(whole) - 1, len(whole) // 2, len(whole) // 2 + 1):
        found = prepare([{"text": text}], made, recipe, max_seq_length=limit)
        check(found, 1, limit)
        pieces = [example["input_ids"] for example in found.examples]
        assert "each begins with BOS" in found.findings[0].sentence
        assert all(piece[0] == bos and bos not in piece[1:] for piece in pieces)
        assert [token for piece in pieces for token in piece[1:]] == whole[1:]
        assert all(e["labels"][0] == IGNORE_INDEX and IGNORE_INDEX not in e["labels"][1:] for e in found.examples)
    found = prepare([{"text": text}], made, recipe, max_seq_length=50)
    for index in range(len(found.examples)):
        (lead, first), (rest, second) = found.preview(index).pieces
        assert (lead, first, second) == (made.bos_token, False, True) and rest.startswith(("word", " word"))
    shown = texts(found)
    assert all(one.startswith(made.bos_token) for one in shown)
    assert "".join(one.removeprefix(made.bos_token) for one in shown) == text + made.eos_token


def test_a_pair_is_neither_cut_nor_split() -> None:
    long = {"prompt": "q", "chosen": "good " * 100, "rejected": "bad"}
    short = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    for way in ("cut", "split"):
        found = report([long, short], 64, too_long=way)
        assert (found.used, found.refused) == (1, 1)
        assert "a pair of answers can be neither cut nor split" in found.findings[0].sentence


def test_tool_calls_are_not_parted_from_their_answers() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    turns = [
        {"role": "user", "content": "u0"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "blue " * 30},
        {"role": "assistant", "content": "a3"},
    ]
    rows = [{"messages": [*chat([2, 2])["messages"], *turns]}, chat([1, 1])]
    limit = report(rows, 10_000, template="qwen-2.5").lengths[0] - 1
    found = report(rows, limit, template="qwen-2.5", too_long="cut")
    check(found, 2, limit)
    assert found.used == 2 and "the last 4 of 6 turns" in found.findings[0].sentence
    assert json.dumps("sky") not in texts(found)[0]
    ends_with_call = [*chat([2, 9])["messages"], *turns[:2]]
    limit = report([{"messages": ends_with_call}], 10_000, template="qwen-2.5").lengths[0] - 1
    found = report([{"messages": ends_with_call}], limit, template="qwen-2.5", too_long="split")
    check(found, 1, limit)
    assert len(found.examples) == 2 and "sky" in texts(found)[1]


def test_a_row_that_changed_since_is_not_shown_as_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [chat([n, n]) for n in range(1, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = prepare(path, TOKENIZER, DataRecipe(), max_seq_length=100)
    assert [found.preview(i).raw for i in (3, 0, 2, 2, 1)] == [rows[i] for i in (3, 0, 2, 2, 1)]
    found = prepare(path, TOKENIZER, DataRecipe(), max_seq_length=100)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]), encoding="utf-8")
    with pytest.raises(DataError, match="Row 4 of .* is no longer what it was; read the data again"):
        found.preview(3)
    found = prepare(path, TOKENIZER, DataRecipe(), max_seq_length=100)
    path.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="Row 4 is no longer in"):
        found.preview(3)
