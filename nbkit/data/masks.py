"""From spans of characters to labels of tokens. Offsets come from the fast tokenizer; nothing is searched among ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

from nbkit.config import IGNORE_INDEX

Span = tuple[int, int]  # characters [start, end) of the rendered text
Ints = np.ndarray  # int32


@dataclass(frozen=True, eq=False)
class Labelled:
    """One example.

    Attributes:
        input_ids: (T,) int32.
        labels: (T,) int32: the ids, or -100 where no loss is borne.
        spans: (T, 2) int32: the characters of each token.
        whole: False where the text goes on after these tokens.
    """

    input_ids: Ints
    labels: Ints
    spans: Ints
    whole: bool = True

    @property
    def size(self) -> str:
        """How many tokens there are, in words: "2,048 tokens", "more than 2,048 tokens"."""
        return ("" if self.whole else "more than ") + f"{len(self.input_ids):,} tokens"


def labelled(text: str, ids: Ints, offsets: Ints, trained: Sequence[Span]) -> Labelled:
    """The example that a text gives: ids (T,), offsets (T, 2), and the characters that are trained."""
    spans = tiled(text, offsets)
    return Labelled(ids, np.where(trained_mask(spans, trained), ids, np.int32(IGNORE_INDEX)), spans)


def arrays(encoding: Any) -> tuple[Ints, Ints]:
    """Ids (T,) and offsets (T, 2) of a tokenizers.Encoding, int32."""
    ids = np.array(encoding.ids, dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(ids))
    return ids, flat.reshape(-1, 2)


@lru_cache(maxsize=1)
def _is_space() -> np.ndarray:
    return np.array([chr(point).isspace() for point in range(0x3001)])


def tiled(text: str, offsets: Ints) -> Ints:
    """The spans with the white space that some tokenizers trim off their offsets; it is part of the token after it.

    Other characters between two tokens are those that a normaliser drops; they are part of no token.
    """
    spans = np.asarray(offsets, dtype=np.int32).reshape(-1, 2).copy()
    if not len(spans):
        return spans
    reached = np.concatenate(([0], np.maximum.accumulate(spans[:, 1])[:-1]))
    gaps = np.flatnonzero(spans[:, 0] > reached)
    if len(gaps):
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        other = ~_is_space()[np.minimum(points, 0x3000)] | (points > 0x3000)
        before = np.concatenate(([0], np.cumsum(other)))  # characters before each place that are no white space
        blank = before[spans[gaps, 0]] == before[reached[gaps]]
        spans[gaps[blank], 0] = reached[gaps[blank]]
    return spans


def trained_mask(spans: Ints, trained: Sequence[Span]) -> np.ndarray:
    """Is each token trained, (T,) bool? It is if it holds a character of a trained span, or is empty and lies in one.

    `trained` are in order and do not overlap.
    """
    spans = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
    if not len(trained) or not len(spans):
        return np.zeros(len(spans), dtype=bool)
    first, last = np.array(trained, dtype=np.int64).T
    start, end = spans.T
    nearest = np.searchsorted(last, start, side="right")  # the first trained span that ends after the token's start
    begins = np.append(first, np.iinfo(np.int64).max)[nearest]
    return (begins < end) | ((start == end) & (begins <= start))


def pieces_of(text: str, example: Labelled) -> Iterator[tuple[str, bool]]:
    """The text cut where the training changes: (text, trained). Joined, they are the text."""
    at, piece, now = 0, "", False
    for end, label in zip(example.spans[:, 1].tolist(), example.labels.tolist(), strict=True):
        if end <= at:
            continue  # a further byte of a character that is shown already
        if (label != IGNORE_INDEX) != now:
            if piece:
                yield piece, now
            piece, now = "", not now
        piece += text[at:end]
        at = end
    if piece:
        yield piece, now
    if at < len(text):
        yield text[at:], False
