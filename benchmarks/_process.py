"""A worker process as its conductor sees it: commands and replies over pipes, each with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from typing import Any

import psutil

from benchmarks._results import ROOT

COMMAND = [sys.executable, "-m", "benchmarks._worker"]


class Failed(RuntimeError):
    """A command failed, or was given up."""


class Process:
    """One `_worker.py`. After a failure other than a lack of memory it is ended: a GPU context may be past use."""

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        self.running = subprocess.Popen(
            [*COMMAND, name, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        self.rest = b""

    @property
    def alive(self) -> bool:
        return self.running.poll() is None

    def send(self, do: str, **arguments: Any) -> None:
        """Raises: Failed if the process has ended."""
        assert self.running.stdin is not None
        try:
            self.running.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self.running.stdin.flush()
        except (OSError, ValueError):  # its end of the pipe is gone, or ours since `stop`
            raise Failed(self._ended()) from None

    def reply(self, seconds: float) -> dict[str, Any]:
        """The reply to the oldest command that has none yet.

        Raises:
            Failed: the command failed, the process ended, or `seconds` went by.
        """
        line = self._line(seconds)
        found = json.loads(line)
        if "error" not in found:
            return found
        if not found["error"].startswith("OutOfMemoryError"):
            self.stop()
        raise Failed(found["error"])

    def _line(self, seconds: float) -> bytes:
        out, until = self.running.stdout, time.monotonic() + seconds
        assert out is not None
        with selectors.DefaultSelector() as ready:
            ready.register(out, selectors.EVENT_READ)
            while b"\n" not in self.rest:
                if not ready.select(max(0.0, until - time.monotonic())):
                    self.stop()
                    raise Failed(f"given up after {max(0.0, seconds):.0f} s")
                read = os.read(out.fileno(), 65536)
                if not read:
                    raise Failed(self._ended())
                self.rest += read
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def _ended(self) -> str:
        return f"the process ended with code {self.running.wait()}"

    def stop(self) -> None:
        """End it with all that it started: compilers among them, which may have left its group and would share the host."""
        if self.alive:
            started = psutil.Process(self.running.pid).children(recursive=True)
            os.killpg(self.running.pid, signal.SIGKILL)
            for child in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self.running.wait()
        for pipe in (self.running.stdin, self.running.stdout):
            if pipe is not None:
                pipe.close()
