"""`prepare` as a stream: what is held, what may end it, and every format up to ready examples."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbkit.config import IGNORE_INDEX, DataRecipe
from nbkit.data import mapping
from nbkit.data.pipeline import prepare
from nbkit.data.progress import told_to
from nbkit.data.report import DataReport
from nbkit.data.rows import Row, Source, Streamed
from nbkit.errors import DataError
from tests.data.chats import tokenizer

TOKENIZER = tokenizer("chatml")


def report(rows: Any, max_seq_length: int = 512, **recipe: Any) -> DataReport:
    return prepare(rows, TOKENIZER, DataRecipe(**recipe), max_seq_length=max_seq_length)


def trained(found: DataReport, example: Any, prefix: str = "") -> str:
    labels = [label for label in example[f"{prefix}labels"] if label != IGNORE_INDEX]
    return TOKENIZER.decode(labels)


class Value(dict):  # type: ignore[type-arg]
    """A row whose life can be followed."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def test_rows_are_never_held_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbkit.data import pipeline

    monkeypatch.setattr(mapping, "CHUNK", 8)
    alive: weakref.WeakSet[Value] = weakref.WeakSet()
    most = []
    mapped = threading.Event()

    def start() -> Iterator[Row]:
        for number in range(1, 3001):
            value = Value(instruction=f"Say {number}.", output=f"It is {number}.")
            alive.add(value)
            if mapped.is_set():
                most.append(len(alive))
            yield Row(number, value)

    source = Source("a stream", Streamed(start), count=3000)
    monkeypatch.setattr(pipeline, "read", lambda _: source)
    collect = pipeline.collect

    def watched(*arguments: Any) -> Any:
        mapped.set()
        return collect(*arguments)

    monkeypatch.setattr(pipeline, "collect", watched)
    found = report("anything")
    assert found.used == 3000 and len(most) == 3000
    assert max(most) < 8 * (mapping.AHEAD + 3), "rows are held long after they were mapped"
    gc.collect()
    assert len(alive) < 8 * (mapping.AHEAD + 3)
    assert trained(found, found.examples[2999]) == "It is 3000.<|im_end|>"


def test_a_listener_may_end_it_and_no_thread_is_left() -> None:
    rows = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(2000)]
    told: list[Any] = []

    class Enough(Exception):
        pass

    def listener(what: str, done: int, total: int | None) -> None:
        told.append((what, done, total))
        if done:
            raise Enough

    with pytest.raises(Enough), told_to(listener):
        report(rows)
    assert told[0] == ("Rows to tokens", 0, 2000)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nbkit-tokens")]


def test_reading_on_another_thread_is_not_disturbed_by_who_uses_the_tokenizer() -> None:
    shared = tokenizer("chatml")
    rows = [{"instruction": f"Say {n}.", "output": f"It is {n}. " * 20} for n in range(600)]
    quiet = prepare(rows, shared, DataRecipe(), max_seq_length=512)
    found: list[DataReport] = []
    reading = threading.Thread(target=lambda: found.append(prepare(rows, shared, DataRecipe(), max_seq_length=512)))
    reading.start()
    while reading.is_alive():
        shared("a chat that goes on meanwhile", truncation=True, max_length=2)
    assert found[0].fingerprint == quiet.fingerprint


def test_preferences_bear_labels_on_both_answers_alone() -> None:
    prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Best?"}]
    row = {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": "This one."}],
        "rejected": [{"role": "assistant", "content": "None."}],
    }
    found = report([row, {**row, "rejected": row["chosen"]}])
    assert found.recipe.format == "preference" and (found.used, found.refused) == (1, 1)
    example = found.examples[0]
    assert set(example) == {"input_ids", "labels", "rejected_input_ids", "rejected_labels"}
    assert trained(found, example) == "This one.<|im_end|>" and trained(found, example, "rejected_") == "None.<|im_end|>"
    common = next(i for i, label in enumerate(example["labels"]) if label != IGNORE_INDEX)
    assert example["input_ids"][:common] == example["rejected_input_ids"][:common]
    assert found.total_tokens == len(example["labels"]) + len(example["rejected_labels"])
    assert "This one." in "".join(text for text, _ in found.preview(0).pieces)


def test_kto_rows_carry_their_label() -> None:
    rows = [{"prompt": "Hi", "completion": f"Answer {n}", "label": n % 2 == 0} for n in range(4)]
    found = report(rows)
    assert found.recipe.format == "kto"
    assert [example["label"] for example in found.examples] == [True, False, True, False]
    assert trained(found, found.examples[1]) == "Answer 1<|im_end|>"


