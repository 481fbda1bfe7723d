"""The training panel: settings, Start, Stop, and the live plot of the run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import ipywidgets as widgets

from nbkit.config import SCHEDULES, TrainConfig
from nbkit.events import Event, RunFailed, RunFinished
from nbkit.widgets import _code, _fields, _html
from nbkit.widgets._panel import Panel
from nbkit.widgets.live_plot import LivePlot

if TYPE_CHECKING:
    from nbkit.engine import Session

CHECKPOINTING = (("auto", "auto"), ("on", True), ("off", False), ("nbkit", "nbkit"), ("unsloth", "unsloth"))  # of activations
PACKING = (("off", False), ("on", True))
GOING = ("running", "stopping")


class TrainPanel(Panel):
    """Train the loaded model on the mapped data. Buttons: `start`, `stop`; the settings are those of `TrainConfig`.

    In a notebook: `panel.click("start")`, then `await panel.finished()`, in the cell that shows the panel.
    """

    name: ClassVar[str] = "training"
    title: ClassVar[str] = "Train"

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.plot = LivePlot(session)
        self.guards: list[Callable[[], None]] = []  # asked before a start; one that has something against it raises
        self._run: Any = None
        usual, rare = self._settings(TrainConfig())
        start = self._button("start", "Start", self._start, "Train with these settings", primary=True)
        stop = self._button("stop", "Stop", self._stop, "Stop after the current step and keep what was learned")
        self._more = widgets.ToggleButton(value=False, description="More settings", tooltip="Show the settings used less often")
        self._more.add_class("nbk-toggle")
        self._more.layout.width = "auto"
        self._more.observe(lambda _: self._show_more(), "value")
        self._rare = _row(rare)
        self.live = widgets.VBox([_row([start, stop]), self.plot.box])  # what `studio.train()` shows in the cell that trains
        self._compose(_row([*usual, self._more]), self._rare, self.live)
        self._show_more()
        self._show_state()

    def _settings(self, default: TrainConfig) -> tuple[list[Any], list[Any]]:
        """The fields: those in sight, and those behind "More settings"."""
        usual = {
            "max_steps": _fields.optional("Steps", int, "a whole number, or nothing for whole epochs", "by epochs"),
            "epochs": _fields.real("Epochs", default.epochs),
            "batch_size": _fields.whole("Rows a batch", default.batch_size),
            "gradient_accumulation": _fields.whole("Batches a step", default.gradient_accumulation),
            "learning_rate": _fields.real("Learning rate", default.learning_rate),
            "schedule": _fields.choice("Schedule", SCHEDULES, default.schedule),
        }
        rare = {
            "warmup_steps": _fields.whole("Warm-up steps", default.warmup_steps),
            "weight_decay": _fields.real("Weight decay", default.weight_decay),
            "max_grad_norm": _fields.real("Clip gradients at", default.max_grad_norm),
            "packing": _fields.choice("Packing", PACKING, default.packing),
            "pack_tokens": _fields.optional("Length of a pack", int, "a whole number, or nothing", "by batch size"),
            "optimizer": _fields.text("Optimizer", default.optimizer),
            "save_steps": _fields.whole("Save every … steps", default.save_steps),
            "seed": _fields.whole("Seed", default.seed),
            "gradient_checkpointing": _fields.choice("Checkpointing", CHECKPOINTING, default.gradient_checkpointing),
        }
        return (
            [self._field(name, field) for name, field in usual.items()],
            [self._field(name, field) for name, field in rare.items()],
        )

    def config(self) -> TrainConfig:
        """The settings as a `TrainConfig`. Raises: ConfigError."""
        return TrainConfig(**self.values())

    def _changed(self, name: str) -> None:
        self.config()

    def _start(self) -> None:
        config = self.config()
        for guard in self.guards:
            guard()
        run = self.session.train(config)
        self._follow(run)
        self.message("Training; Stop ends it after the current step and keeps what was learned.", "busy")
        self._launch(lambda: self._supervise(run))

    def _stop(self) -> None:
        self.session.run.stop()
        self.message("Stopping after the current step …", "busy")
        self._show_state()

    async def _supervise(self, run: Any) -> None:
        """Wait for the run on the kernel's loop; its events reach the plot meanwhile."""
        try:
            await run
        except Exception as error:  # shown as a sentence; raised again by `click` or `finished`
            self._failed(error)
        finally:
            self._show_state()

    def _follow(self, run: Any) -> None:
        if run is self._run:
            return
        self._run = run
        settings = {name: getattr(run.config.train, name) for name in self._fields}
        self._take(settings)
        if run.status in GOING:
            run.subscribe(lambda events: self._heard(run, events))
        self._show_state()

    def _heard(self, run: Any, events: list[Event]) -> None:
        """Say how the run ended, also when it was started and awaited by code."""
        for event in events:
            if isinstance(event, RunFinished):
                word = "Stopped" if event.stopped else "Trained"
                where = f"; the adapter is in {_near(event.adapter_path)}" if event.adapter_path else ""
                self.message(f"{word} at step {event.step} in {_html.duration(event.seconds)}{where}.", "done")
            elif isinstance(event, RunFailed):
                self.message(event.error, "error")
        if any(isinstance(event, (RunFinished, RunFailed)) for event in events):
            self._enable({"start": True, "stop": False})
            self.update_saved()
        self._refresh()

    def _show_state(self) -> None:
        status = self._run.status if self._run is not None else ""
        self._enable({"start": status not in GOING, "stop": status == "running"})
        self._refresh()

    def _show_more(self) -> None:
        self._rare.layout.display = "" if self._more.value else "none"
        self._more.description = "Fewer settings" if self._more.value else "More settings"

    def _session_changed(self, topic: str) -> None:
        if topic == "run" and self.session.run is not None:
            self._follow(self.session.run)

    def _summary(self) -> str:
        return self.plot.progress.headline() if self._run is not None else ""

    def _calls(self) -> list[str]:
        settings = _code.call("nbkit.TrainConfig", [], _code.changed(self.config()))
        return ["import nbkit", "", _code.call("run = session.train", [settings]), "run.wait()"]

    def _static_body(self) -> _html.Markup:
        return self.plot.drawing()


def _near(path: str) -> str:
    """The path as seen from the current folder, where it lies in it."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def _row(children: list[Any]) -> widgets.HBox:
    row = widgets.HBox(children)
    row.add_class("nbk-row")
    return row
