"""Examples become one batch: right-padded rows, or one packed sequence. torch is imported when the first batch is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        _check_padding(self.pad_token_id)
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


@dataclass(frozen=True)
class PackCollator:
    """Lays examples one after the other in a single sequence, in which none sees another.

    What keeps them apart is what transformers reads: `position_ids` begin anew at each document (its masks for packed
    sequences come from them, which is why there is no attention mask), and `cu_seq_lens_q` and `cu_seq_lens_k` hold the
    edges for attention of unequal lengths. The label of each document's first token is -100, so that no document is asked
    to predict how the next begins. Padding at the end is a document of its own, without a label.

    Args:
        width: T of every batch; None: the tokens of the examples, without padding.
    """

    pad_token_id: int
    width: int | None = None

    def __post_init__(self) -> None:
        _check_padding(self.pad_token_id)

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        """{"input_ids", "labels", "position_ids": (1, T) int64, "cu_seq_lens_q" = "cu_seq_lens_k": (documents + 1,) int32,
        "max_length_q" = "max_length_k": int}.

        Raises: ConfigError if the examples have more tokens than `width`.
        """
        import torch

        lengths = [len(example["input_ids"]) for example in examples]
        total = sum(lengths)
        width = total if self.width is None else self.width
        if total > width:
            raise ConfigError(f"A pack of {total:,} tokens does not fit a width of {width:,}; pack with that budget.")
        if total < width:
            lengths.append(width - total)
        ids = torch.full((1, width), self.pad_token_id, dtype=torch.int64)
        labels = torch.full((1, width), IGNORE_INDEX, dtype=torch.int64)
        places = torch.empty((1, width), dtype=torch.int64)
        edges = [0]
        for number, length in enumerate(lengths):
            start, end = edges[-1], edges[-1] + length
            if number < len(examples):
                ids[0, start:end] = torch.tensor(examples[number]["input_ids"], dtype=torch.int64)
                labels[0, start:end] = torch.tensor(examples[number]["labels"], dtype=torch.int64)
                labels[0, start] = IGNORE_INDEX
            places[0, start:end] = torch.arange(length)
            edges.append(end)
        bounds, longest = torch.tensor(edges, dtype=torch.int32), max(lengths)
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": places,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def _check_padding(pad_token_id: Any) -> None:
    if not isinstance(pad_token_id, int):
        raise ConfigError(f"pad_token_id is {pad_token_id!r}; set tokenizer.pad_token (the stop token will do).")
