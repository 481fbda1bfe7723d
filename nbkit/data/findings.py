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
    "missing_column": "a column is missing",
    "wrong_type": "a value is of the wrong type",
    "null_prompt": "the prompt is null",
    "empty_prompt": "the prompt is empty",
    "null_reply": "the reply is null",
    "empty_reply": "the reply is empty",
    "no_messages": "the conversation is empty",
    "unknown_role": "a role is unknown",
    "no_reply": "there is no reply of the assistant",
    "reply_first": "the conversation begins with a reply",
    "tool_call": "the reply is a tool call, not text",
    "template": "the chat template refuses the row",
    "template_rewrites": "the chat template rewrites the text",
    "no_trained_token": "no token would be trained",
    "too_long": "longer than max_seq_length",
    "open_end": "the last turn has no reply and is left out",
    "same_role_twice": "two turns of the same role follow each other",
    "control_text": "the text spells a control token; it is kept as plain characters",
    "no_stop": "no stop token follows the reply",
    "overlap": "the row is among the training rows too",
}


class RowFault(Exception):
    """Raised inside the data room for one row; it becomes a `Finding` and never reaches the user."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind, self.sentence = kind, sentence


@dataclass(frozen=True)
class Finding:
    """One fault of one row.

    Attributes:
        row: 1-based, as the rows are numbered in the file (the line number for JSONL).
        kind: a key of `REASONS`.
        sentence: what is wrong in this very row.
        outcome: "refused" or "dropped" (the row is not trained on), or "used" (it is; this is a warning).
        part: "train" or "held_out".
    """

    row: int
    kind: str
    sentence: str
    outcome: str = REFUSED
    part: str = "train"

    @property
    def reason(self) -> str:
        return REASONS[self.kind]

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
