"""`Panel`: driven by a hand or by code, with sentences instead of tracebacks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pytest

from nbkit.errors import ConfigError, ModelError
from nbkit.widgets import _fields
from nbkit.widgets._panel import Panel
from nbkit.widgets.model_picker import ModelPicker
from tests.widgets.fake import FakeSession
from tests.widgets.hostile import inert


class Toy(Panel):
    name, title = "toy", "Toy"

    def __init__(self, fault: BaseException | None = None) -> None:
        super().__init__(None)
        self.fault, self.done = fault, []
        fields = [
            self._field("count", _fields.whole("Count", 3)),
            self._field("share", _fields.slider("Share", 0.5, 0, 1, 0.1)),
            self._field("word", _fields.text("Word")),
            self._field("kind", _fields.choice("Kind", ("red", "green"), "red")),
            self._field("on", _fields.check("On", False)),
            self._field("limit", _fields.optional("Limit", int, "a whole number")),
            self._field("story", _fields.area("Story")),
            self._field("rate", _fields.real("Rate", 0.5)),
        ]
        self._button("now", "Now", self._now, "Do it")
        self._button("later", "Later", lambda: self._launch(self._later), "Do it in the background")
        self._compose(widgets.VBox(fields))

    def _now(self) -> None:
        if self.fault is not None:
            raise self.fault
        self.done.append("now")

    async def _later(self) -> None:
        await asyncio.sleep(0.01)
        if self.fault is not None:
            raise self.fault
        self.done.append("later")

    def _changed(self, name: str) -> None:
        if self.values()["count"] == 13:
            raise ConfigError("Count is 13; take another number.")


def test_values_are_set_and_read_by_name() -> None:
    toy = Toy()
    toy.set(count=5, share=0.25, word="a", kind="green", on=True, limit=7, story=" b\n", rate=2)
    want = {"count": 5, "share": 0.25, "word": "a", "kind": "green", "on": True, "limit": 7, "story": " b\n", "rate": 2.0}
    assert toy.values() == want
    toy.set(limit=None)
    assert toy.values()["limit"] is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cuont": 1}, "no setting 'cuont'. Did you mean count"),
        ({"zzzzzz": 1}, "It has count, share"),
        ({"count": "many"}, "Count takes a whole number, not 'many'"),
        ({"count": True}, "whole number"),
        ({"count": 1.5}, "whole number"),
        ({"share": 1.5}, "from 0 to 1"),
        ({"share": float("nan")}, "from 0 to 1"),
        ({"word": 3}, "takes text"),
        ({"kind": "gren"}, "Did you mean green"),
        ({"kind": ["red"]}, "Kind cannot be"),
        ({"on": 1}, "True or False"),
        ({"limit": "x"}, "Limit takes a whole number, not 'x'"),
        ({"story": None}, "takes text"),
        ({"rate": "0.1"}, "takes a number"),
        ({"count": 13}, "take another number"),
    ],
)
def test_what_cannot_be_set_is_refused_with_one_sentence(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Toy().set(**values)
    assert "\n" not in str(caught.value)


def test_a_refused_set_changes_nothing() -> None:
    toy = Toy()
    before = toy.values()
    with pytest.raises(ConfigError):
        toy.set(word="new", count="many")
    assert toy.values() == before


def test_a_hand_that_types_nonsense_sees_a_sentence() -> None:
    toy = Toy()
    toy._fields["limit"].widget.value = "many"
    assert "Limit takes a whole number, not &#x27;many&#x27;" in toy.said.value and "Error" in toy.said.value
    toy._fields["limit"].widget.value = "4"
    assert toy.said.value == "" and toy.values()["limit"] == 4


def test_click_presses_the_button_as_a_user_would() -> None:
    toy = Toy()
    toy.click("now")
    toy._buttons["now"].click()
    assert toy.done == ["now", "now"]


@pytest.mark.parametrize("name", ["nwo", "", "start"])
def test_an_unknown_button_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="has no button"):
        Toy().click(name)


def test_a_button_with_nothing_to_do_is_refused() -> None:
    toy = Toy()
    toy._enable({"now": False})
    with pytest.raises(ConfigError, match="nothing to do"):
        toy.click("now")
    toy._enable({"now": True})
    toy.click("now")


@pytest.mark.parametrize("fault", [ModelError("No model is loaded; load one."), KeyError("<b>x</b>"), RuntimeError("a\nb\nc")])
def test_a_click_that_fails_is_a_sentence_for_a_hand_and_an_error_for_code(
    fault: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = Toy(fault)
    toy._buttons["now"].click()  # a user: nothing is raised, nothing printed
    assert toy.error is fault
    said = inert(toy.said.value).text
    assert said.startswith("Error ") and "Traceback" not in said and "\n" not in said
    assert capsys.readouterr() == ("", "")
    with pytest.raises(type(fault)):
        toy.click("now")
    toy.fault = None
    toy.click("now")
    assert toy.error is None


def test_an_interrupted_click_says_so() -> None:
    toy = Toy(KeyboardInterrupt())
    toy._buttons["now"].click()
    assert "Interrupted" in toy.said.value
    with pytest.raises(KeyboardInterrupt):
        toy.click("now")


def test_background_work_is_awaited_and_its_error_raised() -> None:
    async def main(fault: Exception | None) -> Toy:
        toy = Toy(fault)
        toy.click("later")
        assert toy.done == []
        await toy.finished()
        return toy

    assert asyncio.run(main(None)).done == ["later"]
    with pytest.raises(ModelError):
        asyncio.run(main(ModelError("It went away.")))


def test_background_work_that_nobody_awaits_is_shown() -> None:
    async def main() -> Toy:
        toy = Toy(ModelError("It went away."))
        toy._buttons["later"].click()
        await asyncio.sleep(0.05)
        return toy

    assert "It went away." in asyncio.run(main()).said.value


def test_without_a_loop_background_work_is_done_when_click_returns() -> None:
    toy = Toy()
    toy.click("later")
    assert toy.done == ["later"]
    with pytest.raises(ModelError):
        Toy(ModelError("no")).click("later")


def test_busy_holds_the_buttons_and_gives_them_back() -> None:
    toy = Toy()
    with toy.busy("Reading …"):
        assert all(button.disabled for button in toy._buttons.values())
        assert "Reading …" in toy.said.value
    assert not any(button.disabled for button in toy._buttons.values()) and toy.said.value == ""
    with pytest.raises(ModelError), toy.busy("x"):
        raise ModelError("no")
    assert not toy._buttons["now"].disabled


@pytest.mark.parametrize("level", ["info", "done", "busy", "warning", "error"])
def test_messages_are_told_apart_by_a_word_too(level: str) -> None:
    toy = Toy()
    toy.message("It is <i>so</i>.", level)
    reader = inert(toy.said.value)
    assert reader.text.endswith("It is <i>so</i>.") and len(reader.text.split()[0]) > 3
    assert ("role", "alert" if level == "error" else "status") in reader.attributes


def test_every_field_has_a_label() -> None:
    for field in Toy()._fields.values():
        assert field.widget.description


def test_it_is_shown_live_with_a_static_form_beside(tmp_path: Path) -> None:
    panel = ModelPicker(FakeSession(tmp_path))
    bundle = panel._repr_mimebundle_()
    view = bundle["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == panel.widget.model_id and view["version_major"] == 2
    assert bundle["text/html"] == panel._repr_html_() == panel.static_html()
    assert bundle["text/plain"].startswith("<nbkit panel model")
    assert "Llama" in inert(bundle["text/html"]).text


def test_outside_a_notebook_it_prints_itself(capsys: pytest.CaptureFixture[str]) -> None:
    Toy()._ipython_display_()
    assert capsys.readouterr().out == "<nbkit panel toy: nothing yet>\n"


def test_panels_load_no_heavy_library_and_show_within_a_second(tmp_path: Path) -> None:
    code = """
import sys, time
start = time.perf_counter()
import nbkit
studio = nbkit.studio(nbkit.Session(sys.argv[1]))
studio._repr_mimebundle_()
seconds = time.perf_counter() - start
heavy = {"torch", "transformers", "peft", "trl", "datasets", "pandas", "numpy", "bitsandbytes"} & set(sys.modules)
print(seconds, sorted(heavy))
"""
    best = []
    for _ in range(3):  # the best of three: other tests share the cores
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        seconds, heavy = done.stdout.split(" ", 1)
        assert heavy.strip() == "[]"
        best.append(float(seconds))
        if best[-1] < 1.0:
            break
    assert min(best) < 1.0
    assert not list(tmp_path.iterdir())
