"""The README: its example runs, its tables are what the code says, and what it points at is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.lanes import ROOT, run

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(tiny_model_dir: Path, tmp_path: Path) -> None:
    """As it stands there, on a tiny model and for few steps."""
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    short = example.replace('"smollm2-135m-instruct"', repr(str(tiny_model_dir))).replace("max_steps=50", "max_steps=2")
    assert short.count("max_steps=2") == 1 and str(tiny_model_dir) in short
    run(sys.executable, "-c", short, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert list(tmp_path.glob("nbkit-workspace/runs/*/exports/model-q8_0.gguf"))


def test_the_table_of_families_is_what_is_declared() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from tables import families_table
    finally:
        sys.path.pop(0)
    assert families_table() in README, "run: python docs/tables.py"


def test_the_two_commands_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert {"quickstart", "test"} <= set(commands)
    for command in set(commands):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), f"make {command} is not in the Makefile"


@pytest.mark.parametrize("document", [p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))])
def test_what_a_document_points_at_is_there(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{document} points at {target}, which is not there"
