"""Waiting for a run: awaited in a notebook cell, or blocking in a script.

Training runs on a worker thread; the cell awaits this supervisor, which alone hands events to panels, at most
five times a second. Which way of waiting lets buttons work depends on the kernel:
from ipykernel 7.4 on a plain `asyncio.sleep` does; before, `jupyter_ui_poll` must be asked; 7.0 loses clicks and updates.
An interrupt (the square button, Ctrl-C, a cancelled task) stops the run at a step boundary with a checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from nbkit.events import EvalEvent, Event, MessageEvent, RunFinished, StepEvent

if TYPE_CHECKING:
    from nbkit.training.runner import Run

PERIOD = 0.2  # seconds between deliveries


async def supervise(run: Run, period: float = PERIOD) -> RunFinished:
    """Awaits the end of `run` and delivers its events on this thread. A second interrupt is raised; the first stops the run.

    Raises: what the worker raised.
    """
    version = _kernel_version()
    if version is not None and version[:2] == (7, 0):
        warnings.warn(
            "ipykernel 7.0 loses button clicks and widget updates: install ipykernel>=7.1 and restart the kernel. "
            "Progress is printed instead; the interrupt button stops the run.",
            stacklevel=2,
        )
        run.subscribe(print_events)
    interrupted = False
    async with _pauses(version) as pause:
        while not run.done:
            try:
                await pause(period)
                run.deliver()
            except (asyncio.CancelledError, KeyboardInterrupt):
                if interrupted:
                    raise
                interrupted = True
                run.stop()
                if (task := asyncio.current_task()) is not None:
                    task.uncancel()  # the request is served: the cell goes on with the partial result
    run.deliver()
    return run.outcome()


def wait(run: Run, progress: bool = True, period: float = PERIOD) -> RunFinished:
    """Blocks until `run` has ended. The first interrupt stops the run, a second one is raised.

    Raises: what the worker raised.
    """
    bar = _Bar(run) if progress else None
    if bar is not None:
        run.subscribe(bar.follow)
    interrupted = False
    try:
        while True:
            try:
                ended = run.join(period)
                run.deliver()
                if ended:
                    break
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                run.stop()
                print(
                    "\nStopping after this step, with a checkpoint. Interrupt again to leave at once.",
                    file=sys.stderr,
                    flush=True,
                )
    finally:
        if bar is not None:
            bar.close()
    return run.outcome()


def print_events(events: list[Event]) -> None:
    """One text line an event that a reader wants: every tenth step, losses on held-out rows, messages."""
    for event in events:
        if isinstance(event, StepEvent) and (event.step == 1 or event.step % 10 == 0):
            print(f"step {event.step}  loss {event.loss:.4f}  {event.seconds:.2f} s", flush=True)
        elif isinstance(event, EvalEvent):
            print(f"step {event.step}  held-out loss {event.loss:.4f} on {event.rows} rows", flush=True)
        elif isinstance(event, MessageEvent):
            print(f"step {event.step}  {event.text}", flush=True)


class _Bar:
    """tqdm's bar of a run, one tick a step."""

    def __init__(self, run: Run) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(total=run.total_steps, unit="step", desc="training", dynamic_ncols=True)

    def follow(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, StepEvent):
                self._bar.n = event.step
                self._bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
            elif isinstance(event, EvalEvent):
                self._bar.write(f"held-out loss {event.loss:.4f} after step {event.step} ({event.rows} rows)", file=sys.stderr)
            elif isinstance(event, MessageEvent):
                self._bar.write(event.text, file=sys.stderr)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def _kernel_version() -> tuple[int, ...] | None:
    """The version of the ipykernel this code runs in, None outside a kernel."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython  # type: ignore[attr-defined]

    shell = get_ipython()
    if shell is None or getattr(shell, "kernel", None) is None:
        return None
    return tuple(int(part) for part in re.findall(r"\d+", metadata.version("ipykernel"))[:3])


@contextlib.asynccontextmanager
async def _pauses(version: tuple[int, ...] | None) -> AsyncIterator[Callable[[float], Awaitable[None]]]:
    """A coroutine function that sleeps, letting the kernel handle clicks meanwhile where it can."""
    # On 7.4 jupyter_ui_poll breaks the shell, and is not needed there.
    if version is None or version >= (7, 4) or find_spec("jupyter_ui_poll") is None:
        yield asyncio.sleep
        return
    from jupyter_ui_poll import ui_events  # type: ignore[import-not-found]

    async with ui_events() as poll:

        async def pause(seconds: float) -> None:
            await poll(10)
            await asyncio.sleep(seconds)

        yield pause
