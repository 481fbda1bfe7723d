"""The rows of one source, gathered: sequences in flat arrays, findings, and which rows are the same as others."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nbkit.config import IGNORE_INDEX, DataRecipe
from nbkit.data.findings import DROPPED, REFUSED, USED, Finding, grouped
from nbkit.data.fitting import Piece
from nbkit.data.mapping import Mapping, Outcome, Reread
from nbkit.data.progress import bar
from nbkit.data.repairs import offers
from nbkit.data.sources import Source
from nbkit.data.store import Examples, RaggedBuilder
from nbkit.errors import DataError


@dataclass(frozen=True)
class Collected:
    """The rows of one source. Sequences and good rows are counted from 0; good row r has the sequences `starts[r]` to
    `starts[r + 1]`, several if it was split.

    Attributes:
        sequences: those of all good rows.
        digests: of the tokens of each good row, uint64.
        used: the good rows that are left, in order.
        rows_in: all rows of the source, the bad ones included.
        left_out: rows that were dropped, and rows that were refused.
        longest: tokens of the longest row, whether it is used or not; without `longest_counted` at least so many.
        reread: looks at rows once more.
    """

    sequences: Examples
    starts: np.ndarray
    digests: np.ndarray
    used: np.ndarray
    findings: list[Finding]
    rows_in: int
    left_out: dict[str, int]
    longest: int
    reread: Reread
    longest_counted: bool = True

    def number(self, row: int) -> int:
        """The number that a good row has in its source."""
        return int(self.sequences.rows[self.starts[row]])

    def examples(self, rows: np.ndarray) -> Examples:
        """The sequences of some good rows, in order."""
        chosen = np.zeros(len(self.digests), bool)
        chosen[rows] = True
        return self.sequences.taken(np.flatnonzero(np.repeat(chosen, np.diff(self.starts))))

    def same(self, row: int, other: Collected, place: int) -> bool:
        """Whether a good row and one of another source have the same tokens and labels."""
        mine, theirs = (range(of.starts[at], of.starts[at + 1]) for of, at in ((self, row), (other, place)))
        if len(mine) != len(theirs):
            return False
        return all(self.sequences[a] == other.sequences[b] for a, b in zip(mine, theirs, strict=True))


def collect(source: Source, mapping: Mapping, part: str, folder: Path | None) -> Collected:
    """Every row becomes one or more sequences, or a finding.

    Args:
        part: "train" or "held_out", for the findings.
        folder: where sets that are large lie while they are made; None: the system's own place.
    Raises: DataError if no row becomes a sequence.
    """
    gathered = _Gathered(part, mapping.recipe, RaggedBuilder(folder), RaggedBuilder(folder))
    total, what = source.estimate, "Rows to tokens" if part == "train" else "Held-out rows to tokens"
    vars(source).pop("head", None)  # the rows that were looked at for the format need not be held any longer
    with bar(total, what) as shown, contextlib.closing(mapping.outcomes(source.rows)) as outcomes:
        for outcome in outcomes:
            gathered.add(outcome)
            shown.update(1)
            if gathered.rows_in % 512 == 0:
                shown.set_postfix_str(f"{gathered.tokens.tokens / 1e6:.1f}M tokens", refresh=False)
    if not gathered.digests:
        error = DataError(_nothing_left(source, gathered))
        error.repairs = tuple(repair for repair in offers(mapping.recipe, gathered.findings) if repair.setting[1] != "drop")
        raise error
    return _without_duplicates(gathered.finish(Reread(source, mapping)), mapping.recipe.duplicates, part)


@dataclass
class _Gathered:
    """What `collect` has so far."""

    part: str
    recipe: DataRecipe
    tokens: RaggedBuilder
    rejected: RaggedBuilder
    findings: list[Finding] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # the row number of each sequence
    starts: list[int] = field(default_factory=lambda: [0])
    digests: list[int] = field(default_factory=list)
    liked: list[bool] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=lambda: {DROPPED: 0, REFUSED: 0})
    rows_in: int = 0
    longest: int = 0
    longest_counted: bool = True

    def add(self, outcome: Outcome) -> None:
        number = outcome.row.number
        self.rows_in += 1
        self.longest = max(self.longest, outcome.length)
        self.longest_counted &= outcome.counted
        if outcome.fault is not None:
            way = self.recipe.too_long if outcome.fault.kind == "too_long" else self.recipe.faulty
            left_out = DROPPED if way == "drop" else REFUSED
            self.left_out[left_out] += 1
            self.findings.append(
                Finding(number, outcome.fault.kind, outcome.fault.sentence, left_out, self.part, outcome.fault.guess)
            )
            return
        self.findings += [Finding(number, kind, sentence, USED, self.part) for kind, sentence in outcome.notes]
        digest = hashlib.blake2b(repr(outcome.liked).encode(), digest_size=8)
        for piece in outcome.pieces:
            self._piece(piece, digest)
            self.rows.append(number)
            if outcome.liked is not None:
                self.liked.append(outcome.liked)
        self.digests.append(int.from_bytes(digest.digest(), "little"))
        self.starts.append(len(self.rows))

    def _piece(self, piece: Piece, digest: Any) -> None:
        sides = [(self.tokens, piece.labelled)]
        if piece.rejected is not None:
            sides.append((self.rejected, piece.rejected[1]))
        for builder, labelled in sides:
            trained = labelled.labels != IGNORE_INDEX
            builder.add(labelled.input_ids, trained)
            digest.update(len(trained).to_bytes(8, "little") + labelled.input_ids.tobytes() + trained.tobytes())

    def finish(self, reread: Reread) -> Collected:
        rows = np.asarray(self.rows, np.int64)
        rejected = self.rejected.finish() if len(self.rejected) else None
        liked = np.asarray(self.liked, bool) if self.liked else None
        return Collected(
            sequences=Examples(self.tokens.finish(), rows, np.arange(len(rows)), rejected, liked),
            starts=np.asarray(self.starts, np.int64),
            digests=np.asarray(self.digests, np.uint64),
            used=np.arange(len(self.digests)),
            findings=sorted(self.findings, key=lambda finding: finding.row),
            rows_in=self.rows_in,
            left_out=self.left_out,
            longest=self.longest,
            reread=reread,
            longest_counted=self.longest_counted,
        )


def _without_duplicates(found: Collected, way: str, part: str) -> Collected:
    """Rows equal to an earlier one are told, and dropped where the recipe says so."""
    _, first, inverse = np.unique(found.digests, return_index=True, return_inverse=True)
    earlier = first[inverse.reshape(-1)]
    later = np.flatnonzero(earlier < np.arange(len(earlier)))
    twice = [row for row in later.tolist() if found.same(row, found, int(earlier[row]))]
    if not twice:
        return found
    outcome = DROPPED if way == "drop" else USED
    told = [
        Finding(found.number(row), "duplicate", f"the row equals row {found.number(int(earlier[row]))}", outcome, part)
        for row in twice
    ]
    gone = {finding.row for finding in told} if outcome == DROPPED else set()
    findings = [*(finding for finding in found.findings if finding.row not in gone), *told]
    findings.sort(key=lambda finding: finding.row)
    if outcome == USED:
        return replace(found, findings=findings)
    left_out = {**found.left_out, DROPPED: found.left_out[DROPPED] + len(twice)}
    return replace(found, findings=findings, used=np.setdiff1d(found.used, twice), left_out=left_out)


def _nothing_left(source: Source, gathered: _Gathered) -> str:
    findings = gathered.findings
    first, kinds = findings[0], _reasons(findings)
    others = f" (and {len(findings) - 1:,} more: {kinds})" if len(findings) > 1 else ""
    count = "The one row" if gathered.rows_in == 1 else f"None of the {gathered.rows_in:,} rows"
    verb = "cannot" if gathered.rows_in == 1 else "can"
    mend = first.mending or "mend the rows, or name the right columns in a DataRecipe"
    return (
        f"{count} of {source.name} {verb} be trained on, so training would learn nothing. "
        f"Row {first.row}: {first.sentence}{others}. {mend[:1].upper()}{mend[1:]}."
    )


def _reasons(findings: Iterable[Finding]) -> str:
    return "; ".join(dict.fromkeys(reason for _, _, reason, _ in grouped(findings)))
