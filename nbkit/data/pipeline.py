"""`prepare`: any rows become labelled examples and a `DataReport` that accounts for every one of them."""

from __future__ import annotations

import copy
import dataclasses
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np

from nbkit.config import DataRecipe
from nbkit.data.cache import Cache, key_of
from nbkit.data.collect import Collected, collect
from nbkit.data.findings import DROPPED, REFUSED, USED, Finding, shorten
from nbkit.data.formats import Detected, Message, detect
from nbkit.data.mapping import Mapping, Reread
from nbkit.data.report import DataReport
from nbkit.data.sources import Source, read
from nbkit.data.store import Examples, fingerprint
from nbkit.errors import DataError


def prepare(
    source: Any,
    tokenizer: Any,
    recipe: DataRecipe,
    *,
    max_seq_length: int,
    held_out: Any = None,
    seed: int = 3407,
    cache: Path | None = None,
) -> DataReport:
    """Read, map, render and label rows; good rows beside bad ones are used, and each bad one is a finding.

    Args:
        source: see `nbkit.data.sources.read`.
        tokenizer: a fast transformers tokenizer with a chat template.
        max_seq_length: tokens; what becomes of longer rows `recipe.too_long` says.
        held_out: rows never trained on: another source, a number of rows, a share below 1, or None.
        seed: picks the rows of a number or a share.
        cache: a folder where large sets are kept as they are made, so that they are there at once the second time.
    Raises: DataError if the source cannot be read, has no known format, or has no row that would be trained on.
    """
    if threading.current_thread() is not threading.main_thread():
        tokenizer = copy.deepcopy(tokenizer)  # the notebook may chat meanwhile, and its settings (truncation) would be ours too
    rows = read(source)
    by_count = held_out is None or isinstance(held_out, (bool, int, float))
    other, amount = (None, held_out) if by_count else (read(held_out), None)
    store = (
        None if cache is None else Cache(cache, lambda: key_of([rows, other], [amount, max_seq_length, seed], recipe, tokenizer))
    )
    kept = None if store is None else store.load()
    if kept is not None:
        report = _unpacked(*kept)
        report.reread = Reread(rows, Mapping(report.recipe, tokenizer, max_seq_length))
        return report
    found = _detected(rows, recipe)
    train = collect(rows, Mapping(found.recipe, tokenizer, max_seq_length), "train", cache)
    apart = None
    if other is not None:
        apart = collect(other, Mapping(detect(other, recipe).recipe, tokenizer, max_seq_length), "held_out", cache)
    report = _report(rows, found, train, apart, amount, seed, max_seq_length)
    if store is not None:
        store.save(*_packed(report))
    return report


def _detected(rows: Source, recipe: DataRecipe) -> Detected:
    try:
        return detect(rows, recipe)
    except DataError as error:
        error.columns = tuple(rows.columns)
        raise


def _report(
    rows: Source, found: Detected, train: Collected, apart: Collected | None, amount: Any, seed: int, max_seq_length: int
) -> DataReport:
    aside, aside_rows = (train, np.asarray([], np.int64)) if apart is None else (apart, apart.used)
    used = train.used
    if apart is None and amount is not None:
        used, aside_rows = _split(train, amount, rows.name, seed)
    examples, held_out = train.examples(used), aside.examples(aside_rows)
    overlap = _overlap(train, used, aside, aside_rows)
    held_out_numbers = {train.number(int(row)) for row in aside_rows} if apart is None else set()
    findings = [f for f in train.findings if f.row not in held_out_numbers or f.outcome != USED]
    moved = [Finding(f.row, f.kind, f.sentence, USED, "held_out") for f in train.findings if f.row in held_out_numbers]
    return DataReport(
        source=rows.name,
        rows_in=len(used) + train.left_out[DROPPED] + train.left_out[REFUSED],
        used=len(used),
        dropped=train.left_out[DROPPED],
        refused=train.left_out[REFUSED],
        trained_tokens=int(examples.trained_counts.sum()),
        total_tokens=int(examples.lengths.sum()),
        findings=tuple([*findings, *moved, *(apart.findings if apart is not None else ()), *overlap]),
        examples=examples,
        held_out_examples=held_out,
        held_out_rows=_messages(aside.reread, aside, aside_rows),
        recipe=found.recipe,
        reason=found.reason,
        confidence=found.confidence,
        longest=train.longest,
        longest_counted=train.longest_counted,
        max_seq_length=max_seq_length,
        fingerprint=fingerprint(examples, held_out),
        row_numbers=examples.row_numbers,
        reread=train.reread,
    )


