"""Examples become one right-padded batch. torch is imported when the first batch is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbkit.config import IGNORE_INDEX
from nbkit.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right.

    The attention mask comes from the true lengths and the labels are padded with -100, so that nothing hangs on
    which id the padding has: with many models it is the stop token, which is trained and attended to.

    Args:
        pad_to_multiple_of: T is rounded up to a multiple of it.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token_id, int):
            raise ConfigError(f"pad_token_id is {self.pad_token_id!r}; set tokenizer.pad_token (the stop token will do).")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ConfigError(f"pad_to_multiple_of is {self.pad_to_multiple_of}; it must be at least 1, or None.")

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """{"input_ids", "attention_mask", "labels"}, each (B, T) int64."""
        import torch

        lengths = [len(example["input_ids"]) for example in examples]
        width = max(lengths)
        if self.pad_to_multiple_of:
            width += -width % self.pad_to_multiple_of
        shape = (len(examples), width)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.int64),
        }
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            batch["input_ids"][row, :length] = torch.tensor(example["input_ids"], dtype=torch.int64)
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, :length] = torch.tensor(example["labels"], dtype=torch.int64)
        return batch
