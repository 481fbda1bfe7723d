"""The format of rows, found from their columns, and their conversion to one form of messages.

| format | columns by role | a row |
|---|---|---|
| alpaca | instruction, input (may be missing or empty), output | text in each |
| sharegpt | conversations | a list of {"from": ..., "value": ...} |
| messages | messages | a list of {"role": ..., "content": ...} |

Lists may also be JSON text, as they are in CSV files. `DataRecipe.columns` names other columns for the roles.
The one form: a list of {"role": "system" | "user" | "assistant" | "tool", "content": text}, ended by the assistant.
Standard library only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nbkit.config import DataRecipe
from nbkit.data.findings import RowFault, shorten
from nbkit.data.sources import Source
from nbkit.errors import DataError, nearest

ROLES = {  # format -> role of the recipe -> is it required?
    "alpaca": {"instruction": True, "input": False, "output": True},
    "sharegpt": {"conversations": True},
    "messages": {"messages": True},
}
SPEAKERS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "person", "customer"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard", "ai", "agent"),
    "tool": ("tool", "function", "function_response", "observation", "ipython"),
}
SPEAKER_OF = {alias: role for role, aliases in SPEAKERS.items() for alias in aliases}
LOOKED_AT = 1000  # rows that are looked at to find the format
EXPECTED = (
    "alpaca (columns instruction, output and, if you like, input), sharegpt (a column conversations: a list of "
    '{"from", "value"}) or messages (a column messages: a list of {"role", "content"})'
)

Message = dict[str, str]


@dataclass(frozen=True)
class Detected:
    """What was found: the recipe with its format and columns filled in, and why, in one sentence."""

    recipe: DataRecipe
    reason: str


@dataclass(frozen=True)
class Conversation:
    """The messages of one row, and what is worth a warning: (kind, sentence)."""

    messages: list[Message]
    notes: tuple[tuple[str, str], ...] = ()


def detect(source: Source, recipe: DataRecipe) -> Detected:
    """The format and the columns of the rows; what the recipe says comes first.

    Raises: DataError saying which columns were seen and what is accepted.
    """
    columns = source.columns
    if not columns:
        fault = next((row.fault for row in source.rows if row.fault), None)
        seen = f": {fault.sentence}" if fault else f"; the first is {shorten(source.rows[0].value)}"
        raise DataError(f"No row of {source.name} is an object with columns{seen}. Accepted: {EXPECTED}.")
    if recipe.format != "auto" or recipe.columns:
        return _as_told(source, recipe, columns)
    if candidates := _candidates(source, columns):
        return _found(recipe, *candidates[0], columns)
    raise DataError(
        f"{source.name} is in no known format: its columns are {_listed(columns)}. Accepted: {EXPECTED}. "
        "Other columns can be named: DataRecipe(format='alpaca', "
        f"columns={{'instruction': {columns[0]!r}, 'output': {columns[-1]!r}}})."
    )


def form_role(form: str) -> str:
    """The role that holds the list of turns."""
    return next(iter(ROLES[form]))


def _turn_keys(form: str) -> str:
    return '{"from", "value"}' if form == "sharegpt" else '{"role", "content"}'


def _listed(columns: Sequence[str], most: int = 20) -> str:
    more = f" and {len(columns) - most} more" if len(columns) > most else ""
    return ", ".join(shorten(column, 40) for column in columns[:most]) + more


def _found(recipe: DataRecipe, form: str, columns: dict[str, str], reason: str, seen: Sequence[str]) -> Detected:
    left = [column for column in seen if column not in columns.values()]
    unused = f"; {_listed(left, 6)} not used" if left else ""
    return Detected(replace(recipe, format=form, columns=columns), f"{form}, because {reason}{unused}")


def _as_told(source: Source, recipe: DataRecipe, seen: Sequence[str]) -> Detected:
    """The recipe names the format, the columns, or both; what it leaves out takes the usual column."""
    form = recipe.format
    if form == "auto":
        fitting = [name for name, roles in ROLES.items() if set(recipe.columns) <= set(roles)]
        if not fitting:
            roles = [role for known in ROLES.values() for role in known]
            wrong = next((role for role in recipe.columns if role not in roles), next(iter(recipe.columns)))
            raise DataError(
                f"The recipe's columns name {wrong!r}, which no format has together with the rest; the roles are "
                f"instruction, input, output (alpaca), conversations (sharegpt), messages (messages).{nearest(wrong, roles)}"
            )
        form = fitting[0]
    for role, column in recipe.columns.items():
        if role not in ROLES[form]:
            raise DataError(f"The format {form} has no role {role!r}; its roles are {', '.join(ROLES[form])}.")
        if column not in seen:
            raise DataError(f"{source.name} has no column {column!r}; its columns are {_listed(seen)}.{nearest(column, seen)}")
    lower = {column.casefold(): column for column in reversed(seen)}
    filled = {role: column for role in ROLES[form] if (column := recipe.columns.get(role) or lower.get(role))}
    for role, required in ROLES[form].items():
        if required and role not in filled:
            raise DataError(
                f"{source.name} has no column {role!r}, which the format {form} needs; its columns are {_listed(seen)}. "
                f"Name the right one: DataRecipe(format={form!r}, columns={{{role!r}: {seen[0]!r}}})."
            )
    return _found(recipe, form, filled, "the recipe says so", seen)


def _candidates(source: Source, columns: Sequence[str]) -> list[tuple[str, dict[str, str], str]]:
    """(format, columns by role, reason), the one that fits the most of the first rows first."""
    values = [row.value for row in source.rows[:LOOKED_AT] if isinstance(row.value, Mapping)]
    usual = ("messages", "conversations")
    found = []  # (rows that fit, format, columns, reason)
    for column in sorted(columns, key=lambda name: name.casefold() not in usual):
        forms = [_form_of(value.get(column)) for value in values]
        for form in ("messages", "sharegpt"):
            if fitting := forms.count(form):
                found.append(
                    (fitting, form, {form_role(form): column}, f"the column {column!r} holds lists of {_turn_keys(form)}")
                )
    lower = {column.casefold(): column for column in reversed(columns)}
    if "instruction" in lower and "output" in lower:
        filled = {role: lower[role] for role in ROLES["alpaca"] if role in lower}
        fitting = sum(all(isinstance(value.get(lower[role]), str) for role in ("instruction", "output")) for value in values)
        found.append((fitting, "alpaca", filled, f"there are columns {', '.join(map(repr, filled.values()))}"))
    best_first = sorted(found, key=lambda candidate: -candidate[0])  # stable: lists of the usual names win a tie
    return [(form, filled, reason) for _, form, filled, reason in best_first]


def _form_of(value: Any) -> str | None:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], Mapping):
        return None
    if {"from", "value"} <= set(value[0]):
        return "sharegpt"
    return "messages" if {"role", "content"} <= set(value[0]) else None


# -- one row ---------------------------------------------------------------------------------------


def to_conversation(value: Any, recipe: DataRecipe) -> Conversation:
    """The messages of one row, by a recipe that `detect` has filled.

    Raises: RowFault.
    """
    if not isinstance(value, Mapping):
        raise RowFault("not_an_object", f"the row is {shorten(value)}, not an object with columns")
    if recipe.format == "alpaca":
        found = _alpaca(value, recipe.columns)
    else:
        found = _turns(value, recipe.columns[form_role(recipe.format)])
    if recipe.system is not None and found.messages[0]["role"] != "system":
        found.messages.insert(0, {"role": "system", "content": recipe.system})
    for message in found.messages:
        try:
            message["content"].encode("utf-8")
        except UnicodeEncodeError as error:
            letter = f"U+{ord(message['content'][error.start]):04X}"
            raise RowFault("broken_text", f"the text of the {message['role']} holds half a character ({letter})") from error
    return found


def _alpaca(value: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    for role in ("instruction", "output"):
        if columns[role] not in value:
            raise RowFault("missing_column", f"the column {columns[role]!r} is missing")
    instruction = _text(value[columns["instruction"]], "prompt", columns["instruction"])
    output = _text(value[columns["output"]], "reply", columns["output"])
    extra = value.get(columns["input"]) if "input" in columns else None
    prompt = instruction
    if not _is_null(extra):
        if not isinstance(extra, str):
            raise RowFault("wrong_type", f"the column {columns['input']!r} is {shorten(extra)}, not text")
        prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": output}])


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # tables write nothing as NaN


def _text(value: Any, what: str, where: str) -> str:
    """The text of a prompt or a reply. Raises: RowFault of kind null_*, empty_* or wrong_type."""
    if _is_null(value):
        raise RowFault(f"null_{what}", f"the {what} is null ({where})")
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Mapping) and v.get("type") == "text" for v in value):
        value = "".join(v["text"] if isinstance(v.get("text"), str) else "" for v in value)  # OpenAI's content parts
    if not isinstance(value, str):
        raise RowFault("wrong_type", f"the {what} is {shorten(value)}, not text ({where})")
    if not value.strip():
        raise RowFault(f"empty_{what}", f"the {what} is empty ({where})")
    return value


def _turns(value: Mapping[str, Any], column: str) -> Conversation:
    if column not in value:
        raise RowFault("missing_column", f"the column {column!r} is missing")
    turns = value[column]
    if isinstance(turns, str) and turns.strip():
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise RowFault("broken_json", f"the column {column!r} is text that is no JSON list: {str(error)[:80]}") from error
    if _is_null(turns) or (isinstance(turns, (str, list, tuple)) and not turns):
        raise RowFault("no_messages", f"the column {column!r} holds no turns")
    if not isinstance(turns, (list, tuple)):
        raise RowFault("wrong_type", f"the column {column!r} is {shorten(turns)}, not a list of turns")
    messages = [_turn(turn, number) for number, turn in enumerate(turns, 1)]
    return _checked(messages)


def _turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise RowFault("wrong_type", f"turn {number} is {shorten(turn)}, not an object")
    speaker = next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)
    role = SPEAKER_OF.get(speaker.strip().casefold()) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(alias for aliases in SPEAKERS.values() for alias in aliases[:2])
        raise RowFault("unknown_role", f"turn {number} has the unknown role {shorten(speaker)}; known are {known} and others")
    key = next((key for key in ("content", "value") if key in turn), "content")
    content = turn.get(key)
    if role == "assistant" and turn.get("tool_calls") and (_is_null(content) or content == ""):
        raise RowFault("tool_call", f"turn {number} is a tool call without text")
    if role in ("system", "tool") and isinstance(content, str):
        return {"role": role, "content": content}  # these may be empty
    return {"role": role, "content": _text(content, "reply" if role == "assistant" else "prompt", f"turn {number}")}


def _checked(messages: list[Message]) -> Conversation:
    """The order of the turns. A conversation that ends with a question loses that end, with a note."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowFault("no_reply", f"none of the {len(roles)} turns is the assistant's")
    spoken = [role for role in roles if role != "system"]
    if spoken[0] == "assistant":
        raise RowFault("reply_first", "the first turn is a reply, with nothing before it that it answers")
    notes = []
    last = len(roles) - roles[::-1].index("assistant")
    if last < len(roles):
        notes.append(("open_end", f"the last {len(roles) - last} of {len(roles)} turns have no reply and are left out"))
    twice = next((i for i in range(1, last) if roles[i] == roles[i - 1] and roles[i] in ("user", "assistant")), None)
    if twice is not None:
        notes.append(("same_role_twice", f"turns {twice} and {twice + 1} are both the {roles[twice]}'s"))
    return Conversation(messages[:last], tuple(notes))
