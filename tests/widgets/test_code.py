"""Show code: the printed code makes the very calls the panels make."""

from __future__ import annotations

import ast
import asyncio
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nbkit
from nbkit.config import LoraConfig, TrainConfig
from nbkit.widgets import _code
from nbkit.widgets.chat import ChatPanel
from nbkit.widgets.dataset_mapper import DatasetMapper
from nbkit.widgets.lora import LoraPanel
from nbkit.widgets.model_picker import ModelPicker
from nbkit.widgets.studio import Studio
from nbkit.widgets.train import TrainPanel
from tests.widgets.fake import FakeRun, FakeSession
from tests.widgets.hostile import CORPUS

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.lists(inner).map(tuple),
    max_leaves=8,
)


@given(VALUES)
def test_any_value_is_written_as_python(value: Any) -> None:
    assert eval(_code.literal(value)) == value


def test_a_nan_is_written_as_python() -> None:
    assert math.isnan(eval(_code.literal(float("nan"))))


@given(st.text(max_size=300), st.text(max_size=100))
def test_long_calls_are_broken_and_still_the_same(first: str, second: str) -> None:
    line = _code.call("f", [first], {"second": _code.call("g", [second], {"third": [first, second]})})
    seen = eval(line, {"f": lambda *a, **k: (a, k), "g": lambda *a, **k: (a, k)})
    assert seen == ((first,), {"second": ((second,), {"third": [first, second]})})


def test_only_changes_are_written() -> None:
    assert _code.changed(LoraConfig(rank=8)) == {"rank": 8}
    assert _code.changed(TrainConfig()) == {}


def ready(folder: Path) -> FakeSession:
    session = FakeSession(folder)
    session.load("first")
    session.add_lora(rank=2)
    session.use_data("sample:ships-log")
    session.calls.clear()
    return session


def replayed(code: str, folder: Path) -> list[Any]:
    """The calls that the code makes on another session."""
    session = ready(folder)
    FakeRun.wait = lambda self: None  # type: ignore[attr-defined]
    try:
        exec(compile(code, "shown", "exec"), {"session": session, "print": lambda *_: None})
    finally:
        del FakeRun.wait  # type: ignore[attr-defined]
    return session.calls


def pressed(panel: Any, button: str) -> None:
    async def press() -> None:
        panel.click(button)
        await panel.finished()

    asyncio.run(press())


@pytest.mark.parametrize("said", [*CORPUS[::23], CORPUS[-10], "x" * 5000], ids=lambda said: ascii(said[:20]))
def test_the_code_of_each_panel_makes_the_same_calls(tmp_path: Path, said: str) -> None:
    word = said.strip().replace(",", "") or "word"
    settings = [
        (ModelPicker, "load", {"name": word, "load_in_4bit": True, "max_seq_length": 512, "dtype": "float32"}),
        (LoraPanel, "add", {"rank": 3, "alpha": 6.5, "dropout": 0.1, "targets": ("q_proj", word), "use_rslora": True}),
        (
            DatasetMapper,
            "read",
            {"source": word, "format": "alpaca", "columns": {"output": word}, "system": word, "held_out": 0.1},
        ),
        (TrainPanel, "start", {"max_steps": 2, "learning_rate": 1e-3, "optimizer": word, "gradient_checkpointing": "nbkit"}),
        (ChatPanel, "send", {"prompt": said or "hi", "max_new_tokens": 7, "temperature": 0.5}),
    ]
    for kind, button, values in settings:
        session = ready(tmp_path)
        panel = kind(session)
        panel.set(**values)
        code = panel.code()
        ast.parse(code)
        if kind is ChatPanel and not said.strip():
            continue
        pressed(panel, button)
        assert session.calls, kind
        assert replayed(code, tmp_path) == session.calls, code


def test_the_plot_shows_the_code_that_makes_it(tmp_path: Path) -> None:
    session = ready(tmp_path)
    panel = TrainPanel(session)
    assert panel.plot.code() == "from nbkit.widgets import LivePlot\n\nLivePlot(session)\n"
    pressed(panel, "start")
    shown = panel.plot.code()
    assert "LivePlot.from_run_dir(" in shown and _code.literal(str(tmp_path)) in shown


def test_the_studio_shows_a_whole_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studio = Studio(FakeSession(tmp_path))
    studio.model.set(name="some/model", max_seq_length=512)
    studio.lora.set(rank=8)
    studio.data.set(source="rows.jsonl", held_out=30)
    studio.training.set(max_steps=40)
    studio.chat.set(prompt="Who are you?")
    session = FakeSession(tmp_path)
    monkeypatch.setattr(nbkit, "Session", lambda: session, raising=False)
    monkeypatch.setattr(FakeRun, "wait", lambda self: None, raising=False)
    exec(compile(studio.code(), "shown", "exec"), {"print": lambda *_: None})
    names = [call[0] for call in session.calls]
    assert names == ["load", "add_lora", "read_data", "train", "chat"]
    assert session.calls[0][1] == ("some/model",) and session.calls[0][2]["max_seq_length"] == 512
    assert session.calls[2][2]["held_out"] == 30
    assert session.calls[3][1] == (TrainConfig(max_steps=40),)


def test_show_code_shows_it_as_text(tmp_path: Path) -> None:
    panel = ModelPicker(FakeSession(tmp_path))
    assert panel._code.value == ""
    panel._show_code.value = True
    assert "session.load(&quot;smollm2-135m-instruct&quot;)" in panel._code.value
    panel.set(name="<b>" * 20_000)
    assert "print the panel" in panel._code.value and len(panel._code.value) < 500
    assert SimpleNamespace(code=panel.code()).code.count("<b>") == 20_000
    panel._fields["max_seq_length"].widget.value = -1
    assert "There is no code yet" in panel._code.value
