"""How sure the format is, what else it could be, and when nothing is assumed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nbkit.config import DataRecipe
from nbkit.data.formats import Detected, detect
from nbkit.data.sources import read
from nbkit.errors import DataError

CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
OTHER = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}]
SHARE = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


def found(rows: Any, **recipe: Any) -> Detected:
    return detect(read(rows if isinstance(rows, list) else [rows]), DataRecipe(**recipe))


@pytest.mark.parametrize(
    ("row", "form", "columns", "sure"),
    [
        ({"instruction": "a", "output": "b"}, "alpaca", "instruction output", 0.9),
        ({"instruction": "a", "input": "", "output": "b", "text": "x"}, "alpaca", "instruction input output", 0.6),
        ({"conversations": SHARE}, "sharegpt", "conversations", 0.9),
        ({"messages": CHAT}, "messages", "messages", 0.9),
        ({"dialogue": CHAT, "id": 3}, "messages", "dialogue", 0.9),
        ({"messages": json.dumps(CHAT), "tools": "[]"}, "messages", "messages tools", 0.9),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", "prompt completion", 0.9),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt_completion", "prompt completion", 0.5),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", "prompt chosen rejected", 0.9),
        ({"prompt": "a", "chosen": CHAT, "rejected": OTHER}, "preference", "prompt chosen rejected", 0.7),
        ({"chosen": CHAT, "rejected": OTHER, "score": 1.5}, "preference", "chosen rejected", 0.7),
        ({"chosen": SHARE, "rejected": SHARE, "system": "S"}, "preference", "chosen rejected system", 0.7),
        ({"prompt": "a", "completion": "b", "label": False}, "kto", "prompt completion label", 0.7),
        ({"text": "once"}, "text", "text", 0.9),
        ({"question": "a", "answer": "b"}, "prompt_completion", "question answer", 0.6),
        ({"Prompt": "a", "Response": "b"}, "prompt_completion", "Prompt Response", 0.6),
    ],
)
def test_formats_with_their_confidence(row: dict[str, Any], form: str, columns: str, sure: float) -> None:
    seen = found([row] * 5)
    assert (seen.recipe.format, list(seen.recipe.columns.values())) == (form, columns.split())
    assert sure <= seen.confidence <= 1
    assert seen.reason.startswith(f"{form}, because ")
    again = detect(read([row]), seen.recipe)
    assert (again.recipe, again.confidence) == (seen.recipe, 1.0)


def test_the_next_best_reading_is_named() -> None:
    seen = found([{"prompt": "a", "chosen": CHAT, "rejected": OTHER, "messages": CHAT}])
    assert seen.recipe.format == "preference" and seen.runner_up == "messages ('messages')"
    assert "it could also be messages ('messages'): DataRecipe(format='messages') says so" in seen.reason
    alone = found([{"messages": CHAT}])
    assert alone.runner_up is None and "could also" not in alone.reason


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "a", "answer": "b", "prompt": "c", "response": "d"}],
            r"prompt_completion \('prompt', 'response'\).*'question'",
        ),
        ([{"content": "a", "id": 1}], r"may be read as text \('content'\), but not surely \(30%\)"),
        ([{"messages": CHAT}, {"instruction": "a", "output": "b"}] * 5, "may be read as messages .* or as alpaca"),
        ([{"a": "x", "b": "y"}], "is in no known format: its columns are 'a', 'b'"),
    ],
)
def test_nothing_is_assumed_below_half(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        found(rows)
    assert "DataRecipe(format=" in str(caught.value)


def test_bad_rows_do_not_lower_the_confidence_nor_hide_the_format() -> None:
    rows = [None, 3, {"messages": None}, {"messages": "x"}, {}, {"messages": []}] * 10 + [{"messages": CHAT}]
    assert found(rows).confidence > 0.9
    named = found([{"instruction": None, "output": None}] * 3)
    assert named.recipe.format == "alpaca" and named.confidence == 0.5
    assert "though no row holds what belongs there" in named.reason
    assert found([{"conversations": []}]).recipe.format == "sharegpt"


def test_columns_of_a_usual_name_that_hold_something_else_are_left_alone() -> None:
    assert "system" not in found({"messages": CHAT, "system": {"os": "x"}}).recipe.columns
    assert "tools" not in found({"messages": CHAT, "tools": 3}).recipe.columns
    assert "system" not in found({"messages": CHAT, "system": 5}, format="messages").recipe.columns
    assert found({"messages": CHAT, "system": None}).recipe.columns == {"messages": "messages", "system": "system"}


def test_the_recipe_is_followed() -> None:
    row = {"prompt": "a", "chosen": CHAT, "rejected": OTHER, "messages": CHAT, "note": "x"}
    assert found(row, format="messages").recipe.columns == {"messages": "messages"}
    assert found(row, format="messages", columns={"messages": "chosen"}).recipe.columns == {"messages": "chosen"}
    assert found(row, columns={"text": "note"}).recipe.format == "text"
    assert found(
        {"q": "a", "good": "b", "bad": "c"}, columns={"prompt": "q", "chosen": "good", "rejected": "bad"}
    ).recipe.format == ("preference")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"prompt": "{quest}"}, "names the column 'quest', which .* has not.*Did you mean question"),
        ({"prompt": "{question}", "format": "messages"}, "prompt goes with the formats alpaca, .* not with messages"),
        ({"prompt": "{question", "columns": {"completion": "answer"}}, "{ at character 1"),
        ({"prompt": "{question}"}, "no column 'output', which the format alpaca needs"),
        (
            {"columns": {"text": "question", "label": "answer"}},
            "which no format has together with the rest; the roles are alpaca: ",
        ),
        ({"format": "kto"}, "no column 'prompt', which the format kto needs"),
    ],
)
def test_recipes_that_do_not_fit(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        found({"question": "a", "answer": "b"}, **recipe)
