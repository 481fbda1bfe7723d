"""`nbkit.inspect`: what training will really see, from the collated batch down to the token.

The batch is made by the collator that training uses, in the order that training takes; counts and problems are those of all
rows, read from their ids and labels. Nothing is rendered anew for the view, so what is shown is what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from nbkit.config import TrainConfig
from nbkit.data import inspection_html, inspection_text
from nbkit.data.checks import Counts, Problem, Progress, arrays_of, look_at_batch, look_through
from nbkit.data.findings import USED, Finding, RowFault, grouped
from nbkit.data.tokens import Line, Reader, lines
from nbkit.errors import DataError
from nbkit.markup import Markup

Batch = tuple[Mapping[str, Any], list[list[int]]]  # what the collator made, and the examples in each of its rows


@dataclass(frozen=True)
class Batches:
    """The batches of an epoch, in order. `of(index)` is the place of the batch that holds an example, or None."""

    count: int
    get: Callable[[int], Batch]
    of: Callable[[int], int | None]


class InspectedSet:
    """A set of examples and its batches. Everything is read when it is asked for, and once.

    Attributes:
        name: what the rows came from.
        rows: the row number of each example.
        report: the DataReport they are of, or None.
    """

    def __init__(
        self,
        name: str,
        examples: Sequence[Any],
        rows: Sequence[int],
        tokenizer: Any,
        batches: Batches,
        *,
        max_length: int | None = None,
        report: Any = None,
        rebatch: Callable[[TrainConfig], Batches] | None = None,
    ) -> None:
        self.name, self.examples, self.rows, self.batches = name, examples, rows, batches
        self.max_length, self.report, self._rebatch = max_length, report, rebatch
        self.reader = Reader(tokenizer)
        self._counts: Counts | None = None

    def under(self, train: TrainConfig) -> InspectedSet:
        """The same set in the batches of other settings; what was counted is kept. A trainer's own batches stay as they are."""
        other = copy(self)
        if self._rebatch is not None:
            other.batches = self._rebatch(train)
        return other

    @property
    def counted(self) -> bool:
        """Whether all rows have been looked through already."""
        return self._counts is not None

    def counts(self, progress: Progress | None = None) -> Counts:
        """What a look through all rows finds; done once."""
        if self._counts is None:
            self._counts = look_through(
                self.examples,
                self.rows,
                self.reader,
                max_length=self.max_length,
                own_text=_own_text(self.reader.tokenizer, self.report),
                rendered=self.report is not None,
                progress=progress,
            )
        return self._counts

    @property
    def findings(self) -> Sequence[Finding]:
        return self.report.findings if self.report is not None else ()


