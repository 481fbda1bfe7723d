"""`read`: any source becomes a `Source` of numbered rows. Each kind of source has its reader in a file of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nbkit.data import archives, files, folders, hub, tables, web
from nbkit.data.rows import LOOKED_AT, Row, Source, Streamed, checked, in_memory
from nbkit.errors import DataError, nearest

__all__ = ["ACCEPTED", "LOOKED_AT", "SAMPLES", "SUFFIXES", "Row", "Source", "Streamed", "read"]

SAMPLES = Path(__file__).parent / "samples"
SUFFIXES = (*files.SUFFIXES, *tables.SUFFIXES)
DRIVE = "/content/drive"
ACCEPTED = (
    "a .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt file (also .gz, .zst, .zip), a folder of one, a pandas DataFrame, "
    "a list of dicts, a datasets.Dataset, a hub id such as org/name or org/name:config#train[:10000], an https address, "
    "or sample:ships-log"
)


def read(source: Any, *, split: str = "train", limit: int | None = None) -> Source:
    """The rows of a source, in order; a file is read in a stream and again for each pass.

    Args:
        source: the path of a file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .feather, .txt, .md; text also packed
            as .gz, .bz2, .xz, .zst or .zip) or of a folder (see `nbkit.data.folders.read_folder`); a hub id, written
            `org/name`, `org/name:config`, `org/name#split` or `org/name:config#train[:10000]` (see `nbkit.data.hub`);
            an https address (see `nbkit.data.web`); `sample:NAME`; a list of dicts; a pandas DataFrame; a `datasets` Dataset,
            IterableDataset or dictionary of splits.
        split: of a hub id or a dictionary of splits that does not say itself.
        limit: only the first rows, so many.
    Raises: DataError if the source cannot be opened, is of an unknown kind, or has no rows.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; give a number of rows from 1, or None for all.")
    found = checked(_find(source, split))
    if limit is None:
        return found
    rows = found.rows[:limit] if isinstance(found.rows, list) else Streamed(found.rows.__iter__, limit)
    count = None if found.count is None else min(found.count, limit)
    return Source(found.name, rows, count, lambda: f"{found.fingerprint}[:{limit}]" if found.fingerprint else None)


def _find(source: Any, split: str) -> Source:
    if isinstance(source, str):
        return _named(source, split)
    if isinstance(source, os.PathLike):
        return _path(_place(source)[0], split)
    library = type(source).__module__.split(".")[0]
    if library == "datasets":
        return tables.read_dataset(source, split)
    if library == "pandas" and hasattr(source, "columns"):
        return tables.read_frame(source)
    if isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray)):
        return in_memory("the list of rows", source)
    if isinstance(source, Iterator):
        raise DataError("The rows come from an iterator, which can be read only once; pass list(rows) instead.")
    raise DataError(f"Rows cannot be read from a {type(source).__name__}; give {ACCEPTED}.")


def _named(name: str, split: str) -> Source:
    if name.startswith("sample:"):
        return _sample(name)
    if not name.strip():
        raise DataError(f"The name of the source is empty; give {ACCEPTED}.")
    hub_name = hub.parse(name)
    if "://" in name[:12] and not (hub_name and name.startswith("https://")):
        return _address(name)
    path, exists = _place(name)
    if exists or path.suffix.lower() in (*SUFFIXES, *archives.PACKED) or name.startswith(DRIVE):
        return _path(path, split)
    if hub_name:
        return hub.read_hub(hub_name, split)
    raise DataError(f"There is no file {name[:200]!r}, and it is no hub id (org/name); give {ACCEPTED}.")


def _place(name: str | os.PathLike[str]) -> tuple[Path, bool]:
    """A path, and whether there is something."""
    try:
        path = Path(name).expanduser()
        return path, path.exists()
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise DataError(f"{str(name)[:80]!r} is no usable file name ({error}); give {ACCEPTED}.") from error


def _address(url: str) -> Source:
    path, folder = web.fetch(url, SUFFIXES)
    found = _path(path, "train")
    found.name = url
    if isinstance(found.rows, Streamed):
        found.rows.keeps = folder
        identify = found.identify
        found.identify = lambda: identify() if identify and folder else None  # which holds on to the folder too
    return found


def _sample(name: str) -> Source:
    folder, _, part = name.removeprefix("sample:").partition("/")
    known = {p.parent.name.replace("_", "-"): p.parent for p in sorted(SAMPLES.glob("*/train.jsonl"))}
    if folder not in known or (part or "train") not in ("train", "held_out"):
        names = [f"sample:{n}{tail}" for n in known for tail in ("", "/held_out")]
        raise DataError(f"There is no sample set {name[:80]!r}; there are {', '.join(names)}.{nearest(name, names)}")
    found = _path(known[folder] / f"{part or 'train'}.jsonl", "train")
    found.name = name
    return found


def _path(path: Path, split: str) -> Source:
    if path.is_dir():
        return folders.read_folder(path, split, SUFFIXES, lambda inner: _path(inner, split))
    if not path.exists():
        raise _missing(path)
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder; give {ACCEPTED}.")
    packed = archives.inspect(path, SUFFIXES)
    if packed.suffix not in SUFFIXES:
        raise DataError(f"{path} ends in {packed.suffix or 'no suffix'}, which nbkit does not read; give {ACCEPTED}.")
    if packed.suffix in files.SUFFIXES:
        return files.read_file(packed)
    if packed.packing:
        raise DataError(f"{path} is a packed {packed.suffix} file, which cannot be read in place; unpack it first.")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty; give a file with at least one row.")
    return tables.read_parquet(path) if packed.suffix == ".parquet" else tables.read_arrow(path)


def _missing(path: Path) -> DataError:
    if path.as_posix().startswith(DRIVE) and not Path(DRIVE, "MyDrive").is_dir():
        return DataError(
            f"There is no {path}, since Google Drive is not mounted; run `from google.colab import drive` and "
            f"`drive.mount('{DRIVE}')`, then read it again."
        )
    if path.suffix.lower() not in (*SUFFIXES, *archives.PACKED):
        return DataError(f"There is no file or folder {path}; give {ACCEPTED}.")
    suffixes = (*SUFFIXES, *archives.PACKED)
    return DataError(f"There is no file {path}; check the name and the folder.{nearest(path.name, files.beside(path, suffixes))}")