def test_raw_text_needs_no_template() -> None:
    base = tokenizer("chatml")
    base.chat_template = None
    found = prepare([{"text": "The wind is west."}], base, DataRecipe(), max_seq_length=64)
    assert found.recipe.format == "text" and found.held_out_rows == []
    assert found.trained_share > 0.9 and found.examples[0]["input_ids"][-1] == base.eos_token_id
    with pytest.raises(DataError, match="no chat template"):
        prepare([{"instruction": "a", "output": "b"}], base, DataRecipe(), max_seq_length=64)
    named = prepare([{"instruction": "a", "output": "b"}], base, DataRecipe(template="chatml"), max_seq_length=64)
    assert named.used == 1


def test_a_held_out_row_that_was_split_goes_whole(tmp_path: Path) -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"turn {n} " + "wind " * 12} for n in range(8)]
    rows = [{"messages": [{**turn, "content": f"{row} {turn['content']}"} for turn in turns]} for row in range(6)]
    found = prepare(rows, TOKENIZER, DataRecipe(too_long="split"), max_seq_length=120, held_out=2)
    assert found.used == 4 == found.rows_in and len(found.examples) > 8
    mine, apart = set(found.row_numbers.tolist()), set(found.held_out_examples.row_numbers.tolist())
    assert mine.isdisjoint(apart) and mine | apart == set(range(1, 7))
    assert len(found.held_out_rows) == len(found.held_out_examples) > 4
    assert all(messages[-1]["role"] == "assistant" for messages in found.held_out_rows)
    assert {finding.part for finding in found.findings if finding.row in apart} == {"held_out"}


def chat(sizes: list[int], name: int) -> dict[str, Any]:
    said = [f"{name} {turn} " + "wind " * size for turn, size in enumerate(sizes)]
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]}


bad = st.sampled_from([None, 3, {"messages": None}, {"messages": [{"role": "user", "content": "no reply"}]}, {"other": 1}])
good = st.builds(chat, st.lists(st.integers(0, 20), min_size=1, max_size=4).map(lambda s: s * 2), st.integers(0, 3))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.one_of(good, good, bad), min_size=1, max_size=9),
    limit=st.integers(24, 200),
    held_out=st.none() | st.integers(1, 4) | st.lists(good, min_size=1, max_size=3),
    recipe=st.builds(
        DataRecipe,
        format=st.just("messages"),
        faulty=st.sampled_from(["refuse", "drop"]),
        too_long=st.sampled_from(["refuse", "drop", "cut", "split"]),
        duplicates=st.sampled_from(["keep", "drop"]),
        train_on=st.sampled_from(["replies", "last_reply", "all"]),
    ),
)
def test_every_row_is_accounted_for_whatever_the_recipe(
    tmp_path: Path, rows: list[Any], limit: int, held_out: Any, recipe: DataRecipe
) -> None:
    by_source = isinstance(held_out, list)
    try:
        found = prepare(rows, TOKENIZER, recipe, max_seq_length=limit, held_out=held_out)
    except DataError as error:
        assert len(str(error)) > 30
        return
    apart = found.held_out_examples
    split_off = 0 if by_source else len(set(apart.row_numbers.tolist()))
    assert split_off == (held_out if isinstance(held_out, int) else 0)
    assert found.rows_in + split_off == len(rows) and found.rows_in == found.used + found.dropped + found.refused
    assert found.used == len(set(found.row_numbers.tolist())) > 0
    mine = [finding for finding in found.findings if finding.part == "train"]
    for outcome, count in (("dropped", found.dropped), ("refused", found.refused)):
        assert len({finding.row for finding in mine if finding.outcome == outcome}) == count
    assert recipe.faulty == "refuse" or all(f.kind == "too_long" for f in mine if f.outcome == "refused")
    assert recipe.too_long != "drop" or not [f for f in mine if f.kind == "too_long" and f.outcome == "refused"]
    for examples in (found.examples, apart):
        for ids, labels in map(examples.arrays, range(len(examples))):
            assert len(ids) <= limit and (labels[1:] != IGNORE_INDEX).any()
            assert np.isin(labels - ids, [0]).sum() == (labels != IGNORE_INDEX).sum()
    if recipe.duplicates == "drop" and recipe.too_long != "split":
        texts = [str(example) for example in found.examples]
        assert len(set(texts)) == len(texts)
    kept = prepare(rows, TOKENIZER, recipe, max_seq_length=limit, held_out=held_out)
    assert kept.fingerprint == found.fingerprint and kept.findings == found.findings
    for index in range(len(found.examples)):
        assert any(is_trained for _, is_trained in found.preview(index).pieces)
        assert found.preview(index).raw == rows[found.example_row(index) - 1]
    assert str(found) and found._repr_html_()
