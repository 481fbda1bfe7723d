"""Rendering with bounds: nbkit's own templates here, every other one in a worker process with limits on time and memory.

One worker serves the whole process. It starts with the first unknown template (a tenth of a second), ends itself after a
minute without work and whenever this process ends, and has no variable of this process's environment that could be a secret.
A template that loops or grows costs the row that set it off, not the session.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbkit.data import jinja_worker
from nbkit.data.findings import RowFault
from nbkit.data.jinja_worker import Job, answer, read_frame, write_frame

PATIENCE = 30.0  # seconds of real time for one answer; the worker's own clock, of processor time, is the usual bound
HOPELESS = 5  # times in a row that a template is stopped before it is given up
BATCH = 4_000_000  # characters of messages that are sent at once
KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "HOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP")


def fault_of(kind: str, sentence: str) -> RowFault:
    what = "refuses it" if kind == "refused" else "is stopped"
    return RowFault("template" if kind == "refused" else "template_limit", f"the chat template {what}: {sentence}")


def render_here(template: str, names: dict[str, str], jobs: Sequence[Job]) -> list[str | RowFault]:
    """The texts of the jobs, rendered in this process. For templates that are known to end."""
    found = [answer(template, names, job) for job in jobs]
    return [text if kind == "text" else fault_of(kind, text) for kind, text in found]


class Worker:
    """The other process: started when it is needed, replaced when it was stopped.

    `seconds`: of processor time that one rendering may take."""

    def __init__(self, seconds: float = jinja_worker.SECONDS) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._died = False  # without an answer, just now
        self._stopped: dict[str, int] = {}  # template → how often in a row

    def render(
        self, template: str, names: dict[str, str], jobs: Sequence[Job], patience: float = PATIENCE
    ) -> list[str | RowFault]:
        """The texts of the jobs, or the fault of each, in their order. A template that was stopped so often that there is no
        hope is not tried again."""
        found: list[str | RowFault] = []
        with self._lock:
            try:
                for batch in _batches(jobs):
                    start = len(found)
                    while (done := len(found) - start) < len(batch):
                        if self._stopped.get(template, 0) >= HOPELESS:
                            hopeless = f"it was stopped {HOPELESS} times in a row and is not tried again"
                            found += [fault_of("too_much", hopeless)] * (len(batch) - done)
                            break
                        self._ask({"template": template, "names": names, "jobs": batch[done:], "seconds": self.seconds})
                        found += self._collect(template, len(batch) - done, patience)
            except BaseException:  # such as the notebook's stop button: what is still to be answered must not answer the next
                self.stop()
                raise
        return found

    def _ask(self, batch: dict[str, Any]) -> None:
        for _ in range(2):  # a worker that was idle may end just now
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._process is not None and self._process.stdin is not None
            try:
                write_frame(self._process.stdin, batch)
                return
            except OSError:
                self.stop()
        raise RowFault("template_limit", "the process that renders chat templates cannot be started")

    def _collect(self, template: str, count: int, patience: float) -> list[str | RowFault]:
        """The answers to come; fewer than `count` if the worker had to be stopped or died, or the template is hopeless."""
        found: list[str | RowFault] = []
        while len(found) < count and self._stopped.get(template, 0) < HOPELESS:
            try:
                answered = self._answers.get(timeout=patience)
            except queue.Empty:
                answered = "too_much", f"it took more than {patience:g} s"
                self.stop()
            if answered is None:  # the process is no more
                self.stop()
                if not found and not self._died:  # it may have been idle for so long that it ended when it was asked
                    self._died = True
                    return []
                answered = "too_much", f"it ended the process that renders it, which may take {_megabytes()} MB"
            self._died = False
            kind, text = answered
            found.append(text if kind == "text" else fault_of(kind, text))
            self._stopped[template] = self._stopped.get(template, 0) + 1 if kind == "too_much" else 0
            if self._process is None:
                break
        if len(found) < count:
            self.stop()
        return found

    def _start(self) -> None:
        self.stop()
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(jinja_worker.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self._answers = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(self._process, self._answers), name="nbkit-templates", daemon=True).start()

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except OSError:  # what was not yet sent to a process that is no more
                        continue
            self._process = None


def _listen(process: subprocess.Popen[bytes], answers: queue.SimpleQueue[Any]) -> None:
    """Put every answer into the queue, and None when there are no more."""
    try:
        while True:
            answers.put(read_frame(process.stdout))  # type: ignore[arg-type]
    except (EOFError, OSError, ValueError):  # it ended, or was stopped while something was read
        answers.put(None)


def _batches(jobs: Sequence[Job]) -> list[list[Job]]:
    batches: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        size += 100 + sum(len(value) for message in job[0] for value in message.values() if isinstance(value, str))
        if size > BATCH and batches[-1]:
            batches.append([])
            size = 0
        batches[-1].append(job)
    return batches if batches[0] else []


def _megabytes() -> int:
    return jinja_worker.MEMORY >> 20


worker = Worker()
