"""`Run`: a worker thread that owns the model while it trains.

The notebook awaits the run (`await run`), a script waits for it (`run.wait()`); both end with the result or
raise what the worker raised. Only the thread that waits calls subscribers, so that one thread touches panels.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbkit.config import IGNORE_INDEX, RunConfig
from nbkit.data.wanted import told, wanted
from nbkit.errors import TrainingError
from nbkit.events import Event, EventLog, MessageEvent, RunFailed, RunFinished
from nbkit.training import checkpoints, faults, methods, supervisor
from nbkit.training.folder import CONFIG_NAME, RunFolder
from nbkit.training.job import Job, require_same_run

if TYPE_CHECKING:
    from nbkit.data.report import DataReport

Subscriber = Callable[[list[Event]], None]


class Run:
    """A training run in `config.run_dir`; it starts when made.

    Args:
        model: a PEFT model with trainable adapters, patched or not. The worker owns it until the run has ended.
        data: the report whose `examples` are trained on.
        resume: continue from the newest whole checkpoint of the folder; from step 0 if there is none.
    Raises: TrainingError before step 0, with nothing written, for data without a trained token, a model without a
        trainable tensor, an unknown optimizer, a disk without room for one checkpoint, a folder that another run uses
        or has filled, a checkpoint of other rows or another model.
    """

    def __init__(self, config: RunConfig, model: Any, tokenizer: Any, data: DataReport, *, resume: bool = False) -> None:
        left_out, data = told(data.examples), wanted(data)
        _require_trainable(model, data, left_out)
        methods.check(config.train)
        _require_room(config, model)
        self.config = config
        self.total_steps = methods.steps_of(config, data.examples)
        self.result: RunFinished | None = None
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._done = threading.Event()
        self._events: list[Event] = []
        self._subscribers: list[tuple[Subscriber, list[int]]] = []  # with the count of events each has seen
        self._folder = RunFolder(config, resume=resume)
        self.dir: Path = self._folder.path
        try:
            checkpoint, passed_over = checkpoints.newest(self.dir) if resume else (None, [])
            if checkpoint is not None:
                require_same_run(checkpoint, config, data)
            config.to_json(self.dir / CONFIG_NAME)
            self._log = EventLog(self.dir)
        except BaseException:
            self._folder.release()
            raise
        if left_out:
            self._emit(MessageEvent(text=f"{left_out[0].upper()}{left_out[1:]}."))
        for text in passed_over:
            self._emit(MessageEvent(text=text, level="warning"))
        if resume and checkpoint is None:
            self._emit(MessageEvent(text=f"There is no whole checkpoint in {self.dir}; the run starts at step 0."))
        job = Job(config, model, tokenizer, data, self.dir, checkpoint, self._emit, self._stop.is_set)
        # The job goes to the thread alone: when the worker ends, nothing of the run holds the model.
        self._thread = threading.Thread(target=self._work, args=([job],), name="nbkit-run", daemon=True)
        self._thread.start()

    # -- what a user sees --------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """ "running", "stopping", "finished", "stopped" or "failed"."""
        if not self._done.is_set():
            return "stopping" if self._stop.is_set() else "running"
        if self.result is None:
            return "failed"
        return "stopped" if self.result.stopped else "finished"

    @property
    def events(self) -> list[Event]:
        """All events so far, a copy."""
        return list(self._events)

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def stop(self) -> None:
        """Asks for an end at the next step boundary, with a checkpoint. Harmless when asked again or too late."""
        self._stop.set()

    def subscribe(self, callback: Subscriber) -> None:
        """Call `callback(events)` with the events that are new to it, on the thread that awaits or waits for the run."""
        self._subscribers.append((callback, [0]))

    def wait(self, progress: bool = True) -> RunFinished:
        """Blocks until the run has ended; `progress` shows a bar. An interrupt stops the run and returns its result."""
        return supervisor.wait(self, progress)

    def __await__(self) -> Generator[Any, None, RunFinished]:
        return supervisor.supervise(self).__await__()

    def __repr__(self) -> str:
        return f"Run({str(self.dir)!r}, {self.status}, step {_step(self._events)} of {self.total_steps})"

    # -- what the supervisor calls -----------------------------------------------------------------

    def join(self, seconds: float) -> bool:
        """Waits at most `seconds`; True once the run has ended."""
        return self._done.wait(seconds)

    def deliver(self) -> None:
        """Gives subscribers what is new to them. One that raises is dropped with a warning; the run goes on."""
        for entry in list(self._subscribers):
            callback, seen = entry
            fresh = self._events[seen[0] :]
            if not fresh:
                continue
            seen[0] += len(fresh)
            try:
                callback(fresh)
            except Exception as error:
                self._subscribers.remove(entry)
                warnings.warn(f"{callback!r} no longer follows the run: it raised {error!r}.", stacklevel=2)

    def outcome(self) -> RunFinished:
        """The result of an ended run. Raises: what its worker raised."""
        self._thread.join()
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result

    # -- on the worker thread ----------------------------------------------------------------------

    def _emit(self, event: Event) -> None:
        self._events.append(event)  # first: subscribers see it even if the disk is full
        self._log.append(event)

    def _work(self, hold: list[Job]) -> None:
        try:
            result = hold.pop().run()
            self._emit(result)
            self.result = result
        except BaseException as error:
            self._fail(error)
        finally:
            self._folder.release()
            _release_memory()
            self._done.set()

    def _fail(self, error: BaseException) -> None:
        shown = faults.explained(error, self.config, self.dir, _step(self._events))
        faults.free_frames(shown)
        self.error = shown
        event = RunFailed(step=_step(self._events), error=str(shown) or repr(shown), error_type=type(shown).__name__)
        try:
            self._emit(event)
        except OSError as unwritten:
            shown.add_note(f"events.jsonl could not take the last line: {unwritten}")


def _require_trainable(model: Any, data: DataReport, left_out: str) -> None:
    if len(data.examples) == 0:
        if left_out:
            raise TrainingError(f"There is nothing to train on: {left_out}; give rows with a true label.")
        raise TrainingError(f"None of the {data.rows_in} rows can be trained on; the data report says why for each.")
    # The label at position 0 has nothing before it to be predicted from.
    if not any(label != IGNORE_INDEX for example in data.examples for label in example["labels"][1:]):
        raise TrainingError(
            f"No token of the {len(data.examples)} rows would be trained: every label is masked; "
            "check that the rows end in a reply, and that it is not cut off by max_seq_length."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("The model has nothing to train; call session.add_lora(rank=16) first.")


def _require_room(config: RunConfig, model: Any) -> None:
    """A checkpoint with the adapter and AdamW's two moments, and the adapter itself, asked for before step 0."""
    if config.run_dir is None:
        return  # refused with its own sentence
    folder = Path(config.run_dir).absolute()
    while not folder.is_dir():
        folder = folder.parent
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    checkpoints.require_space(folder, 4 * weights + 4_000_000, "The run")


def _step(events: list[Event]) -> int:
    return max((event.step for event in events), default=0)


def _release_memory() -> None:
    from nbkit.hardware.meter import release_memory

    release_memory()
