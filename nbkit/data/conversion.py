"""One row becomes one `Conversation`, by a recipe whose format and columns are known. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nbkit.config import DataRecipe
from nbkit.data import merge
from nbkit.data.findings import RowFault, shorten
from nbkit.data.messages import (
    CONTENT_KEYS,
    SPEAKER_KEYS,
    Message,
    Note,
    check_text,
    human_turns,
    is_null,
    list_of,
    ordered,
    text_of,
    tools_of,
    turns_of,
)

ROLES = {  # format -> role of the recipe -> is it required?
    "alpaca": {"instruction": True, "input": False, "output": True, "system": False},
    "sharegpt": {"conversations": True, "system": False, "tools": False},
    "messages": {"messages": True, "system": False, "tools": False},
    "prompt_completion": {"prompt": True, "completion": True, "system": False, "tools": False},
    "preference": {"prompt": False, "chosen": True, "rejected": True, "system": False, "tools": False},
    "kto": {"prompt": True, "completion": True, "label": True, "system": False, "tools": False},
    "text": {"text": True},
}
PROMPT_ROLE = {"alpaca": "instruction", "prompt_completion": "prompt", "kto": "prompt", "preference": "prompt"}
YES, NO = ("true", "1", "yes"), ("false", "0", "no")


@dataclass(frozen=True)
class Conversation:
    """What one row says.

    Attributes:
        messages: see `nbkit.data.messages`; ended by the assistant, and empty for raw text.
        notes: what is worth a warning: (kind, sentence).
        completion_start: the first message of the completion, where the row tells prompt and completion apart.
        rejected: of a preference, the whole conversation with the rejected answer; `messages` has the chosen one.
        label: of KTO, whether the completion is a wanted one.
        text: raw text for continued pretraining.
        tools: the schemas of the tools that are offered.
    """

    messages: list[Message]
    notes: tuple[Note, ...] = ()
    completion_start: int | None = None
    rejected: list[Message] | None = None
    label: bool | None = None
    text: str | None = None
    tools: list[dict[str, Any]] | None = None


def to_conversation(value: Any, recipe: DataRecipe) -> Conversation:
    """What one row says, by a recipe that `detect` has filled. The row is not changed.

    Raises: RowFault.
    """
    if not isinstance(value, Mapping):
        raise RowFault("not_an_object", f"the row is {shorten(value)}, not an object with columns")
    found = CONVERT[recipe.format](value, recipe)
    if "tools" in recipe.columns:
        found = replace(found, tools=tools_of(value.get(recipe.columns["tools"]), recipe.columns["tools"]))
    if found.text is not None:
        check_text([{"role": "text", "content": found.text}])
        return found
    found = _with_system(found, value, recipe)
    check_text([*found.messages, *(found.rejected or ()), {"role": "list of tools", "content": found.tools}])
    return found


def _with_system(found: Conversation, value: Mapping[str, Any], recipe: DataRecipe) -> Conversation:
    """The system message of the row's own column, else that of the recipe, where the conversation has none."""
    system = recipe.system
    if "system" in recipe.columns:
        own = value.get(recipe.columns["system"])
        if not is_null(own) and not isinstance(own, str):
            raise RowFault("wrong_type", f"the column {recipe.columns['system']!r} is {shorten(own)}, not text")
        system = own if isinstance(own, str) and own.strip() else system
    if system is None or found.messages[0]["role"] == "system":
        return found
    put: list[Message] = [{"role": "system", "content": system}]
    start = None if found.completion_start is None else found.completion_start + 1
    rejected = None if found.rejected is None else [*put, *found.rejected]
    return replace(found, messages=put + found.messages, completion_start=start, rejected=rejected)


def _cell(value: Mapping[str, Any], recipe: DataRecipe, role: str) -> Any:
    column = recipe.columns[role]
    if column not in value:
        raise RowFault("missing_column", f"the column {column!r} is missing")
    return value[column]


def _alpaca(value: Mapping[str, Any], recipe: DataRecipe) -> Conversation:
    columns = recipe.columns
    if recipe.prompt is not None:
        prompt = merge.parse(recipe.prompt).fill(value)
        output = text_of(_cell(value, recipe, "output"), "reply", columns["output"])
    else:
        cells = [_cell(value, recipe, role) for role in ("instruction", "output")]
        prompt = text_of(cells[0], "prompt", columns["instruction"])
        output = text_of(cells[1], "reply", columns["output"])
        extra = value.get(columns["input"]) if "input" in columns else None
        if not is_null(extra):
            if not isinstance(extra, str):
                raise RowFault("wrong_type", f"the column {columns['input']!r} is {shorten(extra)}, not text")
            prompt = f"{prompt}\n\n{extra}" if extra.strip() else prompt
    return Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": output}])


def _turns(value: Mapping[str, Any], recipe: DataRecipe) -> Conversation:
    role = "conversations" if recipe.format == "sharegpt" else "messages"
    messages, notes = turns_of(_cell(value, recipe, role), recipe.columns[role], recipe)
    messages, more, _ = ordered(messages, recipe)
    return Conversation(messages, (*notes, *more))


