"""The live plot: loss and memory of a run, drawn as SVG from its events, live or from a run folder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import ipywidgets as widgets

from nbkit.errors import TrainingError
from nbkit.events import LOG_NAME, Event, read_events
from nbkit.widgets import _code, _fields, _html
from nbkit.widgets._panel import Panel
from nbkit.widgets._progress import Progress, smooth
from nbkit.widgets._svg import Line, chart, key

if TYPE_CHECKING:
    from nbkit.engine import Session

INTERVAL = 0.2  # seconds between two drawings, so at most 5 a second
ENDED = ("finished", "stopped", "failed")
GIB = 2**30
BLUE, ORANGE, GREEN = "#1976d2", "#e65100", "#2e7d32"


class LivePlot(Panel):
    """Loss (raw and smoothed), held-out loss and memory (VRAM on a GPU, RSS on CPU) of one run.

    With a session it follows that session's newest run; `LivePlot.from_run_dir` shows a run from its folder.
    """

    name: ClassVar[str] = "plot"
    title: ClassVar[str] = "Run"

    def __init__(self, session: Session | None = None) -> None:
        super().__init__(session)
        self.progress = Progress()
        self._run: Any = None
        self._folder: str | None = None
        self._drawn_at = 0.0
        self._later: asyncio.TimerHandle | None = None
        self._picture = _html.html()
        smoothing = self._field("smoothing", _fields.slider("Smoothing", 0.6, 0.0, 0.95, 0.05))
        smoothing.add_class("nbk-narrow")
        self.box = widgets.VBox([self._picture, smoothing])  # for panels that show the plot among other things
        self._compose(self.box)
        self.draw()

    @classmethod
    def from_run_dir(cls, path: str | Path) -> LivePlot:
        """The plot of a run that is on disk. Raises: TrainingError if the folder holds no events."""
        events = read_events(path)
        if not events:
            raise TrainingError(f"{path} holds no run; give the folder of a run, the one with {LOG_NAME} in it.")
        plot = cls()
        plot._folder = str(path)
        plot.feed(events)
        plot.draw()
        return plot

    def follow(self, run: Any) -> None:
        """Show this run from now on, as its supervisor delivers events. A run that is followed already is left alone."""
        if run is self._run:
            return
        self._run, self._folder = run, str(run.dir)
        self.progress = Progress()
        if run.status in ("running", "stopping"):
            run.subscribe(lambda events: self.feed(events) if run is self._run else None)  # from its first event on
        else:
            self.progress.add(run.events)
        self.draw()

    def feed(self, events: Sequence[Event]) -> None:
        """Take events in and draw, at most five times a second; a run's beginning and end at once."""
        turned = self.progress.add(events)
        wait = self._drawn_at + INTERVAL - time.monotonic()
        if turned or wait <= 0:
            self.draw()
            if self.progress.state in ENDED:
                self.update_saved()
        elif self._later is None:
            try:
                self._later = asyncio.get_running_loop().call_later(wait, self.draw)
            except RuntimeError:
                return  # no loop: the next events draw, and the run's end does in any case

    def draw(self) -> None:
        """Draw what is known now."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        self._drawn_at = time.monotonic()
        _html.show(self._picture, self.drawing())
        self._fields["smoothing"].widget.layout.display = "none" if self.progress.state == "waiting" else ""
        self._refresh()

    # -- how it looks ------------------------------------------------------------------------------

    def _lines(self) -> tuple[list[Line], list[Line]]:
        progress = self.progress
        weight = self._fields["smoothing"].read()
        loss = [
            Line("loss of each step", progress.losses, "raw", BLUE, width=1.0),
            Line("smoothed", smooth(progress.losses, weight), "smooth", BLUE, width=2.5),
        ]
        if progress.held_out:
            loss.append(Line("held-out rows", progress.held_out, "held", ORANGE, width=1.0, dashes="4 4", marks=True))
        used = [(step, count / GIB) for step, count in progress.memory]
        memory = [Line(f"{progress.memory_name} in use", used, "memory", GREEN)]
        if used:
            last = max(progress.total_steps, progress.step)
            peak = [(0, progress.peak_bytes / GIB), (last, progress.peak_bytes / GIB)]
            memory.append(Line("peak", peak, "peak", GREEN, width=1.0, dashes="2 4"))
        return loss, memory

    def drawing(self) -> _html.Markup:
        progress = self.progress
        if progress.state == "waiting":
            return _html.paragraph("nbk-hint", "No run yet; loss and memory are drawn here while one trains.")
        loss, memory = self._lines()
        said = ", ".join(f"{name} {value}" for name, value in progress.facts()) or "nothing measured yet"
        figures = [
            self._figure("Loss", loss, said, False),
            self._figure(f"{progress.memory_name}, GiB", memory, said, True),
        ]
        facts = (_html.fact(name, value) for name, value in progress.facts())
        return _html.tag(
            "div",
            {"class": "nbk-run"},
            self._bar(),
            _html.tag("div", {"class": "nbk-facts"}, *facts),
            _html.tag("div", {"class": "nbk-figures"}, *figures),
            *(_html.paragraph("nbk-hint", f"Warning: {warning}") for warning in self._warnings()),
        )

    def _figure(self, title: str, lines: list[Line], said: str, from_zero: bool) -> _html.Markup:
        drawn = chart(title, said, lines, x_max=self.progress.total_steps, from_zero=from_zero)
        return _html.tag("div", {"class": "nbk-figure"}, _html.tag("b", None, title), drawn, key(lines))

    def _bar(self) -> _html.Markup:
        progress = self.progress
        share = 100 * min(progress.step / progress.total_steps, 1) if progress.total_steps else 0
        meter = {"class": "nbk-bar", "role": "progressbar", "aria-label": "Training progress"}
        meter |= {"aria-valuemin": 0, "aria-valuemax": progress.total_steps, "aria-valuenow": progress.step}
        filled = _html.tag("div", {"class": f"nbk-bar-{progress.state}", "style": f"width:{share:.1f}%"})
        headline = _html.paragraph("nbk-headline", _html.text(progress.headline(), 600))
        return _html.join((headline, _html.tag("div", meter, filled)))

    def _warnings(self) -> list[str]:
        bad = self.progress.not_numbers
        steps = ", ".join(map(str, bad[:5])) + (" …" if len(bad) > 5 else "")
        loss = [f"The loss is not a number at step {steps}; lower learning_rate."] if bad else []
        return loss + self.progress.warnings[-3:]

    def _changed(self, name: str) -> None:
        self.draw()

    def _session_changed(self, topic: str) -> None:
        if topic == "run" and self.session.run is not None:
            self.follow(self.session.run)

    def _summary(self) -> str:
        return self.progress.headline()

    def _static_body(self) -> _html.Markup:
        return self.drawing()

    def _calls(self) -> list[str]:
        if self._folder is None:
            return ["from nbkit.widgets import LivePlot", "", "LivePlot(session)"]
        return ["from nbkit.widgets import LivePlot", "", _code.call("LivePlot.from_run_dir", [self._folder])]
