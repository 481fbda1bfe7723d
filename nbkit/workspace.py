"""Where runs, kept rows and exports lie, and how a new run folder is named. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

DRIVE = Path("/content/drive/MyDrive")  # Google Drive, where the user has mounted it on Colab
KAGGLE = Path("/kaggle/working")  # what Kaggle keeps of a session


def default_workspace() -> Path:
    """The folder that outlives the session here: Drive on Colab, the output folder on Kaggle, else the current one."""
    if DRIVE.is_dir():
        return DRIVE / "nbkit"
    if KAGGLE.is_dir():
        return KAGGLE / "nbkit"
    return Path.cwd() / "nbkit-workspace"


def new_run_dir(workspace: Path, model_name: str) -> Path:
    """A fresh folder `<workspace>/runs/<date>-<model>`, made here; a second run in the same second gets `-2`."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model_name).name).strip("-.") or "model"
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{slug[:60]}"
    for number in range(1, 10_000):
        folder = workspace / "runs" / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"no free run folder name under {workspace / 'runs'}")


def cache_folder(workspace: Path) -> Path:
    """Where prepared rows are kept; it is made when something is kept, and may be deleted at any time."""
    return workspace / "cache"


def keep_rows(source: Any, workspace: Path) -> str:
    """The name a RunConfig can use for `source`: itself if it is a name or a path, else a JSONL file of its rows.

    The file is named by its content, so that the same rows are kept once.
    """
    if isinstance(source, os.PathLike):
        return str(Path(source).resolve())
    if isinstance(source, str):
        return str(Path(source).resolve()) if Path(source).exists() else source
    text = _jsonl(source)
    path = workspace / "data" / f"rows-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(f".tmp{os.getpid()}")
        staging.write_text(text, encoding="utf-8", errors="surrogatepass")
        staging.replace(path)
    return str(path.resolve())


def _jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    # ASCII escapes keep lone surrogates readable as the text they came as; rows that are no objects keep their place and number,
    # and what JSON cannot hold is written as an object, so that a value refused for its type is not text the next time.
    def line(row: Any) -> str:
        value = dict(row) if isinstance(row, Mapping) else row
        return json.dumps(value, skipkeys=True, default=lambda other: {"type": type(other).__name__}) + "\n"

    return "".join(map(line, rows))
