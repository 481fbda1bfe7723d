"""Turns of every spelling become messages: speakers, texts, tool calls, thinking; and the order of the turns.

A message is {"role": "system" | "user" | "assistant" | "tool", "content": text} and, where the turn has them,
"tool_calls": [{"type": "function", "function": {"name", "arguments": {...}}, "id"?}], "tool_call_id", "name" and
"reasoning_content" (what the assistant thought before it spoke). With tool calls the content may be "".
Standard library only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nbkit.config import DataRecipe
from nbkit.data.findings import RowFault, shorten
from nbkit.errors import nearest

Message = dict[str, Any]
Note = tuple[str, str]  # (kind of finding, sentence)

SPEAKERS = {
    "system": ("system", "developer", "sys", "system_prompt"),
    "user": ("user", "human", "prompter", "person", "customer", "client", "question", "instruction", "input", "student"),
    "assistant": (
        *("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "bing", "bard", "ai", "agent", "llm", "claude", "gemini"),
        *("answer", "response", "output", "tutor", "function_call", "tool_call"),
    ),
    "tool": (
        "tool",
        "function",
        "function_response",
        "function_result",
        "tool_response",
        "tool_result",
        "observation",
        "ipython",
    ),
}
SPEAKER_OF = {alias: role for role, aliases in SPEAKERS.items() for alias in aliases}
CALLS = ("function_call", "tool_call")  # ShareGPT's turns that are a call and nothing else
SPEAKER_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
DEPTH = 64
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
HUMAN_TURNS = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")  # the plain text of Anthropic's hh-rlhf


def is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # tables write nothing as NaN


def text_of(value: Any, what: str, where: str) -> str:
    """The text of a prompt, a reply or a raw text. Raises: RowFault of kind null_*, empty_*, not_text or wrong_type."""
    if is_null(value):
        raise RowFault(f"null_{what}", f"the {what} is null ({where})")
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Mapping) and "type" in part for part in value):
        value = "".join(_part(part, where) for part in value)  # OpenAI's content parts
    if not isinstance(value, str):
        raise RowFault("wrong_type", f"the {what} is {shorten(value)}, not text ({where})")
    if not value.strip():
        raise RowFault(f"empty_{what}", f"the {what} is empty ({where})")
    return value


def _part(part: Mapping[str, Any], where: str) -> str:
    if isinstance(part.get("text"), str) and part["type"] in ("text", "input_text", "output_text"):
        return part["text"]
    raise RowFault("not_text", f"{where} has a part of the type {shorten(part['type'], 30)}; only text is trained on")


def list_of(value: Any, column: str) -> list[Any]:
    """A list of turns, also written as JSON. Raises: RowFault."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowFault("broken_json", f"the column {column!r} is text that is no JSON list: {str(error)[:80]}") from error
    if is_null(value) or (isinstance(value, (str, list, tuple)) and not value) or (isinstance(value, str) and not value.strip()):
        raise RowFault("no_messages", f"the column {column!r} holds no turns")
    if not isinstance(value, (list, tuple)):
        raise RowFault("wrong_type", f"the column {column!r} is {shorten(value)}, not a list of turns")
    return list(value)


def turns_of(value: Any, column: str, recipe: DataRecipe) -> tuple[list[Message], list[Note]]:
    """The messages of a list of turns, and what is worth a warning. Raises: RowFault."""
    roles = {name.strip().casefold(): role for name, role in recipe.roles.items()}
    turns = list_of(value, column)
    notes: list[Note] = []
    weightless = [n for n, turn in enumerate(turns, 1) if isinstance(turn, Mapping) and _no_weight(turn.get("weight"))]
    if weightless:
        notes.append(("weight", f"turn {weightless[0]} has the weight 0, which is not heeded: all replies are trained alike"))
    try:
        return [turn_of(turn, number, roles) for number, turn in enumerate(turns, 1)], notes
    except RowFault as fault:
        fault.guess = _guess(turns, roles) if fault.kind == "unknown_role" else ""
        raise


def _guess(turns: Sequence[Any], roles: Mapping[str, str]) -> str:
    """Who the unknown speaker must be, "alien=user": there is one, who takes turns with the only other; the user begins."""
    told = [turn for turn in turns if isinstance(turn, Mapping)]
    said = [next((turn[key] for key in SPEAKER_KEYS if turn.get(key) is not None), None) for turn in told]
    if len(said) != len(turns) or not all(isinstance(name, str) and name.strip() and not set(name) & set("=,") for name in said):
        return ""
    names = [str(name).strip().casefold() for name in said]
    known = [roles.get(name) or SPEAKER_OF.get(name) or name for name in names]
    talk = [role for role in known if role not in ("system", "tool")]
    strange = set(talk) - {"user", "assistant"}
    missing = {"user", "assistant"} - set(talk)
    alternate = all(one != other for one, other in zip(talk, talk[1:], strict=False))
    if len(strange) != 1 or len(missing) != 1 or not alternate:
        return ""
    (name,), (role,) = strange, missing
    return f"{name}={role}" if (talk[0] == name) == (role == "user") else ""


