"""The inspector panel: rows and batches token by token, stepping, and what it says of rows that are not trained on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nbkit.config import TrainConfig
from nbkit.errors import ConfigError
from nbkit.widgets.inspector import AT_ONCE, Inspector
from nbkit.widgets.studio import Studio
from tests.widgets.fake import FakeSession
from tests.widgets.hostile import inert, inert_tree


@pytest.fixture
def ready(tmp_path: Path) -> FakeSession:
    session = FakeSession(tmp_path)
    session.load("smollm2-135m-instruct")
    session.add_lora(rank=4)
    session.use_data("sample:ships-log")
    return session


def shown(panel: Inspector) -> str:
    return inert(panel._tokens.value).text


def test_rows_are_stepped_through_by_their_numbers(ready: FakeSession) -> None:
    panel = Inspector(ready)
    assert panel.values()["row"] == 3 and '"user": "plain 1"' in shown(panel)
    with pytest.raises(ConfigError, match="nothing to do"):
        panel.click("previous")
    panel.click("next")
    assert panel.values()["row"] == 4 and '"user": "plain 2"' in shown(panel)
    panel.set(row=6)
    with pytest.raises(ConfigError, match="nothing to do"):
        panel.click("next")
    for row in (0, 7, -3, 10**9):
        with pytest.raises(ConfigError, match=f"There is no row {row} among the 4 rows"):
            panel.set(row=row)
        assert panel.values()["row"] == 6
    with pytest.raises(ConfigError, match="Row 31 is not trained on: plain"):
        panel.set(row=31)


def test_a_batch_is_that_of_the_settings_of_training(ready: FakeSession) -> None:
    panel = Inspector(ready)
    panel.set(view="batch")
    assert "Batch 1 of 2" in shown(panel) and "2 rows × " in shown(panel)
    panel.settings = lambda: TrainConfig(batch_size=4, packing=True)
    panel.set(batch=1)
    assert (
        "Batch 1 of 1" in shown(panel) and "4 rows in one pack" in shown(panel) and shown(panel).count("┃") == 4
    )  # with the legend
    assert "packing=True" in panel.code() and "batch=0" in panel.code()
    for batch in (0, 2):
        with pytest.raises(ConfigError, match="numbered from 1 to 1"):
            panel.set(batch=batch)


def test_settings_that_cannot_be_are_left_to_the_panel_that_has_them(ready: FakeSession) -> None:
    studio = Studio(ready)  # type: ignore[arg-type]
    studio.training._fields["batch_size"].widget.value = 0
    studio.data.inspector.set(view="batch")
    assert "Batch 1 of 2" in shown(studio.data.inspector)
    studio.training.set(batch_size=4)
    studio.data.inspector.set(batch=1)
    assert "Batch 1 of 1" in shown(studio.data.inspector)


def test_packs_that_cannot_be_are_a_sentence_where_the_tokens_would_stand(ready: FakeSession) -> None:
    panel = Inspector(ready)
    assert ready.data is not None
    ready.data.max_seq_length = 8
    panel.settings = lambda: TrainConfig(packing=True, pack_tokens=8)
    ready.data.examples[0] = {"input_ids": [1] * 9, "labels": [-100] * 8 + [0]}
    panel.set(view="batch")
    assert "longer than a pack of 8 tokens" in shown(panel)


def test_problems_and_histograms_stand_above_the_rows(ready: FakeSession) -> None:
    panel = Inspector(ready)
    said = inert(panel._found.value).text
    assert "No problem found" in said and "Tokens per row" in said and "Trained share per row" in said
    assert ready.data is not None
    ready.data.examples[1]["labels"] = [-100] * len(ready.data.examples[1]["input_ids"])
    other = Inspector(ready)
    assert "Row 4: every label is -100" in inert(other._found.value).text


def test_large_sets_are_looked_through_when_asked(ready: FakeSession) -> None:
    data: Any = ready.data
    data.examples = data.examples * AT_ONCE
    data.row_numbers = list(range(1, len(data.examples) + 1))
    data.preview = lambda index, kept=data.preview: kept(index % 4)
    panel = Inspector(ready)
    assert panel._found.value == "" and panel._buttons["look"].layout.display == ""
    panel.click("look")
    assert "the row equals an earlier one" in inert(panel._found.value).text and panel._buttons["look"].layout.display == "none"


def test_without_data_there_is_nothing(tmp_path: Path) -> None:
    panel = Inspector(FakeSession(tmp_path))
    assert panel.box.layout.display == "none" and panel.inspection is None and panel.summary() == ""
    inert_tree(panel.widget)
    inert(panel.static_html())


def test_the_static_form_holds_the_tokens(ready: FakeSession) -> None:
    panel = Inspector(ready)
    asyncio.run(panel.finished())
    reader = inert(panel.static_html())
    assert "⟦plain <|im_end|>⟧" in reader.text and "Tokens per row" in reader.text
