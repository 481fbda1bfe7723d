"""`nbkit.inspect(data)`: the real collated batch, token by token, and what is wrong with the set, whatever holds the data.

It stands above the training room, because the batches and their order are those that training makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any

from nbkit.config import DataConfig, DataRecipe, LoraConfig, ModelConfig, RunConfig, TrainConfig
from nbkit.data.inspection import Batch, Batches, InspectedSet, Inspection
from nbkit.data.wanted import wanted
from nbkit.errors import DataError

KINDS = "a Session, the DataReport of Session.use_data, a TRL or transformers trainer, or (rows, tokenizer)"


def inspect(
    data: Any,
    *,
    row: int | None = None,
    batch: int = 0,
    start: int = 0,
    train: TrainConfig | None = None,
    max_seq_length: int | None = None,
) -> Inspection:
    """What training will see: one batch token by token, and the problems of the whole set in `.problems`.

    Nothing is changed, neither the data nor the state of random generators.

    Args:
        data: a `Session`, a `DataReport`, a TRL or transformers trainer, or a pair of (rows, tokenizer), where rows are
            examples with "input_ids" (and "labels"), one collated batch, or anything `Session.use_data` reads.
        row: show the batch that holds the row of this number.
        batch: or the batch at this place in the first epoch, from 0.
        start: the first token shown of each row.
        train: batch size, packing and seed, as they will be given to `Session.train`; a trainer has its own.
        max_seq_length: tokens; for rows that have yet to be rendered (default 2048), and to tell which rows were cut off.
    Raises: DataError where there are no data, no such row or no such batch.
    """
    found = _set_of(data, train or TrainConfig(), max_seq_length)
    if not len(found.examples):
        raise DataError(f"There are no rows in {found.name}; give data with at least one row.")
    return Inspection(found).show(batch=batch, row=row, start=start)


def _set_of(data: Any, train: TrainConfig, max_seq_length: int | None) -> InspectedSet:
    if hasattr(data, "use_data") and hasattr(data, "data"):  # a Session; its module lies above this one
        if data.data is None:
            raise DataError('There is no data yet; call session.use_data("sample:ships-log") or give your own file first.')
        return _of_report(data.data, train)
    if hasattr(data, "row_numbers") and hasattr(data, "findings"):
        return _of_report(data, train)
    if hasattr(data, "get_train_dataloader"):
        return _of_trainer(data)
    if isinstance(data, tuple) and len(data) == 2 and hasattr(data[1], "convert_ids_to_tokens"):
        return _of_pair(*data, train, max_seq_length)
    raise DataError(f"A {type(data).__name__} cannot be inspected; give {KINDS}.")


# -- nbkit's own -----------------------------------------------------------------------------------


def _of_report(report: Any, train: TrainConfig) -> InspectedSet:
    if getattr(report.examples, "liked", None) is not None:  # of KTO, what sft trains; of pairs both replies are shown
        report = wanted(report)
    rows = [int(row) for row in report.row_numbers]
    tokenizer = report.tokenizer

    def rebatch(train: TrainConfig) -> Batches:
        return _batches(report.examples, train, tokenizer, report.max_seq_length)

    return InspectedSet(
        report.source,
        report.examples,
        rows,
        tokenizer,
        rebatch(train),
        max_length=report.max_seq_length,
        report=report,
        rebatch=rebatch,
    )


def _batches(examples: Sequence[Any], train: TrainConfig, tokenizer: Any, max_seq_length: int) -> Batches:
    """The batches that nbkit's trainer makes of these examples in its first epoch."""
    from nbkit.training.loader import batches, collator

    model = ModelConfig(name="inspected", max_seq_length=max(max_seq_length, 8))
    config = RunConfig(model=model, lora=LoraConfig(), data=DataConfig(source="inspected"), train=train)
    order = list(batches(config, examples))
    of = {example: place for place, members in enumerate(order) for example in members}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)

    def get(index: int) -> Batch:
        members = order[index]
        made = collator(config, examples, pad)([examples[example] for example in members])
        return made, [members] if train.packing else [[example] for example in members]

    return Batches(len(order), get, of.get)


# -- others' ---------------------------------------------------------------------------------------


