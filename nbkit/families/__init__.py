"""Model families: one file of facts each, found by looking into this folder. Standard library only.

A new family is one new file here that defines `FAMILY`; nothing else lists it.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from nbkit.families._family import Checkpoint, Family

__all__ = ["Checkpoint", "Family", "all_families", "checkpoint", "find"]


@cache
def all_families() -> tuple[Family, ...]:
    """Every declared family, by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return tuple(importlib.import_module(f"{__name__}.{name}").FAMILY for name in names)


def find(model_type: str) -> Family | None:
    """The family of a config's `model_type`, or None if none is declared."""
    return next((family for family in all_families() if model_type in family.model_types), None)


def checkpoint(name: str) -> tuple[Family, Checkpoint] | None:
    """The checkpoint a name stands for (its short name or hub id, in any case), or None."""
    wanted = name.strip().lower()
    for family in all_families():
        for entry in family.checkpoints:
            if wanted in (entry.name.lower(), entry.repository.lower()):
                return family, entry
    return None
