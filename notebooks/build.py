"""Builds the notebooks from `notebooks/src/*.py` (percent format), so that they are reviewed and edited as Python.

    python notebooks/build.py            writes notebooks/*.ipynb
    python notebooks/build.py --check    exits 1 if one of them is not what its source says

`{{badges}}` in a markdown cell and the cell `# {{install}}` are filled in here; the repository's address comes from
pyproject.toml. Notebooks carry no outputs, no execution counts and no widget state.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path
from urllib.parse import quote

import nbformat

HERE = Path(__file__).resolve().parent
CELL = re.compile(r"^# %%(?P<markdown> \[markdown\])?.*$", re.MULTILINE)

INSTALL = """\
# Installs nbkit where it is missing, as on Colab or Kaggle; changes nothing that is already there.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("nbkit") is None:
    preinstalled = "COLAB_RELEASE_TAG" in os.environ or "KAGGLE_KERNEL_RUN_TYPE" in os.environ
    package = f"nbkit-llm[{{'colab' if preinstalled else 'gpu'}}] @ git+{repository}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)"""


def repository() -> str:
    """The repository's address, from the one place that knows it."""
    with (HERE.parent / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["urls"]["Repository"]


def badges(name: str) -> str:
    """One markdown line that opens notebook `name` on Colab, Kaggle, Binder and GitHub."""
    address = repository()
    project = address.removeprefix("https://github.com/")
    path = f"notebooks/{name}.ipynb"
    links = {
        "Open in Colab": (
            "https://colab.research.google.com/assets/colab-badge.svg",
            f"https://colab.research.google.com/github/{project}/blob/main/{path}",
        ),
        "Open in Kaggle": (
            "https://kaggle.com/static/images/open-in-kaggle.svg",
            f"https://kaggle.com/kernels/welcome?src={address}/blob/main/{path}",
        ),
        "Launch Binder": (
            "https://mybinder.org/badge_logo.svg",
            f"https://mybinder.org/v2/gh/{project}/HEAD?labpath={quote(path, safe='')}",
        ),
        "View on GitHub": ("https://img.shields.io/badge/view-on%20GitHub-181717?logo=github", f"{address}/blob/main/{path}"),
    }
    return " ".join(f"[![{text}]({image})]({link})" for text, (image, link) in links.items())


def cells(name: str, text: str) -> list[nbformat.NotebookNode]:
    """The cells of a percent-format source; what stands before the first `# %%` is the source's own docstring."""
    marks = list(CELL.finditer(text))
    made = []
    for number, mark in enumerate(marks):
        end = marks[number + 1].start() if number + 1 < len(marks) else len(text)
        body = text[mark.end() : end].strip("\n")
        if mark["markdown"]:
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
            cell = nbformat.v4.new_markdown_cell(body.replace("{{badges}}", badges(name)))
        else:
            cell = nbformat.v4.new_code_cell(INSTALL.format(repository=repository()) if body == "# {{install}}" else body)
        cell["id"] = f"{name}-{number:02d}"
        made.append(cell)
    return made


def notebook(source: Path) -> str:
    """The JSON text of the notebook that `source` says."""
    made = nbformat.v4.new_notebook(cells=cells(source.stem, source.read_text(encoding="utf-8")))
    made.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made.metadata["language_info"] = {"name": "python"}
    nbformat.validate(made)
    return nbformat.writes(made, version=4) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the notebooks from their sources.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a notebook differs from its source")
    options = parser.parse_args()
    stale = []
    for source in sorted((HERE / "src").glob("*.py")):
        target, text = HERE / f"{source.stem}.ipynb", notebook(source)
        if target.exists() and target.read_text(encoding="utf-8") == text:
            continue
        stale.append(target.name)
        if not options.check:
            target.write_text(text, encoding="utf-8")
    print("stale:" if options.check else "written:", ", ".join(stale) or "none")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