def _said(cell: Any, column: str, recipe: DataRecipe, what: str) -> tuple[list[Message], list[Note]]:
    """A prompt or an answer: a text, or a list of turns."""
    if isinstance(cell, (list, tuple)) or (isinstance(cell, str) and _is_listed(cell)):
        return turns_of(cell, column, recipe)
    if isinstance(cell, Mapping):
        return turns_of([cell], column, recipe)
    text = text_of(cell, what, column)
    return [{"role": "user" if what == "prompt" else "assistant", "content": text}], []


def _is_listed(text: str) -> bool:
    """Whether a text is a JSON list of turns, as it is in a CSV file. Other JSON is an answer like any text."""
    if not text.lstrip().startswith("["):
        return False
    try:
        turns = list_of(text, "")
    except RowFault:
        return False
    return any(isinstance(turn, Mapping) and _is_turn(turn) for turn in turns)


def _is_turn(turn: Mapping[str, Any]) -> bool:
    return any(key in turn for key in SPEAKER_KEYS) and any(key in turn for key in CONTENT_KEYS)


def _prompt(value: Mapping[str, Any], recipe: DataRecipe) -> tuple[list[Message], list[Note]]:
    if recipe.prompt is not None:
        return [{"role": "user", "content": merge.parse(recipe.prompt).fill(value)}], []
    return _said(_cell(value, recipe, "prompt"), recipe.columns["prompt"], recipe, "prompt")


def _completion(value: Mapping[str, Any], recipe: DataRecipe) -> Conversation:
    prompt, notes = _prompt(value, recipe)
    answer, more = _said(_cell(value, recipe, "completion"), recipe.columns["completion"], recipe, "reply")
    if answer[0]["role"] != "assistant":
        raise RowFault("no_reply", f"the completion begins with a turn of the {answer[0]['role']}, not of the assistant")
    messages, last, start = ordered([*prompt, *answer], recipe, len(prompt))
    return Conversation(messages, (*notes, *more, *last), completion_start=start)


def _kto(value: Mapping[str, Any], recipe: DataRecipe) -> Conversation:
    label = _cell(value, recipe, "label")
    number = label if isinstance(label, (bool, int, float)) else None
    said = label.strip().casefold() if isinstance(label, str) else "1" if number == 1 else "0" if number == 0 else ""
    if said not in (*YES, *NO):
        raise RowFault("bad_label", f"the column {recipe.columns['label']!r} is {shorten(label)}, not true or false")
    return replace(_completion(value, recipe), label=said in YES)


def _preference(value: Mapping[str, Any], recipe: DataRecipe) -> Conversation:
    sides: list[list[Message]] = []
    notes: list[Note] = []
    prompt: list[Message] | None = None
    if recipe.prompt is not None or "prompt" in recipe.columns:
        prompt, notes = _prompt(value, recipe)
    for role in ("chosen", "rejected"):
        cell = _cell(value, recipe, role)
        if prompt is None and isinstance(cell, str):
            cell = human_turns(cell) or cell
        said, more = _said(cell, recipe.columns[role], recipe, "reply")
        sides.append(_whole(prompt, said, recipe.columns[role]))
        notes += more
    chosen, rejected = sides
    start = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(map(len, sides)))
    if chosen == rejected:
        raise RowFault("same_pair", "the chosen and the rejected answer are the same")
    if start == 0 or start == min(map(len, sides)) or {chosen[start]["role"], rejected[start]["role"]} != {"assistant"}:
        raise RowFault("no_pair", f"the chosen and the rejected answer part at turn {start + 1}, which is not a reply of both")
    messages, first, edge = ordered(chosen, recipe, start)
    other, second, _ = ordered(rejected, recipe, start)
    return Conversation(messages, tuple(dict.fromkeys((*notes, *first, *second))), completion_start=edge, rejected=other)


def _whole(prompt: list[Message] | None, said: list[Message], column: str) -> list[Message]:
    """The whole conversation of one answer, which may be written with its prompt or without."""
    if prompt is None:
        if said[0]["role"] == "assistant":
            raise RowFault("no_pair", f"the column {column!r} is an answer, and there is no column with its prompt")
        return said
    if all(message["role"] in ("assistant", "tool") for message in said):
        return [*prompt, *said]
    asked = [message["content"] for message in prompt if message["role"] == "user"]
    if asked and asked[-1] not in [message["content"] for message in said]:
        raise RowFault("no_pair", f"the column {column!r} answers another prompt than that of the row")
    systems = [message for message in prompt if message["role"] == "system"]
    return said if not systems or said[0]["role"] == "system" else [*systems, *said]


def _text(value: Mapping[str, Any], recipe: DataRecipe) -> Conversation:
    return Conversation([], text=text_of(_cell(value, recipe, "text"), "text", recipe.columns["text"]))


CONVERT: dict[str, Callable[[Mapping[str, Any], DataRecipe], Conversation]] = {
    "alpaca": _alpaca,
    "sharegpt": _turns,
    "messages": _turns,
    "prompt_completion": _completion,
    "preference": _preference,
    "kto": _kto,
    "text": _text,
}
