"""The model picker: what fits this machine and why not, and a box for any hub id or local folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import ipywidgets as widgets

from nbkit.config import DTYPES, ModelConfig
from nbkit.widgets import _code, _fields, _html
from nbkit.widgets._panel import Panel

if TYPE_CHECKING:
    from nbkit.engine import Session

DEFAULT = "smollm2-135m-instruct"
LINES = 8  # of the list that are seen at once
NAME_WIDTH = 40


class ModelPicker(Panel):
    """Choose a checkpoint, see whether it fits, load it. Press `load`; settings: name, load_in_4bit, max_seq_length, dtype."""

    name: ClassVar[str] = "model"
    title: ClassVar[str] = "Model"

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.entries: list[Any] = []  # of the session's catalog, as far as it is known
        self._list = _fields.labelled(widgets.Select(options=[], rows=LINES), "Checkpoints and what they need here", wide=True)
        self._list.add_class("nbk-list")
        self._reason = _html.html()
        name = self._field("name", _fields.text("Hub id, local folder or name from the list", DEFAULT, wide=True))
        four_bit = self._field("load_in_4bit", _fields.check("4-bit weights (NF4)", False))
        length = self._field("max_seq_length", _fields.whole("Longest row, tokens", 2048))
        dtype = self._field("dtype", _fields.choice("Number format", DTYPES, "auto"))
        load = self._button("load", "Load", self._load, "Load this checkpoint into the session", primary=True)
        row = widgets.HBox([name, length, dtype, four_bit, load])
        row.add_class("nbk-row")
        self._list.observe(self._picked, "value")
        self._look()
        self._show_choice()
        self._compose(self._list, self._reason, row)

    def _look(self) -> None:
        """Ask what fits. The device is asked without torch, in milliseconds."""
        found = self.session.catalog(self._fields["load_in_4bit"].read())
        self.entries = sorted(found, key=lambda entry: (not entry.fits, entry.parameters))
        self._list.rows = min(max(len(self.entries), 2), LINES)
        self._list.options = [(line(entry), entry.name) for entry in self.entries]

    def _picked(self, change: Any) -> None:
        if change["new"] is not None and not self._quiet:
            self.set(name=change["new"])

    def _changed(self, name: str) -> None:
        if name == "load_in_4bit":
            self._look()
        self._show_choice()

    def _show_choice(self) -> None:
        """Select the named checkpoint in the list and say whether it fits."""
        name = self._fields["name"].read()
        entry = next((entry for entry in self.entries if entry.name.lower() == name.lower()), None)
        self._quiet, quiet = True, self._quiet
        try:
            self._list.value = None if entry is None else entry.name
        finally:
            self._quiet = quiet
        _html.show(self._reason, self._verdict(entry, name))

    def _verdict(self, entry: Any, name: str) -> _html.Markup:
        if entry is None:
            said = f"{_html.plain(name, 200)} is not in the list; whether it fits is seen when it loads."
            return _html.paragraph("nbk-hint", said)
        need, free = _html.size(entry.needed_bytes), _html.size(entry.free_bytes)
        said = f"Fits: needs about {need} of {free} free." if entry.fits else f"Does not fit: needs about {need} of {free} free."
        return _html.paragraph("nbk-fits" if entry.fits else "nbk-misfits", _html.tag("b", None, said), " ", entry.reason)

    def _load(self) -> None:
        values = self.values()
        name = values.pop("name")
        with self.busy(f"Loading {_html.plain(name, 200)} …"):
            loaded = self.session.load(name, **values)
            self.message(loaded.message, "done")

    def _session_changed(self, topic: str) -> None:
        config = self.session.model_config
        if topic == "model" and config is not None:
            self._take({name: getattr(config, name) for name in self._fields})
            self._show_choice()

    def _summary(self) -> str:
        loaded = self.session.loaded
        return "" if loaded is None else f"✓ {loaded.name} is loaded"

    def _calls(self) -> list[str]:
        values = self.values()
        config = _code.changed(ModelConfig(**values))
        return [_code.call("session.load", [config.pop("name")], config)]

    def _static_body(self) -> _html.Markup:
        if self.session.loaded is not None:
            return _html.join(())  # the choice is made
        rows = (
            (entry.name, entry.family, _html.amount(entry.parameters), _html.size(entry.needed_bytes), _mark(entry), entry.reason)
            for entry in self.entries
        )
        columns = ("Checkpoint", "Family", "Parameters", "Needs", "Fits", "Why")
        return _html.table("What fits this machine", columns, rows)


def _mark(entry: Any) -> str:
    return "✓ fits" if entry.fits else "✗ no"


def line(entry: Any) -> str:
    """One line of the list, in columns (the list is set in a font of even width)."""
    name = _html.plain(entry.name, NAME_WIDTH)
    count, need = _html.amount(entry.parameters), _html.size(entry.needed_bytes)
    why = "" if entry.fits else f"  {_html.plain(entry.reason, 70)}"
    return f"{_mark(entry):<7} {name:<{NAME_WIDTH}} {count:>7}  needs {need:>9}{why}"
