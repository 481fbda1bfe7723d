"""The dataset mapper: rows in, their format found, and what of them is trained."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

import ipywidgets as widgets

from nbkit.config import FORMATS, DataRecipe
from nbkit.errors import ConfigError
from nbkit.widgets import _code, _fields, _html
from nbkit.widgets._fields import Field
from nbkit.widgets._panel import Panel

if TYPE_CHECKING:
    from nbkit.engine import Session

SAMPLE = "sample:ships-log"
ROLES = {
    "alpaca": ("instruction", "input", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
}  # of the columns of each format, as `DataRecipe` names them
FINDINGS = 12  # shown at most
TOO_LONG = (("refuse them", "refuse"), ("drop them", "drop"))


class DatasetMapper(Panel):
    """Name a source, see its format, and see which tokens of each row are trained.

    Buttons: `read`, `previous`, `next`; settings: source, format, columns (role → column), system, held_out, too_long, row.
    """

    name: ClassVar[str] = "data"
    title: ClassVar[str] = "Data"

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        roles = [role for names in ROLES.values() for role in names]
        self._roles = {role: _fields.labelled(widgets.Combobox(continuous_update=False), f"Column of {role}") for role in roles}
        source = self._field("source", _fields.text("File, hub data set or sample", SAMPLE, wide=True))
        form = self._field("format", _fields.choice("Format", FORMATS, "auto"))
        held_out = self._field("held_out", _fields.optional("Held-out rows", _share, "rows, a share or a source", "none"))
        too_long = self._field("too_long", _fields.choice("Too long rows", TOO_LONG, "refuse"))
        system = self._field("system", _fields.optional("System message", str, "text", "none"))
        columns = self._field("columns", self._columns())
        row = self._field("row", _fields.whole("Row", 1))
        read = self._button("read", "Read", self._read, "Read the rows and map them", primary=True)
        previous = self._button("previous", "‹ Previous", lambda: self._step(-1), "Show the row before")
        following = self._button("next", "Next ›", lambda: self._step(1), "Show the next row")
        self._found = _html.html()
        self._view = _html.html()
        self._stepper = _row([row, previous, following])
        self._show()
        self._compose(_row([source, form, held_out, too_long, system, read]), columns, self._found, self._stepper, self._view)

    def _columns(self) -> Field:
        row = _row(list(self._roles.values()))

        def read() -> dict[str, str]:
            return {role: box.value.strip() for role, box in self._roles.items() if box.value.strip()}

        def write(new: Any) -> None:
            unknown = [role for role in new if role not in self._roles]
            if unknown:
                raise ConfigError(f"{_fields.short(unknown[0])} is no role of a column; use {', '.join(self._roles)}.")
            for role, box in self._roles.items():
                _fields.keep(f"Column of {role}", box, new.get(role, ""))

        return Field("Columns", row, tuple(self._roles.values()), read, write)

    def recipe(self) -> DataRecipe:
        """The settings as a `DataRecipe`. Raises: ConfigError."""
        values = self.values()
        return DataRecipe(**{name: values[name] for name in ("format", "columns", "system", "too_long")})

    # -- what it does ------------------------------------------------------------------------------

    def _read(self) -> None:
        values, recipe = self.values(), self.recipe()
        with self.busy(f"Reading {_html.plain(values['source'], 200)} …"):
            report = self.session.use_data(values["source"], recipe, held_out=values["held_out"])
            self.message(f"{report.used:,} of {report.rows_in:,} rows are ready to train on.", "done")

    def _step(self, by: int) -> None:
        self.set(row=self._fields["row"].read() + by)

    def _changed(self, name: str) -> None:
        if name == "row":
            row, last = self._fields["row"].read(), self._rows()
            if last and not 1 <= row <= last:
                self.set(row=min(max(row, 1), last))
                raise ConfigError(f"There is no row {row}; the rows that are used are numbered from 1 to {last}.")
            self._show()
        elif name == "format":
            self._show_roles()

    def _session_changed(self, topic: str) -> None:
        if topic == "data" and self.session.data is not None:
            self._take_over(self.session.data)
        if topic in ("model", "data"):
            self._show()

    def _take_over(self, report: Any) -> None:
        """Show what the session really uses, also when code gave it."""
        raws = [report.preview(index).raw for index in range(min(self._rows(), 20))]
        names = list(dict.fromkeys(name for raw in raws if isinstance(raw, dict) for name in raw))
        for box in self._roles.values():
            box.options = [str(name) for name in names if _fields.sendable(str(name))]
        config = self.session.data_config
        settings = {name: getattr(report.recipe, name) for name in ("format", "columns", "system", "too_long")}
        self._take(settings | {"source": config.source, "held_out": config.held_out, "row": 1})

    # -- how it looks ------------------------------------------------------------------------------

    def _rows(self) -> int:
        return 0 if self.session.data is None else len(self.session.data.examples)

    def _show(self) -> None:
        report, rows = self.session.data, self._rows()
        self._show_roles()
        self._stepper.layout.display = "" if rows else "none"
        self._enable({"previous": self._fields["row"].read() > 1, "next": self._fields["row"].read() < rows})
        _html.show(self._found, _html.join(()) if report is None else _found_html(report))
        _html.show(self._view, self._row_html() if rows else _html.join(()))

    def _show_roles(self) -> None:
        """Only the columns that the format has."""
        form = self._fields["format"].read()
        for name, roles in ROLES.items():
            for role in roles:
                self._roles[role].layout.display = "" if name == form else "none"

    def _row_html(self) -> _html.Markup:
        preview = self.session.data.preview(self._fields["row"].read() - 1)
        raw = json.dumps(preview.raw, ensure_ascii=False, indent=2, default=str)
        number = self.session.data.row_numbers[self._fields["row"].read() - 1]
        left = _column(f"Row {number} of the source", _html.block(raw, label="The row as it came"))
        right = _column("What the model reads", _pieces_html(preview.pieces))
        return _html.join((_html.tag("div", {"class": "nbk-columns"}, left, right), _legend()))

    def _summary(self) -> str:
        report = self.session.data
        return "" if report is None else f"✓ {report.used:,} rows, {report.trained_tokens:,} trained tokens"

    def _calls(self) -> list[str]:
        values = self.values()
        recipe = _code.changed(self.recipe())
        keywords = {}
        if recipe:
            keywords["recipe"] = _code.call("nbkit.DataRecipe", [], recipe)
        if values["held_out"] is not None:
            keywords["held_out"] = values["held_out"]
        line = _code.call("session.use_data", [values["source"]], keywords)
        return ["import nbkit", "", line] if recipe else [line]

    def _static_body(self) -> _html.Markup:
        report = self.session.data
        if report is None:
            return _html.join(())
        return _html.join((_found_html(report), self._row_html() if self._rows() else ""))


def _share(said: str) -> str | int | float:
    """A number of rows, a share below 1, or else the name of a source."""
    for kind in (int, float):
        try:
            return kind(said)
        except ValueError:
            continue
    return said


def _row(children: list[Any]) -> widgets.HBox:
    row = widgets.HBox(children)
    row.add_class("nbk-row")
    return row


def _column(title: str, body: _html.Markup) -> _html.Markup:
    return _html.tag("div", {"class": "nbk-column"}, _html.tag("b", None, title), body)


def _found_html(report: Any) -> _html.Markup:
    """Format, counts and findings."""
    share = report.trained_tokens / report.total_tokens if report.total_tokens else 0
    facts = [
        ("Format", report.recipe.format),
        ("Rows read", f"{report.rows_in:,}"),
        ("Rows used", f"{report.used:,}"),
        ("Left out", f"{report.dropped + report.refused:,}"),
        ("Trained tokens", f"{report.trained_tokens:,} of {report.total_tokens:,} ({share:.0%})"),
    ]
    shown = list(report.findings)[:FINDINGS]
    more = len(report.findings) - len(shown)
    items = [_html.tag("li", {"dir": "auto"}, _html.text(finding, 500)) for finding in shown]
    items += [_html.tag("li", None, f"and {more:,} more")] if more > 0 else []
    return _html.join(
        (
            _html.tag("div", {"class": "nbk-facts"}, *(_html.fact(name, value) for name, value in facts)),
            _html.paragraph("nbk-hint", _html.text(f"{report.source} is read as {report.reason}", 600)),
            _html.tag("ul", {"class": "nbk-findings"}, *items) if items else "",
        )
    )


def _pieces_html(pieces: Any) -> _html.Markup:
    """The rendered text; what is trained is marked by colour, underline and brackets."""
    shown, left = [], _html.TEXT_LIMIT
    for said, trained in pieces:
        if left <= 0:
            shown.append(_html.text(" …"))
            break
        part = _html.text(said, left)
        left -= len(said)
        shown.append(_html.tag("mark", {"class": "nbk-trained"}, "⟦", part, "⟧") if trained else part)
    attributes = {"class": "nbk-block", "dir": "auto", "tabindex": "0", "role": "group", "aria-label": "What the model reads"}
    return _html.tag("pre", attributes, *shown)


def _legend() -> _html.Markup:
    trained = _html.tag("mark", {"class": "nbk-trained"}, "⟦trained⟧")
    return _html.paragraph("nbk-hint", trained, " the loss is computed on these tokens; the rest is only read.")
