"""A run's folder: one owner at a time, and never two runs in one.

Holds `run.json` (the RunConfig), `events.jsonl`, checkpoints, `adapter/` once the run has ended, and the lock.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from nbkit.config import RunConfig
from nbkit.errors import TrainingError
from nbkit.events import LOG_NAME, RunFinished, read_events
from nbkit.training import checkpoints

CONFIG_NAME = "run.json"
ADAPTER_NAME = "adapter"
LOCK_NAME = ".run.lock"
OWNER_NAME = ".run.owner.json"


class RunFolder:
    """The folder of `config.run_dir`, owned until `release`.

    The lock is the operating system's own (filelock), so it ends with its process: a killed run leaves none behind.
    """

    def __init__(self, config: RunConfig, *, resume: bool) -> None:
        """Raises: TrainingError if another run owns the folder, or if it holds a run and `resume` is False."""
        from filelock import FileLock

        if config.run_dir is None:
            raise TrainingError('The run has no folder; set one with config.replace(run_dir="runs/one").')
        self.path = Path(config.run_dir).absolute()
        if self.path.exists() and not self.path.is_dir():
            raise TrainingError(f"{self.path} is a file; give run_dir the name of a folder.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"The run folder {self.path} cannot be made ({error.strerror}); choose another.") from error
        # thread_local=False: taken by the thread that starts the run, given back by its worker.
        self._lock = FileLock(self.path / LOCK_NAME, thread_local=False)
        self._take_lock()
        try:
            if not resume:
                self._refuse_another_run()
            checkpoints.sweep(self.path)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Gives the folder up; harmless when called again."""
        if self._lock.is_locked:
            (self.path / OWNER_NAME).unlink(missing_ok=True)
            self._lock.release()

    def _take_lock(self) -> None:
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise TrainingError(
                f"{self.path} is in use by another run ({_owner(self.path)}); wait for it, stop it, or choose another run_dir."
            ) from error
        owner = {"process": os.getpid(), "machine": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        (self.path / OWNER_NAME).write_text(json.dumps(owner), encoding="utf-8")

    def _refuse_another_run(self) -> None:
        checkpoint, _ = checkpoints.newest(self.path)
        held = checkpoint is not None or (self.path / ADAPTER_NAME).exists() or (self.path / LOG_NAME).exists()
        if not held:
            return
        ends = [event for event in read_events(self.path) if isinstance(event, RunFinished) and not event.stopped]
        state = f"finished at step {ends[-1].step}" if ends else f"at step {checkpoint.step if checkpoint else 0}"
        raise TrainingError(f"{self.path} already holds a run, {state}; choose another run_dir, or resume that run.")


def _owner(folder: Path) -> str:
    try:
        owner: dict[str, Any] = json.loads((folder / OWNER_NAME).read_bytes())
        return f"process {owner['process']} on {owner['machine']}, since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "its process is not known"
