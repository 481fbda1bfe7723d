"""What is tied to one instance of a model, and is None in a copy or a pickle of it."""

from __future__ import annotations

from typing import Any


class Unshared:
    """A copied or pickled model runs stock until it is patched itself."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())


def _nothing() -> None:
    return None