def _no_weight(weight: Any) -> bool:
    return isinstance(weight, (int, float)) and weight == 0


def turn_of(turn: Any, number: int, roles: Mapping[str, str]) -> Message:
    """One message. `roles`: names of speakers, in lower case, that come before the usual ones. Raises: RowFault."""
    if not isinstance(turn, Mapping):
        raise RowFault("wrong_type", f"turn {number} is {shorten(turn)}, not an object")
    speaker = next((turn[key] for key in SPEAKER_KEYS if turn.get(key) is not None), None)
    name = speaker.strip().casefold() if isinstance(speaker, str) else None
    role = (roles.get(name) or SPEAKER_OF.get(name)) if name is not None else None
    if role is None:
        raise RowFault("unknown_role", f"turn {number} has the unknown role {shorten(speaker)}{_offer(name, speaker)}")
    content = turn.get(next((key for key in CONTENT_KEYS if key in turn), "content"))
    where = f"turn {number}"
    if role == "assistant":
        return _reply(turn, content, where, name in CALLS and name not in roles)
    if role in ("system", "tool") and isinstance(content, str):
        message: Message = {"role": role, "content": content}  # these may be empty
    else:
        message = {"role": role, "content": text_of(content, "prompt", where)}
    for key in ("tool_call_id", "name"):
        if role == "tool" and isinstance(turn.get(key), str):
            message[key] = turn[key]
    return message


def _offer(name: str | None, speaker: Any) -> str:
    if name is None:
        return "; it must be a name such as user or assistant"
    near = nearest(name, SPEAKER_OF)
    role = SPEAKER_OF[near.removeprefix(" Did you mean ").rstrip("?").split(", ")[0]] if near else "user"
    return f"; say who that is with DataRecipe(roles={{{shorten(speaker, 30)}: {role!r}}})"


def _reply(turn: Mapping[str, Any], content: Any, where: str, is_call: bool) -> Message:
    """A message of the assistant: text, tool calls, or both."""
    calls = turn.get("tool_calls")
    if is_call:
        calls, content = _decoded(content, where), ""
    elif is_null(calls) and isinstance(turn.get("function_call"), Mapping):  # OpenAI's older form
        calls = [turn["function_call"]]
    if is_null(calls) or calls == [] or calls == "":
        message: Message = {"role": "assistant", "content": text_of(content, "reply", where)}
    else:
        listed = _decoded(calls, where) if isinstance(calls, str) else calls
        listed = [listed] if isinstance(listed, Mapping) else listed
        if not isinstance(listed, (list, tuple)) or not listed:
            raise RowFault("broken_tool_call", f"the tool calls of {where} are {shorten(calls)}, not a list")
        empty = is_null(content) or (isinstance(content, str) and not content.strip())
        message = {"role": "assistant", "content": "" if empty else text_of(content, "reply", where)}
        message["tool_calls"] = [_call(call, f"tool call {number} of {where}") for number, call in enumerate(listed, 1)]
    thought = next((turn[key] for key in THINKING_KEYS if isinstance(turn.get(key), str) and turn[key].strip()), None)
    if thought is not None:
        message["reasoning_content"] = thought
    return message


