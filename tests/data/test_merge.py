"""Merged prompts: columns, optional parts, and patterns that cannot be read."""

from __future__ import annotations

from typing import Any

import pytest

from nbkit.data.findings import RowFault
from nbkit.data.merge import parse
from nbkit.errors import DataError


@pytest.mark.parametrize(
    ("pattern", "row", "text"),
    [
        ("{a}", {"a": "x"}, "x"),
        ("Q: {a}[[ in {b}]].", {"a": "x", "b": "y"}, "Q: x in y."),
        ("Q: {a}[[ in {b}]].", {"a": "x", "b": ""}, "Q: x."),
        ("Q: {a}[[ in {b}]].", {"a": "x", "b": float("nan")}, "Q: x."),
        ("Q: {a}[[ in {b}]].", {"a": "x"}, "Q: x."),
        ("[[{b} ]][[{c} ]]{a}", {"a": 1, "b": 2.5, "c": None}, "2.5 1"),
        ("{{{a}}} [not] ]", {"a": "x"}, "{x} [not] ]"),
        ("{a b}{a b}", {"a b": "{c}[["}, "{c}[[{c}[["),
        ("[[both {a} and {b}]]{c}", {"a": "x", "b": "", "c": True}, "True"),
    ],
)
def test_filled_patterns(pattern: str, row: dict[str, Any], text: str) -> None:
    assert parse(pattern).fill(row) == text


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({}, "missing_column", "'a', which the prompt needs, is missing"),
        ({"a": None}, "null_prompt", "'a', which the prompt needs, is null"),
        ({"a": " "}, "empty_prompt", "'a', which the prompt needs, is empty"),
        ({"a": ["x"]}, "wrong_type", "'a' is a list of 1, not text"),
    ],
)
def test_rows_that_lack_what_is_needed(row: dict[str, Any], kind: str, message: str) -> None:
    with pytest.raises(RowFault, match=message) as caught:
        parse("x {a}").fill(row)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "names no column"),
        ("text", "'text' names no column"),
        ("[[{a}", "does not close"),
        ("{a}]]", r"\]\] at character 4"),
        ("[[[[{a}]]]]", r"\[\[ at character 3"),
        ("{a", "{ at character 1"),
        ("a}", "} at character 2"),
        ("{}", "{} at character 1"),
    ],
)
def test_patterns_that_cannot_be_read(pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(pattern)
    assert parse("{a}").columns == ("a",)
