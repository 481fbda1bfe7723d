"""How far reading is: a tqdm bar, or whoever listens instead, as a panel does. What a listener raises ends the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

INTERVAL = 0.1  # seconds between two calls of a listener
FETCHING = "Fetching"  # a file from the web, counted in bytes
Listener = Callable[[str, int, int | None], None]  # (what is done, rows done, rows in all or None)

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def told_to(listener: Listener | None) -> Iterator[None]:
    """Within this block, and in threads started with a copy of its context, bars tell `listener` and draw nothing."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@contextmanager
def bar(total: int | None, what: str) -> Iterator[Any]:
    """Something with `update(n)` and `set_postfix_str(text)`, as a tqdm bar has. `total` is None where it is not known.

    What is counted are rows, or bytes where `what` is `FETCHING`.
    """
    listener = _LISTENER.get()
    if listener is not None:
        told = _Told(listener, total, what)
        yield told
        told.tell()
        return
    from tqdm.auto import tqdm

    unit: dict[str, Any] = {"unit": "B", "unit_scale": True} if what == FETCHING else {"unit": " rows"}
    with tqdm(total=total, desc=what, delay=1, leave=False, **unit) as drawn:
        yield drawn


class _Told:
    def __init__(self, listener: Listener, total: int | None, what: str) -> None:
        self._listener, self._total, self._what = listener, total, what
        self._done, self._at = 0, 0.0
        self.tell()

    def update(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() - self._at >= INTERVAL:
            self.tell()

    def set_postfix_str(self, said: str, refresh: bool = True) -> None:
        """What tqdm would show behind the bar; a listener is told rows alone."""

    def tell(self) -> None:
        self._at = time.monotonic()
        self._listener(self._what, self._done, self._total)
