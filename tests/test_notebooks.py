"""The notebooks: equal to their sources, fit to be opened anywhere, and the quickstart does what it promises."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

from tests.lanes import ROOT, run

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BOUND = 2.5e9  # bytes of memory the quickstart may take


def code(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_notebooks_equal_their_sources() -> None:
    done = subprocess.run([sys.executable, ROOT / "notebooks" / "build.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + "run: python notebooks/build.py"
    assert {path.stem for path in NOTEBOOKS} == {path.stem for path in (ROOT / "notebooks" / "src").glob("*.py")}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_opens_anywhere(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert sum(line.startswith("# ") for text in prose for line in text.splitlines()) == 1, "a notebook has one title"
    assert "**Needs:**" in prose[0]
    with (ROOT / "pyproject.toml").open("rb") as file:
        address = tomllib.load(file)["project"]["urls"]["Repository"]
    for host in ("colab.research.google.com/github/", "kaggle.com/kernels/welcome", "mybinder.org/v2/gh/", f"({address}/blob/"):
        assert host in prose[0], f"no badge for {host}"
    for source in code(path):
        compile(source, path.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert 'find_spec("nbkit")' in code(path)[0], "the first code cell installs nbkit where it is missing"
    assert address in code(path)[0]
    assert "torch" not in code(path)[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_install_cell_does_nothing_where_nbkit_is(path: Path) -> None:
    guard = """
import subprocess, sys
def refuse(*arguments, **options):
    raise SystemExit("the install cell started a process")
subprocess.run = refuse
"""
    check = "\nassert 'torch' not in sys.modules and 'nbkit' not in sys.modules\nprint('quiet')"
    assert run(sys.executable, "-c", guard + code(path)[0] + check).strip() == "quiet"


@pytest.mark.slow
def test_the_quickstart_keeps_its_promises(tmp_path: Path) -> None:
    """As `make quickstart` runs it: exits 0 only if the loss fell, the fields are right and every export is there."""
    printed = run(sys.executable, "notebooks/run.py", "notebooks/quickstart.ipynb", "--out", tmp_path, timeout=900)
    print(printed[-3000:])
    summary = json.loads((tmp_path / "nbkit-workspace" / "quickstart.json").read_text(encoding="utf-8"))
    assert summary["rows"] == 30 and len(summary["gguf"]) == 2
    peak = float(printed.split("peak memory ")[1].split(" GB")[0]) * 1e9
    assert peak <= BOUND
    html = (tmp_path / "quickstart.html").read_text(encoding="utf-8")
    assert html.count("<svg") >= 1, "the plot stands in the HTML in its static form"
    assert "application/vnd.jupyter.widget-state+json" not in html
