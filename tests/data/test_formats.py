"""Formats found with a reason, and the conversion of good and bad rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nbkit.config import DataRecipe
from nbkit.data.findings import REASONS, RowFault
from nbkit.data.formats import SPEAKERS, Conversation, Detected, detect, to_conversation
from nbkit.data.sources import read
from nbkit.errors import DataError

ALPACA = {"instruction": "Add.", "input": "1+1", "output": "2"}
SHAREGPT = {"id": 7, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def found(rows: list[Any], **recipe: Any) -> Detected:
    return detect(read(rows), DataRecipe(**recipe))


def converted(row: Any, like: Any = None, **recipe: Any) -> Conversation:
    """`row` converted by what was found in `like` (or in itself)."""
    return to_conversation(row, found([like or row], **recipe).recipe)


def test_the_three_formats_are_found_with_a_reason() -> None:
    seen = found([ALPACA])
    assert (seen.recipe.format, seen.recipe.columns) == (
        "alpaca",
        {"instruction": "instruction", "input": "input", "output": "output"},
    )
    assert seen.reason == "alpaca, because there are columns 'instruction', 'input', 'output'"
    seen = found([SHAREGPT])
    assert (seen.recipe.format, seen.recipe.columns) == ("sharegpt", {"conversations": "conversations"})
    assert seen.reason == "sharegpt, because the column 'conversations' holds lists of {\"from\", \"value\"}; 'id' not used"
    seen = found([MESSAGES])
    assert (seen.recipe.format, seen.recipe.columns) == ("messages", {"messages": "messages"})


def test_detection_looks_past_bad_rows_at_values_and_at_json_text() -> None:
    assert found([None, 3, {"other": 1}, {"conversations": None}, SHAREGPT]).recipe.format == "sharegpt"
    assert found([{"text": "x", "dialog": MESSAGES["messages"]}]).recipe.columns == {"messages": "dialog"}
    assert found([{"conversations": json.dumps(SHAREGPT["conversations"])}]).recipe.format == "sharegpt"
    assert found([{"conversations": MESSAGES["messages"]}]).recipe.format == "messages"  # the keys decide, not the name
    assert found([{"Instruction": "a", "OUTPUT": "b"}]).recipe.columns == {"instruction": "Instruction", "output": "OUTPUT"}
    assert found([{**ALPACA, "messages": CHAT}]).recipe.format == "messages"
    assert found([{"instruction": MESSAGES["messages"]}, ALPACA, ALPACA]).recipe.format == "alpaca"  # most rows decide
    assert found([{"instruction": "a", "output": "b"}]).recipe.columns == {"instruction": "instruction", "output": "output"}


def test_what_is_found_is_found_again_from_its_own_recipe() -> None:
    for row in (ALPACA, SHAREGPT, MESSAGES):
        once = found([row]).recipe
        assert detect(read([row]), once).recipe == once


def test_an_unknown_format_says_what_was_seen_and_what_is_accepted() -> None:
    with pytest.raises(DataError) as caught:
        found([{"heading": "a", "body": "b"}])
    for part in (
        "'heading', 'body'",
        "alpaca",
        "sharegpt",
        "messages",
        "columns={'instruction': 'heading', 'output': 'body'}",
    ):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="No row of the list of rows is an object with columns; row 1: it is 'text'"):
        found(["text", "more"])
    with pytest.raises(DataError, match="its columns are .* and 80 more"):
        found([{f"c{i}": 1 for i in range(100)}])


def test_the_recipe_names_columns_and_format() -> None:
    row = {"question": "a", "answer": "b", "messages": CHAT}
    columns = {"instruction": "question", "output": "answer"}
    assert converted(row, columns=columns).messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert found([row], format="alpaca", columns=columns).reason.startswith("alpaca, because the recipe says so")
    assert found([{"chat": CHAT}], columns={"messages": "chat"}).recipe.format == "messages"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"columns": {"instruction": "question", "output": "anser"}}, "no column 'anser'.*Did you mean answer"),
        ({"columns": {"instrucion": "question"}}, "'instrucion', which no format has.*Did you mean instruction"),
        ({"columns": {"instruction": "question", "messages": "answer"}}, "which no format has together"),
        ({"format": "sharegpt", "columns": {"output": "answer"}}, "sharegpt has no role 'output'; its roles are conversations"),
        ({"format": "messages"}, "no column 'messages', which the format messages needs.*'question', 'answer'"),
        ({"columns": {"instruction": "question"}}, "no column 'output', which the format alpaca needs"),
    ],
)
def test_recipes_that_do_not_fit(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        found([{"question": "a", "answer": "b"}], **recipe)


def test_alpaca_with_and_without_input() -> None:
    assert [m["content"] for m in converted(ALPACA).messages] == ["Add.\n\n1+1", "2"]
    for nothing in ("", "  ", None, float("nan")):
        assert converted({**ALPACA, "input": nothing}, ALPACA).messages[0]["content"] == "Add."
    assert converted({"instruction": "Add.", "output": "2"}, ALPACA).messages[0]["content"] == "Add."


def test_every_alias_of_a_role() -> None:
    for role, aliases in SPEAKERS.items():
        for alias in aliases:
            value = '{"name": "x"}' if alias.endswith("_call") else "x"
            turns = [{"from": "human", "value": "q"}, {"from": alias.upper(), "value": value}, {"from": "gpt", "value": "y"}]
            assert [m["role"] for m in converted({"conversations": turns}).messages] == ["user", role, "assistant"]


def test_content_parts_and_a_system_message_of_the_recipe() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Hello"}]}
    assert converted(row).messages[0]["content"] == "Hi there"
    assert converted(MESSAGES, system="Be short.").messages == [{"role": "system", "content": "Be short."}, *CHAT]
    assert converted(MESSAGES, system="").messages[0] == {"role": "system", "content": ""}
    own = {"messages": [{"role": "system", "content": "Mine."}, *CHAT]}
    assert converted(own, system="Be short.").messages[0]["content"] == "Mine."


def test_the_rows_of_the_user_are_not_changed() -> None:
    row = {"messages": [dict(turn) for turn in CHAT]}
    converted(row, system="x").messages[-1]["content"] = "changed"
    assert row == MESSAGES


def test_an_open_end_is_left_out_and_said() -> None:
    row = {"messages": [*CHAT, {"role": "user", "content": "And?"}]}
    assert converted(row).messages == CHAT
    assert converted(row).notes == (("open_end", "the last 1 of 3 turns have no reply and are left out"),)
    row = {"messages": [CHAT[0], *CHAT]}
    assert converted(row).notes == (("same_role_twice", "turns 1 and 2 are both the user's"),)


def turn(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        (None, "not_an_object", "the row is None"),
        ([1, 2], "not_an_object", "a list of 2"),
        ("x" * 900, "not_an_object", "xxx…"),
        ({}, "missing_column", "'messages' is missing"),
        ({"messages": None}, "no_messages", "holds no turns"),
        ({"messages": []}, "no_messages", "holds no turns"),
        ({"messages": ""}, "no_messages", "holds no turns"),
        ({"messages": float("nan")}, "no_messages", "holds no turns"),
        ({"messages": "[{'role': 'user'}]"}, "broken_json", "no JSON list"),
        ({"messages": "[" * 100_000}, "broken_json", "no JSON list"),
        ({"messages": 3}, "wrong_type", "is 3, not a list"),
        ({"messages": {"role": "user"}}, "wrong_type", "a dict of 1"),
        ({"messages": ["Hi"]}, "wrong_type", "turn 1 is 'Hi', not an object"),
        ({"messages": [turn("user", "a"), turn("assistent", "b")]}, "unknown_role", "turn 2 has the unknown role 'assistent'"),
        ({"messages": [turn(None, "a")]}, "unknown_role", "turn 1 has the unknown role None"),
        ({"messages": [turn(3, "a")]}, "unknown_role", "unknown role 3"),
        ({"messages": [turn("user", "a")]}, "no_reply", "none of the 1 turns"),
        ({"messages": [turn("system", "a")]}, "no_reply", "none of the 1 turns"),
        ({"messages": [turn("assistant", "a"), *CHAT]}, "reply_first", "first turn is a reply"),
        ({"messages": [turn("system", "s"), turn("assistant", "a"), *CHAT]}, "reply_first", "first turn is a reply"),
        ({"messages": [turn("user", "a"), turn("assistant", None)]}, "null_reply", r"the reply is null \(turn 2\)"),
        ({"messages": [turn("user", "a"), turn("assistant", " \n")]}, "empty_reply", r"the reply is empty \(turn 2\)"),
        ({"messages": [turn("user", "a"), turn("assistant", 5)]}, "wrong_type", "the reply is 5, not text"),
        ({"messages": [turn("user", None), turn("assistant", "a")]}, "null_prompt", r"the prompt is null \(turn 1\)"),
        ({"messages": [turn("user", ""), turn("assistant", "a")]}, "empty_prompt", "the prompt is empty"),
        (
            {"messages": [turn("user", [{"type": "image_url"}]), turn("assistant", "a")]},
            "not_text",
            "a part of the type 'image_url'",
        ),
        ({"messages": [turn("user", "a"), turn("assistant", None, tool_calls=[1])]}, "broken_tool_call", "call 1 of turn 2 is 1"),
        (
            {"messages": [turn("user", "a\ud83d"), turn("assistant", "b")]},
            "broken_text",
            r"the user holds half a character \(U\+D83D\)",
        ),
        ({"messages": [turn("user", "a"), {"role": "assistant"}]}, "null_reply", "the reply is null"),
    ],
)
def test_bad_conversations(row: Any, kind: str, message: str) -> None:
    with pytest.raises(RowFault, match=message) as caught:
        converted(row, MESSAGES)
    assert caught.value.kind == kind
    assert kind in REASONS


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"output": None}, "null_reply", r"the reply is null \(output\)"),
        ({"output": float("nan")}, "null_reply", "the reply is null"),
        ({"output": ""}, "empty_reply", r"the reply is empty \(output\)"),
        ({"output": 42}, "wrong_type", "the reply is 42, not text"),
        ({"output": 10**5000}, "wrong_type", "the reply is of the type int"),
        ({"output": ["a"]}, "wrong_type", "a list of 1"),
        ({"instruction": None}, "null_prompt", "the prompt is null"),
        ({"instruction": "\t"}, "empty_prompt", "the prompt is empty"),
        ({"input": 3}, "wrong_type", "'input' is 3, not text"),
        ({"output": "\udc80"}, "broken_text", "the assistant holds half a character"),
    ],
)
def test_bad_alpaca_rows(change: dict[str, Any], kind: str, message: str) -> None:
    with pytest.raises(RowFault, match=message) as caught:
        converted({**ALPACA, **change}, ALPACA)
    assert caught.value.kind == kind


def test_a_missing_alpaca_column() -> None:
    with pytest.raises(RowFault, match="'output' is missing"):
        converted({"instruction": "a"}, ALPACA)
