"""The one exception that speaks to the user.

A message of `NbkitError` says in one sentence what is wrong, where, and what to do.
In a notebook it is shown as that sentence alone, without a traceback (IPython's
`_render_traceback_` protocol); under pytest, nbmake and plain Python it is an ordinary exception.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class NbkitError(Exception):
    """A fault the user can act on. `str(error)` is the whole message."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class ConfigError(NbkitError):
    """A setting is out of range, unknown, or contradicts another."""


class ModelError(NbkitError):
    """A model name, folder, download or weight format is not usable."""


class DataError(NbkitError):
    """A data source or its rows cannot be trained on.

    `columns`: those that were seen, where it is not clear which holds what; panels offer them.
    `repairs`: as `DataReport.repairs`, where no row is left; panels offer them too.
    """

    columns: tuple[str, ...] = ()
    repairs: tuple[Any, ...] = ()


class TrainingError(NbkitError):
    """A run cannot start, or cannot go on."""


class ExportError(NbkitError):
    """An export could not be written, or what was written does not equal what was trained."""


def nearest(word: str, choices: Iterable[str], count: int = 3) -> str:
    """' Did you mean a, b?' for the known words most like `word`; '' if none is like it."""
    lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower(), lower, n=count, cutoff=0.5)
    return f" Did you mean {', '.join(lower[f] for f in found)}?" if found else ""
