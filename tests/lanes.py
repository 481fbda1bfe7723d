"""Environments for the install tests: venvs that borrow heavy packages, kernels in them, and the quickstart's code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])  # of the pinned set


def run(*command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 600) -> str:
    """Run a command and return what it prints; a failure shows its last lines."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd or ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command[:4]} exited {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def pip(python: Path, *arguments: str | Path, timeout: float = 600) -> str:
    """The pinned set's pip, working on another environment."""
    return run(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *arguments, timeout=timeout)


def empty_venv(folder: Path) -> Path:
    """An environment without any package, pip included. Returns its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", "--clear", folder)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def site_packages(python: Path) -> Path:
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())


def borrow(python: Path) -> None:
    """Let an environment fall back on the packages of the pinned set (torch alone is 800 MB). Its own come first, and the
    pinned set's own .pth files, nbkit's editable install among them, are not read."""
    (site_packages(python) / "borrowed.pth").write_text(f"{SITE_PACKAGES}\n", encoding="utf-8")


def kernel(python: Path, data: Path, name: str) -> dict[str, str]:
    """Install a kernelspec for `python` under `data`; returns the environment variables that make Jupyter find it."""
    folder = data / "kernels" / name
    folder.mkdir(parents=True, exist_ok=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": name, "language": "python"}), encoding="utf-8")
    return {"JUPYTER_PATH": str(data)}


def short_quickstart(target: Path, model: str, max_steps: int, without: tuple[str, ...] = ()) -> Path:
    """The quickstart with another model and fewer steps, without the code cells that contain one of the words in `without`."""
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    cells = [c for c in notebook.cells if c.cell_type == "markdown" or not any(word in c.source for word in without)]
    changed = 0
    for cell in cells:
        if cell.cell_type == "code":
            before = cell.source
            cell.source = cell.source.replace('"smollm2-135m-instruct"', json.dumps(model))
            cell.source = cell.source.replace("max_steps=50", f"max_steps={max_steps}")
            changed += cell.source != before
    assert changed == 2 or model == "smollm2-135m-instruct", "the quickstart no longer reads as this helper expects"
    notebook.cells = cells
    nbformat.write(notebook, target)
    return target
