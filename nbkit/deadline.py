"""A request that is given up after some seconds, whatever it hangs on. Standard library only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def within(seconds: float, request: Callable[[], Any]) -> Any:
    """The request's answer, or TimeoutError: a name service that hangs obeys no time-out of its own."""
    box: dict[str, Any] = {}

    def work() -> None:
        try:
            box["answer"] = request()
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=work, daemon=True, name="nbkit-hub")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if "error" in box:
        raise box["error"]
    return box["answer"]
