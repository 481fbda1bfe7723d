"""One text out of several columns: `{column}` stands for a cell, and what is in `[[ ]]` may be missing. Standard library only.

    "Answer the question.[[\\nContext: {context}]]\\n{question}"

A part in `[[ ]]` is left out where one of its cells is empty or null; outside of them an empty cell is a fault of the row.
`{{` and `}}` are braces.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nbkit.data.findings import RowFault, shorten
from nbkit.errors import DataError

TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|\[\[|\]\]|[{}]")


@dataclass(frozen=True)
class _Part:
    texts: tuple[str, ...]  # one more than the columns
    columns: tuple[str, ...]
    optional: bool


@dataclass(frozen=True)
class Pattern:
    """A merged prompt, read by `parse`."""

    parts: tuple[_Part, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for part in self.parts for column in part.columns))

    def fill(self, row: Mapping[str, Any]) -> str:
        """Raises: RowFault where a column is missing, or a cell that is needed is null, empty or no text."""
        text = ""
        for part in self.parts:
            cells = [_cell(row, column, part.optional) for column in part.columns]
            if None not in cells:
                text += part.texts[0] + "".join(f"{cell}{after}" for cell, after in zip(cells, part.texts[1:], strict=True))
        return text


def _cell(row: Mapping[str, Any], column: str, optional: bool) -> str | None:
    value = row.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip()):
        if optional:
            return None
        if column not in row:
            raise RowFault("missing_column", f"the column {column!r}, which the prompt needs, is missing")
        kind = "empty_prompt" if isinstance(value, str) else "null_prompt"
        raise RowFault(kind, f"the column {column!r}, which the prompt needs, is {'empty' if isinstance(value, str) else 'null'}")
    if isinstance(value, (str, bool, int, float)):
        return str(value) if not isinstance(value, int) or abs(value) < 10**1000 else shorten(value)
    raise RowFault("wrong_type", f"the column {column!r} is {shorten(value)}, not text")


@lru_cache(maxsize=64)
def parse(pattern: str) -> Pattern:
    """Raises: DataError for brackets that do not match, or a pattern without a column."""
    parts: list[_Part] = []
    texts, columns, optional, at = [""], [], False, 0
    for token in TOKEN.finditer(pattern):
        texts[-1] += pattern[at : token.start()]
        at = token.end()
        mark = token[0]
        if mark in ("{{", "}}"):
            texts[-1] += mark[0]
        elif mark in ("[[", "]]"):
            if optional == (mark == "[["):
                raise DataError(
                    f"The merged prompt has {mark} at character {token.start() + 1}, which does not match; parts are [[ ]]."
                )
            parts.append(_Part(tuple(texts), tuple(columns), optional))
            texts, columns, optional = [""], [], not optional
        elif mark in ("{", "}") or not token[1].strip():
            raise DataError(
                f"The merged prompt has {mark} at character {token.start() + 1}; write columns as {{column}}, braces as {{{{."
            )
        else:
            columns.append(token[1])
            texts.append("")
    texts[-1] += pattern[at:]
    if optional:
        raise DataError("The merged prompt opens a part with [[ and does not close it; write ]] after it.")
    found = Pattern(
        tuple(part for part in (*parts, _Part(tuple(texts), tuple(columns), False)) if part.columns or part.texts != ("",))
    )
    if not found.columns:
        raise DataError(f"The merged prompt {pattern[:60]!r} names no column; write each as {{column}}.")
    return found
