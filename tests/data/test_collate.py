from __future__ import annotations

import subprocess
import sys

import pytest

from nbkit.config import IGNORE_INDEX
from nbkit.data.collate import Collator, PackCollator
from nbkit.errors import ConfigError

EOS = 2
EXAMPLES = [
    {"input_ids": [5, EOS, 6, 7, EOS], "labels": [-100, -100, 6, 7, EOS]},
    {"input_ids": [8, EOS], "labels": [-100, EOS]},
]


def test_padding_hides_nothing_though_the_padding_is_the_stop_token() -> None:
    batch = Collator(EOS)(EXAMPLES)
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, 5)
    )
    assert all(str(value.dtype) == "torch.int64" for value in batch.values())
    assert batch["input_ids"].tolist() == [[5, EOS, 6, 7, EOS], [8, EOS, EOS, EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 7, EOS], [-100, EOS, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]]


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (5, 5), (4, 8), (64, 64), (None, 5)])
def test_widths(multiple: int | None, width: int) -> None:
    batch = Collator(0, pad_to_multiple_of=multiple)(EXAMPLES)
    assert batch["labels"].shape == (2, width)
    assert batch["attention_mask"].sum(1).tolist() == [5, 2]


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="set tokenizer.pad_token"):
        Collator(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1"):
        Collator(0, pad_to_multiple_of=0)


def test_a_pack_restarts_positions_and_asks_no_document_for_the_next_ones_beginning() -> None:
    batch = PackCollator(EOS, width=9)([*EXAMPLES, {"input_ids": [9], "labels": [9]}])
    assert batch["input_ids"].tolist() == [[5, EOS, 6, 7, EOS, 8, EOS, 9, EOS]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 7, EOS, -100, EOS, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 0]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 5, 7, 8, 9]
    assert str(batch["cu_seq_lens_q"].dtype) == "torch.int32" and str(batch["position_ids"].dtype) == "torch.int64"
    assert batch["max_length_q"] == batch["max_length_k"] == 5
    whole = PackCollator(EOS)([{"input_ids": [3, 4], "labels": [3, 4]}] * 2)
    assert whole["labels"].tolist() == [[-100, 4, -100, 4]] and whole["cu_seq_lens_q"].tolist() == [0, 2, 4]
    with pytest.raises(ConfigError, match="A pack of 7 tokens does not fit a width of 6"):
        PackCollator(EOS, width=6)(EXAMPLES)
    with pytest.raises(ConfigError, match="set tokenizer.pad_token"):
        PackCollator(None)  # type: ignore[arg-type]


def test_transformers_sees_the_documents_of_a_pack() -> None:
    from transformers.masking_utils import find_packed_sequence_indices

    batch = PackCollator(EOS, width=10)([*EXAMPLES, {"input_ids": [9], "labels": [9]}])
    found = find_packed_sequence_indices(batch["position_ids"])
    assert found is not None and found.tolist() == [[0, 0, 0, 0, 0, 1, 1, 2, 3, 3]]


def test_the_room_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import nbkit.data.collate, nbkit.data.report, nbkit.data.formats, sys; nbkit.data.collate.Collator(0);"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pandas', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
