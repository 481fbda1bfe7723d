"""The studio over the real engine: a tiny model is loaded, adapted, trained, stopped and asked, as a user would."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

import nbkit
from nbkit.errors import ConfigError, DataError, ModelError, TrainingError
from nbkit.widgets.studio import Studio
from tests.widgets.hostile import inert, inert_tree

ROWS = [
    {"instruction": f"Say the number {n}. <img src=x onerror=alert({n})>", "output": f"It is {n}; that is all."}
    for n in range(12)
]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    bad = [{"instruction": "Say nothing.", "output": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:3], *bad, *ROWS[3:]]), encoding="utf-8")
    return str(path)


def test_the_studio_drives_the_engine(tmp_path: Path, tiny_model_dir: Path, rows: str) -> None:
    shown = Studio(nbkit.Session(tmp_path / "space"))
    shown.model.set(name=str(tiny_model_dir), max_seq_length=256)
    for button, said in (("lora.add", "No model is loaded"), ("data.read", "No model is loaded"), ("training.start", "No model")):
        with pytest.raises(ModelError, match=said):
            shown.click(button)

    shown.click("model.load")
    shown.lora.set(rank=4)
    with pytest.raises(ConfigError, match="no adapter yet"):
        shown.click("training.start")
    shown.click("lora.add")
    assert f"{shown.lora.cost()[0]:,}" in shown.lora._figures.value

    with pytest.raises(DataError, match="There is no data yet"):
        shown.click("training.start")
    shown.data.set(source=rows, held_out=2)
    shown.click("data.read")
    found = inert(shown.data._found.value).text
    assert "alpaca" in found and "the reply is null" in found
    shown.click("data.faulty_drop")
    assert shown.session.data.dropped == 1 and "recipe=nbkit.DataRecipe(" in shown.data.code()
    view = inert(shown.data.inspector._tokens.value).text
    assert "<img src=x onerror=alert(" in view and "that is all.<|im_end|>⟧" in view
    shown.training.set(batch_size=3)
    shown.data.inspector.set(view="batch")
    assert "3 rows × " in inert(shown.data.inspector._tokens.value).text
    assert shown.data.values()["columns"] == {"instruction": "instruction", "output": "output"}

    asyncio.run(_train_and_ask(shown))
    inert_tree(shown.widget)
    inert(shown.static_html())


async def _train_and_ask(shown: Studio) -> None:
    shown.training.set(max_steps=3, learning_rate=1e-3)
    run = await shown.train()
    assert run.status == "finished" and shown.plot.progress.step == 3
    facts = dict(shown.plot.progress.facts())
    assert "Loss" in facts and "→" in facts["Held-out loss"] and {"RSS", "VRAM"} & facts.keys()
    assert "Trained at step 3" in shown.training.said.value

    shown.training.set(max_steps=300)
    shown.click("training.start")
    with pytest.raises(TrainingError, match="A run is training"):
        shown.click("lora.add")
    while shown.plot.progress.step < 1:
        await asyncio.sleep(0.05)
    shown.training._buttons["stop"].click()
    await shown.training.finished()
    assert shown.session.run.status == "stopped" and 1 <= shown.plot.progress.step < 300

    waiting = asyncio.ensure_future(shown.train())
    while shown.plot.progress.state != "running" or shown.plot.progress.step < 1:
        await asyncio.sleep(0.05)
    waiting.cancel()  # the interrupt button cancels the cell: the run ends at a step, and the cell gets it
    assert (await waiting).status == "stopped"

    shown.click("chat.example")
    shown.chat.set(max_new_tokens=4)
    shown.click("chat.send")
    await shown.chat.finished()
    (exchange,) = shown.chat.exchanges
    assert exchange.tuned is not None and exchange.expected is not None and exchange.expected.startswith("It is")
