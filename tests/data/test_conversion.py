"""Rows of the formats beyond plain turns: prompts and completions, preferences, KTO, raw text, tools, thinking, repairs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nbkit.config import DataRecipe
from nbkit.data.findings import REASONS, REPAIRS, RowFault
from nbkit.data.formats import Conversation, detect, to_conversation
from nbkit.data.sources import read

USER, REPLY = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
WORSE = {"role": "assistant", "content": "B"}
SYSTEM = {"role": "system", "content": "S"}
CHAT = [USER, REPLY]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}


def said(row: Any, like: Any = None, **recipe: Any) -> Conversation:
    """`row` converted by what is found in `like` (or in itself)."""
    return to_conversation(row, detect(read([like or row]), DataRecipe(**recipe)).recipe)


def share(*turns: dict[str, str]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


@pytest.mark.parametrize("form", ["text", "messages", "sharegpt", "json"])
def test_prompt_and_completion(form: str) -> None:
    made: dict[str, Any] = {
        "text": {"prompt": "Q", "completion": "A"},
        "messages": {"prompt": [USER], "completion": [REPLY]},
        "sharegpt": {"prompt": share(USER), "completion": share(REPLY)},
        "json": {"prompt": json.dumps([USER]), "completion": json.dumps([REPLY])},
    }
    found = said(made[form])
    assert (found.messages, found.completion_start, found.rejected, found.label) == (CHAT, 1, None, None)
    longer = said({"prompt": [SYSTEM, USER, REPLY, USER], "completion": [REPLY]})
    assert (len(longer.messages), longer.completion_start) == (5, 4)
    assert said({"prompt": "Q", "completion": "A", "system": "S"}).completion_start == 2
    assert said(made[form], system="S").messages == [SYSTEM, *CHAT]


@pytest.mark.parametrize("turns", [lambda *t: list(t), share, lambda *t: json.dumps(t)])
def test_preferences_with_and_without_their_prompt(turns: Any) -> None:
    for row in (
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": turns(REPLY), "rejected": turns(WORSE)},
        {"prompt": turns(USER), "chosen": turns(REPLY), "rejected": turns(WORSE)},
        {"prompt": "Q", "chosen": turns(USER, REPLY), "rejected": turns(USER, WORSE)},
        {"chosen": turns(USER, REPLY), "rejected": turns(USER, WORSE)},
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
    ):
        found = said(row)
        assert found.messages == CHAT, row
        assert found.rejected == [USER, WORSE]
        assert found.completion_start == 1
    found = said({"chosen": turns(SYSTEM, USER, REPLY, USER, REPLY), "rejected": turns(SYSTEM, USER, REPLY, USER, WORSE)})
    assert (found.completion_start, len(found.messages)) == (4, 5)
    found = said({"prompt": "Q", "chosen": "A", "rejected": "B", "system": "S"})
    assert (found.messages, found.rejected, found.completion_start) == ([SYSTEM, *CHAT], [SYSTEM, USER, WORSE], 2)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"rejected": "A"}, "same_pair", "are the same"),
        ({"chosen": [{"role": "user", "content": "other"}, REPLY]}, "no_pair", "'chosen' answers another prompt"),
        ({"rejected": None}, "null_reply", r"the reply is null \(rejected\)"),
        ({"chosen": ""}, "empty_reply", r"the reply is empty \(chosen\)"),
        ({"prompt": None}, "null_prompt", "the prompt is null"),
        ({"rejected": [REPLY, USER, WORSE]}, "no_pair", "part at turn 1, which is not a reply of both"),
        ({"chosen": [REPLY], "rejected": [REPLY, WORSE]}, "no_pair", "part at turn 3"),
        ({"chosen": 3}, "wrong_type", "the reply is 3, not text"),
    ],
)
def test_preferences_that_are_none(change: dict[str, Any], kind: str, message: str) -> None:
    row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    with pytest.raises(RowFault, match=message) as caught:
        said({**row, **change}, row)
    assert caught.value.kind == kind
    pair = {"chosen": [USER, REPLY], "rejected": [USER, WORSE]}
    with pytest.raises(RowFault, match="part at turn 1, which is not a reply"):
        said({"chosen": [USER, REPLY], "rejected": [{**USER, "content": "x"}, WORSE]}, pair)
    with pytest.raises(RowFault, match="'chosen' is an answer, and there is no column with its prompt"):
        said({"chosen": [REPLY], "rejected": [WORSE]}, pair)


@pytest.mark.parametrize(
    ("label", "wanted"), [(True, True), (False, False), (1, True), (0.0, False), ("True", True), (" no ", False)]
)
def test_kto_labels(label: Any, wanted: bool) -> None:
    found = said({"prompt": "Q", "completion": "A", "label": label}, {"prompt": "Q", "completion": "A", "label": True})
    assert (found.messages, found.label, found.completion_start) == (CHAT, wanted, 1)
    found = said({"prompt": [USER], "completion": [REPLY], "label": label}, {"prompt": "Q", "completion": "A", "label": True})
    assert (found.messages, found.label) == (CHAT, wanted)


@pytest.mark.parametrize("label", [None, float("nan"), 2, -1, "perhaps", "", [], [1], {}, pytest.param(10**5000, id="huge")])
def test_labels_that_say_nothing(label: Any) -> None:
    with pytest.raises(RowFault, match="'label' is .*, not true or false") as caught:
        said({"prompt": "Q", "completion": "A", "label": label}, {"prompt": "Q", "completion": "A", "label": True})
    assert caught.value.kind == "bad_label"


@pytest.mark.parametrize("answer", ['[{"name": "Ann", "from": "Ulm"}]', "[1, 2]", "[{", "[]", '{"role": "user", "content": "x"}'])
def test_answers_that_are_json_are_texts(answer: str) -> None:
    assert said({"prompt": "Q", "completion": answer}).messages[1]["content"] == answer


def test_raw_text() -> None:
    found = said({"text": "Once upon a time.\n", "id": 1})
    assert (found.text, found.messages, found.completion_start) == ("Once upon a time.\n", [], None)
    for text, kind in ((None, "null_text"), (" ", "empty_text"), (3, "wrong_type"), ("\ud800", "broken_text")):
        with pytest.raises(RowFault) as caught:
            said({"text": text}, {"text": "x"})
        assert caught.value.kind == kind


def test_replies_that_are_tool_calls_are_replies() -> None:
    given = {**CALL, "id": "c1"}
    as_text = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    for call in (given, as_text):
        turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
        turns += [{"role": "tool", "content": "", "tool_call_id": "c1", "name": "look"}, REPLY]
        found = said({"messages": turns, "tools": json.dumps([TOOL])})
        assert found.messages == [USER, {"role": "assistant", "content": "", "tool_calls": [given]}, *turns[2:]]
        assert found.tools == [TOOL]
    both = said({"messages": [USER, {**REPLY, "tool_calls": [{"name": "look", "arguments": None}]}]})
    assert both.messages[1]["content"] == "A"
    assert both.messages[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {}}
    old = said({"messages": [USER, {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": "{}"}}]})
    assert old.messages[1]["tool_calls"][0]["function"]["name"] == "look"
    none = said({"messages": [USER, {**REPLY, "tool_calls": None}], "tools": None})
    assert (none.messages, none.tools) == (CHAT, None)


def test_sharegpt_with_calls_system_and_tools() -> None:
    turns = [
        *share(USER),
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
        {"from": "observation", "value": "blue"},
        {"from": "gpt", "value": "A"},
    ]
    found = said({"conversations": turns, "system": "S", "tools": json.dumps([TOOL])})
    assert found.messages == [
        SYSTEM,
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "blue"},
        REPLY,
    ]
    assert found.tools == [TOOL]
    plain = said({"conversations": turns}, roles={"function_call": "assistant"})
    assert plain.messages[1]["content"].startswith('{"name"')
    assert said({"conversations": share(*CHAT), "system": None}).messages == CHAT


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (3, "tool call 1 of turn 2 is 3, not an object"),
        ({}, "tool call 1 of turn 2 has no name"),
        ({"name": "x", "arguments": "{"}, "the tool call of tool call 1 of turn 2 is no JSON|tool call 1 of turn 2 is no JSON"),
        ({"name": "x", "arguments": [1]}, "the arguments of tool call 1 of turn 2 are a list of 1"),
    ],
)
def test_broken_tool_calls(call: Any, message: str) -> None:
    with pytest.raises(RowFault, match=message) as caught:
        said({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}, {"messages": CHAT})
    assert caught.value.kind == "broken_tool_call"
    with pytest.raises(RowFault, match="the column 'tools' is text that is no JSON") as caught:
        said({"messages": CHAT, "tools": "x"})
    assert caught.value.kind == "broken_tools"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_is_kept(key: str) -> None:
    assert said({"messages": [USER, {**REPLY, key: "Hm."}]}).messages[1] == {**REPLY, "reasoning_content": "Hm."}
    assert said({"messages": [USER, {**REPLY, key: None}]}).messages == CHAT


def test_a_weight_of_nothing_is_told() -> None:
    found = said({"messages": [USER, {**REPLY, "weight": 0}, USER, {**REPLY, "weight": 1}]})
    assert found.notes == (("weight", "turn 2 has the weight 0, which is not heeded: all replies are trained alike"),)


def test_the_prompt_of_the_recipe() -> None:
    recipe = {"prompt": "{title}[[ ({year})]]", "columns": {"completion": "plot"}, "format": "prompt_completion"}
    row = {"title": "T", "year": 1999, "plot": "P"}
    assert said(row, **recipe).messages == [{"role": "user", "content": "T (1999)"}, {"role": "assistant", "content": "P"}]
    assert said({**row, "year": None}, row, **recipe).messages[0]["content"] == "T"
    alpaca = said({"title": "T", "output": "P"}, prompt="{title}!")
    assert alpaca.messages == [{"role": "user", "content": "T!"}, {"role": "assistant", "content": "P"}]


# -- repairs ---------------------------------------------------------------------------------------


def test_names_of_speakers() -> None:
    row = {"conversations": [{"from": "Narrator", "value": "Q"}, {"from": "hero", "value": "A"}]}
    with pytest.raises(
        RowFault, match=r"unknown role 'Narrator'; say who that is with DataRecipe\(roles=\{'Narrator': 'user'\}\)"
    ):
        said(row)
    assert said(row, roles={"narrator": "user", "HERO": "assistant"}).messages == CHAT
    near = {"messages": [USER, {"role": "asistant", "content": "A"}]}
    with pytest.raises(RowFault, match=r"roles=\{'asistant': 'assistant'\}"):
        said(near)


def test_turns_of_one_speaker_in_a_row_are_kept_or_joined() -> None:
    row = {"messages": [USER, {**USER, "content": "R"}, REPLY, {**WORSE, "tool_calls": [CALL], "reasoning_content": "Hm."}]}
    kept = said(row)
    assert len(kept.messages) == 4
    assert kept.notes == (("same_role_twice", "turns 1 and 2 are both the user's"),)
    joined = said(row, same_role="join")
    assert joined.messages == [
        {"role": "user", "content": "Q\n\nR"},
        {"role": "assistant", "content": "A\n\nB", "tool_calls": [CALL], "reasoning_content": "Hm."},
    ]
    assert joined.notes == (("turns_joined", "turns 1 and 2 are both the user's and are joined"),)
    edge = said({"prompt": [USER, USER, REPLY], "completion": [WORSE]}, same_role="join")
    assert [m["content"] for m in edge.messages] == ["Q\n\nQ", "A", "B"] and edge.completion_start == 2


def test_a_first_reply_is_refused_or_skipped() -> None:
    row = {"messages": [SYSTEM, WORSE, *CHAT]}
    with pytest.raises(RowFault, match="the first turn is a reply"):
        said(row)
    found = said(row, first_reply="skip")
    assert found.messages == [SYSTEM, *CHAT]
    assert found.notes == (("first_reply_skipped", "turn 2 is a reply before the first question, left out"),)
    with pytest.raises(RowFault) as caught:
        said({"messages": [WORSE]}, {"messages": CHAT}, first_reply="skip")
    assert caught.value.kind == "no_reply"
    begun = said({"prompt": [WORSE, USER], "completion": [REPLY]}, first_reply="skip")
    assert (begun.messages, begun.completion_start) == (CHAT, 1)


def test_values_that_never_end_are_told() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(RowFault, match="nested deeper than 64"):
        said({"messages": [USER, {**REPLY, "tool_calls": [{"name": "x", "arguments": {"a": endless}}]}]})


def test_every_repair_is_of_a_known_kind_and_names_what_to_do() -> None:
    assert set(REPAIRS) <= set(REASONS)
    refusals = set(REASONS) - {"open_end", "control_text", "no_stop"}
    assert all(len(REPAIRS[kind]) > 10 for kind in refusals & set(REPAIRS))
