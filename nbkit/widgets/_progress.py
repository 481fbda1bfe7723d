"""The events of a run folded into what a plot and a line of text need. Knows no widgets."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from nbkit.events import (
    EvalEvent,
    Event,
    MemoryEvent,
    MessageEvent,
    RunFailed,
    RunFinished,
    RunStarted,
    StepEvent,
)
from nbkit.widgets._html import duration, number, size

RECENT = 20  # steps that speed and time left are judged by


@dataclass
class Progress:
    """What is known of a run so far. Losses in nats, memory in bytes, points as (step, value)."""

    total_steps: int = 0
    step: int = 0
    device: str = ""
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)
    memory_name: str = "Memory"
    peak_bytes: int = 0
    total_bytes: int = 0
    state: str = "waiting"  # waiting, running, finished, stopped, failed
    ending: str = ""
    warnings: list[str] = field(default_factory=list)
    _recent: deque[StepEvent] = field(default_factory=lambda: deque(maxlen=RECENT))

    def add(self, events: Iterable[Event]) -> bool:
        """Take events in; True if one of them began or ended the run."""
        turned = False
        for event in events:
            match event:
                case RunStarted():
                    self._start(event)
                    turned = True
                case StepEvent():
                    self.step, self.state = event.step, "running"
                    self.losses.append((event.step, event.loss))
                    self._recent.append(event)
                case MemoryEvent():
                    self.memory.append((event.step, event.used_bytes))
                    self.memory_name, self.total_bytes = event.memory, event.total_bytes
                    self.peak_bytes = max(self.peak_bytes, event.peak_bytes, event.used_bytes)
                case EvalEvent():
                    self.held_out.append((event.step, event.loss))
                case MessageEvent(level="warning"):
                    self.warnings.append(event.text)
                case RunFinished():
                    self.state = "stopped" if event.stopped else "finished"
                    self.ending = f"in {duration(event.seconds)}"
                    turned = True
                case RunFailed():
                    self.state, self.ending, turned = "failed", event.error, True
        return turned

    def _start(self, event: RunStarted) -> None:
        """A resumed part replaces what an interrupted one did after the checkpoint it continues from."""
        self.total_steps, self.device, self.step = event.total_steps, event.device, event.resumed_from
        self.state, self.ending = "running", ""
        for points in (self.losses, self.held_out, self.memory):
            points[:] = [point for point in points if point[0] <= event.resumed_from]
        self._recent.clear()

    @property
    def tokens_per_second(self) -> float:
        """Non-padding tokens a second over the recent steps; nan before the first."""
        seconds = sum(event.seconds for event in self._recent)
        return sum(event.total_tokens for event in self._recent) / seconds if seconds > 0 else math.nan

    @property
    def seconds_left(self) -> float:
        """By the median of the recent steps; nan before the first."""
        times = [event.seconds for event in self._recent if event.seconds > 0]
        return statistics.median(times) * max(self.total_steps - self.step, 0) if times else math.nan

    @property
    def not_numbers(self) -> list[int]:
        """Steps whose loss is not finite."""
        return [step for step, loss in self.losses if not math.isfinite(loss)]

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of each figure that is known."""
        found = []
        if self.losses:
            found.append(("Loss", number(self.losses[-1][1])))
        if self.held_out:
            values = " → ".join(number(loss) for _, loss in dict.fromkeys((self.held_out[0], self.held_out[-1])))
            found.append(("Held-out loss", values))
        if self.memory:
            found.append((self.memory_name, f"{size(self.memory[-1][1])} (peak {size(self.peak_bytes)})"))
        if math.isfinite(self.tokens_per_second):
            found.append(("Speed", f"{self.tokens_per_second:,.0f} tok/s"))
        if self.state == "running" and math.isfinite(self.seconds_left):
            found.append(("Time left", duration(self.seconds_left)))
        return found

    def headline(self) -> str:
        """One line: where the run stands."""
        steps = f"step {self.step} of {self.total_steps}" if self.total_steps else f"step {self.step}"
        words = {"waiting": "No run yet", "running": steps.capitalize(), "finished": f"Finished, {steps}"}
        words |= {"stopped": f"Stopped, {steps}", "failed": f"Failed, {steps}"}
        return f"{words[self.state]} {self.ending}".strip() if self.state != "failed" else f"{words['failed']}: {self.ending}"


def smooth(points: Iterable[tuple[int, float]], weight: float) -> list[tuple[int, float]]:
    """Exponential moving average, s = weight * s + (1 - weight) * x, divided by 1 - weight**n as in Adam (arXiv 1412.6980),
    so that it starts at the first value. Values that are not finite are passed over.
    """
    smoothed, average, count = [], 0.0, 0
    for step, value in points:
        if math.isfinite(value):
            count += 1
            average = weight * average + (1 - weight) * value
            smoothed.append((step, average / (1 - weight**count)))
    return smoothed
