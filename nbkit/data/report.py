"""`prepare`: any rows become labelled examples and a `DataReport` that accounts for every one of them."""

from __future__ import annotations

import hashlib
import html
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nbkit.config import IGNORE_INDEX, DataRecipe
from nbkit.data.findings import DROPPED, REASONS, REFUSED, USED, Finding, RowFault, grouped, rows_text, shorten
from nbkit.data.formats import Detected, Message, detect, to_conversation
from nbkit.data.sources import Row, Source, read
from nbkit.data.template import Labelled, Rendered, Renderer, pieces_of
from nbkit.errors import DataError

CHUNK = 256  # rows that are tokenised together, by as many threads as the tokenizer likes

Example = dict[str, list[int]]  # "input_ids" and "labels", of one length


class Preview(NamedTuple):
    """One training row beside what is made of it. `pieces`, joined, are the whole rendered text."""

    raw: Any
    pieces: list[tuple[str, bool]]  # (text, is it trained?)


@dataclass(repr=False)
class DataReport:
    """The examples, and what became of every row: `rows_in == used + dropped + refused`.

    Rows that are split off as held out (`held_out=` a number or a share) are good rows and are not counted in
    `rows_in`. `trained_tokens` and `total_tokens` are those of the training examples.

    Attributes:
        examples: what is trained on: {"input_ids", "labels"}, labels -100 where no loss is borne.
        row_numbers: the row number of each example.
        held_out_rows: the messages of each held-out example, ended by the reply it should get.
        recipe: the recipe with the format found and the columns filled in.
        reason: why this format, in one sentence.
        longest: tokens of the longest row, whether it was used or not.
        fingerprint: SHA-256 of ids and labels of all examples, the held-out ones included.
    """

    source: str
    rows_in: int
    used: int
    dropped: int
    refused: int
    trained_tokens: int
    total_tokens: int
    findings: tuple[Finding, ...]
    examples: list[Example]
    held_out_examples: list[Example]
    held_out_rows: list[list[Message]]
    recipe: DataRecipe
    reason: str
    longest: int
    max_seq_length: int
    fingerprint: str
    row_numbers: list[int]
    _kept: list[_Kept]
    _renderer: Renderer

    @property
    def trained_share(self) -> float:
        """Trained tokens as a share of all, 0 to 1."""
        return self.trained_tokens / self.total_tokens if self.total_tokens else 0.0

    def preview(self, index: int) -> Preview:
        """Example `index` (from 0): its raw row and its rendered text, with what is trained.

        Raises: DataError if there is no such example.
        """
        if not -len(self._kept) <= index < len(self._kept):
            raise DataError(f"There is no example {index}; there are {len(self._kept)}, counted from 0.")
        kept = self._kept[index]
        rendered = self._renderer.render(kept.messages)
        (labelled,) = self._renderer.label([rendered])
        assert isinstance(labelled, Labelled)  # it was, when the row was used
        return Preview(kept.row.value, list(pieces_of(rendered.text, labelled)))

    def _headline(self) -> str:
        counts = [f"{self.used:,} used"]
        for outcome, count in ((DROPPED, self.dropped), (REFUSED, self.refused)):
            groups = [g for g in grouped(self.findings) if g[:2] == ("train", outcome)]
            why = "; ".join(f"{rows_text(numbers)}: {self._reason(part, reason)}" for part, _, reason, numbers in groups)
            if count:
                counts.append(f"{count:,} {outcome} ({why})")
        tokens = f"trains on {self.trained_tokens:,} of {self.total_tokens:,} tokens ({100 * self.trained_share:.1f} %)"
        return f"{self.rows_in:,} rows in: {', '.join(counts)}; {tokens}"

    def _reason(self, part: str, reason: str) -> str:
        if reason != REASONS["too_long"]:
            return reason
        longest = f"; the longest has {self.longest:,} tokens" if part == "train" else ""
        return f"{reason} {self.max_seq_length:,}{longest}"

    def _lines(self) -> list[str]:
        lines = [self._headline(), f"{self.source} is read as {self.reason}"]
        if self.held_out_examples:
            lines.append(f"{len(self.held_out_examples):,} rows are held out")
        for part, outcome, reason, numbers in grouped(self.findings):
            if part == "held_out" or outcome == USED:
                where = "held-out " if part == "held_out" else ""
                left_out = "" if outcome == USED else f" ({outcome})"
                lines.append(f"{where}{rows_text(numbers)}: {self._reason(part, reason)}{left_out}")
        return lines

    def __str__(self) -> str:
        return "\n".join(self._lines())

    __repr__ = __str__  # not thousands of ids

    def _repr_html_(self) -> str:
        first, *rest = (html.escape(line) for line in self._lines())
        items = "".join(f"<li>{line}</li>" for line in rest)
        return f'<div class="nbkit-data-report"><b>{first}</b><ul>{items}</ul></div>'


