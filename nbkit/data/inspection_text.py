"""The inspector as plain text, for terminals and screen readers: ⟦trained⟧, masked, ░padding░, ┃ a packed row begins."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from nbkit.data.findings import rows_text
from nbkit.data.inspection_html import visible
from nbkit.data.tokens import PADDING, TRAINED, Line, Token
from nbkit.markup import plain

if TYPE_CHECKING:
    from nbkit.data.inspection import Inspection

TOKENS = 300  # shown of each row of the batch


def whole(shown: Inspection) -> str:
    facts = ", ".join(f"{name[:1].lower()}{name[1:]} {value}" for name, value in shown.facts())
    said = [f"{plain(shown.set.name, 200)}: {facts}"]
    said += [f"{'✖' if problem.stops else '⚠'} {plain(problem, 600)}" for problem in shown.problems] or ["✓ No problem found"]
    said += [f"{outcome}: {rows_text(rows)}: {reason}" for outcome, reason, rows in shown.rows_by_reason()]
    said.append(f"Batch {shown.index + 1:,} of {shown.batches:,}: ⟦trained⟧ masked ░padding░ ┃ a packed row begins")
    said += [line(one, shown.start) for one in shown.batch]
    return "\n".join(said)


def line(one: Line, start: int = 0) -> str:
    """One row of the batch: a heading and its tokens."""
    trained, padding = one.count(TRAINED), one.count(PADDING)
    name = rows_text(one.rows) if one.rows else "row"
    real = len(one.tokens) - padding
    head = f"— {name}: {trained:,} of {real:,} tokens trained" + (f", {padding:,} padding" if padding else "")
    tokens = one.tokens[start : start + TOKENS]
    left = len(one.tokens) - start - len(tokens)
    more = f"\n⋯ {left:,} more tokens" if left > 0 else ""
    return f"{head}\n{''.join(_runs(tokens))}{more}"


def _runs(tokens: tuple[Token, ...]) -> Iterator[str]:
    for (edge, state), members in groupby(tokens, lambda token: (token.edge, token.state)):
        run = list(members)
        if edge:
            yield "\n┃ "
        if state == PADDING:
            yield f"░{visible(run[0].text)} × {len(run):,}░"
            continue
        said = "".join(_said(token) for token in run)
        yield f"⟦{said}⟧" if state == TRAINED else said


def _said(token: Token) -> str:
    return visible(token.text) + "\n" * token.text.count("\n")
