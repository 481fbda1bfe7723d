"""What all benchmarks write: rows in a CSV, each with the date, the commit, the GPU and the versions it was measured with."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEASURED_WITH = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def commit() -> str:
    """The checkout's commit, with a + where files differ from it; "" outside a checkout."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return done.stdout.strip()


def versions(names: Iterable[str] = MEASURED_WITH) -> dict[str, str]:
    """Python's version and those of the named libraries, "" for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def gpu_name() -> str:
    """The GPU's name without starting CUDA in this process: workers have it to themselves."""
    import pynvml

    try:
        pynvml.nvmlInit()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:
        return "no GPU"
    return name.decode() if isinstance(name, bytes) else name


def stamp(given_commit: str = "", libraries: Iterable[str] = ()) -> dict[str, str]:
    """What every row of a run carries beside its figures."""
    where = {"date": time.strftime("%Y-%m-%d"), "commit": given_commit or commit(), "gpu": gpu_name()}
    return where | versions((*MEASURED_WITH, *libraries))


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`rows` as the whole CSV, a column for every name in any of them. The file is replaced at once: a killed run tears none."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(path.suffix + ".part")
    with beside.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, names, restval="")
        table.writeheader()
        table.writerows(rows)
    os.replace(beside, path)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no file yet."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV, with new columns where they have any that it had not."""
    write(path, [*read(path), *rows])