@dataclass(frozen=True)
class _Kept:
    """A good row on its way."""

    row: Row
    messages: list[Message]
    example: Example


@dataclass(frozen=True)
class _Mapped:
    kept: list[_Kept]
    findings: list[Finding]
    longest: int

    def count(self, outcome: str) -> int:
        return len({finding.row for finding in self.findings if finding.outcome == outcome})


def prepare(
    source: Any,
    tokenizer: Any,
    recipe: DataRecipe,
    *,
    max_seq_length: int,
    held_out: Any = None,
    seed: int = 3407,
) -> DataReport:
    """Read, map, render and label rows; good rows beside bad ones are used, and each bad one is a finding.

    Args:
        source: see `nbkit.data.sources.read`.
        tokenizer: a fast transformers tokenizer with a chat template.
        max_seq_length: tokens; longer rows are refused or dropped (`recipe.too_long`), never cut.
        held_out: rows never trained on: another source, a number of rows, a share below 1, or None.
        seed: picks the rows of a number or a share.
    Raises: DataError if the source cannot be read, has no known format, or has no row that would be trained on.
    """
    renderer = Renderer(tokenizer)
    rows = read(source)
    found = detect(rows, recipe)
    mapped = _map(rows, found.recipe, renderer, max_seq_length, "train")
    kept, apart, more = _split(mapped, rows, recipe, renderer, max_seq_length, held_out, seed)
    findings = [*mapped.findings, *more, *_overlap(kept, apart)]
    if not kept:
        raise DataError(f"No row of {rows.name} is left to train on: all {len(apart)} good rows are held out; hold out fewer.")
    return _report(rows, found, renderer, max_seq_length, mapped, kept, apart, findings)


def _report(
    rows: Source,
    found: Detected,
    renderer: Renderer,
    max_seq_length: int,
    mapped: _Mapped,
    kept: list[_Kept],
    apart: list[_Kept],
    findings: list[Finding],
) -> DataReport:
    examples, aside = [k.example for k in kept], [k.example for k in apart]
    dropped, refused = mapped.count(DROPPED), mapped.count(REFUSED)
    return DataReport(
        source=rows.name,
        rows_in=len(kept) + dropped + refused,
        used=len(kept),
        dropped=dropped,
        refused=refused,
        trained_tokens=sum(label != IGNORE_INDEX for example in examples for label in example["labels"]),
        total_tokens=sum(len(example["input_ids"]) for example in examples),
        findings=tuple(findings),
        examples=examples,
        held_out_examples=aside,
        held_out_rows=[[dict(message) for message in k.messages] for k in apart],
        recipe=found.recipe,
        reason=found.reason,
        longest=mapped.longest,
        max_seq_length=max_seq_length,
        fingerprint=fingerprint(examples, aside),
        row_numbers=[k.row.number for k in kept],
        _kept=kept,
        _renderer=renderer,
    )


def _map(rows: Source, recipe: DataRecipe, renderer: Renderer, max_seq_length: int, part: str) -> _Mapped:
    """Every row becomes an example or a finding.

    Raises: DataError if none becomes an example.
    """
    from tqdm.auto import tqdm

    kept: list[_Kept] = []
    findings: list[Finding] = []
    longest = 0
    with tqdm(total=len(rows.rows), desc="Mapping rows", unit=" rows", delay=1, leave=False) as bar:
        for start in range(0, len(rows.rows), CHUNK):
            chunk = rows.rows[start : start + CHUNK]
            rendered = _rendered(chunk, recipe, renderer, part, findings)
            for (row, messages, one), result in zip(rendered, renderer.label([r[2] for r in rendered]), strict=True):
                notes = one.notes
                if isinstance(result, Labelled):
                    longest = max(longest, len(result.input_ids))
                fault = _fault(result, max_seq_length)
                if fault is None and isinstance(result, Labelled):
                    kept.append(_Kept(row, messages, {"input_ids": result.input_ids, "labels": result.labels}))
                    findings += [Finding(row.number, kind, sentence, USED, part) for kind, sentence in notes]
                elif fault is not None:
                    outcome = DROPPED if fault.kind == "too_long" and recipe.too_long == "drop" else REFUSED
                    findings.append(Finding(row.number, fault.kind, fault.sentence, outcome, part))
            bar.update(len(chunk))
    findings.sort(key=lambda finding: finding.row)
    if not kept:
        raise DataError(_nothing_left(rows, findings))
    return _Mapped(kept, findings, longest)


