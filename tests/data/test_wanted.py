"""What sft takes of preferences and of KTO, and what is offered where no row is left."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import nbkit
from nbkit.config import DataRecipe, TrainConfig
from nbkit.data import progress, web
from nbkit.data.pipeline import prepare
from nbkit.data.wanted import told, wanted
from nbkit.errors import DataError
from tests.data.chats import tokenizer

TOKENIZER = tokenizer("chatml")


def report(rows: Any, limit: int = 300, held_out: Any = None, **recipe: Any) -> Any:
    return prepare(rows, TOKENIZER, DataRecipe(**recipe), max_seq_length=limit, held_out=held_out)


def kto(*labels: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"q{n}", "completion": f"answer {n}", "label": label} for n, label in enumerate(labels)]


def test_rows_of_kto_with_a_false_label_are_not_trained_by_sft_and_are_counted() -> None:
    found = report(kto(True, False, "no", 1, True), held_out=kto(False, True))
    assert "the method sft trains on the 3 of 5 examples whose label is true" in str(found)
    made = wanted(found)
    assert made.row_numbers.tolist() == [1, 4, 5] and [one["input_ids"] for one in made.examples] == [
        found.examples[place]["input_ids"] for place in (0, 3, 4)
    ]
    assert (made.rows_in, made.used, made.dropped) == (5, 3, 2) == (found.rows_in, 3, found.dropped + 2)
    assert [(one.row, one.outcome) for one in made.findings if one.kind == "unwanted"] == [(2, "dropped"), (3, "dropped")]
    assert made.trained_tokens == sum(label != -100 for one in made.examples for label in one["labels"])
    assert len(made.held_out_examples) == len(made.held_out_rows) == 1 and made.held_out_rows[0][0]["content"] == "q1"
    assert made.preview(1).raw["prompt"] == "q3" and "label" not in made.examples[0]
    shown = nbkit.inspect(found, train=TrainConfig(batch_size=8))
    assert {row for line in shown.batch for row in line.rows} == {1, 4, 5}


def test_of_a_pair_sft_takes_the_better_reply() -> None:
    found = report([{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n} indeed"} for n in range(3)])
    assert "better reply of each of the 3 pairs, never on the worse one" in str(found)
    made = wanted(found)
    assert made.used == 3 and all(set(one) == {"input_ids", "labels"} for one in made.examples)
    assert made.trained_tokens == int(found.examples.tokens.counts.sum()) < found.trained_tokens
    plain = report([{"prompt": "a", "completion": "b"}])
    assert wanted(plain) is plain and not told(plain.examples) and not told([{"input_ids": [1]}])


def test_where_no_row_is_left_the_repair_of_the_first_is_named_and_offered() -> None:
    long = [{"instruction": "a", "output": "wind " * 400}]
    chat = [{"messages": [{"role": r, "content": "x"} for r in ("assistant", "user", "assistant")]}]
    for rows, said, offered in (
        (long, "Raise max_seq_length, or choose DataRecipe(too_long='cut')", {("too_long", "cut"), ("too_long", "split")}),
        (chat, "Leave such a first turn out with DataRecipe(first_reply='skip').", {("first_reply", "skip")}),
        ([{"instruction": "a", "output": ""}], "Fill the cell in.", set()),
    ):
        with pytest.raises(DataError) as raised:
            report(rows)
        assert said in str(raised.value) and {repair.setting for repair in raised.value.repairs} == offered
    assert report(chat, first_reply="skip").used == 1


def turns(*speakers: str) -> dict[str, Any]:
    return {"messages": [{"role": name, "content": f"t{n}"} for n, name in enumerate(speakers)]}


def test_an_unknown_role_is_guessed_where_it_is_certain() -> None:
    found = report([turns("user", "assistant"), turns("alien", "assistant", "alien", "assistant")])
    (repair,) = (one for one in found.repairs if one.setting == ("roles", "guess"))
    assert repair.recipe.roles == {"alien": "user"} and repair.rows == (2,) and "'alien' for the user in row 2" in repair.sentence
    again = prepare([turns("user", "assistant"), turns("alien", "assistant")], TOKENIZER, repair.recipe, max_seq_length=99)
    assert again.used == 2
    with pytest.raises(DataError) as raised:
        report([turns("system", "user", "Zorg")])
    assert [one.recipe.roles for one in raised.value.repairs] == [{"zorg": "assistant"}]
    for unsure in (
        turns("alien", "robot"),
        turns("alien", "alien", "assistant"),
        turns("assistant", "alien"),
        turns("alien", "user"),
        turns("user", "assistant", "alien", "assistant"),
        turns("a=b", "assistant"),
    ):
        found = report([turns("user", "assistant"), unsure], format="messages", columns={"messages": "messages"})
        assert found.refused == 1 and "say who that is with DataRecipe(roles={" in str(found.findings[0])
        assert all(one.setting[0] != "roles" for one in found.repairs)
    both = [turns("user", "assistant"), turns("alien", "assistant"), turns("user", "alien")]
    assert all(one.setting[0] != "roles" for one in report(both).repairs)


class _Answer:
    def __init__(self) -> None:
        self.headers = {"Content-Length": "3000000"}
        self.left = 3_000_000

    def read1(self, size: int) -> bytes:
        size = min(size, self.left)
        self.left -= size
        return b"x" * size


def test_a_download_is_told_to_the_listener_which_may_end_it(tmp_path: Any) -> None:
    heard: list[tuple[str, int, int | None]] = []
    with progress.told_to(lambda *said: heard.append(said)):
        web._download(_Answer(), tmp_path / "rows", "https://example.org/rows")  # type: ignore[arg-type]
    assert heard[-1] == (progress.FETCHING, 3_000_000, 3_000_000)

    def stop(what: str, done: int, total: int | None) -> None:
        raise InterruptedError

    answer = _Answer()
    with progress.told_to(stop), pytest.raises(InterruptedError):
        web._download(answer, tmp_path / "rows", "https://example.org/rows")  # type: ignore[arg-type]
    assert answer.left


def test_padding_at_the_end_of_a_pack_is_shown_as_padding() -> None:
    from nbkit.data.collate import PackCollator
    from nbkit.data.tokens import PADDING, Reader, lines

    found = report([{"instruction": f"a{n}", "output": "b"} for n in range(2)])
    total = int(found.lengths.sum())
    for extra in (1, 9):
        made = PackCollator(TOKENIZER.pad_token_id, total + extra)(list(found.examples))
        (line,) = lines(made, Reader(TOKENIZER))
        assert [token.state for token in line.tokens[total:]] == [PADDING] * extra
        assert line.count(PADDING) == extra and line.documents == 2


def test_the_way_to_an_interactive_figure_is_told_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbkit.data import inspection_html

    shown = nbkit.inspect(report([{"instruction": "a", "output": "b"}]))
    for there in (True, False):
        monkeypatch.setattr(inspection_html, "find_spec", lambda name, there=there: sys if there else None)
        assert ("nbkit.inspect(session).figure()" in shown.histograms_html()) == there


def test_names_of_other_notebooks_are_at_the_top() -> None:
    from nbkit import chat_templates

    for name in chat_templates.__all__:
        assert getattr(nbkit, name) is getattr(chat_templates, name) and name in nbkit.__all__
