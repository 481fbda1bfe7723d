"""What was found in the rows: one `Finding` a fault, told with its row number. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

USED, DROPPED, REFUSED = "used", "dropped", "refused"

# kind of fault -> the short reason under which rows are listed together
REASONS = {
    "broken_line": "the line is not JSON",
    "broken_text": "the text is not valid UTF-8",
    "broken_json": "the conversation is broken JSON",
    "not_an_object": "the row is not an object with columns",
    "ragged_row": "the row has more cells than there are columns",
    "broken_quotes": "the quotes of the table are broken",
    "broken_block": "a block of the file is damaged",
    "column_twice": "a column stands twice in one row",
    "too_big": "the row is too large to be read",
    "missing_column": "a column is missing",
    "wrong_type": "a value is of the wrong type",
    "null_prompt": "the prompt is null",
    "empty_prompt": "the prompt is empty",
    "null_reply": "the reply is null",
    "empty_reply": "the reply is empty",
    "null_text": "the text is null",
    "empty_text": "the text is empty",
    "no_messages": "the conversation is empty",
    "unknown_role": "a role is unknown",
    "no_reply": "there is no reply of the assistant",
    "reply_first": "the conversation begins with a reply",
    "tool_call": "the reply is a tool call, not text",
    "broken_tool_call": "a tool call has no name, or its arguments are no JSON",
    "broken_tools": "the list of tools is no JSON list of objects",
    "not_text": "a part of a message is not text",
    "bad_label": "the label is neither true nor false",
    "no_pair": "the chosen and the rejected answer do not part at a reply",
    "same_pair": "the chosen and the rejected answer are the same",
    "template": "the chat template refuses the row",
    "template_rewrites": "the chat template rewrites the text",
    "template_limit": "the chat template takes too much time or memory",
    "thinking_dropped": "the chat template leaves out thinking of earlier turns",
    "text_dropped": "the chat template leaves out the text beside a tool call",
    "no_trained_token": "no token would be trained",
    "too_long": "longer than max_seq_length",
    "open_end": "the last turn has no reply and is left out",
    "same_role_twice": "two turns of the same role follow each other",
    "first_reply_skipped": "the first turn is a reply and is left out",
    "turns_joined": "turns of the same role are joined",
    "weight": "a message has the weight 0, which is not heeded",
    "control_text": "the text spells a control token; it is kept as plain characters",
    "no_stop": "no stop token follows the reply",
    "overlap": "the row is among the training rows too",
    "duplicate": "the row equals an earlier one",
    "unwanted": "the label is false, and the method sft trains wanted replies alone",
    "cut": "too long, so the end is cut off",
    "split": "too long, so the row is split",
}

_DROP = "leave such rows out with DataRecipe(faulty='drop')"
_FILL = f"fill the cell in, or {_DROP}"
_MEND = f"mend the file, or {_DROP}"

# kind of fault -> the repair that is offered: an edit of the rows or a setting of the recipe. Kinds without one need none.
REPAIRS = {
    "broken_line": _MEND,
    "broken_text": f"save the file as UTF-8, or {_DROP}",
    "broken_json": f"write lists as JSON with double quotes, or {_DROP}",
    "not_an_object": f"write the row as an object with columns, or {_DROP}",
    "ragged_row": f"put texts with commas in quotes, or {_DROP}",
    "broken_quotes": f"double the quotes inside a cell, or {_DROP}",
    "broken_block": f"fetch or write the file again, or {_DROP}",
    "column_twice": f"rename one of them, or {_DROP}",
    "too_big": f"shorten or split the row, or {_DROP}",
    "missing_column": f"name the right one with DataRecipe(columns={{...}}), or {_DROP}",
    "wrong_type": f"write the value as text, name another column with DataRecipe(columns={{...}}), or {_DROP}",
    "null_prompt": _FILL,
    "empty_prompt": _FILL,
    "null_reply": _FILL,
    "empty_reply": _FILL,
    "null_text": _FILL,
    "empty_text": _FILL,
    "no_messages": _FILL,
    "unknown_role": "say who speaks with DataRecipe(roles={'NAME': 'user'}) (or 'assistant', 'system', 'tool')",
    "no_reply": f"add the reply, or {_DROP}",
    "reply_first": "leave such a first turn out with DataRecipe(first_reply='skip')",
    "same_role_twice": "join such turns with DataRecipe(same_role='join')",
    "tool_call": _DROP,
    "broken_tool_call": f"write it as {{'name': ..., 'arguments': {{...}}}}, or {_DROP}",
    "broken_tools": f"write them as a JSON list of objects, or {_DROP}",
    "not_text": f"take images, sound and files out, or {_DROP}",
    "bad_label": f"write true or false, or {_DROP}",
    "no_pair": f"give both answers to one prompt, or {_DROP}",
    "same_pair": f"give two different answers, or {_DROP}",
    "template": f"choose another template with DataRecipe(template=...), or {_DROP}",
    "template_rewrites": f"choose another template with DataRecipe(template=...), or {_DROP}",
    "template_limit": f"choose another template with DataRecipe(template=...), or {_DROP}",
    "no_trained_token": _DROP,
    "too_long": "raise max_seq_length, or choose DataRecipe(too_long='drop'), 'cut' or 'split'",
    "overlap": "take the row out of one of the two sets",
    "duplicate": "leave them out with DataRecipe(duplicates='drop')",
}


class RowFault(Exception):
    """Raised inside the data room for one row; it becomes a `Finding` and never reaches the user."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind, self.sentence = kind, sentence
        self.guess = ""  # see `Finding`


