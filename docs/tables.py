"""Writes the generated tables into README.md and docs/templates.md: `python docs/tables.py`. Tests hold that they are what the
code says."""

from __future__ import annotations

import re
from pathlib import Path

from nbkit.data.templates import NAMED
from nbkit.families import all_families

README = Path(__file__).resolve().parent.parent / "README.md"
TEMPLATES = Path(__file__).resolve().parent / "templates.md"


def families_table() -> str:
    """The declared families as a Markdown table: title, the config's model types, checkpoints in the picker."""
    lines = ["| family | `model_type` | checkpoints in the picker |", "|---|---|---|"]
    for family in all_families():
        names = [entry.name.split("/")[-1] for entry in family.checkpoints]
        types = ", ".join(f"`{name}`" for name in family.model_types)
        lines.append(f"| {family.title} | {types} | {', '.join(names) or 'any from the hub'} |")
    return "\n".join(lines)


def templates_table() -> str:
    """The named chat templates as a Markdown table."""
    lines = ["| name | also | stop token | system message | tools | thinking | format |", "|---|---|---|---|---|---|---|"]
    for named in NAMED:
        stop = f"`{named.stop}`" if named.stop else "EOS"
        shown = ["yes" if has else "" for has in (named.tools, named.thinking)]
        lines.append(
            f"| `{named.name}` | {', '.join(named.aliases)} | {stop} | {named.system} | {' | '.join(shown)} | {named.source} |"
        )
    return "\n".join(line.replace("<|", "<\\|").replace("|>", "\\|>") for line in lines)


def write(file: Path, name: str, table: str) -> None:
    """Put a table between the marks of its name."""
    text = file.read_text(encoding="utf-8")
    made, count = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + table + "\n" + m[2], text, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{file.name} has no place for the table of {name}: <!-- {name} --> ... <!-- /{name} -->")
    file.write_text(made, encoding="utf-8")


def main() -> None:
    write(README, "families", families_table())
    write(TEMPLATES, "templates", templates_table())


if __name__ == "__main__":
    main()
