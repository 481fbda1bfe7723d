"""Rows counted by length and by the share that is trained, for whoever draws them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BARS = 40  # at most


@dataclass(frozen=True)
class Bars:
    """A histogram. `edges` (n + 1,) in units of the axis; `counts` rows in each [edge, next edge); `limit` a mark or None."""

    title: str
    axis: str
    said: str  # in words
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    limit: float | None = None
    percent: bool = False

    def name(self, number: int) -> str:
        """What a bar stands for: '64 to 79 tokens: 12 rows'."""
        low, high, count = self.edges[number], self.edges[number + 1], self.counts[number]
        rows = f"{count:,} row{'s' if count != 1 else ''}"
        if self.percent:
            return f"{low:g} to {high:g} %: {rows}"
        return f"{low:,.0f} to {high - 1:,.0f} tokens: {rows}" if high - low > 1 else f"{low:,.0f} tokens: {rows}"

    def ticks(self) -> list[tuple[float, str]]:
        """(place from 0 to 1, what is written there)."""
        low, high = self.edges[0], self.edges[-1]
        raw = (high - low) / 5
        power = 10.0 ** np.floor(np.log10(raw))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
        values = np.arange(np.ceil(low / step) * step, high + step * 1e-9, step)
        return [((float(value) - low) / (high - low), f"{value:,.0f}") for value in values if value == int(value)]

    def limit_place(self) -> float | None:
        """Where the mark stands, from 0 to 1; None where there is none, or it lies beyond the axis."""
        low, high = self.edges[0], self.edges[-1]
        return None if self.limit is None or not low <= self.limit <= high else (self.limit - low) / (high - low)


def lengths_of(lengths: np.ndarray, max_length: int | None = None) -> Bars:
    """Rows by tokens. The mark is the longest length allowed, where a row comes near to it."""
    longest = int(lengths.max(initial=0))
    width = max(1, int(np.ceil((longest + 1) / BARS)))
    edges = np.arange(0, longest + 1 + width, width)
    counts, _ = np.histogram(lengths, edges)
    middle = int(np.median(lengths)) if len(lengths) else 0
    said = f"{len(lengths):,} rows of {int(lengths.min(initial=longest)):,} to {longest:,} tokens, the middle one {middle:,}"
    limit = f"; at most {max_length:,} are allowed" if max_length else ""
    return Bars("Tokens per row", "tokens", said + limit, _floats(edges), _ints(counts), max_length)


def shares_of(trained: np.ndarray, lengths: np.ndarray) -> Bars:
    """Rows by the share of their tokens that is trained, in steps of 5 %."""
    shares = 100 * trained / np.maximum(lengths, 1)
    edges = np.arange(0, 101, 5)
    counts, _ = np.histogram(shares, edges)
    middle = float(np.median(shares)) if len(shares) else 0.0
    said = f"{len(shares):,} rows; in the middle one {middle:.0f} % of the tokens are trained"
    return Bars("Trained share per row", "% of its tokens", said, _floats(edges), _ints(counts), percent=True)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _ints(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
