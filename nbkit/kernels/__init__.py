"""Kernels: one op a file, each with its plain-torch reference beside it. Every op is found by looking into this folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from nbkit.kernels._op import Case, KernelOp

__all__ = ["Case", "KernelOp", "all_ops"]


@cache
def all_ops() -> tuple[KernelOp, ...]:
    """Every op, by name. A new op is one new file here that defines `OP`."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return tuple(importlib.import_module(f"{__name__}.{name}").OP for name in names)