@dataclass(frozen=True)
class Finding:
    """One fault of one row.

    Attributes:
        row: 1-based, as the rows are numbered in the file (the line number for JSONL).
        kind: a key of `REASONS`.
        sentence: what is wrong in this very row.
        outcome: "refused" or "dropped" (the row is not trained on), or "used" (it is; this is a warning).
        part: "train" or "held_out".
        guess: of an unknown role, who speaks, where that is certain: "alien=user".
    """

    row: int
    kind: str
    sentence: str
    outcome: str = REFUSED
    part: str = "train"
    guess: str = ""

    @property
    def reason(self) -> str:
        return REASONS[self.kind]

    @property
    def repair(self) -> str:
        """What can be done about it, as an edit or a setting; '' where nothing has to be."""
        return REPAIRS.get(self.kind, "")

    @property
    def mending(self) -> str:
        """The repair but for leaving the row out; '' where there is no other."""
        if self.kind == "too_long":
            return "raise max_seq_length, or choose DataRecipe(too_long='cut') or 'split'"
        return "" if self.repair == _DROP else self.repair.removesuffix(f", or {_DROP}")

    def __str__(self) -> str:
        where = "Held-out row" if self.part == "held_out" else "Row"
        return f"{where} {self.row}: {self.sentence} ({self.outcome})."


def rows_text(numbers: Sequence[int], most: int = 8) -> str:
    """'row 7', 'rows 7, 31' or 'rows 4, 9, 12 and 40 more'."""
    if len(numbers) == 1:
        return f"row {numbers[0]}"
    shown = ", ".join(map(str, numbers[:most]))
    rest = len(numbers) - most
    return f"rows {shown} and {rest:,} more" if rest > 0 else f"rows {shown}"


def grouped(findings: Iterable[Finding]) -> list[tuple[str, str, str, list[int]]]:
    """(part, outcome, reason, row numbers) for each kind of fault, in order of first appearance."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for finding in findings:
        groups.setdefault((finding.part, finding.outcome, finding.reason), []).append(finding.row)
    return [(*key, sorted(set(numbers))) for key, numbers in groups.items()]


def shorten(value: object, most: int = 60) -> str:
    """A value from a row, cut so that a message stays one readable line."""
    if isinstance(value, str):
        text = repr(value[: most * 2])
    elif isinstance(value, (list, tuple, dict)):
        text = f"a {type(value).__name__} of {len(value)}"
    elif value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 10**20):
        text = repr(value)
    else:
        text = f"of the type {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 1]}…"
