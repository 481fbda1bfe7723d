"""Markup in widgets: the pieces of `nbkit.markup`, the style sheet, and the only two ways to show either.

An ipywidgets `HTML` shows its value as it stands, without a sanitiser; so nothing but `Markup` is ever put into one.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import ipywidgets as widgets

from nbkit.markup import (
    TEXT_LIMIT,
    Markup,
    amount,
    block,
    duration,
    fact,
    join,
    number,
    pairs,
    paragraph,
    plain,
    size,
    stylesheet,
    table,
    tag,
    text,
)

__all__ = [
    "TEXT_LIMIT",
    "Markup",
    "amount",
    "block",
    "duration",
    "fact",
    "html",
    "join",
    "number",
    "pairs",
    "paragraph",
    "plain",
    "show",
    "size",
    "style",
    "table",
    "tag",
    "text",
]


@cache
def style() -> Markup:
    """The style sheet of all panels. Fixed text of this package, scoped to the class `nbk`."""
    css = files("nbkit.widgets").joinpath("static", "panel.css").read_text(encoding="utf-8")
    return stylesheet(css)


def html(markup: Markup | None = None, css_class: str = "") -> widgets.HTML:
    """A widget that shows markup."""
    widget = widgets.HTML(value="" if markup is None else _checked(markup))
    if css_class:
        widget.add_class(css_class)
    return widget


def show(widget: widgets.HTML, markup: Markup) -> None:
    """Show `markup` in `widget`; nothing is sent if it shows it already."""
    if widget.value != _checked(markup):
        widget.value = markup


def _checked(markup: Markup) -> Markup:
    if not isinstance(markup, Markup):
        raise TypeError("only Markup is shown; put strings through nbkit.widgets._html.text")
    return markup
