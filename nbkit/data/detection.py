"""The format of a source and its columns, found with a confidence and a reason, or told by the recipe. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from nbkit.config import DataRecipe
from nbkit.data import merge
from nbkit.data.conversion import NO, PROMPT_ROLE, ROLES, YES
from nbkit.data.findings import shorten
from nbkit.data.messages import CONTENT_KEYS, SPEAKER_KEYS, human_turns, is_null
from nbkit.data.rows import Source
from nbkit.errors import DataError, nearest

SURE_ENOUGH = 0.5  # below this confidence nothing is assumed
EXPECTED = (
    "alpaca (columns instruction, output and, if you like, input), sharegpt (a column conversations: a list of "
    '{"from", "value"}), messages (a column messages: a list of {"role", "content"}), prompt_completion (prompt, completion), '
    "preference (prompt, chosen, rejected), kto (prompt, completion, label) or text (text)"
)
# Usual names of a prompt and its completion, beside those of the formats themselves.
PAIRS = (
    *(("prompt", "response"), ("question", "answer"), ("instruction", "response"), ("query", "response"), ("query", "answer")),
    *(("question", "response"), ("prompt", "answer"), ("prompt", "output"), ("input", "output"), ("problem", "solution")),
)


@dataclass(frozen=True)
class Detected:
    """What was found.

    Attributes:
        recipe: with its format and columns filled in.
        reason: why, in one sentence.
        confidence: 0 to 1; 1 where the recipe says so.
        runner_up: the format and columns that fit next best, as text; None where there is none.
    """

    recipe: DataRecipe
    reason: str
    confidence: float = 1.0
    runner_up: str | None = None


class _Candidate(NamedTuple):
    form: str
    columns: dict[str, str]
    reason: str
    sure: float  # how sure the names and shapes make it, 0 to 1
    rows: frozenset[int]  # those of the first rows that fit

    @property
    def score(self) -> float:
        return self.sure * len(self.rows)

    def __str__(self) -> str:
        return f"{self.form} ({_listed(list(self.columns.values()))})"


def detect(source: Source, recipe: DataRecipe) -> Detected:
    """The format and the columns of the rows; what the recipe says comes first.

    Raises: DataError saying which columns were seen, what is accepted, and how to name columns, where no format fits or
    none fits clearly.
    """
    columns = source.columns
    if not columns:
        first = source.head[0]
        seen = first.fault.sentence if first.fault else f"it is {shorten(first.value)}"
        raise DataError(f"No row of {source.name} is an object with columns; row {first.number}: {seen}. Accepted: {EXPECTED}.")
    if recipe.format != "auto" or recipe.columns or recipe.prompt is not None:
        return _as_told(source, recipe, columns)
    found = sorted(_candidates(source, columns), key=lambda candidate: -candidate.score)  # stable: the first named wins a tie
    if not found and (named := _by_name_alone(columns)):
        reason = f"the columns {_listed(list(named.columns.values()))} are named so, though no row holds what belongs there"
        return Detected(
            replace(recipe, format=named.form, columns=named.columns), _sentence(named.form, named.columns, reason, columns), 0.5
        )
    if not found:
        raise DataError(
            f"{source.name} is in no known format: its columns are {_listed(columns)}. Accepted: {EXPECTED}. "
            f"Other columns can be named: {_example(columns)}."
        )
    return _judged(source, recipe, found, columns)


def _judged(source: Source, recipe: DataRecipe, found: list[_Candidate], columns: Sequence[str]) -> Detected:
    best, second = found[0], found[1] if len(found) > 1 else None
    share = len(best.rows) / len(frozenset().union(*(candidate.rows for candidate in found)))
    near = second.score / best.score if second else 0.0
    confidence = round(best.sure * share * (1 - 0.25 * near), 3)
    if confidence < SURE_ENOUGH:
        other = f" or as {second}" if second else ""
        raise DataError(
            f"{source.name} may be read as {best}{other}, but not surely ({confidence:.0%}); its columns are {_listed(columns)}. "
            f"Say which: DataRecipe(format={best.form!r}, columns={best.columns!r})."
        )
    reason = _sentence(best.form, best.columns, best.reason, columns)
    if second and near > 0.5:
        reason += f" (it could also be {second}: DataRecipe(format={second.form!r}) says so)"
    filled = replace(recipe, format=best.form, columns=best.columns)
    return Detected(filled, reason, confidence, str(second) if second else None)


def _example(columns: Sequence[str]) -> str:
    return f"DataRecipe(format='alpaca', columns={{'instruction': {columns[0]!r}, 'output': {columns[-1]!r}}})"


def _listed(columns: Sequence[str], most: int = 20) -> str:
    more = f" and {len(columns) - most} more" if len(columns) > most else ""
    return ", ".join(shorten(column, 40) for column in columns[:most]) + more


def _sentence(form: str, columns: Mapping[str, str], reason: str, seen: Sequence[str]) -> str:
    left = [column for column in seen if column not in columns.values()]
    unused = f"; {_listed(left, 6)} not used" if left else ""
    return f"{form}, because {reason}{unused}"


# -- told ------------------------------------------------------------------------------------------


def _as_told(source: Source, recipe: DataRecipe, seen: Sequence[str]) -> Detected:
    """The recipe names the format, the columns, or both; what it leaves out takes the usual column."""
    form = recipe.format if recipe.format != "auto" else _form_told(recipe)
    for role, column in recipe.columns.items():
        if role not in ROLES[form]:
            raise DataError(f"The format {form} has no role {role!r}; its roles are {', '.join(ROLES[form])}.")
        if column not in seen:
            raise DataError(f"{source.name} has no column {column!r}; its columns are {_listed(seen)}.{nearest(column, seen)}")
    lower = {column.casefold(): column for column in reversed(seen)}
    values = [row.value for row in source.head if isinstance(row.value, Mapping)]
    filled: dict[str, str] = {}
    for role, required in ROLES[form].items():
        column = recipe.columns.get(role) or lower.get(role)
        if column and (required or role in recipe.columns or _suits(role, column, values)):
            filled[role] = column
    merged = merge.parse(recipe.prompt) if recipe.prompt is not None else None
    if merged is not None:
        if form not in PROMPT_ROLE:
            raise DataError(f"The recipe's prompt goes with the formats {', '.join(PROMPT_ROLE)}, not with {form}.")
        missing = next((column for column in merged.columns if column not in seen), None)
        if missing is not None:
            raise DataError(
                f"The recipe's prompt names the column {missing!r}, which {source.name} has not; its columns are "
                f"{_listed(seen)}.{nearest(missing, seen)}"
            )
        filled.pop(PROMPT_ROLE[form], None)
        filled.pop("input", None)
    for role, required in ROLES[form].items():
        if required and role not in filled and not (merged is not None and role == PROMPT_ROLE[form]):
            raise DataError(
                f"{source.name} has no column {role!r}, which the format {form} needs; its columns are {_listed(seen)}. "
                f"Name the right one: DataRecipe(format={form!r}, columns={{{role!r}: {seen[0]!r}}})."
            )
    used = {**filled, **({f"prompt {i}": column for i, column in enumerate(merged.columns)} if merged else {})}
    return Detected(replace(recipe, format=form, columns=filled), _sentence(form, used, "the recipe says so", seen))


def _form_told(recipe: DataRecipe) -> str:
    """The first format that has all roles the recipe names."""
    fitting = [name for name, roles in ROLES.items() if set(recipe.columns) <= set(roles)]
    if recipe.prompt is not None:
        fitting = [name for name in fitting if name in PROMPT_ROLE]
    if fitting:
        return fitting[0]
    roles = list(dict.fromkeys(role for known in ROLES.values() for role in known))
    wrong = next((role for role in recipe.columns if role not in roles), next(iter(recipe.columns)))
    formats = "; ".join(f"{name}: {', '.join(roles)}" for name, roles in ROLES.items())
    raise DataError(
        f"The recipe's columns name {wrong!r}, which no format has together with the rest; the roles are {formats}."
        f"{nearest(wrong, roles)}"
    )


def _suits(role: str, column: str, values: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a column named system or tools holds what that role needs, as far as it holds anything."""
    if role not in ("system", "tools"):
        return True
    cells = [value[column] for value in values if not is_null(value.get(column)) and value[column] != ""]
    kinds = (str, list, tuple) if role == "tools" else (str,)
    return 2 * sum(isinstance(cell, kinds) for cell in cells) >= len(cells)