def _decoded(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowFault("broken_tool_call", f"the tool call of {where} is no JSON: {str(error)[:80]}") from error


def _call(call: Any, where: str) -> Message:
    if not isinstance(call, Mapping):
        raise RowFault("broken_tool_call", f"{where} is {shorten(call)}, not an object")
    function = call.get("function")
    inner = function if isinstance(function, Mapping) else call
    name, arguments = inner.get("name"), inner.get("arguments", inner.get("parameters"))
    if not isinstance(name, str) or not name.strip():
        raise RowFault("broken_tool_call", f"{where} has no name")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _decoded(arguments, where)
    if is_null(arguments) or arguments == "":
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise RowFault("broken_tool_call", f"the arguments of {where} are {shorten(arguments)}, not an object")
    made: Message = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    return {**made, "id": call["id"]} if isinstance(call.get("id"), str) else made


def tools_of(value: Any, column: str) -> list[dict[str, Any]] | None:
    """The schemas of the tools that a row offers, or None. Raises: RowFault."""
    if is_null(value) or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowFault("broken_tools", f"the column {column!r} is text that is no JSON list: {str(error)[:80]}") from error
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowFault("broken_tools", f"the column {column!r} is {shorten(value)}, not a list of tools")
    return [dict(tool) for tool in value] or None


def human_turns(text: str) -> list[Message] | None:
    """The messages of a text that is written as "Human: …" and "Assistant: …", or None."""
    pieces = HUMAN_TURNS.split(text.strip("\n") if text.startswith("\n\n") else text)
    if len(pieces) < 3 or pieces[0].strip():
        return None
    roles = ["user" if who == "Human" else "assistant" for who in pieces[1::2]]
    return [{"role": role, "content": words} for role, words in zip(roles, pieces[2::2], strict=True)]


# -- the order of the turns ------------------------------------------------------------------------


def ordered(
    messages: list[Message], recipe: DataRecipe, start: int | None = None
) -> tuple[list[Message], list[Note], int | None]:
    """(the turns in an order that can be trained on, warnings, the new place of the completion).

    An end without a reply is left out. A conversation that begins with a reply, and turns of one speaker in a row, are
    treated as the recipe says.

    Args:
        start: the first message of the completion, where there is one; nothing is joined across it.
    Raises: RowFault of the kinds no_reply and reply_first.
    """
    kept, notes, skipped = _begun(messages, recipe)
    if all(message["role"] != "assistant" for message in kept):
        raise RowFault(
            "no_reply", f"none of the {len(messages)} turns is the assistant's{', but a first one' if skipped else ''}"
        )
    last = max(i for i, message in enumerate(kept) if message["role"] == "assistant") + 1
    if last < len(kept):
        notes.append(("open_end", f"the last {len(kept) - last} of {len(messages)} turns have no reply and are left out"))
    if start is None:
        return *_same_roles(kept[:last], recipe, notes), None
    edge = start - skipped
    if edge < 1 or edge >= last:
        raise RowFault("no_reply", "the prompt has no question, or the completion has no reply")
    prompt, notes = _same_roles(kept[:edge], recipe, notes)
    answer, notes = _same_roles(kept[edge:last], recipe, notes)
    return prompt + answer, notes, len(prompt)


def _begun(messages: list[Message], recipe: DataRecipe) -> tuple[list[Message], list[Note], int]:
    """The turns from the first question on; how many were left out before it."""
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if first == len(messages) or messages[first]["role"] != "assistant":
        return messages, [], 0
    if recipe.first_reply != "skip":
        raise RowFault("reply_first", "the first turn is a reply, with nothing before it that it answers")
    begin = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    said = f"turn {first + 1} is a reply" if begin - first == 1 else f"turns {first + 1} to {begin} stand"
    return (
        messages[:first] + messages[begin:],
        [("first_reply_skipped", f"{said} before the first question, left out")],
        begin - first,
    )


def _same_roles(messages: list[Message], recipe: DataRecipe, notes: list[Note]) -> tuple[list[Message], list[Note]]:
    twice = next((i for i in range(1, len(messages)) if _follows(messages[i - 1], messages[i])), None)
    if twice is None:
        return messages, notes
    said = f"turns {twice} and {twice + 1} are both the {messages[twice]['role']}'s"
    if recipe.same_role != "join":
        return messages, [*notes, ("same_role_twice", said)]
    joined = [messages[0]]
    for message in messages[1:]:
        if _follows(joined[-1], message):
            joined[-1] = _joined(joined[-1], message)
        else:
            joined.append(message)
    return joined, [*notes, ("turns_joined", f"{said} and are joined")]


def _follows(one: Message, other: Message) -> bool:
    return one["role"] == other["role"] and one["role"] in ("user", "assistant")


def _joined(one: Message, other: Message) -> Message:
    made = {**one, **other, "content": "\n\n".join(filter(None, (one["content"], other["content"])))}
    if calls := [*one.get("tool_calls", ()), *other.get("tool_calls", ())]:
        made["tool_calls"] = calls
    thoughts = [message["reasoning_content"] for message in (one, other) if "reasoning_content" in message]
    return {**made, "reasoning_content": "\n\n".join(thoughts)} if thoughts else made


def check_text(messages: Sequence[Message]) -> None:
    """Raises: RowFault where a text holds half a character (a lone surrogate), which no file and no tokenizer can hold."""
    for message in messages:
        for value in _strings(message):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                letter = f"U+{ord(value[error.start]):04X}"
                raise RowFault("broken_text", f"the text of the {message['role']} holds half a character ({letter})") from error


def _strings(value: Any) -> list[str]:
    """All texts inside a message that are not plain ASCII. Raises: RowFault for what is nested deeper than templates take."""
    found: list[str] = []
    todo: list[tuple[Any, int]] = [(value, 0)]
    while todo:
        one, depth = todo.pop()
        if depth > DEPTH:
            raise RowFault("wrong_type", f"a value is nested deeper than {DEPTH} levels")
        if isinstance(one, str):
            if not one.isascii():
                found.append(one)
        elif isinstance(one, Mapping):
            todo += [(inner, depth + 1) for pair in one.items() for inner in pair]
        elif isinstance(one, (list, tuple)):
            todo += [(inner, depth + 1) for inner in one]
    return found
