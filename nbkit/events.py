"""What a run says, as frozen dataclasses, and the log file they are kept in.

`events.jsonl` in the run folder holds one JSON object a line, each with `kind`, `step` and `time`
(seconds since the epoch); a `step` event also has `loss`. The live plot, the progress text and a
re-opened notebook read the same log, whether the run is a thread of this kernel or another process.
Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

LOG_NAME = "events.jsonl"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events. `step` counts finished optimizer steps; 0 is before the first."""

    kind: ClassVar[str] = "event"
    step: int = 0
    time: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The first event of a run and of every resumed part of it."""

    kind: ClassVar[str] = "started"
    total_steps: int
    device: str
    trainable_parameters: int
    resumed_from: int = 0  # the step of the checkpoint that was loaded, 0 for a fresh run
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class StepEvent(Event):
    """One optimizer step. `loss`: mean over the trained tokens of the whole step, in nats."""

    kind: ClassVar[str] = "step"
    loss: float
    learning_rate: float
    grad_norm: float | None = None
    trained_tokens: int = 0  # labelled tokens of this step
    total_tokens: int = 0  # non-padding tokens of this step
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MemoryEvent(Event):
    """Memory in use after a step, in bytes. `memory`: "VRAM" (device peak) or "RSS" (this process)."""

    kind: ClassVar[str] = "memory"
    memory: str
    used_bytes: int
    peak_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class EvalEvent(Event):
    """Mean loss over the labelled tokens of the held-out rows, in nats."""

    kind: ClassVar[str] = "eval"
    loss: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class CheckpointEvent(Event):
    kind: ClassVar[str] = "checkpoint"
    path: str


@dataclass(frozen=True, kw_only=True)
class MessageEvent(Event):
    """A sentence for the user. `level`: "info" or "warning"."""

    kind: ClassVar[str] = "message"
    text: str
    level: str = "info"


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """The run ended by itself or was stopped at a step boundary (`stopped`)."""

    kind: ClassVar[str] = "finished"
    stopped: bool = False
    loss: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    adapter_path: str = ""


@dataclass(frozen=True, kw_only=True)
class RunFailed(Event):
    kind: ClassVar[str] = "failed"
    error: str
    error_type: str = ""


KINDS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (RunStarted, StepEvent, MemoryEvent, EvalEvent, CheckpointEvent, MessageEvent, RunFinished, RunFailed)
}


def to_dict(event: Event) -> dict[str, Any]:
    """The JSON object of one event. Non-finite numbers become the strings "nan", "inf", "-inf"."""
    values = {k: _plain(v) for k, v in dataclasses.asdict(event).items()}
    return {"kind": event.kind, **values}


def from_dict(values: dict[str, Any]) -> Event:
    """The event of one JSON object. Unknown keys are ignored, so that an older nbkit reads a newer log.

    Raises: KeyError for an unknown kind, TypeError for a missing field.
    """
    cls = KINDS[values["kind"]]
    types = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    return cls(**{k: _number(v) if "float" in types[k] else v for k, v in values.items() if k in types})


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


class EventLog:
    """Appends events to `<run_dir>/events.jsonl`, one flushed line each; safe from several threads."""

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / LOG_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        # A killed run may leave half a line; closing it keeps the next event on a line of its own.
        if self.path.exists() and (data := self.path.read_bytes()) and not data.endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")

    def append(self, event: Event) -> None:
        line = json.dumps(to_dict(event), ensure_ascii=False, allow_nan=False)
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_events(run_dir: str | Path) -> list[Event]:
    """All whole events of a run folder (or of a log file), in order. Torn or foreign lines are passed over."""
    path = Path(run_dir)
    if path.is_dir():
        path = path / LOG_NAME
    if not path.exists():
        return []
    return list(_parse(path.read_bytes().splitlines()))


def _parse(lines: list[bytes]) -> Iterator[Event]:
    for line in lines:
        try:
            yield from_dict(json.loads(line))
        except (ValueError, KeyError, TypeError):
            continue  # a line cut off by a kill, or a kind of a newer nbkit
