"""`DataReport`: what became of every row, and the examples that are trained on."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nbkit.config import DataRecipe
from nbkit.data.findings import DROPPED, REASONS, REFUSED, USED, Finding, grouped, rows_text
from nbkit.data.formats import Message
from nbkit.data.repairs import Repair, offers
from nbkit.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from nbkit.data.mapping import Reread
    from nbkit.data.store import Examples


class Preview(NamedTuple):
    """One training row beside what is made of it. `pieces`, joined, are the whole rendered text."""

    raw: Any
    pieces: list[tuple[str, bool]]  # (text, is it trained?)


@dataclass(repr=False, eq=False)
class DataReport:
    """The examples, and what became of every row: `rows_in == used + dropped + refused`.

    Rows that are split off as held out (`held_out=` a number or a share) are good rows and are not counted in
    `rows_in`. `trained_tokens` and `total_tokens` are those of the training examples.

    Attributes:
        examples: what is trained on: {"input_ids", "labels"}, labels -100 where no loss is borne. There are more of them than
            rows used where rows were split.
        row_numbers: the row number of each example, int64.
        held_out_rows: the messages of each held-out example, ended by the reply it should get; none of raw text.
        recipe: the recipe with the format found and the columns filled in.
        reason: why this format, in one sentence.
        confidence: how sure that is, 0 to 1.
        longest: tokens of the longest row, whether it was used or not; without `longest_counted` at least so many.
        fingerprint: SHA-256 of ids and labels of all examples, the held-out ones included.
        reread: looks at rows once more, for `preview`.
    """

    source: str
    rows_in: int
    used: int
    dropped: int
    refused: int
    trained_tokens: int
    total_tokens: int
    findings: tuple[Finding, ...]
    examples: Examples
    held_out_examples: Examples
    held_out_rows: list[list[Message]]
    recipe: DataRecipe
    reason: str
    confidence: float
    longest: int
    max_seq_length: int
    fingerprint: str
    row_numbers: np.ndarray
    reread: Reread | None = None
    longest_counted: bool = True

    @property
    def tokenizer(self) -> Any:
        """The tokenizer whose ids the examples hold."""
        assert self.reread is not None
        return self.reread.tokenizer

    @property
    def trained_share(self) -> float:
        """Trained tokens as a share of all, 0 to 1."""
        return self.trained_tokens / self.total_tokens if self.total_tokens else 0.0

    @property
    def pieces(self) -> int:
        """How many examples the used rows give: more than there are rows where some were split."""
        return len(self.examples)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        return self.examples.lengths

    @property
    def trained_counts(self) -> np.ndarray:
        """Trained tokens of each example, int64."""
        return self.examples.trained_counts

    @property
    def duplicates(self) -> list[int]:
        """The numbers of the rows that equal an earlier one, whether they were dropped or are told alone."""
        return [finding.row for finding in self.findings if finding.kind == "duplicate" and finding.part == "train"]

    @property
    def repairs(self) -> list[Repair]:
        """What can be done about the rows that are not used: a sentence, and the recipe that does it."""
        return offers(self.recipe, self.findings)

    def example_row(self, index: int) -> int:
        """The number of the row that example `index` (from 0) comes from. Raises: DataError if there is no such example."""
        if not -len(self.examples) <= index < len(self.examples):
            raise DataError(f"There is no example {index}; there are {len(self.examples)}, counted from 0.")
        return int(self.row_numbers[index])

    def preview(self, index: int) -> Preview:
        """Example `index` (from 0): its raw row, read once more, and its rendered text, with what is trained.

        Raises: DataError if there is no such example, or the row is no longer what it was.
        """
        from nbkit.data.template import pieces_of

        number = self.example_row(index)
        index %= len(self.examples)
        first = index
        while first and self.row_numbers[first - 1] == number:
            first -= 1
        assert self.reread is not None
        outcome = self.reread.outcome(number)
        piece = outcome.pieces[index - first] if index - first < len(outcome.pieces) else None
        if piece is None or piece.labelled.input_ids.tolist() != self.examples[index]["input_ids"]:
            raise DataError(f"Row {number} of {self.source} is no longer what it was; read the data again.")
        return Preview(outcome.row.value, list(pieces_of(piece.rendered.text, piece.labelled)))

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
        more = "" if self.longest_counted else "at least "
        longest = f"; the longest has {more}{self.longest:,} tokens" if part == "train" else ""
        return f"{reason} {self.max_seq_length:,}{longest}"

    def _lines(self) -> list[str]:
        from nbkit.data.wanted import told  # here, since it needs numpy

        lines = [self._headline(), f"{self.source} is read as {self.reason}"]
        if self.pieces > self.used:
            lines.append(f"rows that were split make {self.pieces:,} examples of {self.used:,} rows")
        if self.held_out_examples:
            lines.append(f"{len(self.held_out_examples):,} rows are held out")
        if said := told(self.examples):
            lines.append(said)
        for part, outcome, reason, numbers in grouped(self.findings):
            if part == "held_out" or outcome == USED:
                where = "held-out " if part == "held_out" else ""
                left_out = "" if outcome == USED else f" ({outcome})"
                lines.append(f"{where}{rows_text(numbers)}: {self._reason(part, reason)}{left_out}")
        if self.repairs:
            lines.append("offered: " + " ".join(repair.sentence for repair in self.repairs))
        return lines

    def __str__(self) -> str:
        return "\n".join(self._lines())

    __repr__ = __str__  # not thousands of ids

    def _repr_html_(self) -> str:
        first, *rest = (html.escape(line) for line in self._lines())
        items = "".join(f"<li>{line}</li>" for line in rest)
        return f'<div class="nbkit-data-report"><b>{first}</b><ul>{items}</ul></div>'