# -- found -----------------------------------------------------------------------------------------


def _candidates(source: Source, columns: Sequence[str]) -> list[_Candidate]:
    """Every reading that at least one of the first rows fits, the more telling ones first."""
    values = [row.value for row in source.head if isinstance(row.value, Mapping)]
    lower = {column.casefold(): column for column in reversed(columns)}
    named = [*_by_names(values, lower), *_by_turns(values, columns), *_by_pairs(values, lower)]
    found = [one for one in named if one.rows and not any(_within(one, other) for other in named)]
    found += [one for one in _texts(values, columns, lower, bool(found)) if one.rows]
    wanted = {role for roles in ROLES.values() for role in roles if role in ("system", "tools")}
    extra = {role: lower[role] for role in wanted if role in lower and _suits(role, lower[role], values)}
    filled = []
    for one in found:
        more = {role: column for role, column in extra.items() if role in ROLES[one.form] and column not in one.columns.values()}
        filled.append(one._replace(columns={**one.columns, **more}))
    return filled


def _within(one: _Candidate, other: _Candidate) -> bool:
    """Whether a reading is but a part of another one: the turns in the column chosen are no set of their own."""
    if not other.rows or not set(one.columns.values()) < set(other.columns.values()):
        return False
    sides = one.form in ("messages", "sharegpt") and other.form in ("preference", "kto", "prompt_completion")
    return sides or len(one.rows) <= 2 * len(other.rows)


