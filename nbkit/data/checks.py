"""Faults that show in the ids and labels themselves, whoever made them: each told with its rows and its repair.

They are looked for in what is trained on, not in what the rows said: a template that lost its stop token, a tokenizer that
put BOS twice or a collator that cut a row all show here, also where the rows were without fault.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nbkit.config import IGNORE_INDEX
from nbkit.data.findings import rows_text
from nbkit.data.tokens import TRAINED, Line, Reader

Ids = np.ndarray
TEXTS = 2000  # rows whose texts are read for signs of mixed-up roles; ids and labels are read in all rows
USER = r"user|human|prompter|customer"
ASSISTANT = r"assistant|chatgpt|gpt|ai|bot"
MARKS = (
    r"<\|im_start\|>",
    r"<\|start_header_id\|>",
    r"<\|user\|>",
    r"<start_of_turn>",
    r"\[INST\]",
    r"### (?:Instruction|Human|User)\b",
)
REPLY_BEGINS = re.compile(rf"\s*(?:(?:{USER})\s*:|### (?:Instruction|Input|User|Human)\b)", re.IGNORECASE)
REPLY_HOLDS = re.compile(rf"^[ \t]*(?:{USER})\s*:(?=\s)|{'|'.join(MARKS)}", re.IGNORECASE | re.MULTILINE)
PROMPT_BEGINS = re.compile(rf"^[ \t]*(?:(?:{ASSISTANT})\s*:(?=\s)|### (?:Response|Assistant)\b)", re.IGNORECASE | re.MULTILINE)

# kind → (what is wrong, in one clause; what to do; the line of the recipe that does it, if one does)
KINDS: dict[str, tuple[str, str, tuple[str, str] | None]] = {
    "nothing_trained": (
        "no token of any row is trained: every label is -100, so that the loss would be 0 and nothing learned",
        "name the columns and roles of the replies, or the marker that really stands before them",
        None,
    ),
    "masked_row": ("every label is -100, so that the row teaches nothing", "leave it out, or mend the column of its reply", None),
    "no_stop": (
        "the last trained token of a reply is no stop token, so that the model does not learn to end",
        "use a template that ends replies with the tokenizer's stop token",
        None,
    ),
    "double_bos": (
        "the text begins with BOS twice",
        "tokenise with add_special_tokens=False, as the template writes BOS itself",
        None,
    ),
    "cut_off": (
        "the row fills the longest length and does not end with a stop token: its end was cut off",
        "raise max_seq_length, or split long rows",
        ("too_long", "split"),
    ),
    "duplicate": ("the row equals an earlier one, token by token", "drop what is double", ("duplicates", "drop")),
    "reply_as_prompt": (
        "a reply begins with another role's name, as if roles or columns were mixed up",
        "check which column and which role holds the replies",
        None,
    ),
    "marker_in_reply": (
        "a reply holds another role's marker, so that the model learns to write the user's part too",
        "cut the reply before it",
        None,
    ),
    "prompt_as_reply": (
        "a turn that is not trained begins with the assistant's name, as if roles or columns were mixed up",
        "check which column and which role holds the replies",
        None,
    ),
    "padding_trained": ("padding bears a loss", "use a collator that labels padding -100", None),
    "edge_trained": (
        "the first token of a packed row is trained to follow the row before it",
        "label the first token of each packed row -100",
        None,
    ),
}


@dataclass(frozen=True)
class Problem:
    """One kind of fault. `str()` is one sentence.

    Attributes:
        rows: the numbers of the rows that have it; empty where it is of the whole set.
        sentence: what is wrong.
        repair: what to do about it.
        setting: the line of the recipe that does so, as (name, value); None where none does.
        stops: whether training is refused.
    """

    kind: str
    rows: tuple[int, ...]
    sentence: str
    repair: str
    setting: tuple[str, str] | None = None
    stops: bool = False

    def __str__(self) -> str:
        where = f"{rows_text(self.rows)}: " if self.rows else ""
        said = f"{where}{self.sentence}; {self.repair}"
        line = f' (DataRecipe({self.setting[0]}="{self.setting[1]}"))' if self.setting else ""
        return f"{said[:1].upper()}{said[1:]}{line}."


@dataclass
class Counts:
    """What a look through all rows found: tokens of each, trained tokens of each, and rows by kind of fault."""

    lengths: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)
    teaching: int = 0  # sequences of which a token is really predicted; the first of each has nothing before it
    texts_read: int = 0

    def add(self, kind: str, row: int) -> None:
        self.rows.setdefault(kind, []).append(row)

    def problems(self) -> tuple[Problem, ...]:
        if self.lengths and not self.teaching:
            kinds = {"nothing_trained": []} | {kind: rows for kind, rows in self.rows.items() if kind != "masked_row"}
        else:
            kinds = self.rows
        order = list(KINDS)
        return tuple(problem(kind, kinds[kind]) for kind in sorted(kinds, key=order.index))


def problem(kind: str, rows: Iterable[int] = ()) -> Problem:
    sentence, repair, setting = KINDS[kind]
    return Problem(kind, tuple(dict.fromkeys(rows)), sentence, repair, setting, stops=kind == "nothing_trained")


Progress = Callable[[int, int], None]  # (rows done, rows in all); what it raises ends the work


def look_through(
    examples: Sequence[Any],
    rows: Sequence[int],
    reader: Reader,
    *,
    max_length: int | None = None,
    own_text: str = "",
    rendered: bool = False,
    progress: Progress | None = None,
) -> Counts:
    """Look at the ids and labels of every row, and at the texts of at most `TEXTS` of them, evenly spread.

    Args:
        examples: each {"input_ids", "labels"}, one-dimensional and without padding.
        rows: the row number of each.
        max_length: tokens; a row of this length that does not end with a stop token was cut off.
        own_text: what the template itself writes; markers that stand in it are no fault.
        rendered: whether the rows are known to be rendered by that very template.
    """
    counts, seen = Counts(), {}
    step = max(1, -(-len(examples) // TEXTS))
    markers = _Markers(own_text, rendered)
    for number, row in enumerate(rows):
        sequences = arrays_of(examples, number)
        counts.lengths.append(sum(len(ids) for ids, _ in sequences))
        counts.trained.append(sum(int((labels != IGNORE_INDEX).sum()) for _, labels in sequences))
        for ids, labels in sequences:
            runs = _runs(labels != IGNORE_INDEX)
            _ends(counts, row, ids, runs, reader, max_length)
            if number % step == 0:
                markers.read(row, [reader.text(ids[a:b].tolist()) for a, b in runs], _between(ids, runs, reader))
        key = b"/".join(ids.tobytes() for ids, _ in sequences)
        if seen.setdefault(hashlib.blake2b(key, digest_size=16).digest(), row) != row:
            counts.add("duplicate", row)
        if progress is not None and (number % 64 == 63 or number + 1 == len(rows)):
            progress(number + 1, len(rows))
    for kind, row in markers.found():
        counts.add(kind, row)
    counts.texts_read = markers.count
    return counts


def arrays_of(examples: Sequence[Any], number: int) -> list[tuple[Ids, Ids]]:
    """(ids, labels) of an example, int64 (T,); of a preference row those of the better and of the worse reply."""
    example = examples[number]
    names = [("input_ids", "labels")]
    if "rejected_input_ids" in example:
        names.append(("rejected_input_ids", "rejected_labels"))
    return [(np.asarray(example[a], np.int64), np.asarray(example.get(b, example[a]), np.int64)) for a, b in names]


def _ends(counts: Counts, row: int, ids: Ids, runs: list[tuple[int, int]], reader: Reader, max_length: int | None) -> None:
    """What is wrong with the beginning of a row, with its labels, and with the ends of its replies."""
    bos = getattr(reader.tokenizer, "bos_token_id", None)
    if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
        counts.add("double_bos", row)
    if not runs or runs[-1][1] == 1:
        counts.add("masked_row", row)
        return
    counts.teaching += 1
    unstopped = [end for start, end in runs if not _stops(ids[start:end].tolist(), reader)]
    if max_length is not None and len(ids) >= max_length and unstopped and unstopped[-1] == len(ids):
        counts.add("cut_off", row)
        unstopped.pop()
    if unstopped:
        counts.add("no_stop", row)


def _stops(ids: list[int], reader: Reader) -> bool:
    """Whether a trained run ends with a control token; white space that the template writes after it does not count."""
    for index in reversed(ids):
        if index in reader.controls:
            return True
        if reader.text([index]).strip():
            return False
    return False


def _runs(trained: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of each stretch of trained tokens."""
    turns = np.flatnonzero(np.diff(np.concatenate(([False], trained, [False])).astype(np.int8)))
    return list(zip(turns[::2].tolist(), turns[1::2].tolist(), strict=True))


