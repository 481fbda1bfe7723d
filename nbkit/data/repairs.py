"""The repairs that a report offers: each a sentence and the recipe that carries it out. Nothing is repaired unasked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nbkit.config import DataRecipe
from nbkit.data.findings import DROPPED, REFUSED, Finding, rows_text, shorten

# kind of fault -> settings of the recipe that repair it: (name, value, what it does, with the rows filled in)
SETTINGS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "too_long": (
        ("too_long", "cut", "Cut {rows} after the last reply that fits"),
        ("too_long", "split", "Split {rows} into conversations that fit"),
        ("too_long", "drop", "Leave out {rows} as too long"),
    ),
    "duplicate": (("duplicates", "drop", "Leave out {rows} as equal to an earlier row"),),
    "reply_first": (("first_reply", "skip", "Leave out the reply at the start of {rows}"),),
    "same_role_twice": (("same_role", "join", "Join the turns of one speaker that follow each other in {rows}"),),
}
DROP = ("faulty", "drop", "Leave out {rows} as not to be trained on")


@dataclass(frozen=True)
class Repair:
    """A repair of some rows. `sentence` says what it does, `setting` is the line of the recipe, `recipe` the whole of it."""

    sentence: str
    setting: tuple[str, str]
    recipe: DataRecipe
    rows: tuple[int, ...]


def offers(recipe: DataRecipe, findings: Iterable[Finding]) -> list[Repair]:
    """What can be done about the rows that are refused or told of, and is not done yet."""
    findings = list(findings)
    asked: dict[tuple[str, str, str, str], set[int]] = {}
    for finding in findings:
        settings: Sequence[tuple[str, str, str]] = SETTINGS.get(finding.kind, ())
        if finding.outcome == REFUSED and finding.kind != "too_long":
            settings = (*settings, DROP)
        for name, value, sentence in settings if finding.outcome != DROPPED else ():
            if getattr(recipe, name) != value:
                asked.setdefault((name, value, sentence, finding.part), set()).add(finding.row)
    return [*_named(recipe, findings), *_changed(recipe, asked)]


def _named(recipe: DataRecipe, findings: Iterable[Finding]) -> list[Repair]:
    """Unknown speakers of whom it is certain who they are; ("roles", "guess") stands for the line of the recipe."""
    certain = [finding for finding in findings if finding.guess and finding.outcome == REFUSED]
    who: dict[str, set[str]] = {}
    for finding in certain:
        name, _, role = finding.guess.partition("=")
        who.setdefault(name, set()).add(role)
    found = {name: min(roles) for name, roles in who.items() if len(roles) == 1 and name not in recipe.roles}
    rows = sorted({finding.row for finding in certain if finding.guess.partition("=")[0] in found})
    if not found:
        return []
    said = ", ".join(f"{shorten(name)} for the {role}" for name, role in found.items())
    changed = dataclasses.replace(recipe, roles={**recipe.roles, **found})
    return [Repair(f"Take {said} in {rows_text(rows)} (roles={found!r}).", ("roles", "guess"), changed, tuple(rows))]


def _changed(recipe: DataRecipe, asked: dict[tuple[str, str, str, str], set[int]]) -> list[Repair]:
    return [
        Repair(
            sentence=f"{sentence.format(rows=_where(part, sorted(rows)))} ({name}={value!r}).",
            setting=(name, value),
            recipe=dataclasses.replace(recipe, **{name: value}),
            rows=tuple(sorted(rows)),
        )
        for (name, value, sentence, part), rows in asked.items()
    ]


def _where(part: str, rows: list[int]) -> str:
    return ("held-out " if part == "held_out" else "") + rows_text(rows)
