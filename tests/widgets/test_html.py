"""The escaping module: nothing that is put into it can act, and nothing else makes HTML."""

from __future__ import annotations

import ast
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nbkit.widgets
from nbkit.widgets import _html
from tests.widgets.hostile import CORPUS, inert

ROOM = Path(nbkit.widgets.__file__).parent


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 200 and len(set(CORPUS)) == len(CORPUS)


@pytest.mark.parametrize("said", CORPUS, ids=lambda said: ascii(said[:30]))
def test_hostile_text_is_shown_as_text(said: str) -> None:
    for markup in (_html.text(said), _html.tag("div", {"title": said}, said), _html.block(said), _html.fact("name", said)):
        reader = inert(markup)
        assert _html.plain(said) in reader.text or markup.startswith("<div title")
        assert len(markup) < 12 * _html.TEXT_LIMIT


@given(st.text(max_size=200))
def test_any_text_comes_back_as_it_was_shown(said: str) -> None:
    root = ElementTree.fromstring(_html.tag("p", {"title": said}, said))
    shown = _html.plain(said)
    assert (root.text or "") == shown
    assert root.get("title", "").replace("\n", " ").replace("\t", " ") == shown.replace("\n", " ").replace("\t", " ")


def test_control_characters_are_seen_and_the_writing_direction_stays() -> None:
    assert _html.plain("\x1b[31m\x00\x7f") == "␛[31m␀␡"
    assert _html.plain("a\u202eb") == "a[U+202E]b"
    assert _html.plain("\ud800") == "\ufffd"
    assert _html.plain("line\n\ttab") == "line\n\ttab"


def test_long_text_is_cut_and_counted() -> None:
    shown = _html.plain("x" * 1_048_576, 100)
    assert shown == "x" * 100 + "… (1,048,576 characters in all)"


@pytest.mark.parametrize("name", ["script", "img", "a", "iframe", "style", "p onclick=x"])
def test_elements_that_could_act_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="element"):
        _html.tag(name)


@pytest.mark.parametrize("name", ["onclick", "href", "src", "data-x", "srcdoc", 'class="x" onload'])
def test_attributes_that_could_act_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="attribute"):
        _html.tag("p", {name: "x"})


def test_only_markup_is_shown() -> None:
    widget = _html.html(_html.text("a"))
    with pytest.raises(TypeError, match="Markup"):
        _html.show(widget, "<b>plain string</b>")
    with pytest.raises(TypeError, match="Markup"):
        _html.html(_html.text("a") + "<b>")  # a Markup and a string make a string
    assert widget.value == "a"


def test_nothing_but_the_escaping_module_makes_html() -> None:
    for path in ROOM.glob("*.py"):
        if path.name == "_html.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            called = ast.unparse(node.func).rsplit(".", 1)[-1] if isinstance(node, ast.Call) else ""
            assert called not in ("HTML", "HTMLMath", "Label", "Markup", "Javascript"), where
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "</" not in node.value and "<div" not in node.value and "<b>" not in node.value, where


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (_html.size(0), "0 bytes"),
        (_html.size(1536), "1.5 KiB"),
        (_html.size(167_772_160), "160 MiB"),
        (_html.size(3 * 2**40), "3.0 TiB"),
        (_html.amount(8_030_261_248), "8.03 B"),
        (_html.amount(134_515_008), "135 M"),
        (_html.amount(7), "7"),
        (_html.number(float("nan")), "not a number"),
        (_html.number(float("inf")), "inf"),
        (_html.number(None), "–"),
        (_html.duration(125), "2:05"),
        (_html.duration(3725), "1:02:05"),
        (_html.duration(float("nan")), "–"),
        (_html.duration(-3), "0:00"),
    ],
)
def test_figures_are_written_for_people(shown: str, expected: str) -> None:
    assert shown == expected


def test_the_style_sheet_fetches_nothing_and_keeps_to_itself() -> None:
    style = _html.style()
    assert "url(" not in style and "@import" not in style and "<" not in style[len("<style>") : -len("</style>")]
    assert len(style) < 16_000
