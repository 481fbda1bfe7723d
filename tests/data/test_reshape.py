"""`standardize_sharegpt` and `to_sharegpt`: the same kind out as in, and rows that keep their places."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from nbkit import standardize_sharegpt, to_sharegpt
from nbkit.config import DataRecipe
from nbkit.data.findings import RowFault
from nbkit.data.formats import detect, to_conversation
from nbkit.data.sources import read
from nbkit.errors import DataError

SHAREGPT = [
    {
        "conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "id": 1,
    },
    {"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}], "id": 2},
]
STANDARD = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
]
PEOPLE = [{"name": f"N{i}", "age": i or None, "lived": i % 2} for i in range(6)]
PATTERN = "Who is {name}?[[\nAge: {age}]]"


def faults(rows: Any) -> list[tuple[int, str, str]]:
    """(row, kind, sentence) of what is wrong in the rows once they are read."""
    source, found = read(rows), []
    recipe = detect(source, DataRecipe()).recipe
    for row in source.rows:
        try:
            to_conversation(row.value, recipe)
        except RowFault as fault:
            found.append((row.number, fault.kind, fault.sentence))
    return found


def test_turns_become_roles_and_contents_in_every_kind_of_set() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(SHAREGPT)
    made = standardize_sharegpt(SHAREGPT)
    assert made[0] == {"conversations": STANDARD, "id": 1}
    assert SHAREGPT[0]["conversations"][0] == {"from": "system", "value": "S"}
    assert standardize_sharegpt(made) == made
    assert standardize_sharegpt(data).to_list() == made
    assert list(standardize_sharegpt(data.to_iterable_dataset())) == made
    splits = standardize_sharegpt(datasets.DatasetDict({"train": data, "test": data.select([1])}))
    assert isinstance(splits, datasets.DatasetDict) and splits["test"].to_list() == made[1:]


def test_rows_that_cannot_be_standardised_are_told_when_they_are_read() -> None:
    rows: list[Any] = [*SHAREGPT, {"conversations": [{"from": "narrator", "value": "x"}, {"from": "gpt", "value": "y"}]}]
    rows += [{"conversations": None}, {"conversations": ["x"]}]
    found = faults(standardize_sharegpt(rows))
    assert [fault[:2] for fault in found] == [(3, "unknown_role"), (4, "no_messages"), (5, "wrong_type")]
    assert "'narrator'" in found[0][2]


def test_columns_become_conversations() -> None:
    datasets = pytest.importorskip("datasets")
    made = to_sharegpt(PEOPLE, PATTERN, output_column_name="lived")
    turns = [{"from": "human", "value": "Who is N1?\nAge: 1"}, {"from": "gpt", "value": "1"}]
    assert made[1] == {"conversations": turns}
    assert made[0]["conversations"][0]["value"] == "Who is N0?"
    data = datasets.Dataset.from_list(PEOPLE)
    assert to_sharegpt(data, PATTERN, output_column_name="lived").to_list() == made
    assert list(to_sharegpt(data.to_iterable_dataset(), PATTERN, output_column_name="lived")) == made
    kept = to_sharegpt(PEOPLE, PATTERN, output_column_name="lived", remove_unused_columns=False)
    assert kept[1] == {**PEOPLE[1], "conversations": turns}
    plain = to_sharegpt([{"instruction": "q", "output": "a"}])
    assert plain == [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_conversations_are_extended_by_other_rows(count: int) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(PEOPLE)
    made = to_sharegpt(PEOPLE, PATTERN, output_column_name="lived", conversation_extension=count)
    single = [row["conversations"] for row in to_sharegpt(PEOPLE, PATTERN, output_column_name="lived")]
    assert len(made) == len(PEOPLE)
    used: Counter[str] = Counter()
    for own, row in zip(single, made, strict=True):
        turns = row["conversations"]
        assert turns[:2] == own and len(turns) == 2 * count
        asked = [turn["value"] for turn in turns[::2]]
        assert len(set(asked)) == count
        used.update(asked)
    assert set(used.values()) == {count}
    assert to_sharegpt(data, PATTERN, output_column_name="lived", conversation_extension=count).to_list() == made
    other = to_sharegpt(PEOPLE, PATTERN, output_column_name="lived", conversation_extension=count, random_state=1)
    assert other != made


def test_missing_cells_are_told_with_their_rows() -> None:
    rows = [{"q": "Say.", "a": "Said."}, {"q": None, "a": "x"}, {"q": "y", "a": float("nan")}]
    found = faults(to_sharegpt(rows, "{q}", output_column_name="a"))
    assert [fault[:2] for fault in found] == [(2, "null_prompt"), (3, "null_reply")]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (PEOPLE, {"merged_prompt": "{nam}"}, "no column 'nam'; their columns are .*Did you mean name"),
        (PEOPLE, {}, "no column 'instruction'"),
        (PEOPLE, {"merged_prompt": "{name}"}, "no column 'output'"),
        (PEOPLE, {"merged_prompt": "{name}", "output_column_name": "age", "conversation_extension": 0}, "is 0; it must be"),
        (PEOPLE, {"merged_prompt": "{name}", "output_column_name": "age", "conversation_extension": 7}, "is 7, and there are 6"),
        ([1], {}, "Row 1 is 1, not an object"),
        (3, {}, "Rows of a int cannot be reshaped"),
    ],
)
def test_what_cannot_be_reshaped(rows: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_sharegpt(rows, **settings)


def test_a_set_without_conversations_and_a_stream_to_extend() -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises(DataError, match="no column conversations or messages; their columns are 'name', 'age', 'lived'"):
        standardize_sharegpt(PEOPLE)
    stream = datasets.Dataset.from_list(PEOPLE).to_iterable_dataset()
    with pytest.raises(DataError, match="streamed"):
        to_sharegpt(stream, PATTERN, output_column_name="lived", conversation_extension=2)
