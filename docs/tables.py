"""Writes the generated tables into README.md: `python docs/tables.py`. A test holds that they are what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from nbkit.families import all_families

README = Path(__file__).resolve().parent.parent / "README.md"


def families_table() -> str:
    """The declared families as a Markdown table: title, the config's model types, checkpoints in the picker."""
    lines = ["| family | `model_type` | checkpoints in the picker |", "|---|---|---|"]
    for family in all_families():
        names = [entry.name.split("/")[-1] for entry in family.checkpoints]
        types = ", ".join(f"`{name}`" for name in family.model_types)
        lines.append(f"| {family.title} | {types} | {', '.join(names) or 'any from the hub'} |")
    return "\n".join(lines)


def main() -> None:
    text = README.read_text(encoding="utf-8")
    made, count = re.subn(
        r"(<!-- families -->\n).*?(<!-- /families -->)", lambda m: m[1] + families_table() + "\n" + m[2], text, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit("README.md has no place for the table of families: <!-- families --> ... <!-- /families -->")
    README.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
