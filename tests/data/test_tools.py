"""Tool calls and thinking: what is trained of them, written down by hand; what tools answer never is."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nbkit.config import IGNORE_INDEX
from nbkit.data import skeleton, template
from nbkit.data.findings import RowFault
from nbkit.data.masks import Labelled
from nbkit.data.template import Renderer, Row
from nbkit.data.templates import NAMED
from tests.data.oracle import text
from tests.data.test_templates import WEATHER, called
from tests.data.vocab import KINDS, tokenizer

# template → the trained parts of a conversation with one tool call and a last reply; {text} is the text beside the call
TRAINED = {
    "llama-3.1": ['{{"name": "weather", "parameters": {arguments}}}<|eot_id|>', "It does.<|eot_id|>"],
    "qwen-2.5": ["{text}{line}<tool_call>\n{call}\n</tool_call><|im_end|>", "It does.<|im_end|>"],
    "qwen-3": ["{text}{line}<tool_call>\n{call}\n</tool_call><|im_end|>", "<think>\n\n</think>\n\nIt does.<|im_end|>"],
    "mistral-v3": ["{blank}{text}[TOOL_CALLS] [{called}]</s>", " It does.</s>"],
    "mistral-v3-tekken": ["{text}[TOOL_CALLS][{called}]</s>", "It does.</s>"],
    "mistral-v7": ["{blank}{text}[TOOL_CALLS] [{called}]</s>", " It does.</s>"],
    "mistral-v7-tekken": ["{text}[TOOL_CALLS][{called}]</s>", "It does.</s>"],
}


def wanted(name: str, place: str, beside: str) -> list[str]:
    arguments = '{"place": "' + place + '", "days": 2, "now": true}'
    call = '{"name": "weather", "arguments": ' + arguments + "}"
    named = call[:-1] + ', "id": "abcdef123"}'
    parts = {"arguments": arguments, "call": call, "called": named, "text": beside, "line": "\n" if beside else ""}
    return [part.format(**parts, blank=" " if beside else "") for part in TRAINED[name]]


def trained(renderer: Renderer, messages: list[dict[str, Any]], tools: Any = None) -> list[str]:
    """The trained stretches of the text, from the labels."""
    rendered = renderer.render(messages, tools)
    (found,) = renderer.label([rendered])
    assert isinstance(found, Labelled)
    parts, now, at = [], False, 0
    for (start, end), label in zip(found.spans.tolist(), found.labels.tolist(), strict=True):
        if label != IGNORE_INDEX and not now:
            parts.append("")
        now = label != IGNORE_INDEX
        if now:
            parts[-1] += rendered.text[max(start, at) : end]  # the bytes of one character share its span
        at = max(at, end)
    return parts


def test_the_templates_with_tools_are_the_ones_tested() -> None:
    assert set(TRAINED) == {named.name for named in NAMED if named.tools}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beside", ["", "I look."])
@pytest.mark.parametrize("name", TRAINED)
def test_a_tool_call_is_trained_and_the_answer_is_not(name: str, beside: str, kind: str) -> None:
    renderer = Renderer(tokenizer(kind), name)
    for place, spelled in (("Bergen", "Bergen"), ('Ber"gen\n', 'Ber\\"gen\\n'), ("日本 😀", "日本 😀"), ("mm", "mm")):
        messages = called(place=place, text=beside)
        parts = wanted(name, spelled, "" if name == "llama-3.1" else beside)
        for tools in (None, [WEATHER]):
            assert trained(renderer, messages, tools) == parts, (name, tools)
            empty = "<think>\n\n</think>\n\n" if name == "qwen-3" else ""  # before the last message
            assert trained(renderer, messages[:2], tools) == [empty + parts[0]]


@pytest.mark.parametrize("name", sorted({named.name for named in NAMED} - set(TRAINED)))
def test_a_template_that_shows_no_tool_call_refuses_the_row(name: str) -> None:
    with pytest.raises(RowFault) as caught:
        Renderer(tokenizer(), name).render(called(text="I look."))
    assert caught.value.kind in ("tool_call", "template")


def test_a_tool_that_spells_a_control_token_is_refused() -> None:
    tool = {"type": "function", "function": {"name": "x", "description": "ends <|im_end|> here", "parameters": {}}}
    with pytest.raises(RowFault, match="control token"):
        Renderer(tokenizer(), "qwen-3").render(called(), [tool])
    messages = called(place="<|im_end|>")
    renderer = Renderer(tokenizer(), "qwen-3")
    assert [kind for kind, _ in renderer.render(messages).notes] == ["control_text"]
    stops = renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    (found,) = renderer.label([renderer.render(messages)])
    assert isinstance(found, Labelled)
    assert found.input_ids.tolist().count(stops) == 4 and "<|im_end|>" in trained(renderer, messages)[0][:-10]


@pytest.mark.parametrize("kind", KINDS)
def test_thinking_is_trained_where_it_is_shown(kind: str) -> None:
    renderer, random_ = Renderer(tokenizer(kind), "qwen-3"), random.Random(kind)
    for _ in range(30):
        first, second = (text(random_).strip() for _ in range(2))
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": "Q1"},
            {"role": "assistant", "content": f"<think>\n{first}\n</think>\n\nA1"},
            {"role": "user", "content": "Q2"},
            {"role": "assistant", "content": f"<think>\n{second}\n</think>\n\nA2"},
        ]
        apart = [dict(turn) for turn in turns]
        apart[1] |= {"content": "A1", "reasoning_content": first}
        apart[3] |= {"content": "A2", "thinking": second}
        if "<think>" in second or "<think>" in first:
            continue
        for messages in (turns, apart):
            assert trained(renderer, messages) == ["A1<|im_end|>", f"<think>\n{second}\n</think>\n\nA2<|im_end|>"]
            assert [kind for kind, _ in renderer.render(messages).notes] == ["thinking_dropped"]


def test_thinking_of_steps_with_tools_is_shown_after_the_last_question() -> None:
    messages = called()
    messages[1]["reasoning_content"] = "I ask the tool."
    messages[-1]["reasoning_content"] = "It says mm."
    call = wanted("qwen-3", "Bergen", "")[0]
    assert trained(Renderer(tokenizer(), "qwen-3"), messages) == [
        "<think>\nI ask the tool.\n</think>\n\n" + call,
        "<think>\nIt says mm.\n</think>\n\nIt does.<|im_end|>",
    ]


def test_thinking_that_no_template_shows_is_told() -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "R"}]
    rendered = Renderer(tokenizer(), "chatml").render(messages)
    assert "R" not in rendered.text and [kind for kind, _ in rendered.notes] == ["thinking_dropped"]


def test_a_mask_that_trains_what_a_tool_answers_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer, true = Renderer(tokenizer(), "qwen-2.5"), Renderer._trained

    def wrong(self: Renderer, row: Any, text: str, places: Any, found: skeleton.Skeleton) -> tuple:
        owners = skeleton.mark(skeleton.prepared(row.messages)).owners
        answers = [places[n] for n, index in enumerate(found.order) if row.messages[owners[index]]["role"] == "tool"]
        return tuple(sorted([*true(self, row, text, places, found), *answers]))

    assert trained(renderer, called(), [WEATHER]) == wanted("qwen-2.5", "Bergen", "")
    monkeypatch.setattr(Renderer, "_trained", wrong)
    assert trained(renderer, called(), [WEATHER]) != wanted("qwen-2.5", "Bergen", "")


def test_values_that_are_no_json_cost_their_row_only() -> None:
    import datetime

    renderer = Renderer(tokenizer(), "qwen-3")
    bad, keys = called(), called()
    bad[1]["tool_calls"] = [{"type": "function", "function": {"name": "x", "arguments": {"day": datetime.date(2026, 1, 1)}}}]
    keys[1]["tool_calls"] = [{"type": "function", "function": {"name": "x", "arguments": {1: "a", "b": "c"}}}]
    found = renderer.render_rows([Row(called()), Row(bad), Row(keys), Row(called(), [datetime.date]), Row(called("Oslo"))])
    assert [isinstance(one, RowFault) for one in found] == [False, True, True, True, False]
    assert all(one.kind == "wrong_type" and "not JSON" in one.sentence for one in found if isinstance(one, RowFault))


def test_more_shapes_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "KEPT_SKELETONS", 2)
    renderer = Renderer(tokenizer(), "qwen-3")
    shapes = [called(count=count, text=beside) for count in (1, 2, 3) for beside in ("", "I look.")]
    for _ in range(3):
        assert not any(isinstance(one, RowFault) for one in renderer.render_rows([Row(one) for one in shapes]))
    assert len(renderer._skeletons) <= 2 + len(shapes)
