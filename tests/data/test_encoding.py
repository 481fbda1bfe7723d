"""Texts of many megabytes: encoded in windows as they are in one piece, and not at all where their beginning is too long."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nbkit.config import DataRecipe
from nbkit.data import encoding, template
from nbkit.data.pipeline import prepare
from tests.data import chats
from tests.data.vocab import BOS, EOS, KINDS, tokenizer

WORDS = "Hello there, how are you? the wind is west 5; rain\n\n  think 0123456789 söß 你好 🙂🙃 ### Response:\n"


def text(length: int) -> str:
    rng = np.random.default_rng(3)
    parts = WORDS.split(" ")
    return " ".join(parts[place] for place in rng.integers(0, len(parts), length))[:length]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "WINDOW", 700)
    monkeypatch.setattr(encoding, "OVERLAP", 220)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_make_the_ids_and_offsets_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    made = tokenizer(kind)
    seams: list[Any] = []
    true = encoding._seam
    monkeypatch.setattr(encoding, "_seam", lambda *given: seams.append(true(*given)) or seams[-1])
    control = f" {EOS}{BOS} "
    for said in (text(6_000), text(921), control.join(text(300 + n) for n in range(20)), "🙂" * 3_000):
        for plain in (False, True):
            seams.clear()
            ((ids, offsets),) = encoding.encode(made, [said], plain)
            (((whole, places)),) = [encoding._batch(made.backend_tokenizer, [said])[0]] if not plain else [_whole(made, said)]
            assert np.array_equal(ids, whole) and np.array_equal(offsets, places)
            assert None not in seams and seams or "🙂" * 3 in said


def _whole(made: Any, said: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "WINDOW", len(said))
        return encoding.encode(made, [said], True)[0]


def test_where_windows_do_not_agree_the_whole_is_encoded(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    made, said = tokenizer("bytes"), text(2_000)
    monkeypatch.setattr(encoding, "_seam", lambda *given: None)
    ((ids, offsets),) = encoding.encode(made, [said])
    whole, places = encoding._batch(made.backend_tokenizer, [said])[0]
    assert np.array_equal(ids, whole) and np.array_equal(offsets, places)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many characters each call encodes."""
    found: list[int] = []
    true = template.encode

    def count(tokenizer: Any, texts: Any, plain: bool = False) -> Any:
        found.append(sum(map(len, texts)))
        return true(tokenizer, texts, plain)

    monkeypatch.setattr(template, "encode", count)
    return found


@pytest.mark.parametrize("way", ["refuse", "drop", "cut"])
@pytest.mark.parametrize("spelled", ["", "<|im_end|> "])
def test_a_cell_of_ten_megabytes_is_told_by_its_beginning(way: str, spelled: str, encoded: list[int]) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": spelled + "wind " * 2_000_000}]
    found = prepare(rows, chats.tokenizer("chatml"), DataRecipe(too_long=way), max_seq_length=512)
    (fault,) = (one for one in found.findings if one.outcome != "used")
    assert (fault.row, fault.kind, found.used) == (2, "too_long", 1)
    assert "the row has more than " in fault.sentence and "max_seq_length is 512" in fault.sentence
    assert sum(encoded) < 10 * template.PROBE * 600
    assert not found.longest_counted and f"the longest has at least {found.longest:,} tokens" in str(found)


def test_a_long_conversation_is_cut_and_a_long_text_too_by_their_beginnings(encoded: list[int]) -> None:
    made = chats.tokenizer("chatml")
    turns = [{"role": ("user", "assistant")[n % 2], "content": "wind " * (10 if n < 4 else 100_000)} for n in range(8)]
    found = prepare([{"messages": turns}], made, DataRecipe(too_long="cut"), max_seq_length=512)
    alone = prepare([{"messages": turns[:4]}], made, DataRecipe(), max_seq_length=512)
    assert list(found.examples) == list(alone.examples)
    assert "the last 4 of 8 turns are cut off" in found.findings[0].sentence and sum(encoded) < 500_000
    encoded.clear()
    said = text(1_000_000)
    found = prepare([{"text": said}], made, DataRecipe(too_long="cut"), max_seq_length=512)
    assert sum(encoded) < 100_000 and " of more than " in found.findings[0].sentence
    ids = encoding.encode(made, [said])[0][0].tolist()
    cut = found.examples[0]["input_ids"]
    assert 512 - 64 <= len(cut) <= 512 and ids[: len(cut)] == cut


def test_a_text_that_only_looks_long_is_used() -> None:
    """What is dropped by the tokenizer, or is one token however long, makes no row too long."""
    from tokenizers import normalizers

    made = chats.tokenizer("chatml")
    made.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    found = prepare([{"text": "a" + " " * 1_000_000 + "b"}], made, DataRecipe(), max_seq_length=64)
    assert found.used == 1 and found.longest_counted and found.longest < 64


def test_the_bos_of_raw_text_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tokenizer("metaspace")
    calls: list[str] = []
    true = type(made).__call__
    monkeypatch.setattr(type(made), "__call__", lambda self, said, *a, **b: calls.append(said) or true(self, said, *a, **b))
    prepare([{"text": f"rain {n}"} for n in range(9)], made, DataRecipe(), max_seq_length=64)
    assert calls == ["a"]
