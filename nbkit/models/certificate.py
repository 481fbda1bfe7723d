"""What `nbkit.certify` hands back: every comparison as a row, what was not compared and why, and one verdict."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nbkit import markup

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One thing compared. `ratio`: the largest error by what the rule allows there, so that 1 and less passes.

    `kind` is "loss", "gradient" or "kernel"; `leg` says in which precision and against what; `error` and `allowance` are
    the figures behind the ratio, relative to the size of the tensor; `note` what is special about it.
    """

    kind: str
    name: str
    leg: str
    ratio: float
    error: float
    stock_error: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


@dataclass(frozen=True)
class Certificate:
    """The outcome of `nbkit.certify`. Show it by `print`, or as the value of a cell; keep it by `to_json(path)`.

    `rows` holds every tensor; the table shows the worst of each kind. `stock` names what runs stock and why, `skipped` what
    could not be compared and why. `passed` is True where at least the loss was compared and no row is outside the rule.
    """

    model: str
    family: str | None
    dtype: str
    weights: str
    batch: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    date: str
    seconds: float
    rows: tuple[Row, ...]
    how: tuple[str, ...] = ()
    stock: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    schema: int = field(default=SCHEMA)

    @property
    def failures(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.ok)

    @property
    def passed(self) -> bool:
        return not self.failures and any(row.kind == "loss" for row in self.rows)

    @property
    def verdict(self) -> str:
        """One sentence."""
        what = f"{self.model} in {self.dtype} on {self.machine.get('device', '?')}"
        if self.failures:
            worst = max(self.failures, key=lambda row: row.ratio)
            others = f" and {len(self.failures) - 1} more" if len(self.failures) > 1 else ""
            return (
                f"NOT EXACT: {what}: {worst.kind} {worst.name} ({worst.leg}){others} errs {worst.ratio:.3g} times what the rule "
                "allows; run nbkit.unpatch(model) to train stock, and report this certificate."
            )
        if not self.passed:
            return f"NOT CERTIFIED: {what}: loss and gradients were not compared; the reasons are below."
        count = sum(row.kind == "gradient" for row in self.rows)
        kernels = len({row.name.split()[0] for row in self.rows if row.kind == "kernel"})
        left = f"; {len(self.skipped)} comparisons were left out, see below" if self.skipped else ""
        return (
            f"EXACT: {what}: the loss, {count} gradient comparisons and {kernels} kernel ops are all within the rule, the worst "
            f"at {max(row.ratio for row in self.rows):.0%} of what it allows{left}."
        )

    def table(self) -> list[tuple[str, str, str, str, str, str]]:
        """(what, compared, error, stock's error, share of what is allowed, verdict) for the worst row of each group."""
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.kind, _group(row), row.leg), []).append(row)
        shown = []
        for (kind, name, leg), rows in groups.items():
            worst = max(rows, key=lambda row: row.ratio)
            count = f" x {len(rows)}" if len(rows) > 1 else ""
            theirs = "-" if worst.stock_error is None else f"{worst.stock_error:.1e}"
            verdict = ("ok" if worst.ok else "OUTSIDE") + (f", {worst.note}" if worst.note else "")
            shown.append((f"{kind} {name}{count}".strip(), leg, f"{worst.error:.1e}", theirs, f"{worst.ratio:.0%}", verdict))
        return shown

    def _notes(self) -> list[str]:
        return [
            *(f"path: {text}" for text in self.how),
            *(f"runs stock: {text}" for text in self.stock),
            *(f"not compared: {text}" for text in self.skipped),
        ]

    def _about(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        commit = f", commit {self.commit[:12]}" if self.commit else ""
        return f"{self.date}, {self.batch}, {self.weights}; {versions}{commit}; {self.seconds:.1f} s"

    def __str__(self) -> str:
        rows = [_HEAD, *self.table()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.verdict, *lines, *self._notes(), self._about()])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        notes = markup.tag("ul", None, *(markup.tag("li", None, note) for note in self._notes()))
        return markup.join(
            (
                markup.paragraph("nbk-verdict", markup.tag("b", None, self.verdict)),
                markup.table("Comparisons with the stock model", _HEAD, self.table()),
                notes,
                markup.paragraph("nbk-about", self._about()),
            )
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON, every tensor with its figures; also written to `path` if one is given."""
        figures = asdict(self) | {"passed": self.passed, "verdict": self.verdict}
        text = json.dumps(_plain(figures), indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text


_HEAD = ("what", "compared", "error", "stock's", "of allowed", "")


def _group(row: Row) -> str:
    """Gradients of one kind of weight in all layers share a line: `q_proj.lora_A`."""
    if row.kind != "gradient":
        return row.name
    parts = [part for part in row.name.split(".") if not part.isdigit() and part not in ("default", "weight", "base_layer")]
    return ".".join(parts[-2:])


def _plain(value: Any) -> Any:
    """Figures that JSON has no word for (inf, nan) as text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value
