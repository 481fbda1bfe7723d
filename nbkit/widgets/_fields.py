"""Form fields: an ipywidget, its label, and how its value is read, written and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets
from traitlets import TraitError

from nbkit.errors import ConfigError, nearest
from nbkit.widgets._html import plain


@dataclass(frozen=True)
class Field:
    """One named setting of a panel. `watched` are the widgets whose change changes it.

    `read` gives the Python value and raises ConfigError for text that is none; `write` takes it back.
    """

    label: str
    widget: Any  # what is laid out
    watched: Sequence[Any]
    read: Callable[[], Any]
    write: Callable[[Any], None]


def labelled(widget: Any, label: str, wide: bool = False) -> Any:
    """The widget with a label above it; ipywidgets ties the two together for screen readers.

    `label` must be fixed text: ipywidgets 7 shows descriptions as HTML.
    """
    widget.description = label
    widget.style.description_width = "auto"
    widget.layout.width = "auto"
    widget.add_class("nbk-field")
    if wide:
        widget.add_class("nbk-wide")
    return widget


def sendable(said: str) -> bool:
    """Whether a text can be sent to a front end: half of a surrogate pair has no UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in said)


def keep(label: str, widget: Any, value: Any) -> None:
    """Write a value; a widget that cannot hold it, or would hold another, refuses aloud."""
    if isinstance(value, str) and not sendable(value):
        raise ConfigError(f"{label} cannot be {short(value)}: it holds half a surrogate pair, which no front end can show.")
    before = widget.value
    try:
        widget.value = value
    except TraitError as error:
        raise ConfigError(f"{label} cannot be {short(value)}.") from error
    if widget.value != value:
        widget.value = before
        raise ConfigError(f"{label} cannot be {short(value)}.")


def short(value: Any) -> str:
    return plain(repr(value), 80)


def text(label: str, value: str = "", hint: str = "", wide: bool = False) -> Field:
    """Free text; spaces around it do not count."""
    widget = labelled(widgets.Text(value=value, placeholder=hint, continuous_update=False), label, wide)

    def write(new: Any) -> None:
        if not isinstance(new, str):
            raise ConfigError(f"{label} takes text, not {short(new)}.")
        keep(label, widget, new)

    return Field(label, widget, (widget,), lambda: widget.value.strip(), write)


def optional(label: str, parse: Callable[[str], Any], takes: str, hint: str = "", value: Any = None) -> Field:
    """A text box in which nothing means None. `parse` raises ValueError; `takes` says what it accepts."""
    start = "" if value is None else str(value)
    widget = labelled(widgets.Text(value=start, placeholder=hint, continuous_update=False), label)

    def checked(said: str) -> Any:
        try:
            return parse(said)
        except ValueError as error:
            raise ConfigError(f"{label} takes {takes}, not {short(said)}.") from error

    def write(new: Any) -> None:
        said = "" if new is None else str(new)
        if said:
            checked(said)
        keep(label, widget, said)

    return Field(label, widget, (widget,), lambda: checked(widget.value.strip()) if widget.value.strip() else None, write)


def whole(label: str, value: int) -> Field:
    """A whole number. Its range is checked by the config that takes it, with a sentence."""
    widget = labelled(widgets.IntText(value=value), label)

    def write(new: Any) -> None:
        if not isinstance(new, int) or isinstance(new, bool):
            raise ConfigError(f"{label} takes a whole number, not {short(new)}.")
        keep(label, widget, new)

    return Field(label, widget, (widget,), lambda: int(widget.value), write)


def real(label: str, value: float) -> Field:
    """A number. Its range is checked by the config that takes it, with a sentence."""
    widget = labelled(widgets.FloatText(value=value, step=None), label)

    def write(new: Any) -> None:
        if not isinstance(new, (int, float)) or isinstance(new, bool):
            raise ConfigError(f"{label} takes a number, not {short(new)}.")
        keep(label, widget, float(new))

    return Field(label, widget, (widget,), lambda: float(widget.value), write)


def slider(label: str, value: float, low: float, high: float, step: float) -> Field:
    widget = labelled(widgets.FloatSlider(value=value, min=low, max=high, step=step, readout_format=".2f"), label)

    def write(new: Any) -> None:
        if not isinstance(new, (int, float)) or isinstance(new, bool) or not low <= new <= high:
            raise ConfigError(f"{label} takes a number from {low} to {high}, not {short(new)}.")
        keep(label, widget, float(new))

    return Field(label, widget, (widget,), lambda: float(widget.value), write)


def choice(label: str, options: Sequence[Any], value: Any) -> Field:
    """One of fixed values, each shown as it is written, or of (text, value) pairs."""
    widget = labelled(widgets.Dropdown(options=list(options), value=value), label)

    def write(new: Any) -> None:
        known = [str(option[1] if isinstance(option, tuple) else option) for option in options]
        try:
            widget.value = new
        except TraitError as error:
            raise ConfigError(f"{label} cannot be {short(new)}.{nearest(str(new), known)}") from error

    return Field(label, widget, (widget,), lambda: widget.value, write)


def check(label: str, value: bool) -> Field:
    widget = widgets.Checkbox(value=value, description=label, indent=False)
    widget.layout.width = "auto"
    widget.add_class("nbk-check")

    def write(new: Any) -> None:
        if not isinstance(new, bool):
            raise ConfigError(f"{label} takes True or False, not {short(new)}.")
        widget.value = new

    return Field(label, widget, (widget,), lambda: bool(widget.value), write)


def area(label: str, value: str = "", hint: str = "", rows: int = 3) -> Field:
    """Several lines of text, taken as they are."""
    widget = labelled(widgets.Textarea(value=value, placeholder=hint, rows=rows, continuous_update=False), label, wide=True)

    def write(new: Any) -> None:
        if not isinstance(new, str):
            raise ConfigError(f"{label} takes text, not {short(new)}.")
        keep(label, widget, new)

    return Field(label, widget, (widget,), lambda: widget.value, write)
