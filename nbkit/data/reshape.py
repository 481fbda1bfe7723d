"""Rows of other shapes made into conversations before they are read: `standardize_sharegpt` and `to_sharegpt`.

Both take a `datasets` Dataset, IterableDataset or dictionary of splits, or a list of dicts, and give the same kind. A row that
cannot be converted keeps its place and what is wrong with it, so that `Session.use_data` tells it with its number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nbkit.data import merge
from nbkit.data.findings import RowFault, shorten
from nbkit.data.messages import CONTENT_KEYS, SPEAKER_KEYS, SPEAKER_OF, is_null
from nbkit.errors import DataError, nearest

LISTS = ("conversations", "messages")


def standardize_sharegpt(dataset: Any) -> Any:
    """ShareGPT's turns {"from", "value"} as {"role", "content"}, with the roles system, user, assistant and tool.

    Turns that are so already stay as they are. Rows are new; the given ones are not changed.

    Raises: DataError if there is no column conversations or messages.
    """
    if isinstance(dataset, Mapping):
        return _by_split(dataset, standardize_sharegpt)
    columns = _columns(dataset)
    column = next((name for name in LISTS if name in columns), None)
    if column is None:
        raise DataError(f"The rows have no column conversations or messages; their columns are {_shown(columns)}.")
    return _mapped(dataset, _standard_row, {"column": column})


def _standard_row(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    turns = row.get(column)
    return {column: [_standard_turn(turn) for turn in turns] if isinstance(turns, (list, tuple)) else turns}


def _standard_turn(turn: Any) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    speaker = next((key for key in SPEAKER_KEYS if turn.get(key) is not None), None)
    content = next((key for key in CONTENT_KEYS if key in turn), None)
    name = turn[speaker] if speaker else None
    role = SPEAKER_OF.get(name.strip().casefold(), name) if isinstance(name, str) else name
    rest = {key: value for key, value in turn.items() if key not in (speaker, content)}
    return {"role": role, "content": turn[content] if content else None, **rest}


def to_sharegpt(
    dataset: Any,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Any:
    """Columns of single questions and answers as conversations: [{"from": "human", "value"}, {"from": "gpt", "value"}].

    Args:
        merged_prompt: the question out of several columns, such as "{name} is asked:[[ after {years} years,]] {question}", where
            what is in [[ ]] is left out for rows that have nothing there; '' takes the column `merged_column_name`.
        output_column_name: the column of the answers; numbers are written as text.
        remove_unused_columns: keep the conversations only.
        conversation_extension: so many rows, picked by chance, follow each other in one conversation. There are as many
            conversations as rows; each row is in `conversation_extension` of them and never twice in one.
        random_state: the seed of that.
    Raises: DataError for a column that is not there, a pattern that cannot be read, or more rows asked for than there are.
    """
    if isinstance(dataset, Mapping):
        rest = (
            merged_prompt,
            merged_column_name,
            output_column_name,
            remove_unused_columns,
            conversation_extension,
            random_state,
        )
        return _by_split(dataset, lambda part: to_sharegpt(part, *rest))
    columns = _columns(dataset)
    pattern = merged_prompt or f"{{{merged_column_name}}}"
    for column in (*merge.parse(pattern).columns, output_column_name):
        if column not in columns:
            raise DataError(f"The rows have no column {column!r}; their columns are {_shown(columns)}.{nearest(column, columns)}")
    if conversation_extension < 1:
        raise DataError(f"conversation_extension is {conversation_extension}; it must be at least 1.")
    unused = [column for column in columns if column != "conversations"] if remove_unused_columns else []
    single = _mapped(dataset, _pair, {"pattern": pattern, "output": output_column_name}, unused)
    return single if conversation_extension == 1 else _extended(single, conversation_extension, random_state)


def _pair(row: Mapping[str, Any], pattern: str, output: str) -> dict[str, Any]:
    try:
        prompt: str | None = merge.parse(pattern).fill(row)
    except RowFault:
        prompt = None  # which is a finding of its own once the row is read
    answer = row.get(output)
    if not isinstance(answer, str):
        answer = None if is_null(answer) or not isinstance(answer, (bool, int, float)) else str(answer)
    return {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]}


def _extended(single: Any, count: int, seed: int) -> Any:
    """Each row followed by the next ones of a shuffled circle of all rows."""
    if not hasattr(single, "__len__"):
        raise DataError(
            "A streamed data set has no order to pick rows from; use conversation_extension=1, or take rows out of it."
        )
    total = len(single)
    if count > total:
        raise DataError(f"conversation_extension is {count}, and there are {total:,} rows; take at most as many.")
    circle = list(range(total))
    random.Random(seed).shuffle(circle)
    place = {row: at for at, row in enumerate(circle)}
    follow = [[circle[(place[row] + step) % total] for row in range(total)] for step in range(1, count)]
    if isinstance(single, list):
        parts = [single, *([single[i] for i in order] for order in follow)]
        return [
            {**rows[0], "conversations": sum((row["conversations"] for row in rows), [])} for rows in zip(*parts, strict=True)
        ]
    import datasets

    more = [
        single.select(order).select_columns(["conversations"]).rename_column("conversations", f"next {i}")
        for i, order in enumerate(follow)
    ]
    names = [f"next {i}" for i in range(len(more))]
    return datasets.concatenate_datasets([single, *more], axis=1).map(_joined, fn_kwargs={"names": names}, remove_columns=names)


def _joined(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {"conversations": sum((row[name] for name in names), row["conversations"])}


# -- kinds of sets ---------------------------------------------------------------------------------


def _by_split(splits: Mapping[str, Any], change: Callable[[Any], Any]) -> Any:
    kind: Any = type(splits)
    return kind({name: change(part) for name, part in splits.items()})


def _columns(dataset: Any) -> list[str]:
    if isinstance(dataset, (list, tuple)):
        wrong = next((number for number, row in enumerate(dataset, 1) if not isinstance(row, Mapping)), None)
        if wrong is not None:
            raise DataError(f"Row {wrong} is {shorten(dataset[wrong - 1])}, not an object with columns; give a list of dicts.")
        return list(dict.fromkeys(key for row in dataset for key in row))
    if type(dataset).__module__.split(".")[0] != "datasets":
        raise DataError(
            f"Rows of a {type(dataset).__name__} cannot be reshaped; give a data set of the datasets library or a list."
        )
    if dataset.column_names is None:
        return list(next(iter(dataset), {}))
    return list(dataset.column_names)


def _shown(columns: Sequence[str]) -> str:
    return ", ".join(shorten(column, 40) for column in columns[:20]) or "none"


def _mapped(dataset: Any, change: Callable[..., dict[str, Any]], settings: dict[str, Any], unused: Sequence[str] = ()) -> Any:
    if isinstance(dataset, (list, tuple)):
        return [{**{k: v for k, v in row.items() if k not in unused}, **change(row, **settings)} for row in dataset]
    return dataset.map(change, fn_kwargs=settings, remove_columns=[*unused] or None)
