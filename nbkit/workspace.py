"""Where runs, kept rows and exports lie, and how a new run folder is named. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
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
    folder = workspace / "data"
    folder.mkdir(parents=True, exist_ok=True)
    staging, digest = folder / f"rows.tmp{os.getpid()}-{threading.get_ident()}", hashlib.sha256()
    try:
        with staging.open("wb") as file:
            for row in _rows_of(source):
                line = _json_line(row)
                digest.update(line)
                file.write(line)
        path = folder / f"rows-{digest.hexdigest()[:16]}.jsonl"
        if not path.exists():
            staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    return str(path.resolve())


def _rows_of(source: Any) -> Iterable[Any]:
    """Row by row, as they are read: a table's rows are not its columns, and a dictionary of splits means its training rows."""
    rows: Any = source["train"] if isinstance(source, Mapping) and "train" in source else source
    return rows.to_dict("records") if hasattr(rows, "to_dict") and hasattr(rows, "columns") else rows


def _plain(value: Any) -> Any:
    """numpy's arrays, as pandas has the lists of a parquet file, are lists."""
    return value.tolist() if hasattr(value, "tolist") else {"type": type(value).__name__}


def _json_line(row: Any) -> bytes:
    """One row as a line. ASCII escapes keep lone surrogates readable as the text they came as; rows that are no objects keep
    their place and number, and what JSON cannot hold is written as an object, so that a value refused for its type is not
    text the next time."""
    value = dict(row) if isinstance(row, Mapping) else row
    return (json.dumps(value, skipkeys=True, default=_plain) + "\n").encode()
