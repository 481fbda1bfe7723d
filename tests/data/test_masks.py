"""The vectorised masks against the same written out token by token."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nbkit.config import IGNORE_INDEX
from nbkit.data.masks import labelled, pieces_of, tiled, trained_mask


def slow_tiled(text: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    spans, at = [], 0
    for start, end in offsets:
        spans.append((at if text[at:start].isspace() else start, end))
        at = max(at, end)
    return spans


def slow_mask(spans: list[tuple[int, int]], trained: list[tuple[int, int]]) -> list[bool]:
    return [any(a < last and first < b if a < b else first <= a < last for first, last in trained) for a, b in spans]


def pairs(array: np.ndarray) -> list[tuple[int, int]]:
    return [tuple(row) for row in array.tolist()]


def test_masks_by_hand() -> None:
    offsets = np.array([(0, 2), (3, 5), (5, 6), (5, 6), (6, 6), (8, 9), (12, 12)])
    assert pairs(tiled("ab cdé~~x   ", offsets)) == [(0, 2), (2, 5), (5, 6), (5, 6), (6, 6), (8, 9), (9, 12)]
    spans = np.array([(0, 2), (2, 5), (5, 6), (5, 6), (6, 6), (6, 9), (9, 9)])
    assert trained_mask(spans, [(5, 6)]).tolist() == [False, False, True, True, False, False, False]
    assert trained_mask(spans, [(4, 6), (6, 9)]).tolist() == [False, True, True, True, True, True, False]
    assert trained_mask(spans, []).tolist() == [False] * 7
    assert trained_mask(np.zeros((0, 2)), [(0, 1)]).tolist() == []
    assert tiled("  ", np.zeros((0, 2))).shape == (0, 2)


@given(st.data())
def test_masks_equal_the_slow_ones(data: st.DataObject) -> None:
    text = data.draw(st.text(st.sampled_from("ab \n\u3000\u2003é😀\x1c\u180e"), max_size=30))
    edges = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=24)))
    offsets = list(zip(edges[::2], edges[1::2], strict=False))
    offsets = [one for one in offsets for _ in range(data.draw(st.integers(1, 2)))]  # bytes of one character share their span
    array = np.array(offsets, dtype=np.int32).reshape(-1, 2)
    assert pairs(tiled(text, array)) == slow_tiled(text, offsets)
    cuts = sorted(set(data.draw(st.lists(st.integers(0, len(text)), max_size=8))))
    trained = list(zip(cuts[::2], cuts[1::2], strict=False))
    assert trained_mask(array, trained).tolist() == slow_mask(offsets, trained)


def test_an_example_and_its_pieces() -> None:
    ids, offsets = np.array([5, 6, 7], np.int32), np.array([(0, 2), (3, 4), (4, 6)], np.int32)
    found = labelled("ab cde", ids, offsets, [(3, 4)])
    assert found.labels.dtype == found.spans.dtype == np.int32
    assert found.labels.tolist() == [IGNORE_INDEX, 6, IGNORE_INDEX]
    assert list(pieces_of("ab cde", found)) == [("ab", False), (" c", True), ("de", False)]
