"""The inspector: the rows that are trained on, token by token, one at a time or as the batches that training makes."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import ipywidgets as widgets

from nbkit.config import TrainConfig
from nbkit.errors import ConfigError, NbkitError
from nbkit.widgets import _code, _fields, _html
from nbkit.widgets._panel import Panel

if TYPE_CHECKING:
    from nbkit.engine import Session

VIEWS = (("one row", "row"), ("whole batch", "batch"))
AT_ONCE = 2000  # rows that are looked through while the user waits; more only when asked for


class Inspector(Panel):
    """Which tokens bear a loss, and what is wrong with the set. Buttons: `previous`, `next`, `look`.

    Settings: view ("row" or "batch"), row (its number in the source), batch (from 1).

    Attributes:
        settings: asked for the settings of training that make the batches; a studio puts its training panel here.
    """

    name: ClassVar[str] = "inspector"
    title: ClassVar[str] = "What training sees"

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.settings: Callable[[], TrainConfig] = TrainConfig
        self._inspection: Any = None
        self._place = 0  # of the row shown, among the examples
        self._numbers: list[int] = []
        view = self._field("view", _fields.choice("Show", VIEWS, "row"))
        row = self._field("row", _fields.whole("Row of the source", 1))
        batch = self._field("batch", _fields.whole("Batch", 1))
        previous = self._button("previous", "‹ Previous", lambda: self._step(-1), "Show the row or batch before")
        following = self._button("next", "Next ›", lambda: self._step(1), "Show the next row or batch")
        look = self._button("look", "Check all rows", self._look, "Look for faults in the ids and labels of all rows")
        self._found, self._tokens = _html.html(), _html.html()
        self._style = _html.html()
        self._stepper = widgets.HBox([view, row, batch, previous, following, look])
        self._stepper.add_class("nbk-row")
        # For panels that show it among other things.
        self.box = widgets.VBox([self._style, self._found, self._stepper, self._tokens])
        self._compose(self.box)

    # -- for code ----------------------------------------------------------------------------------

    @property
    def inspection(self) -> Any:
        """What `nbkit.inspect(session)` gives for the data and the settings shown; None where there are no data."""
        return self._inspection

    # -- what it does ------------------------------------------------------------------------------

    def _step(self, by: int) -> None:
        if self._whole():
            self.set(batch=self._fields["batch"].read() + by)
        else:
            self._go(self._place + by)

    def _go(self, place: int) -> None:
        self._place = min(max(place, 0), len(self._numbers) - 1)
        self._take({"row": self._numbers[self._place]})
        self._show()

    def _look(self) -> None:
        self.inspection.set.counts()
        self._show()

    def _changed(self, name: str) -> None:
        if self._inspection is None:
            return
        if name == "row":
            self._find(self._fields["row"].read())
        elif name == "batch":
            number, last = self._fields["batch"].read(), self._inspection.batches
            if not 1 <= number <= last:
                self._take({"batch": min(max(number, 1), last)})
                raise ConfigError(f"There is no batch {number}; the batches of an epoch are numbered from 1 to {last:,}.")
        self._show()

    def _find(self, number: int) -> None:
        """Show the row of this number, or say why it is not trained on."""
        if number in self._numbers:
            self._place = self._numbers.index(number)
            return
        why = next((finding.sentence for finding in self.session.data.findings if finding.row == number), None)
        self._take({"row": self._numbers[self._place]})
        if why is not None:
            raise ConfigError(f"Row {number} is not trained on: {_html.plain(why, 400)}.")
        known = sorted(self._numbers)
        near = known[min(bisect.bisect(known, number), len(known) - 1)]
        raise ConfigError(f"There is no row {number} among the {len(known):,} rows that are used; near it is row {near}.")

    def _session_changed(self, topic: str) -> None:
        if topic in ("model", "data"):
            self.renew()

    def renew(self) -> None:
        """Look at the session's data as they are now, in the batches of the settings as they are now."""
        report = self.session.data
        if report is None or not len(report.examples):
            self._inspection, self._numbers = None, []
        elif self._inspection is None or self._inspection.set.report is not report:
            self._inspection = self.session.inspect(train=self._train())
            self._numbers = [int(number) for number in report.row_numbers]
            self._place = 0
            if len(self._numbers) <= AT_ONCE:
                self._inspection.set.counts()
            self._take({"row": self._numbers[0], "batch": 1})
        self._show()

    def _train(self) -> TrainConfig:
        try:
            return self.settings()
        except ConfigError:  # a box of the training panel holds what it cannot take: it says so itself
            return TrainConfig()

    # -- how it looks ------------------------------------------------------------------------------

    def _show(self) -> None:
        found = self._inspection
        self.box.layout.display = "" if found is not None else "none"
        if found is None:
            for widget in (self._found, self._tokens):
                _html.show(widget, _html.join(()))
            return
        whole = self._whole()
        self._fields["row"].widget.layout.display = "none" if whole else ""
        self._fields["batch"].widget.layout.display = "" if whole else "none"
        self._buttons["look"].layout.display = "none" if found.set.counted else ""
        tokens = self._view_html()
        at, last = (self._fields["batch"].read(), self._inspection.batches) if whole else (self._place + 1, len(self._numbers))
        self._enable({"previous": at > 1, "next": at < last})
        _html.show(self._style, found.style())
        _html.show(self._found, self._found_html())
        _html.show(self._tokens, tokens)

    def _found_html(self) -> _html.Markup:
        found = self._inspection
        if not found.set.counted:
            return _html.join(())
        told = {finding.kind for finding in self.session.data.findings}
        return _html.join((found.problems_html(told), found.histograms_html()))

    def _whole(self) -> bool:
        return self._fields["view"].read() == "batch"

    def _view_html(self) -> _html.Markup:
        try:
            return self._batch_html() if self._whole() else self._row_html()
        except NbkitError as error:  # packing that cannot be: said where the tokens would stand
            return _html.paragraph("nbk-hint", _html.text(error, 600))

    def _batch_html(self) -> _html.Markup:
        train = self._train()
        of = self._inspection.show(train=train)
        number = min(self._fields["batch"].read(), of.batches)
        self._inspection = of.show(batch=number - 1)
        return self._inspection.batch_html()

    def _row_html(self) -> _html.Markup:
        preview = self.session.data.preview(self._place)
        raw = json.dumps(preview.raw, ensure_ascii=False, indent=2, default=str)
        number = self._numbers[self._place]
        head = _html.tag("div", {"class": "nbk-column-head"}, _html.tag("b", None, f"Row {number} of the source"))
        left = _html.tag("div", {"class": "nbk-column"}, head, _html.block(raw, label="The row as it came"))
        right = _html.tag("div", {"class": "nbk-column"}, self._inspection.row_html(self._place))
        return _html.join((self._inspection.legend_html(), _html.tag("div", {"class": "nbk-columns"}, left, right)))

    def _summary(self) -> str:
        return "" if self._inspection is None else f"{len(self._numbers):,} rows"

    def _calls(self) -> list[str]:
        chosen = {"row": self._fields["row"].read()}
        if self._whole():
            settings = _code.changed(self._train())
            chosen = {"batch": self._fields["batch"].read() - 1}
            chosen |= {"train": _code.call("nbkit.TrainConfig", [], settings)} if settings else {}
        return ["import nbkit", "", _code.call("nbkit.inspect", [_code.Source("session")], chosen)]

    def static_rows(self) -> _html.Markup:
        """What is shown now, without controls."""
        if self._inspection is None:
            return _html.join(())
        return _html.join((self._inspection.style(), self._found_html(), self._view_html()))

    def _static_body(self) -> _html.Markup:
        return self.static_rows()
