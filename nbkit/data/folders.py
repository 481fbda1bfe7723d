"""A folder as a source: the one file of rows in it, a set of texts, or what `save_to_disk` wrote."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from nbkit.data.archives import PACKED, Packed
from nbkit.data.files import TEXTS, fingerprint, text_row
from nbkit.data.rows import Row, Source, Streamed
from nbkit.data.tables import read_saved
from nbkit.errors import DataError

MOST_FILES = 100_000
DEPTH = 3  # folders below the given one that are looked into
TRAINING = re.compile(r"train([-_.]|$)", re.IGNORECASE)  # train.csv, train-00000-of-00004.parquet, train_sft.jsonl


def read_folder(folder: Path, split: str, suffixes: tuple[str, ...], read_path: Callable[[Path], Source]) -> Source:
    """The rows of a folder.

    It may be one that `datasets.save_to_disk` wrote; hold one file of rows, or one or several (the parts of a set) whose
    names begin with `train`, as folders of Kaggle's input do; or hold texts, of which each is a row
    {"file": its name, "text": its content}.
    Raises: DataError listing the files where it is not clear which one is meant.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return read_saved(folder, split)
    files = list(_walk(folder))
    rows = [path for path in files if _suffix(path) in suffixes and _suffix(path) not in TEXTS]
    texts = [path for path in files if path.suffix.lower() in TEXTS]
    if len(rows) == 1:
        return read_path(rows[0])
    if rows:
        training = [path for path in rows if TRAINING.match(path.name)]
        if len(training) == 1:
            return read_path(training[0])
        if training and len({_stem(path) for path in training}) == 1:
            return _parts(folder, training, read_path)
        seen = ", ".join(str(path.relative_to(folder)) for path in rows[:12])
        more = f" and {len(rows) - 12} more" if len(rows) > 12 else ""
        raise DataError(f"{folder} holds {len(rows)} files of rows: {seen}{more}; give the path of the one you want.")
    if texts:
        return _texts(folder, texts)
    seen = ", ".join(path.name for path in files[:8]) or "no files"
    raise DataError(f"{folder} holds nothing that can be read ({seen}); a folder must hold {', '.join(suffixes)} files.")


def _walk(folder: Path) -> Iterator[Path]:
    """All files below the folder, in order, hidden ones left out."""
    found = 0
    for root, folders, names in os.walk(folder):
        depth = len(Path(root).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")) and depth < DEPTH)
        for name in sorted(names):
            found += 1
            if found > MOST_FILES:
                raise DataError(f"{folder} holds more than {MOST_FILES:,} files; give one file, or a folder with fewer.")
            if not name.startswith("."):
                yield Path(root) / name


def _suffix(path: Path) -> str:
    """That of the rows inside a compressed file; an archive counts as a file of rows."""
    suffix = path.suffix.lower()
    if suffix == ".zip":
        return ".jsonl"
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


def _stem(path: Path) -> str:
    return re.sub(r"\d+", "0", path.name)


def _texts(folder: Path, paths: list[Path]) -> Source:
    files = [Packed(path, ".txt") for path in paths]

    def rows() -> Iterator[Row]:
        for number, file in enumerate(files, 1):
            yield text_row(number, file, file.path.relative_to(folder).as_posix())

    size = sum(path.stat().st_size for path in paths)
    return Source(str(folder), Streamed(rows), count=len(files), identify=partial(fingerprint, *files), size=size)


def _parts(folder: Path, paths: list[Path], read_path: Callable[[Path], Source]) -> Source:
    """One set in several files, numbered on from one to the next."""
    parts = [read_path(path) for path in paths]

    def rows() -> Iterator[Row]:
        number = 0
        for part in parts:
            for row in part.rows:
                number += 1
                yield Row(number, row.value, row.fault)

    counts = [part.count for part in parts]
    name = f"{folder} ({len(paths)} files from {paths[0].name})"
    count = None if None in counts else sum(filter(None, counts))
    size = sum(path.stat().st_size for path in paths)
    return Source(
        name, Streamed(rows), count=count, identify=lambda: "-".join(filter(None, (p.fingerprint for p in parts))), size=size
    )