def _split(train: Collected, amount: Any, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(good rows to train on, good rows held out)."""
    count = _held_out_count(amount, len(train.used), name)
    chosen = np.zeros(len(train.used), bool)
    chosen[random.Random(seed).sample(range(len(train.used)), count)] = True
    return train.used[~chosen], train.used[chosen]


def _held_out_count(held_out: int | float, good: int, name: str) -> int:
    share = isinstance(held_out, float) and 0 < held_out < 1
    count = max(1, round(held_out * good)) if share else held_out
    if isinstance(held_out, bool) or (isinstance(held_out, float) and not share) or count < 1:
        raise DataError(f"held_out is {shorten(held_out)}; give a number of rows from 1, a share below 1, or another source.")
    if count >= good:
        raise DataError(f"held_out takes {count:,} of the {good:,} good rows of {name} and leaves none to train on; take fewer.")
    return int(count)


def _overlap(train: Collected, used: np.ndarray, apart: Collected, aside: np.ndarray) -> list[Finding]:
    """Held-out rows that are trained on too, token by token: their loss says nothing."""
    if not len(aside):
        return []
    trained: dict[int, int] = {}
    for row, digest in zip(used.tolist(), train.digests[used].tolist(), strict=True):
        trained.setdefault(digest, row)
    findings = []
    for row, digest in zip(aside.tolist(), apart.digests[aside].tolist(), strict=True):
        twin = trained.get(digest)
        if twin is not None and apart.same(row, train, twin):
            sentence = f"the row equals training row {train.number(twin)}"
            findings.append(Finding(apart.number(row), "overlap", sentence, USED, "held_out"))
    return findings


def _messages(reread: Reread, apart: Collected, rows: np.ndarray) -> list[list[Message]]:
    """The messages of each held-out example; rows of raw text have none."""
    numbers = [apart.number(int(row)) for row in rows]
    outcomes = reread.outcomes(numbers) if numbers else ()
    return [[dict(m) for m in piece.messages] for outcome in outcomes for piece in outcome.pieces if piece.messages]


# -- kept from one session to the next -------------------------------------------------------------

PLAIN = (
    "source", "rows_in", "used", "dropped", "refused", "trained_tokens", "total_tokens", "held_out_rows", "reason", "confidence",
    "longest", "longest_counted", "max_seq_length", "fingerprint",
)  # fmt: skip


def _packed(report: DataReport) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, facts as JSON values) from which `_unpacked` makes the report again."""
    arrays, apart = report.examples.parts(), report.held_out_examples.parts()
    own = report.held_out_examples.tokens is report.examples.tokens
    arrays |= {f"held_out_{name}": array for name, array in apart.items() if not own or name == "order"}
    facts = {name: getattr(report, name) for name in PLAIN}
    facts["recipe"] = dataclasses.asdict(report.recipe)
    facts["findings"] = [dataclasses.astuple(finding) for finding in report.findings]
    return arrays, facts


def _unpacked(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> DataReport:
    apart = arrays | {name.removeprefix("held_out_"): array for name, array in arrays.items() if name.startswith("held_out_")}
    examples = Examples.of_parts(arrays)
    own = "held_out_rows" not in arrays
    return DataReport(
        **{name: facts[name] for name in PLAIN},
        findings=tuple(Finding(*values) for values in facts["findings"]),
        recipe=DataRecipe(**facts["recipe"]),
        examples=examples,
        held_out_examples=examples.ordered(apart["order"]) if own else Examples.of_parts(apart),
        row_numbers=examples.row_numbers,
    )
