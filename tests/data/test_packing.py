"""Packs: every document once and whole, few packs, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbkit.data.packing import ROUND, pack
from nbkit.errors import ConfigError


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60), more=st.integers(0, 300), seed=st.integers(0, 2**32 - 1))
def test_every_document_once_within_the_budget(lengths: list[int], more: int, seed: int) -> None:
    budget = max(lengths) + more
    made = [pack(lengths, budget, seed, epoch) for epoch in range(3)]
    for packs in made:
        assert sorted(document for one in packs.packs for document in one) == list(range(len(lengths)))
        fullest = max(sum(lengths[document] for document in one) for one in packs.packs)
        assert fullest <= packs.width <= budget and packs.width - fullest < ROUND
        # No two packs could be one: so less than twice the packs that the tokens need, and one more.
        assert sum(lengths) / budget <= len(packs) < 2 * sum(lengths) / budget + 1
        assert packs.fill == pytest.approx(sum(lengths) / (len(packs) * packs.width))
    assert len({(len(packs), packs.width) for packs in made}) == 1
    assert pack(np.asarray(lengths), budget, seed, 1).packs == made[1].packs


def test_the_fullest_pack_with_room_is_taken() -> None:
    found = pack([60, 50, 40, 30, 10], 100, seed=0)
    assert sorted(sorted(one) for one in found.packs) == [[0, 2], [1, 3, 4]]


def test_many_documents_of_a_chats_lengths_fill_their_packs() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 0.6, 5_000).clip(10, 2048).astype(int)
    found = pack(lengths, 8192, seed=1)
    assert found.fill > 0.99 and len(found) <= -(-lengths.sum() // 8192) + 3


def test_the_order_follows_from_seed_and_epoch() -> None:
    lengths = [5, 5, 5, 7, 7, 9] * 20
    orders = [pack(lengths, 30, seed, epoch).packs for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert orders[0] == pack(lengths, 30, 1, 0).packs and len({str(order) for order in orders}) == 3
    together = [{frozenset(one) for one in order} for order in orders]
    assert together[0] != together[1]  # documents of one length change places too


def test_a_document_longer_than_a_pack_is_told() -> None:
    with pytest.raises(
        ConfigError, match="2 of 3 documents are longer than a pack of 10 tokens; the longest has 12: set pack_tokens"
    ):
        pack([11, 12, 3], 10, seed=0)