def _by_names(values: Sequence[Mapping[str, Any]], lower: Mapping[str, str]) -> Iterable[_Candidate]:
    """The formats that their columns' names tell."""
    for form, sure, needed in (
        ("preference", 1.0, ("chosen", "rejected")),
        ("kto", 1.0, ("prompt", "completion", "label")),
        ("prompt_completion", 0.95, ("prompt", "completion")),
        ("alpaca", 0.95, ("instruction", "output")),
    ):
        if not all(role in lower for role in needed):
            continue
        columns = {role: lower[role] for role in ROLES[form] if role in lower and role not in ("system", "tools")}
        rows = frozenset(i for i, value in enumerate(values) if _row_fits(form, [(r, value.get(lower[r])) for r in needed]))
        if form == "preference" and "prompt" not in columns and not _carry_prompts(values, lower):
            continue
        yield _Candidate(form, columns, f"there are columns {', '.join(map(repr, columns.values()))}", sure, rows)


def _row_fits(form: str, cells: Sequence[tuple[str, Any]]) -> bool:
    """Whether a row has what belongs there, or nothing, and not nothing at all."""
    there = [(role, cell) for role, cell in cells if not is_null(cell) and cell not in ("", [], ())]
    return bool(there) and all(_fits(form, role, cell) for role, cell in there)


def _fits(form: str, role: str, cell: Any) -> bool:
    if role == "label":
        return isinstance(cell, (bool, int, float)) and cell in (0, 1) or isinstance(cell, str) and cell.casefold() in (*YES, *NO)
    return isinstance(cell, str) or (form != "alpaca" and _form_of(cell) is not None)


def _carry_prompts(values: Sequence[Mapping[str, Any]], lower: Mapping[str, str]) -> bool:
    """Whether the chosen answers come with their prompts: as turns, or as a text that is written as turns."""
    cells = (value.get(lower["chosen"]) for value in values)
    return any(_form_of(cell) is not None or (isinstance(cell, str) and human_turns(cell) is not None) for cell in cells)


def _by_name_alone(columns: Sequence[str]) -> _Candidate | None:
    """The format whose columns are there by name, so that each row's fault can be told rather than none known."""
    lower = {column.casefold(): column for column in reversed(columns)}
    for form in ("preference", "kto", "prompt_completion", "alpaca", "messages", "sharegpt", "text"):
        needed = [role for role, required in ROLES[form].items() if required]
        if all(role in lower for role in needed):
            filled = {role: lower[role] for role in ROLES[form] if role in lower and role not in ("system", "tools")}
            return _Candidate(form, filled, "", SURE_ENOUGH, frozenset())
    return None


def _by_turns(values: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Iterable[_Candidate]:
    """Columns that hold lists of turns, whatever their names are."""
    usual = ("messages", "conversations")
    for column in sorted(columns, key=lambda name: name.casefold() not in usual):
        forms = [_form_of(value.get(column)) for value in values]
        for form, role, keys in (
            ("messages", "messages", '{"role", "content"}'),
            ("sharegpt", "conversations", '{"from", "value"}'),
        ):
            rows = frozenset(i for i, found in enumerate(forms) if found == form)
            sure = 0.97 if column.casefold() in usual else 0.96
            yield _Candidate(form, {role: column}, f"the column {column!r} holds lists of {keys}", sure, rows)


def _form_of(value: Any) -> str | None:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], Mapping):
        return None
    turn = value[0]
    if not any(key in turn for key in SPEAKER_KEYS) or not any(key in turn for key in CONTENT_KEYS):
        return None
    return "messages" if "role" in turn and "value" not in turn else "sharegpt"


def _by_pairs(values: Sequence[Mapping[str, Any]], lower: Mapping[str, str]) -> Iterable[_Candidate]:
    for prompt, completion in PAIRS:
        if prompt in lower and completion in lower and ("instruction" not in lower or completion != "output"):
            columns = {"prompt": lower[prompt], "completion": lower[completion]}
            rows = frozenset(i for i, value in enumerate(values) if all(isinstance(value.get(c), str) for c in columns.values()))
            reason = f"the columns {lower[prompt]!r} and {lower[completion]!r} are usual names of a prompt and its completion"
            yield _Candidate("prompt_completion", columns, reason, 0.65, rows)


def _texts(
    values: Sequence[Mapping[str, Any]], columns: Sequence[str], lower: Mapping[str, str], others: bool
) -> Iterable[_Candidate]:
    for name, sure in (("text", 0.5 if others else 0.9), ("content", 0.3)):
        if name in lower:
            rows = frozenset(i for i, value in enumerate(values) if isinstance(value.get(lower[name]), str))
            more = " and nothing else" if len(columns) == 1 else ""
            yield _Candidate("text", {"text": lower[name]}, f"there is a column {lower[name]!r} of text{more}", sure, rows)
