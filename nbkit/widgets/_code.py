"""Settings written as the Python that makes them: what "Show code" shows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 88


class Source(str):
    """A piece of Python that is written as it stands."""

    __slots__ = ()


def literal(value: Any) -> str:
    """Python that evaluates to `value` (numbers, strings, None, and lists, tuples and dicts of them)."""
    if isinstance(value, Source):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(literal, value))
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, str):
        single = repr(value)
        # Double quotes, as formatters write them, where that needs no further escape.
        return f'"{single[1:-1]}"' if single[0] == "'" and '"' not in single and "\\'" not in single else single
    return repr(value)


def call(function: str, positional: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None) -> Source:
    """`function(positional, name=value)`, over several lines where one is too long."""
    arguments = [literal(value) for value in positional]
    arguments += [f"{name}={literal(value)}" for name, value in (keywords or {}).items()]
    line = f"{function}({', '.join(arguments)})"
    if len(line) <= WIDTH or not arguments:
        return Source(line)
    inside = "".join(f"    {argument.replace(chr(10), chr(10) + '    ')},\n" for argument in arguments)
    return Source(f"{function}(\n{inside})")


def changed(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults; those without one always."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING or value != default or type(value) is not type(default):
            found[field.name] = value
    return found
