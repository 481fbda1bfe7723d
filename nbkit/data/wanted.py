"""What a training method takes of a set: of preferences and of KTO, sft trains the wanted replies and no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nbkit.data.findings import DROPPED, Finding
from nbkit.data.store import Examples

if TYPE_CHECKING:
    from nbkit.data.report import DataReport


def wanted(report: DataReport) -> DataReport:
    """The report as the method sft trains it: the better reply of each pair, and the KTO rows whose label is true.

    The others of KTO are counted as dropped, each with a finding. A set of another format comes back as it is.
    """
    examples = report.examples
    if not isinstance(examples, Examples) or (examples.rejected is None and examples.liked is None):
        return report
    kept, held_out = _wanted(examples), _wanted(report.held_out_examples)
    gone = sorted(set(examples.row_numbers.tolist()) - set(kept.row_numbers.tolist()))
    sentence = "the label is false, so the method sft does not train on it"
    return dataclasses.replace(
        report,
        examples=kept,
        row_numbers=kept.row_numbers,
        held_out_examples=held_out,
        held_out_rows=_rows(report),
        used=report.used - len(gone),
        dropped=report.dropped + len(gone),
        trained_tokens=int(kept.trained_counts.sum()),
        total_tokens=int(kept.lengths.sum()),
        findings=(*report.findings, *(Finding(row, "unwanted", sentence, DROPPED) for row in gone)),
    )


def told(examples: Sequence[Any]) -> str:
    """What sft leaves out of these examples, in one sentence; "" where it takes them as they are."""
    if not isinstance(examples, Examples):
        return ""
    if examples.rejected is not None:
        return f"the method sft trains on the better reply of each of the {len(examples):,} pairs, never on the worse one"
    if examples.liked is None:
        return ""
    count = len(_wanted(examples))
    return f"the method sft trains on the {count:,} of {len(examples):,} examples whose label is true, never on the others"


def _wanted(examples: Examples) -> Examples:
    order = examples.order if examples.liked is None else examples.order[np.asarray(examples.liked)[examples.order]]
    return Examples(examples.tokens, examples.rows, order)


def _rows(report: DataReport) -> list[Any]:
    liked, order = report.held_out_examples.liked, report.held_out_examples.order
    if liked is None or len(order) != len(report.held_out_rows):
        return report.held_out_rows
    return [row for row, place in zip(report.held_out_rows, order, strict=True) if liked[place]]