def _between(ids: Ids, runs: list[tuple[int, int]], reader: Reader) -> list[str]:
    edges = [0, *(edge for run in runs for edge in run), len(ids)]
    return [reader.text(ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


class _Markers:
    """Signs of mixed-up roles. What the template writes itself is no sign."""

    def __init__(self, own_text: str, known: bool) -> None:
        self._own, self._known = own_text.casefold(), known
        self._rows: dict[tuple[str, str], list[int]] = {}
        self.count = 0

    def read(self, row: int, replies: list[str], others: list[str]) -> None:
        self.count += 1
        for reply in replies:
            begins = REPLY_BEGINS.match(reply)
            self._keep("reply_as_prompt", begins, row)
            for held in REPLY_HOLDS.finditer(reply, begins.end() if begins else 0):
                self._keep("marker_in_reply", held, row)
        for other in others:
            for held in PROMPT_BEGINS.finditer(other):
                self._keep("prompt_as_reply", held, row)

    def _keep(self, kind: str, match: re.Match[str] | None, row: int) -> None:
        if match is None or (mark := match[0].strip().casefold()) in self._own:
            return
        rows = self._rows.setdefault((kind, mark), [])
        if not rows or rows[-1] != row:
            rows.append(row)

    def found(self) -> Iterator[tuple[str, int]]:
        for (kind, _), rows in self._rows.items():
            # Where the template is not known, a mark that stands in most of the rows is taken for the template's.
            if self._known or self.count < 4 or len(rows) <= self.count / 2:
                yield from ((kind, row) for row in rows)


def look_at_batch(lines: Sequence[Line]) -> tuple[Problem, ...]:
    """Faults that only a collated batch has: padding that is trained, packed rows that run into each other."""
    found: dict[str, list[int]] = {}
    for line in lines:
        for token in line.tokens:
            kind = "padding_trained" if not token.real else "edge_trained" if token.edge else None
            if kind is not None and token.state == TRAINED:
                found.setdefault(kind, []).extend(line.rows)
    return tuple(problem(kind, rows) for kind, rows in found.items())
