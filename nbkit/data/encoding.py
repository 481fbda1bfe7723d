"""Texts to ids and offsets. A text of many megabytes goes window by window: encoded at once it takes 280 bytes a character.

Windows overlap, and are joined in the middle of a stretch of tokens that both have alike. Tokenisers look at no more than a
word or a few tokens around, so what is joined is the tokenisation of the whole; where the windows do not agree (a run of
white space longer than the overlap), the whole is encoded after all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbkit.data.masks import Ints, arrays

WINDOW = 1 << 18  # characters
OVERLAP = 1 << 12  # characters that two windows share
ALIKE = 16  # tokens one after the other that two windows must have alike
TOGETHER = 4  # windows that are encoded at a time


def encode(tokenizer: Any, texts: Sequence[str], plain: bool = False) -> list[tuple[Ints, Ints]]:
    """Ids (T,) and offsets (T, 2) of each text, int32; nothing is added before or after.

    Args:
        plain: control tokens that are spelled in a text are plain characters.
    """
    backend = tokenizer.backend_tokenizer
    for ask, clear in ((backend.truncation, backend.no_truncation), (backend.padding, backend.no_padding)):
        if ask is not None:
            clear()
    was = backend.encode_special_tokens
    backend.encode_special_tokens = plain
    try:
        short = iter(_batch(backend, [text for text in texts if len(text) <= WINDOW + OVERLAP]))
        return [next(short) if len(text) <= WINDOW + OVERLAP else _long(backend, text) for text in texts]
    finally:
        backend.encode_special_tokens = was


def _batch(backend: Any, texts: list[str]) -> list[tuple[Ints, Ints]]:
    return [arrays(encoding) for encoding in backend.encode_batch(texts, add_special_tokens=False)]


def _long(backend: Any, text: str) -> tuple[Ints, Ints]:
    starts = range(0, len(text) - OVERLAP, WINDOW)
    ids: list[Ints] = []
    offsets: list[Ints] = []
    for first in range(0, len(starts), TOGETHER):
        group = starts[first : first + TOGETHER]
        found = _batch(backend, [text[start : start + WINDOW + OVERLAP] for start in group])
        for start, (more, places) in zip(group, found, strict=True):
            places = places + np.int32(start)
            if ids:
                seam = _seam(ids[-1], offsets[-1], more, places)
                if seam is None:
                    return _batch(backend, [text])[0]
                ids[-1], offsets[-1] = ids[-1][: seam[0]], offsets[-1][: seam[0]]
                more, places = more[seam[1] :], places[seam[1] :]
            ids.append(more)
            offsets.append(places)
    return np.concatenate(ids), np.concatenate(offsets)


def _seam(ids: Ints, offsets: Ints, more: Ints, places: Ints) -> tuple[int, int] | None:
    """(tokens to keep of the earlier window, tokens to leave out of the later one); None where they do not agree."""
    if not len(ids) or not len(more):
        return None
    begin, end = int(np.searchsorted(offsets[:, 0], places[0, 0])), int(np.searchsorted(places[:, 0], offsets[-1, 1]))
    later: dict[tuple[int, int, int], int] = {}
    for at in range(end):
        later.setdefault((int(places[at, 0]), int(places[at, 1]), int(more[at])), at)
    alike = 0
    for at in range(begin, len(ids)):
        found = later.get((int(offsets[at, 0]), int(offsets[at, 1]), int(ids[at])))
        alike = 0 if found is None else alike + 1
        middle = at - ALIKE // 2
        if alike >= ALIKE and offsets[middle, 0] >= offsets[middle - 1, 1]:  # no token of a character's bytes
            return middle, later[int(offsets[middle, 0]), int(offsets[middle, 1]), int(ids[middle])]
    return None
