"""Files as streams of bytes, unpacked while they are read if they are compressed, and never more than they may hold."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from nbkit.errors import DataError

PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
FREE_BYTES = 2**26  # whatever unpacks to less than 64 MiB is read
MOST_EXPANSION = 200  # text packs to a tenth or a twentieth; what grows more than this is a bomb
MOST_MEMBERS = 10_000
BUFFER = 2**20


@dataclass(frozen=True)
class Packed:
    """A file of rows: `suffix` is that of the rows' own format, `packing` that of the compression around it, or ''."""

    path: Path
    suffix: str
    packing: str = ""
    member: str = ""  # of a zip archive

    @property
    def name(self) -> str:
        return f"{self.path}, {self.member}" if self.member else str(self.path)

    def open(self) -> BinaryIO:
        """The rows' bytes, from the start. Raises: DataError, also while they are read."""
        try:
            if not self.packing:
                return open(self.path, "rb", buffering=BUFFER)
            return cast(BinaryIO, io.BufferedReader(_Guarded(self), BUFFER))
        except FileNotFoundError as error:
            raise DataError(f"There is no file {self.path}; check the name and the folder.") from error
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}; check the file and its rights.") from error


def inspect(path: Path, suffixes: Sequence[str]) -> Packed:
    """What a file holds, by its name; of a zip archive, by its list of members.

    Args:
        suffixes: those of the formats that can be read.
    Raises: DataError for an archive without exactly one file of rows.
    """
    suffix = path.suffix.lower()
    if suffix not in PACKED:
        return Packed(path, suffix)
    if suffix != ".zip":
        return Packed(path, Path(path.stem).suffix.lower(), suffix)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise DataError(f"{path} is no zip archive that can be read ({error}); fetch it again.") from error
    if len(members) > MOST_MEMBERS:
        raise DataError(f"{path} holds {len(members):,} files; take the one file of rows out of it.")
    rows = [m for m in members if Path(m.filename).suffix.lower() in suffixes and not _hidden(m.filename)]
    training = [m for m in rows if Path(m.filename).stem.lower() == "train"]
    chosen = rows if len(rows) == 1 else training
    if len(chosen) != 1:
        seen = ", ".join(m.filename for m in (rows or members)[:8]) or "nothing"
        raise DataError(f"{path} holds {seen}; unpack it and give the one file of rows ({', '.join(suffixes)}).")
    if chosen[0].flag_bits & 1:
        raise DataError(f"{path} is locked with a password; unpack it and give the file of rows.")
    return Packed(path, Path(chosen[0].filename).suffix.lower(), ".zip", chosen[0].filename)


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in Path(name).parts)


class _Guarded(io.RawIOBase):
    """An unpacked stream that stops where it has grown beyond what text can, and tells damage in one sentence."""

    def __init__(self, packed: Packed) -> None:
        self._packed = packed
        self._most = max(FREE_BYTES, MOST_EXPANSION * packed.path.stat().st_size)
        self._seen = 0
        self._archive: zipfile.ZipFile | None = None
        try:
            self._inner: Any = self._unpacked()
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError) as error:
            raise self._damaged(error) from error

    def _unpacked(self) -> Any:
        path, packing = self._packed.path, self._packed.packing
        if packing == ".zip":
            self._archive = zipfile.ZipFile(path)
            return self._archive.open(self._packed.member)
        if packing == ".zst":  # arrow comes with datasets and has the codec; Python has it from 3.14 on
            import pyarrow

            return pyarrow.input_stream(str(path), compression="zstd")
        import bz2
        import gzip
        import lzma

        openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        return openers[packing](path, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except Exception as error:  # each codec has kinds of its own: EOFError, zlib.error, LZMAError, BadZipFile, ArrowInvalid
            raise self._damaged(error) from error
        self._seen += len(data)
        if self._seen > self._most:
            size = self._packed.path.stat().st_size
            raise DataError(
                f"{self._packed.name} has {size:,} bytes and unpacks to more than {self._most:,}, as a zip bomb does and text "
                "does not, so it is refused; if you trust it, unpack it yourself and give the file inside."
            )
        buffer[: len(data)] = data
        return len(data)

    def _damaged(self, error: Exception) -> DataError:
        reason = str(error).strip().split("\n")[0][:120]
        return DataError(
            f"{self._packed.name} is damaged or cut off after {self._seen:,} bytes ({reason}); fetch or pack it again."
        )

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
            if self._archive is not None:
                self._archive.close()
        super().close()
