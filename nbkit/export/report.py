"""`ExportReport`: what was written, where, and how the read-back went. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """One finished export. `str()` is one line; in a notebook it is shown as a small table.

    Attributes:
        kind: "adapter", "merged_16bit" or "gguf".
        path: the folder, or for GGUF the file.
        bytes: of all files written.
        verdict: what the read-back found, in words.
        check: its figures, e.g. `max_relative_logit_difference`.
    """

    kind: str
    path: Path
    bytes: int
    seconds: float
    verdict: str
    check: Mapping[str, float | int | str]

    def __str__(self) -> str:
        return f"{self.kind}: {size_text(self.bytes)} in {self.path}, {self.seconds:.1f} s; {self.verdict}"

    def _repr_html_(self) -> str:
        facts = {"written to": self.path, "size": size_text(self.bytes), "time": f"{self.seconds:.1f} s", "check": self.verdict}
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
        return f"<table><caption>{escape(self.kind)}</caption>{rows}</table>"


def size_text(count: float) -> str:
    """Bytes in decimal units, as disks are sold: '269.1 MB', '15.3 GB'."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