def _of_trainer(trainer: Any) -> InspectedSet:
    """The trainer's own data loader and collator; its order is drawn from a copy of the random state."""
    tokenizer = getattr(trainer, "processing_class", None)
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        tokenizer = getattr(tokenizer, "tokenizer", None)
    if tokenizer is None or trainer.train_dataset is None or not hasattr(trainer.train_dataset, "__len__"):
        raise DataError(
            f"The {type(trainer).__name__} has no tokenizer or no sized train_dataset; give (rows, tokenizer) instead."
        )
    dataset = trainer.train_dataset
    examples = Collated(dataset, trainer.data_collator)
    place_of = {tuple(examples[index]["input_ids"]): index for index in reversed(range(len(dataset)))}

    @cache
    def get(index: int) -> Batch:
        made = _nth_batch(trainer, index)
        return made, [
            [place_of[ids] for ids in _documents(made, row) if ids in place_of] for row in range(len(made["input_ids"]))
        ]

    size = int(trainer.args.per_device_train_batch_size)
    limit = getattr(trainer.args, "max_length", None)
    batches = Batches(-(-len(dataset) // size), get, lambda _: None)
    rows = range(1, len(dataset) + 1)
    return InspectedSet(
        f"the train_dataset of the {type(trainer).__name__}", examples, rows, tokenizer, batches, max_length=limit
    )


def _nth_batch(trainer: Any, index: int) -> dict[str, Any]:
    import torch

    loaders = getattr(trainer.accelerator, "_dataloaders", [])
    before = len(loaders)
    with torch.random.fork_rng():
        try:
            made = next(islice(iter(trainer.get_train_dataloader()), index, None), None)
        finally:
            del loaders[before:]  # accelerate keeps each loader that it prepares
    if made is None:
        raise DataError(f"The trainer's data loader has no batch {index}; batches are counted from 0.")
    return dict(made)


def _documents(made: Mapping[str, Any], row: int) -> list[tuple[int, ...]]:
    """The ids of a row of a batch without its padding."""
    ids = made["input_ids"][row].tolist()
    mask = made.get("attention_mask")
    return [tuple(ids if mask is None else [index for index, real in zip(ids, mask[row].tolist(), strict=True) if real])]


class Collated(Sequence[Mapping[str, Any]]):
    """The rows of a data set as a collator makes them, one at a time, without padding."""

    def __init__(self, dataset: Any, collate: Any) -> None:
        self._dataset, self._collate = dataset, collate

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Mapping[str, Any]:
        made = self._collate([self._dataset[index]])
        ids, mask = made["input_ids"][0].tolist(), made.get("attention_mask")
        labels = made["labels"][0].tolist() if made.get("labels") is not None else ids
        real = [True] * len(ids) if mask is None else mask[0].tolist()
        kept = [(one, label) for one, label, is_real in zip(ids, labels, real, strict=True) if is_real]
        return {"input_ids": [one for one, _ in kept], "labels": [label for _, label in kept]}


def _of_pair(rows: Any, tokenizer: Any, train: TrainConfig, max_seq_length: int | None) -> InspectedSet:
    if isinstance(rows, Mapping) and "input_ids" in rows:
        return _of_batch(rows, tokenizer, max_seq_length)
    first = rows[0] if isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) else None
    if first is None and hasattr(rows, "__len__") and hasattr(rows, "__getitem__") and not isinstance(rows, str) and len(rows):
        first = rows[0]  # a datasets.Dataset
    if not (isinstance(first, Mapping) and "input_ids" in first):
        from nbkit.data.pipeline import prepare

        return _of_report(prepare(rows, tokenizer, DataRecipe(), max_seq_length=max_seq_length or 2048), train)
    examples = Labelled(rows)
    longest = max(len(example["input_ids"]) for example in examples)
    limit = max(longest, max_seq_length or 0)

    def rebatch(train: TrainConfig) -> Batches:
        return _batches(examples, train, tokenizer, limit)

    numbers = range(1, len(examples) + 1)
    return InspectedSet("the examples", examples, numbers, tokenizer, rebatch(train), max_length=max_seq_length, rebatch=rebatch)


class Labelled(Sequence[Mapping[str, Any]]):
    """Examples that may lack labels: every token is then its own label, as trainers take it."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Mapping[str, Any]:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"there is no example {index}")
        row = dict(self._rows[index])
        return row if row.get("labels") is not None else {**row, "labels": row["input_ids"]}


def _of_batch(made: Mapping[str, Any], tokenizer: Any, max_seq_length: int | None) -> InspectedSet:
    """One collated batch, as it is."""
    examples = _Rows(made)
    batches = Batches(1, lambda _: (made, [[row] for row in range(len(examples))]), lambda _: 0)
    rows = range(1, len(examples) + 1)
    return InspectedSet("the batch", examples, rows, tokenizer, batches, max_length=max_seq_length)


class _Rows(Sequence[Mapping[str, Any]]):
    """The rows of a collated batch, without padding."""

    def __init__(self, made: Mapping[str, Any]) -> None:
        self._made = made

    def __len__(self) -> int:
        return len(self._made["input_ids"])

    def __getitem__(self, index: Any) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no row {index}")
        ids = list(map(int, self._made["input_ids"][index]))
        labels = self._made.get("labels")
        labels = ids if labels is None else list(map(int, labels[index]))
        mask = self._made.get("attention_mask")
        real = [1] * len(ids) if mask is None else list(map(int, mask[index]))
        kept = [(one, label) for one, label, is_real in zip(ids, labels, real, strict=True) if is_real]
        return {"input_ids": [one for one, _ in kept], "labels": [label for _, label in kept]}
