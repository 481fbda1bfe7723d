"""Which rows come in which batch: an order that follows from seed and epoch alone, and says where a resumed run goes on.

Without packing, the rows of one optimizer step are of similar lengths, so that little is spent on padding: the shuffled rows
are sorted by length within windows of a few hundred, cut into steps, and the steps are shuffled. Which rows a step has hangs
on `batch_size * gradient_accumulation` alone, not on how the two share it. The rows left over at the end of an epoch are its
last, shorter step. With packing a batch is one pack (see `nbkit.data.packing`), a step `gradient_accumulation` of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from nbkit.config import IGNORE_INDEX, RunConfig, TrainConfig
from nbkit.data.collate import Collator, PackCollator
from nbkit.data.packing import Packs, pack
from nbkit.errors import TrainingError

WINDOW_STEPS, WINDOW_ROWS = 8, 256  # what is sorted by length together: at least so many optimizer steps and rows
COUNTS = "token_counts"  # key of a batch: (trained, all) tokens, counted before anything is on the device


class _Batches(Sampler[list[int]]):
    """A batch sampler. `sampler` is itself, since accelerate passes the epoch on to the `sampler` of what it has wrapped."""

    def __init__(self) -> None:
        self._epoch = 0

    @property
    def sampler(self) -> _Batches:
        return self

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch


class BucketedBatches(_Batches):
    """All rows once an epoch, in batches of `batch_size` rows of similar lengths; the last batch may be shorter.

    Args:
        lengths: tokens of each row.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, accumulation: int, seed: int) -> None:
        super().__init__()
        self._lengths = np.asarray(lengths, np.int64)
        self._size, self._step, self._seed = batch_size, batch_size * accumulation, seed

    def __len__(self) -> int:
        return -(-len(self._lengths) // self._size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = _generator(self._seed, self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).numpy()
        whole = len(order) - len(order) % self._step
        steps: list[np.ndarray] = []
        width = self._step * max(WINDOW_STEPS, -(-WINDOW_ROWS // self._step))
        for start in range(0, whole, width):
            window = order[start : min(start + width, whole)]
            window = window[np.argsort(self._lengths[window], kind="stable")]
            steps += np.split(window, len(window) // self._step)
        shuffled = [steps[place] for place in torch.randperm(len(steps), generator=generator).tolist()]
        rest = order[whole:]
        for rows in (*shuffled, rest[np.argsort(self._lengths[rest], kind="stable")]):
            yield from (rows[at : at + self._size].tolist() for at in range(0, len(rows), self._size))


class PackedBatches(_Batches):
    """One pack a batch; every row once an epoch. The number of packs and their width are the same in every epoch."""

    def __init__(self, lengths: Sequence[int] | np.ndarray, budget: int, seed: int) -> None:
        super().__init__()
        self._lengths, self._budget, self._seed = np.asarray(lengths, np.int64), budget, seed
        self.first: Packs = pack(self._lengths, budget, seed)

    @property
    def width(self) -> int:
        """Tokens of every packed sequence, padding included."""
        return self.first.width

    def __len__(self) -> int:
        return len(self.first)

    def __iter__(self) -> Iterator[list[int]]:
        packs = self.first if self._epoch == 0 else pack(self._lengths, self._budget, self._seed, self._epoch)
        return iter(packs.packs)


def batches(config: RunConfig, examples: Sequence[Any]) -> BucketedBatches | PackedBatches:
    """The batches of a run over `examples`.

    Raises: ConfigError if a row is longer than a pack.
    """
    train, lengths = config.train, lengths_of(examples)
    if train.packing:
        return PackedBatches(lengths, pack_budget(train, config.model.max_seq_length), train.seed)
    return BucketedBatches(lengths, train.batch_size, train.gradient_accumulation, train.seed)


def position(batches: Sized, step: int, accumulation: int) -> tuple[int, int]:
    """(epoch, batch of it) at which a run goes on after `step` optimizer steps; it is what transformers counts too."""
    steps = -(-len(batches) // accumulation)
    return step // steps, step % steps * accumulation


def pack_budget(train: TrainConfig, max_seq_length: int) -> int:
    """Tokens of a pack: as told, or those of a full batch."""
    return train.pack_tokens if train.pack_tokens is not None else train.batch_size * max_seq_length


def lengths_of(examples: Sequence[Any]) -> np.ndarray:
    """Tokens of each example, int64."""
    known = getattr(examples, "lengths", None)
    return known if known is not None else np.asarray([len(example["input_ids"]) for example in examples], np.int64)


def collator(config: RunConfig, examples: Sequence[Any], pad_token_id: int) -> Collator | PackCollator:
    """What makes one batch of the examples that `batches` names."""
    chosen = batches(config, examples) if config.train.packing else None
    return Collator(pad_token_id) if not isinstance(chosen, PackedBatches) else PackCollator(pad_token_id, chosen.width)


@dataclass(frozen=True)
class Counted:
    """A collator that tells its batch's (trained, all) tokens under `COUNTS`; the trainer takes them off again."""

    collate: Any

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        batch = self.collate(examples)
        if "labels" in batch:
            trained = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
            batch[COUNTS] = (trained, sum(len(example["input_ids"]) for example in examples))
        return batch


def train_loader(config: RunConfig, examples: Sequence[Any], collate: Any, pin_memory: bool) -> DataLoader:
    """Batches of the examples in seeded order, collated, each with its token counts."""
    return DataLoader(
        examples,  # type: ignore[arg-type]
        batch_sampler=batches(config, examples),
        collate_fn=Counted(collate),
        pin_memory=pin_memory,
    )


def require_separation(model: Any) -> None:
    """Asks the model whether it keeps packed documents apart: what the second one gives must not change with the first.

    Raises: TrainingError if it does.
    """
    collate = PackCollator(0)
    device, vocabulary = model.get_input_embeddings().weight.device, model.get_input_embeddings().weight.shape[0]
    outputs = []
    was_training = model.training
    model.eval()
    try:
        for first in (1, 2):
            documents = [[(first * 7 + i) % vocabulary for i in range(4)], [(3 + i) % vocabulary for i in range(4)]]
            batch = collate([{"input_ids": ids, "labels": ids} for ids in documents])
            del batch["labels"]
            inputs = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
            with torch.no_grad():
                outputs.append(model(**inputs, use_cache=False).logits[0])
    finally:
        model.train(was_training)
    if not torch.equal(outputs[0][4:], outputs[1][4:]):
        raise TrainingError(
            f"In a {type(model).__name__} with {model.config._attn_implementation} attention packed documents would see each "
            "other; train with packing=False, or load the model with sdpa attention."
        )
    if torch.equal(outputs[0][:4], outputs[1][:4]):
        raise TrainingError("The model's output does not hang on its input, so packing cannot be checked; use packing=False.")


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)
