"""Prepared sets, kept by their content: arrays and facts in a folder that is whole or not there.

The name of an entry is a digest of all that its content hangs on: the rows, the recipe, the tokenizer and its template, the
settings, the code of this room and the libraries it calls. An entry is written beside and renamed into place, so that two
processes may write one at once; the digest of every file is checked when it is read, and what is damaged is made anew, with a
warning. Only numbers and JSON are stored: reading an entry can run no code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nbkit.config import DataRecipe
from nbkit.data.sources import Source
from nbkit.data.store import SPILL

SCHEMA = 1
MOST_BYTES = 2 * 2**30  # of all entries; the ones that were not read for longest go first
LEAST_TOKENS = 500_000  # smaller sets are made anew faster than they are looked for
STALE_SECONDS = 24 * 3600  # a folder of a writer that died
LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy")
BLOCK = 1 << 22


class Cache:
    """One entry under a folder. Nothing is raised when the folder cannot be written: it is said as a warning.

    Args:
        name: gives the name of the entry, or None if there is to be none; called when it is first needed, as it takes time.
        most_bytes: of all entries of the folder.
        least_tokens: a set with fewer is not kept.
    """

    def __init__(
        self, folder: Path, name: Callable[[], str | None], most_bytes: int = MOST_BYTES, least_tokens: int = LEAST_TOKENS
    ) -> None:
        self.folder, self._ask, self._most, self._least = folder, name, most_bytes, least_tokens

    @functools.cached_property
    def _name(self) -> str | None:
        return self._ask()

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """(arrays, facts) as they were saved, or None."""
        if not self.folder.is_dir() or all(path.name.startswith(".") for path in self.folder.iterdir()) or self._name is None:
            return None
        entry = self.folder / self._name
        if not entry.is_dir():
            return None
        try:
            manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
            facts = json.loads(_checked(entry, "facts.json", manifest))
            arrays = {name: _array(entry, name, about, manifest) for name, about in facts.pop("arrays").items()}
            os.utime(entry / "manifest.json")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"The prepared rows in {entry} are damaged ({error}); they are made anew.", stacklevel=3)
            shutil.rmtree(entry, ignore_errors=True)
            return None
        return arrays, facts

    def save(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Publishes the entry, whole; nothing is done for a small set, or where another process was faster."""
        key = self._name if arrays["tokens_starts"][-1] >= self._least else None
        if key is None:
            return
        staging = self.folder / f".{key}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            staging.mkdir(parents=True)
            needed = sum(array.nbytes for array in arrays.values())
            if shutil.disk_usage(staging).free < 2 * needed:
                raise OSError(errno.ENOSPC, f"{needed / 2**20:,.0f} MiB are needed, and as much again is left to others")
            _write(staging, arrays, facts)
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                _publish(staging, self.folder / key)
            self._prune(keep=key)
        except OSError as error:
            warnings.warn(f"The prepared rows could not be kept in {self.folder}: {error.strerror or error}.", stacklevel=3)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _prune(self, keep: str) -> None:
        entries = []
        for path in self.folder.iterdir():
            if path.name.startswith(".") and path.name.endswith(".tmp"):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
            elif (path / "manifest.json").is_file():
                size = sum(file.stat().st_size for file in path.iterdir())
                entries.append(((path / "manifest.json").stat().st_mtime, size, path))
        room = self._most - sum(size for _, size, path in entries if path.name == keep)
        for _, size, path in sorted(entries, reverse=True):
            if path.name != keep:
                room -= size
                if room < 0:
                    shutil.rmtree(path, ignore_errors=True)


def key_of(sources: Sequence[Source | None], settings: Sequence[Any], recipe: DataRecipe, tokenizer: Any) -> str | None:
    """The name of the entry of these rows and settings; None if the content of the rows has no fingerprint."""
    contents = [None if source is None else _content(source) for source in sources]
    if any(source is not None and content is None for source, content in zip(sources, contents, strict=True)):
        return None
    about = {
        "schema": SCHEMA,
        "rows": [[source.name, content] for source, content in zip(sources, contents, strict=True) if source is not None],
        "settings": [repr(setting) for setting in settings],
        "recipe": dataclasses.asdict(recipe),
        "tokenizer": _tokenizer(tokenizer, None if recipe.template else tokenizer.chat_template),
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:40]


def _content(source: Source) -> str | None:
    """What identifies the rows: the source's own fingerprint, or a digest of rows that are in memory as JSON."""
    if source.fingerprint is not None or not isinstance(source.rows, list):
        return source.fingerprint
    digest = hashlib.sha256()
    try:
        for row in source.rows:
            digest.update(json.dumps(row.value if row.fault is None else [row.number, str(row.fault)]).encode() + b"\n")
    except (TypeError, ValueError, RecursionError):
        return None  # values that are no JSON have no digest that holds
    return digest.hexdigest()


def _tokenizer(tokenizer: Any, template: Any) -> str:
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(repr((type(tokenizer).__name__, template, tokenizer.special_tokens_map)).encode())
    return digest.hexdigest()


@functools.cache
def _code() -> str:
    """A digest of the files of this room, and the versions of what they call."""
    digest = hashlib.sha256(repr([(name, version(name)) for name in LIBRARIES]).encode())
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".jinja", ".json"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


# -- files -----------------------------------------------------------------------------------------


def _write(folder: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    files = {}
    about = {name: {"dtype": array.dtype.str, "shape": list(array.shape)} for name, array in arrays.items()}
    text = json.dumps({**facts, "arrays": about}).encode()
    for name, content in (("facts.json", np.frombuffer(text, np.uint8)), *((f"{n}.bin", a) for n, a in arrays.items())):
        digest = hashlib.sha256()
        with (folder / name).open("wb") as file:
            for block in _blocks(content):
                file.write(block)
                digest.update(block)
            file.flush()
            os.fsync(file.fileno())
        files[name] = {"bytes": content.nbytes, "sha256": digest.hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"schema": SCHEMA, "files": files}), encoding="utf-8")


def _blocks(array: np.ndarray) -> Any:
    flat = array.reshape(-1)
    step = max(1, BLOCK // flat.itemsize)
    return (flat[start : start + step].tobytes() for start in range(0, len(flat), step))


def _publish(staging: Path, target: Path) -> None:
    """Renames a whole folder into place. Raises: FileExistsError if there is one already, which is just as good."""
    try:
        staging.rename(target)
    except OSError as error:
        if target.is_dir():
            raise FileExistsError(str(target)) from error
        raise


def _checked(entry: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    content = (entry / name).read_bytes()
    _compare(name, hashlib.sha256(content).hexdigest(), manifest)
    return content


def _compare(name: str, digest: str, manifest: Mapping[str, Any]) -> None:
    if digest != manifest["files"][name]["sha256"]:
        raise ValueError(f"{name} is not what was written")


def _array(entry: Path, name: str, about: Mapping[str, Any], manifest: Mapping[str, Any]) -> np.ndarray:
    """A small array in memory; a large one through the page cache, after its digest has been checked block by block."""
    path, dtype, shape = entry / f"{name}.bin", np.dtype(about["dtype"]), tuple(about["shape"])
    if path.stat().st_size <= SPILL * 4:
        return np.frombuffer(_checked(entry, path.name, manifest), dtype).reshape(shape)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    _compare(path.name, digest.hexdigest(), manifest)
    return np.memmap(path, dtype, "r", shape=shape)
