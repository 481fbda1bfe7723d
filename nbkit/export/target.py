"""Where an export goes: its name checked, its space checked, written beside the target and renamed into place at the end.

What stands at the target is replaced only if it is an earlier export of the same kind, and only once the new one
is written and has passed its check. Whatever goes wrong, nothing half-written is left.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from nbkit.errors import ExportError
from nbkit.export.report import size_text

MARK = "nbkit_export.json"  # in every exported folder: its kind, its check, the files nbkit wrote
GGUF_MARK = "nbkit.export"  # the same in a GGUF file's header, among the first keys
HEAD_BYTES = 65536
NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class Target:
    """A checked place for one export of `kind`; a folder, or one file where `suffix` is given.

    Raises: ExportError for a name that cannot be used or a place that holds something else.
    """

    def __init__(self, path: str | Path, kind: str, suffix: str = "") -> None:
        self.kind, self.suffix = kind, suffix
        self.path = _absolute(path)
        if suffix and self.path.suffix.lower() != suffix:
            raise ExportError(f"The path of a {kind} export must end in {suffix}, {self.path.name!r} does not; add it.")
        above = next((p for p in self.path.parents if p.exists()), None)
        if above is None or not above.is_dir():
            raise ExportError(f"{above or self.path.anchor} is not a folder, so nothing can be written there; give another path.")
        self.disk = above
        self._require_replaceable()

    def _require_replaceable(self) -> None:
        if not os.path.lexists(self.path):
            return
        if bool(self.suffix) == self.path.is_dir():
            is_what = "folder" if self.path.is_dir() else "file"
            raise ExportError(f"{self.path} is a {is_what}, where a {self.kind} export has to go; give another path.")
        if self.suffix:
            with self.path.open("rb") as file:
                head = file.read(HEAD_BYTES)
            if head and not (head.startswith(b"GGUF") and GGUF_MARK.encode() in head):
                raise ExportError(f"{self.path} exists and was not written by nbkit; give another path, or remove it first.")
            return
        present = {p.name for p in self.path.iterdir()}
        known = _known_files(self.path, self.kind)
        if present and known is None:
            raise ExportError(
                f"{self.path} is not empty and holds no earlier {self.kind} export; give another path, or empty it first."
            )
        if foreign := sorted(present - (known or set())):
            raise ExportError(f"{self.path} also holds {foreign[0]}, which nbkit did not write; move it, or give another path.")

    def require_space(self, needed: int) -> None:
        """Raises: ExportError if the disk has fewer than `needed` bytes free. An export that is replaced stays until the end."""
        free = shutil.disk_usage(self.disk).free
        if free >= needed:
            return
        other = Path(tempfile.gettempdir())
        there = shutil.disk_usage(other).free
        remedy = f"export to {other} ({size_text(there)} free)" if there >= needed else "give a path on another disk"
        sizes = f"needs {size_text(needed)}, {self.disk} has {size_text(free)} free"
        raise ExportError(f"The {self.kind} export {sizes}; make room there, or {remedy}.")

    @contextmanager
    def staged(self, needed: int) -> Iterator[Path]:
        """Yields a fresh folder beside the target. If the body ends well its content becomes the target, else it is removed.

        For a file the body writes `folder / target.path.name`.

        Raises: ExportError if the disk is too full or cannot be written; whatever the body raises.
        """
        self.require_space(needed)
        staging = self.path.with_name(f".{self.path.name[:80]}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.tmp")
        try:
            staging.parent.mkdir(parents=True, exist_ok=True)
            self._sweep()
            staging.mkdir()
            yield staging
            self._publish(staging)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if (sentence := self._disk_fault(error, needed)) is not None:
                raise ExportError(sentence) from error
            raise

    def _disk_fault(self, error: BaseException, needed: int) -> str | None:
        full = isinstance(error, OSError) and error.errno in NO_SPACE
        # safetensors and tokenizers report a full disk in their own exception types.
        if full or (isinstance(error, Exception) and "No space left on device" in str(error)):
            return (
                f"The disk of {self.disk} became full while the {self.kind} export was written (it needs {size_text(needed)}); "
                "make room there, or give a path on another disk."
            )
        if isinstance(error, OSError) and not isinstance(error, ConnectionError):
            return f"The {self.kind} export cannot be written to {self.path} ({error.strerror or error}); give another path."
        return None

    def _sweep(self) -> None:
        """Removes what a killed process of this machine left of an export to the same place."""
        prefix = f".{self.path.name[:80]}.{socket.gethostname()}-"
        for left in self.path.parent.glob(_literal(prefix) + "*.tmp"):
            owner = left.name.removeprefix(prefix).split("-")[0]
            if owner.isdigit() and not psutil.pid_exists(int(owner)):
                shutil.rmtree(left, ignore_errors=True)

    def _publish(self, staging: Path) -> None:
        """Renames what was written into place; an earlier export moves aside first and comes back if that fails."""
        _sync(staging)
        source = staging / self.path.name if self.suffix else staging
        if self.suffix:
            os.replace(source, self.path)
            staging.rmdir()
            return
        old = None
        if self.path.exists():
            old = staging.with_name(staging.name.removesuffix(".tmp") + "-old.tmp")
            self.path.rename(old)
        try:
            source.rename(self.path)
        except OSError:
            if old is not None:
                old.rename(self.path)
            raise
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def write_mark(folder: Path, kind: str, facts: dict[str, Any]) -> None:
    """Writes the file that tells a later export that this folder is nbkit's own. Call it last."""
    files = sorted([*(p.name for p in folder.iterdir()), MARK])
    text = json.dumps({"kind": kind, **facts, "files": files}, indent=2, ensure_ascii=False)
    (folder / MARK).write_text(text + "\n", encoding="utf-8")


def bytes_under(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _absolute(path: str | Path) -> Path:
    text = str(path)
    if not text.strip() or "\0" in text:
        raise ExportError(f"{text!r} is not a path; name a folder or file to write to.")
    full = Path(os.path.abspath(Path(text).expanduser()))
    if full.is_symlink():
        full = full.resolve()  # the link stays, what it points to is replaced
    if full.parent == full:
        raise ExportError(f"{full} is the root of the file system; name a folder or file in it.")
    if len(os.fsencode(full.name)) > 160:
        raise ExportError(f"The name {full.name[:40]}… is too long for a file; use at most 160 bytes.")
    return full


def _known_files(folder: Path, kind: str) -> set[str] | None:
    """The files an earlier export of this kind wrote there; None if there was none."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return set(mark["files"]) if mark["kind"] == kind else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _literal(text: str) -> str:
    """`text` with the wildcards of glob taken literally."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _sync(folder: Path) -> None:
    """The written bytes, on to the disk, before anything is renamed."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