def _rendered(
    chunk: Sequence[Row], recipe: DataRecipe, renderer: Renderer, part: str, findings: list[Finding]
) -> list[tuple[Row, list[Message], Rendered]]:
    good = []
    for row in chunk:
        try:
            if row.fault is not None:
                raise row.fault
            conversation = to_conversation(row.value, recipe)
            one = renderer.render(conversation.messages)
        except RowFault as fault:
            findings.append(Finding(row.number, fault.kind, fault.sentence, REFUSED, part))
            continue
        notes = (*conversation.notes, *one.notes)
        good.append((row, conversation.messages, Rendered(one.text, one.trained, one.texts, notes)))
    return good


def _fault(result: Labelled | RowFault, max_seq_length: int) -> RowFault | None:
    if isinstance(result, RowFault):
        return result
    length = len(result.input_ids)
    if length > max_seq_length:
        remedy = "raise max_seq_length or shorten the row"
        return RowFault("too_long", f"the row has {length:,} tokens, max_seq_length is {max_seq_length:,}; {remedy}")
    if all(label == IGNORE_INDEX for label in result.labels):
        return RowFault("no_trained_token", "the tokenizer makes no token of the reply, so nothing would be trained")
    return None


def _nothing_left(rows: Source, findings: Sequence[Finding]) -> str:
    first = findings[0]
    kinds = grouped(findings)
    others = f" (and {len(findings) - 1:,} more: {'; '.join(dict.fromkeys(k[2] for k in kinds))})" if len(findings) > 1 else ""
    count = "The one row" if len(rows.rows) == 1 else f"None of the {len(rows.rows):,} rows"
    verb = "cannot" if len(rows.rows) == 1 else "can"
    return (
        f"{count} of {rows.name} {verb} be trained on, so training would learn nothing. "
        f"Row {first.row}: {first.sentence}{others}. Mend the rows, or name the right columns in a DataRecipe."
    )


def _split(
    mapped: _Mapped, rows: Source, recipe: DataRecipe, renderer: Renderer, max_seq_length: int, held_out: Any, seed: int
) -> tuple[list[_Kept], list[_Kept], list[Finding]]:
    """(training rows, held-out rows, findings in a held-out source)."""
    if held_out is None:
        return mapped.kept, [], []
    if isinstance(held_out, (bool, int, float)):
        count = _held_out_count(held_out, len(mapped.kept), rows.name)
        import random

        chosen = set(random.Random(seed).sample(range(len(mapped.kept)), count))
        train = [k for i, k in enumerate(mapped.kept) if i not in chosen]
        return train, [k for i, k in enumerate(mapped.kept) if i in chosen], []
    other = read(held_out)
    apart = _map(other, detect(other, recipe).recipe, renderer, max_seq_length, "held_out")
    return mapped.kept, apart.kept, apart.findings


def _held_out_count(held_out: int | float, good: int, name: str) -> int:
    share = isinstance(held_out, float) and 0 < held_out < 1
    count = max(1, round(held_out * good)) if share else held_out
    if isinstance(held_out, bool) or (isinstance(held_out, float) and not share) or count < 1:
        raise DataError(f"held_out is {shorten(held_out)}; give a number of rows from 1, a share below 1, or another source.")
    if count >= good:
        raise DataError(f"held_out takes {count:,} of the {good:,} good rows of {name} and leaves none to train on; take fewer.")
    return int(count)


def _overlap(kept: Sequence[_Kept], apart: Sequence[_Kept]) -> list[Finding]:
    """Held-out rows that are trained on too, token by token: their loss says nothing."""
    trained: dict[tuple[int, ...], int] = {}
    if apart:
        for k in kept:
            trained.setdefault(tuple(k.example["input_ids"]), k.row.number)
    return [
        Finding(k.row.number, "overlap", f"the row equals training row {trained[ids]}", USED, "held_out")
        for k in apart
        if (ids := tuple(k.example["input_ids"])) in trained
    ]


def fingerprint(*parts: Sequence[Example]) -> str:
    """SHA-256 over the ids and labels, as 32-bit integers, each with its length before it."""
    digest = hashlib.sha256()
    for examples in parts:
        digest.update(len(examples).to_bytes(8, "little"))
        for example in examples:
            for name in ("input_ids", "labels"):
                numbers = array("i", example[name])
                digest.update(len(numbers).to_bytes(8, "little") + numbers.tobytes())
    return digest.hexdigest()
