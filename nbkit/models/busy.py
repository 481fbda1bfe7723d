"""Which thread has a model in hand: what another one may not bind, unbind or measure meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nbkit.errors import ModelError
from nbkit.models.unshared import Unshared

MARK = "_nbkit_busy"  # instance attribute of the causal LM while a thread has it in hand


class _Hand(Unshared):
    """A copy of the model is in nobody's hand."""

    def __init__(self, what: str) -> None:
        self.what, self.thread = what, threading.current_thread()


@contextmanager
def in_hand(base: Any, what: str) -> Iterator[None]:
    """Within: the causal LM `base` is "being trained", say, by this thread."""
    vars(base)[MARK] = _Hand(what)
    try:
        yield
    finally:
        vars(base).pop(MARK, None)


def require_free(base: Any, doing: str) -> None:
    """Raises: ModelError where another thread has the model in hand; `doing` ("certify") would spoil its work."""
    hand: _Hand | None = vars(base).get(MARK)
    if hand is None or hand.thread is threading.current_thread() or not hand.thread.is_alive():
        return
    raise ModelError(f"The model is {hand.what} at the moment, and {doing} would reach into that; wait for its end or stop it.")
