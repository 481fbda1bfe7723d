"""The dataset mapper: rows in, their format found, what of them is trained, and repairs for what is wrong with them."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import ipywidgets as widgets

from nbkit.config import DataRecipe
from nbkit.data.progress import FETCHING
from nbkit.errors import DataError
from nbkit.widgets import _code, _fields, _html, _mapping
from nbkit.widgets._panel import Panel
from nbkit.widgets.inspector import Inspector

if TYPE_CHECKING:
    from nbkit.engine import Session

FINDINGS = 12  # kinds of remarks shown at most
INTERVAL = 0.1  # seconds between two drawings of the progress
SETTLED = 0.4  # seconds after which a rate is worth telling
UNTOLD: dict[str, Any] = {"format": "auto", "columns": {}}
RECIPE = tuple(field.name for field in dataclasses.fields(DataRecipe))  # each is a setting of the panel


class DatasetMapper(Panel):
    """Name a source, see its format, mend its faults, and see which tokens of each row are trained.

    Buttons: `read`, `stop`, and the repairs that are offered, by the line of the recipe that each writes: `faulty_drop`,
    `too_long_drop`, `too_long_cut`, `too_long_split`, `duplicates_drop`, `same_role_join`, `first_reply_skip`, `roles_guess`.
    Settings: source, held_out and those of `DataRecipe`. The rows themselves are shown by its `inspector`.

    Reading goes on in the background: after `click("read")` in a cell, `await panel.finished()`.
    """

    name: ClassVar[str] = "data"
    title: ClassVar[str] = "Data"

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.inspector = Inspector(session)
        self._columns = _mapping.Columns()
        self._read_at: tuple[int, float] | None = None
        self._halt = False
        self._asked: DataRecipe | None = None  # what is being read with
        self._guessed: dict[str, Any] = {}  # format and columns, where they were found and not told
        self._offers: dict[str, tuple[str, DataRecipe]] = {}
        self._refused: tuple[Any, ...] = ()  # the repairs of rows none of which could be used
        usual, rare = self._settings()
        self._more = widgets.ToggleButton(value=False, description="More settings", tooltip="Show the settings used less often")
        self._more.add_class("nbk-toggle")
        self._more.layout.width = "auto"
        self._more.observe(lambda _: self._show_more(), "value")
        self._rare = _row(rare)
        self._progress, self._found = _html.html(), _html.html()
        self._repairs = self._repair_rows()
        self._offered = _html.html(
            _html.paragraph("nbk-caption", _html.tag("b", None, "Repairs"), " · each writes a line of the recipe and reads again")
        )
        source = self._field("source", _mapping.source())
        read = self._button("read", "Read", self._read, "Read the rows and map them", primary=True)
        stop = self._button("stop", "Stop", self._stop, "Stop reading; the data stay as they were")
        stop.layout.display = "none"
        hint = _html.html(_html.paragraph("nbk-hint", _html.text(_mapping.HINT)))
        columns = self._field("columns", self._columns.field)
        self._show_more()
        self._compose(
            *(_row([source, read, stop]), hint, _row([*usual, self._more]), columns, self._rare, self._progress),
            *(self._found, self._offered, self._repairs, self.inspector.box),
        )
        head, body, said, code = self.section.children
        self.section.children = (head, said, code, body)  # this panel is long: what it says stands above all
        self._show()

    def _settings(self) -> tuple[list[Any], list[Any]]:
        """The fields: those in sight, and those behind "More settings"."""
        usual = {
            "format": _fields.choice("Format", _mapping.FORMATS, "auto"),
            "template": _mapping.template(),
            "train_on": _fields.choice("Trained", _mapping.TRAIN_ON, "replies"),
            "held_out": _fields.optional("Held-out rows", _mapping.share, "rows, a share or a source", "none"),
        }
        rare = {
            "too_long": _fields.choice("Too long rows", _mapping.TOO_LONG, "refuse"),
            "faulty": _fields.choice("Faulty rows", _mapping.FAULTY, "refuse"),
            "duplicates": _fields.choice("Duplicates", _mapping.DUPLICATES, "keep"),
            "same_role": _fields.choice("Two turns of one role", _mapping.SAME_ROLE, "keep"),
            "first_reply": _fields.choice("A reply comes first", _mapping.FIRST_REPLY, "refuse"),
            "system": _fields.optional("System message", str, "text", "none"),
            "prompt": _fields.optional("Prompt out of columns", str, "text", "{question} {context}"),
            "roles": _mapping.roles(),
        }
        return (
            [self._field(name, field) for name, field in usual.items()],
            [self._field(name, field) for name, field in rare.items()],
        )

    def _repair_rows(self) -> Any:
        """A button and its sentence for every repair there is; those that are offered are shown."""
        rows = []
        self._sentences: dict[str, Any] = {}
        words = {f"{name}_{value}": text for (name, value), text in _mapping.REPAIRS.items()}
        for name, text in words.items():
            button = self._button(name, text, lambda name=name: self._repair(name), "Change the recipe and read again")
            button.layout.width = "150px"  # so that the sentences stand below each other
            self._sentences[name] = _html.html()
            row = _row([button, self._sentences[name]])
            row.add_class("nbk-repair")
            rows.append(row)
        return widgets.VBox(rows)

    def recipe(self) -> DataRecipe:
        """The settings as a `DataRecipe`. Raises: ConfigError."""
        values = self.values()
        return DataRecipe(**{name: values[name] for name in RECIPE})

    # -- what it does ------------------------------------------------------------------------------

    def _read(self) -> None:
        values, recipe = self.values(), self.recipe()
        if not values["source"]:
            raise DataError(f"There is no source yet; give {_mapping.HINT}.")
        if self._still_guessed(values):
            recipe = dataclasses.replace(recipe, **UNTOLD)
        self._launch(lambda: self._reading(values["source"], recipe, values["held_out"]))

    def _still_guessed(self, values: Mapping[str, Any]) -> bool:
        """Whether format and columns are those that were found, so that other rows are looked at afresh."""
        return bool(self._guessed) and all(values[name] == value for name, value in self._guessed.items())

    def _repair(self, name: str) -> None:
        _, recipe = self._offers[name]
        self._take({name: getattr(recipe, name) for name in RECIPE})
        self._read()

    def _stop(self) -> None:
        self._halt = True

    async def _reading(self, source: str, recipe: DataRecipe, held_out: Any) -> None:
        """Read on another thread, so that the kernel goes on answering, and show how far it is ten times a second."""
        self._halt, self._refused, told = False, (), {}
        try:
            with self.busy(f"Reading {_html.plain(source, 200)} …"):
                self._buttons["stop"].disabled, self._buttons["stop"].layout.display = False, ""
                report, config = await self._apart(told, lambda: self._work(source, recipe, held_out, told))
                self._asked = recipe
                self.session.take_data(report, config)
                await self._check(told)
            left_out = report.dropped + report.refused
            rest = f"; {left_out:,} are left out, see below" if left_out else ""
            self.message(f"{report.used:,} of {report.rows_in:,} rows are ready to train on{rest}.", "done")
        except DataError as error:
            self._refused = error.repairs
            if error.columns:
                self._columns.offer(list(error.columns))
            raise
        except _StopReading:
            self.message("Reading was stopped; the data are as they were.", "warning")
        except asyncio.CancelledError:
            self._stop()  # the interrupt button
            raise
        finally:
            _html.show(self._progress, _html.join(()))
            self._buttons["stop"].layout.display = "none"
            self.inspector.renew()
            self._show()
        self.update_saved()

    async def _check(self, told: dict[str, Any]) -> None:
        """Look for faults in the ids and labels of a large set too; Stop leaves that to the button of the inspector."""
        found = self.inspector.inspection
        if found is None or found.set.counted:
            return
        with suppress(_StopReading):
            await self._apart(told, lambda: found.set.counts(lambda done, all: self._hear(told, "Looking for faults", done, all)))

    async def _apart(self, told: Mapping[str, Any], work: Callable[[], Any]) -> Any:
        """Work on another thread; what it tells is shown meanwhile."""
        going = asyncio.ensure_future(asyncio.to_thread(work))
        while not going.done():
            await asyncio.wait({going}, timeout=INTERVAL)
            self._show_progress(told)
        return await going

    def _work(self, source: str, recipe: DataRecipe, held_out: Any, told: dict[str, Any]) -> Any:
        def listen(what: str, done: int, total: int | None) -> None:
            self._hear(told, what, done, total)

        return self.session.read_data(source, recipe, held_out=held_out, progress=listen)

    def _hear(self, told: dict[str, Any], what: str, done: int, total: int | None) -> None:
        """On the other thread: how far it is. Raises: _StopReading once Stop was pressed."""
        if self._halt:
            raise _StopReading
        if told.get("what") != what:
            told.update(what=what, began=time.monotonic())
        told.update(done=done, total=total)

    def _show_progress(self, told: Mapping[str, Any]) -> None:
        if "what" not in told or not told["done"]:
            return
        self.inspector.box.layout.display = "none"  # what it would render, the reading thread's tokenizer is busy with
        done, total = told["done"], told["total"]
        seconds = time.monotonic() - told["began"]
        scale, unit, digits = (1e6, "MB", ".1f") if told["what"] == FETCHING else (1, "rows", ",.0f")
        said = f"{told['what']}: {done / scale:{digits}}" + (f" of {total / scale:{digits}} {unit}" if total else f" {unit}")
        if seconds > SETTLED:
            said += f" · {done / scale / seconds:{digits}} {unit}/s"
            said += f" · {_html.duration(max(total - done, 0) * seconds / done)} left" if total else ""
        share = 100 * min(done / total, 1) if total else 100
        meter = {"class": "nbk-bar", "role": "progressbar", "aria-label": "Reading progress", "aria-valuemin": 0}
        meter |= {"aria-valuemax": total or done, "aria-valuenow": done}
        bar = _html.tag("div", meter, _html.tag("div", {"class": "nbk-bar-running", "style": f"width:{share:.1f}%"}))
        _html.show(self._progress, _html.join((bar, _html.paragraph("nbk-hint", said))))

    def _changed(self, name: str) -> None:
        if name == "source" and self._still_guessed(self.values()):
            self._take(UNTOLD)
            self._columns.show("auto")
        if name == "format":
            self._columns.show(self._fields["format"].read())
        if name in ("roles", "system", "template"):
            self.recipe()

    def _session_changed(self, topic: str) -> None:
        if topic == "data" and self.session.data is not None:
            self._take_over(self.session.data)
        if topic in ("model", "data"):
            self._show()

    def _take_over(self, report: Any) -> None:
        """Show what the session really uses, also when code gave it."""
        raws = [report.preview(index).raw for index in range(min(len(report.examples), 5))]
        names = list(dict.fromkeys(str(name) for raw in raws if isinstance(raw, dict) for name in raw))
        self._columns.offer(names)
        asked, self._asked = self._asked or DataRecipe(), None
        found = {name: getattr(report.recipe, name) for name in UNTOLD}
        self._guessed = found if {name: getattr(asked, name) for name in UNTOLD} == UNTOLD else {}
        config = self.session.data_config
        settings = {name: getattr(report.recipe, name) for name in RECIPE}
        self._take(settings | {"source": _near(config.source), "held_out": _near(config.held_out)})

    # -- how it looks ------------------------------------------------------------------------------

    def _show_more(self) -> None:
        self._rare.layout.display = "" if self._more.value else "none"
        self._more.description = "Fewer settings" if self._more.value else "More settings"

    def _show(self) -> None:
        report = self.session.data
        self._columns.show(self._fields["format"].read())
        self._offers = offers(self._refused or (() if report is None else report.repairs))
        self._enable({"stop": False} | {name: name in self._offers for name in self._sentences})
        self._offered.layout.display = "" if self._offers else "none"
        for name, row in zip(self._sentences, self._repairs.children, strict=True):
            row.layout.display = "" if name in self._offers else "none"
            said = self._offers[name][0] if name in self._offers else ""
            _html.show(self._sentences[name], _html.paragraph("nbk-hint", _html.text(said, 400)) if said else _html.join(()))
        _html.show(self._found, _html.join(()) if report is None else _found_html(report))
        self._refresh()

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
        return _html.join(()) if report is None else _html.join((_found_html(report), self.inspector.static_rows()))


class _StopReading(Exception):
    """Raised into the reading thread by its progress."""


def offers(repairs: Iterable[Any]) -> dict[str, tuple[str, DataRecipe]]:
    """Button → (sentence, the recipe it would read again with)."""
    known = {f"{name}_{value}" for name, value in _mapping.REPAIRS}
    found = {"_".join(repair.setting): (repair.sentence, repair.recipe) for repair in repairs}
    return {name: offer for name, offer in found.items() if name in known}


def _near(source: Any) -> Any:
    """A path as seen from the current folder, where it lies in it."""
    if isinstance(source, str) and os.path.isabs(source) and Path(source).is_relative_to(Path.cwd()):
        return os.path.relpath(source)
    return source


def _row(children: list[Any]) -> widgets.HBox:
    row = widgets.HBox(children)
    row.add_class("nbk-row")
    return row


def _found_html(report: Any) -> _html.Markup:
    """Format, counts and remarks."""
    share = report.trained_tokens / report.total_tokens if report.total_tokens else 0
    sure = getattr(report, "confidence", None)
    facts = [
        ("Format", report.recipe.format + (f", {sure:.0%} sure" if sure is not None and sure < 1 else "")),
        ("Rows read", f"{report.rows_in:,}"),
        ("Rows used", f"{report.used:,}"),
        ("Left out", f"{report.dropped + report.refused:,}"),
        ("Trained tokens", f"{report.trained_tokens:,} of {report.total_tokens:,} ({share:.0%})"),
    ]
    return _html.join(
        (
            _html.tag("div", {"class": "nbk-facts"}, *(_html.fact(name, value) for name, value in facts)),
            _html.paragraph("nbk-hint", _html.text(f"{report.source} is read as {report.reason}", 600)),
            _remarks(report.findings),
        )
    )


def _remarks(findings: Any) -> _html.Markup:
    """One line for each kind of fault: what became of the rows, how many, which, and why."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for finding in findings:
        groups.setdefault((finding.part, finding.outcome, finding.reason), []).append(finding)
    if not groups:
        return _html.join(())
    left_out_first = sorted(groups.items(), key=lambda item: (item[0][1] == "used", -len(item[1])))
    rows = []
    for (part, outcome, reason), found in left_out_first[:FINDINGS]:
        numbers = list(dict.fromkeys(finding.row for finding in found))
        shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8:,} more" if len(numbers) > 8 else "")
        what = f"{outcome}, held out" if part == "held_out" else outcome
        first = _html.text(found[0].sentence, 300)
        why = first if len(numbers) == 1 else _html.join((_html.text(reason, 200), f" (row {numbers[0]}: ", first, ")"))
        rows.append((what, f"{len(numbers):,}", shown, why))
    more = len(groups) - FINDINGS
    hint = _html.paragraph("nbk-hint", f"and {more} more kinds") if more > 0 else ""
    return _html.join((_html.table("Rows with a remark", ("outcome", "rows", "which", "why"), rows), hint))
