"""The studio: all panels over one session, from a checkpoint to a chat."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import nbkit
from nbkit.errors import ConfigError, ModelError, TrainingError
from nbkit.widgets.studio import Studio, studio
from tests.lanes import ROOT, borrow, empty_venv, pip, run
from tests.widgets.fake import FakeSession
from tests.widgets.hostile import inert, inert_tree


def opened(shown: Studio) -> list[str]:
    return [name for name, panel in shown.panels.items() if panel._body.layout.display != "none"]


def test_the_steps_open_one_after_the_other(tmp_path: Path) -> None:
    async def main() -> None:
        shown = Studio(FakeSession(tmp_path))
        assert opened(shown) == ["model"]
        shown.click("model.load")
        assert opened(shown) == ["lora"]
        shown.click("lora.add")
        assert opened(shown) == ["data"]
        shown.click("data.read")
        await shown.data.finished()
        assert opened(shown) == ["data", "training"]
        run = await shown.train()
        assert run is shown.session.run and run.status == "finished"
        assert opened(shown) == ["training", "chat"]
        shown.chat.set(prompt="hi")
        shown.click("chat.send")
        await shown.chat.finished()
        assert shown.chat.exchanges[0].tuned == "tuned plain"
        inert_tree(shown.widget)

    asyncio.run(main())


def test_it_opens_where_the_session_stands(tmp_path: Path) -> None:
    session = FakeSession(tmp_path)
    session.load("a")
    assert opened(Studio(session)) == ["lora"]
    session.add_lora()
    session.use_data("x")
    assert opened(Studio(session)) == ["training"]
    asyncio.run(_await(session))
    assert opened(Studio(session)) == ["chat"]


async def _await(session: FakeSession) -> None:
    await session.train()


def test_a_closed_step_still_says_what_is_wrong(tmp_path: Path) -> None:
    shown = Studio(FakeSession(tmp_path))
    shown.lora.message("All is well.", "done")
    assert shown.lora.said.layout.display == "none"
    shown.lora.message("It is not.", "error")
    assert shown.lora.said.layout.display == ""


def test_the_cost_of_the_adapter_follows_the_picked_model(tmp_path: Path) -> None:
    shown = Studio(nbkit.Session(tmp_path))
    assert "2,442,240" not in shown.lora._figures.value
    shown.lora.set(rank=8)
    assert "2,442,240" in shown.lora._figures.value  # of SmolLM2-135M
    shown.model.set(name="meta-llama/Llama-3.1-8B-Instruct")
    shown.lora.set(rank=16)
    assert "41,943,040" in shown.lora._figures.value
    assert not list(tmp_path.iterdir())


def test_training_that_fails_is_raised_where_it_is_awaited(tmp_path: Path) -> None:
    async def main() -> None:
        shown = Studio(FakeSession(tmp_path, failure=TrainingError("The disk is full; free 2 GB.")))
        with pytest.raises(ModelError, match="No model is loaded"):
            await shown.train()
        for button in ("model.load", "lora.add", "data.read"):
            shown.click(button)
        with pytest.raises(TrainingError, match="disk is full"):
            await shown.train()

    asyncio.run(main())


def test_training_waits_for_a_reply_that_is_being_written(tmp_path: Path) -> None:
    async def main() -> None:
        session = FakeSession(tmp_path, said="word " * 50)
        session.pause = 0.02
        shown = Studio(session)
        for button in ("model.load", "lora.add", "data.read"):
            shown.click(button)
        shown.chat.set(prompt="hi")
        shown.click("chat.send")
        with pytest.raises(TrainingError, match="A reply is being written"):
            shown.click("training.start")
        shown.click("chat.stop")
        await shown.chat.finished()
        shown.click("training.start")
        await shown.training.finished()

    asyncio.run(main())


def test_a_run_that_a_hand_has_started_is_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        shown = Studio(FakeSession(tmp_path, steps=20))
        for button in ("model.load", "lora.add", "data.read", "training.start"):
            shown.click(button)
        first = shown.session.run
        await asyncio.sleep(0.05)
        assert await shown.train() is first and first.status == "finished"

    asyncio.run(main())


@pytest.mark.parametrize("name", ["modle.load", "model.laod", "start", "", "model"])
def test_unknown_panels_and_buttons_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="has no"):
        Studio(FakeSession(tmp_path)).click(name)


def test_all_of_it_has_a_static_form(tmp_path: Path) -> None:
    shown = studio(FakeSession(tmp_path))  # type: ignore[arg-type]
    html = shown._repr_html_()
    assert inert(html).tags.count("h3") == 5 and html.count("<style>") == 1
    assert "text/html" in shown._repr_mimebundle_()
    assert repr(shown).startswith("<nbkit studio: model:")


def test_without_a_session_it_makes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(nbkit.studio().session, nbkit.Session)


SCRIPT = """
import asyncio, sys
sys.path[:0] = sys.argv[1:3]
import IPython, ipywidgets
assert ipywidgets.__version__ == "7.7.1" and IPython.__version__ == "7.34.0"
from pathlib import Path
from fake import FakeSession
from nbkit.widgets import LivePlot
from nbkit.widgets.studio import Studio

async def main():
    shown = Studio(FakeSession(Path(sys.argv[3])))
    for button in ("model.load", "lora.add", "data.read"):
        shown.click(button)
    shown.training.set(max_steps=5, schedule="cosine")
    await shown.train()
    shown.chat.set(prompt="hi")
    shown.click("chat.send")
    await shown.chat.finished()
    for panel in [*shown.panels.values(), shown.plot, LivePlot()]:
        panel._show_code.value = True
        bundle = panel._repr_mimebundle_()
        assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] and panel.error is None
    print(shown.chat.exchanges[0].tuned)

asyncio.run(main())
"""


@pytest.mark.slow
def test_all_panels_work_with_colabs_ipywidgets(tmp_path: Path) -> None:
    python = empty_venv(tmp_path / "venv")
    pip(python, "install", "--quiet", "ipywidgets==7.7.1", "ipykernel==6.17.1", "ipython==7.34.0", "psutil", "nvidia-ml-py")
    borrow(python)
    assert run(python, "-c", SCRIPT, ROOT, Path(__file__).parent, tmp_path, cwd=tmp_path).strip().endswith("tuned plain")