class Inspection:
    """One batch, token by token, and what is to be said of the whole set. `str()` is for terminals; notebooks show HTML.

    Attributes:
        index: which batch of the epoch, from 0.
        start: the first token shown of each row of the batch; up to `TOKENS` are shown in all.
    """

    def __init__(self, of: InspectedSet, index: int = 0, start: int = 0) -> None:
        self.set, self.index, self.start = of, index, start

    # -- the batch -------------------------------------------------------------------------------------

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return self.set.batches.count

    @cached_property
    def batch(self) -> list[Line]:
        """The rows of the batch, each token with its text, id, label and state."""
        made, members = self.set.batches.get(self.index)
        numbers = [[int(self.set.rows[example]) for example in row] for row in members]
        return lines(made, self.set.reader, numbers)

    def show(
        self, *, batch: int | None = None, row: int | None = None, start: int = 0, train: TrainConfig | None = None
    ) -> Inspection:
        """Another batch of the same set: by its place from 0, or the one with the row of this number, also of other settings.

        Raises: DataError if there is none.
        """
        of = self.set if train is None else self.set.under(train)
        index = batch if batch is not None else self.index if train is None else 0
        if row is not None:
            index = _batch_of(of, row)
        if not 0 <= index < of.batches.count:
            raise DataError(f"There is no batch {index}; the {of.batches.count:,} batches of an epoch are counted from 0.")
        return Inspection(of, index, start)

    def one_row(self, place: int) -> list[Line]:
        """The example at `place` (from 0) alone, without padding; a preference row gives two lines."""
        if not 0 <= place < len(self.set.examples):
            raise DataError(f"There is no example {place}; there are {len(self.set.examples):,}, counted from 0.")
        number = (int(self.set.rows[place]),)
        sides = arrays_of(self.set.examples, place)
        parts = ("chosen", "rejected") if len(sides) == 2 else ("",)
        found = []
        for part, (ids, labels) in zip(parts, sides, strict=True):
            (line,) = lines({"input_ids": ids, "labels": labels}, self.set.reader, [number])
            found.append(replace(line, part=part))
        return found

    # -- the set ---------------------------------------------------------------------------------------

    @property
    def counts(self) -> Counts:
        """Lengths, trained tokens and faults of all rows; looked through when first asked for."""
        return self.set.counts()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong, each kind with its rows and its repair; empty for a sound set."""
        return (*self.counts.problems(), *look_at_batch(self.batch))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        return np.asarray(self.counts.lengths, np.int64)

    @property
    def trained(self) -> np.ndarray:
        """Trained tokens of each example, int64."""
        return np.asarray(self.counts.trained, np.int64)

    @property
    def trained_share(self) -> float:
        """Trained tokens as a share of all, 0 to 1."""
        return float(self.trained.sum() / max(self.lengths.sum(), 1))

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of each figure of the set."""
        report, lengths = self.set.report, self.lengths
        found = [("Rows used", f"{len(self.set.examples):,}")]
        if report is not None:
            found = [("Rows in", f"{report.rows_in:,}"), ("Used", f"{report.used:,}")]
            found += [(name, f"{count:,}") for name, count in (("Dropped", report.dropped), ("Refused", report.refused)) if count]
        found.append(("Trained tokens", f"{int(self.trained.sum()):,} of {int(lengths.sum()):,} ({self.trained_share:.1%})"))
        limit = f" of {self.set.max_length:,}" if self.set.max_length else ""
        return [*found, ("Longest row", f"{int(lengths.max(initial=0)):,}{limit} tokens")]

    def rows_by_reason(self) -> list[tuple[str, str, list[int]]]:
        """(outcome, reason, row numbers) of what the report of the set tells of its rows and `problems` does not."""
        seen = {problem.kind for problem in self.problems}
        findings = [one for one in self.set.findings if one.outcome != USED or one.part != "train" or one.kind not in seen]
        return [
            (f"held out, {outcome}" if part == "held_out" else outcome, reason, numbers)
            for part, outcome, reason, numbers in grouped(findings)
        ]

    # -- how it is shown -------------------------------------------------------------------------------

    def batch_html(self) -> Markup:
        """The legend and the tokens of the batch."""
        return inspection_html.batch(self)

    def row_html(self, place: int) -> Markup:
        """The tokens of one example."""
        return inspection_html.rows(self.one_row(place), self.start)

    def legend_html(self) -> Markup:
        """What the marks of `row_html` mean."""
        return inspection_html.legend()

    def facts_html(self) -> Markup:
        return inspection_html.facts(self)

    def problems_html(self, told: Collection[str] = ()) -> Markup:
        """The problems, but for those of kinds that are `told` elsewhere."""
        return inspection_html.problems(self, told)

    def histograms_html(self) -> Markup:
        return inspection_html.histograms(self)

    def style(self) -> Markup:
        """The style sheet of all of these, scoped to the class `nbk-inspection`."""
        return inspection_html.style()

    def _repr_html_(self) -> str:
        return inspection_html.whole(self)

    def __str__(self) -> str:
        return inspection_text.whole(self)

    def __repr__(self) -> str:
        return f"<nbkit inspection of {self.set.name}: batch {self.index} of {self.batches:,}>"

    def figure(self) -> Any:
        """Both histograms as a plotly figure, to zoom and to save. Raises: ConfigError where plotly is not installed."""
        from nbkit.data.inspection_figure import figure

        return figure(self)


def _own_text(tokenizer: Any, report: Any) -> str:
    """What the chat template writes itself, as far as its text and a short conversation show it; "" where there is none."""
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")] * 2
    reread = getattr(report, "reread", None)
    if reread is not None:
        try:
            return reread.renderer.render(turns).text
        except RowFault:
            return reread.renderer.resolved.text
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return ""
    try:
        return f"{template} {tokenizer.apply_chat_template(turns, tokenize=False)}"
    except Exception:  # whatever a template's own code may raise: its text is then all that is known
        return str(template)


def _batch_of(of: InspectedSet, row: int) -> int:
    places = [place for place, number in enumerate(of.rows) if int(number) == row]
    if not places:
        near = [finding for finding in of.findings if finding.row == row]
        numbers = [int(number) for number in of.rows]
        why = f": {near[0].sentence}" if near else f"; those have numbers from {min(numbers)} to {max(numbers)}"
        raise DataError(f"Row {row} is not among the rows that are trained on{why}.")
    found = of.batches.of(places[0])
    if found is None:
        raise DataError(f"Which batch holds row {row} is not known here; name a batch instead.")
    return found
