"""A GGUF file read back: its header compared with what was meant, its tensors read a few rows at a time.

The header goes through the package gguf. Tensors are read by plain file access at the offsets found there, since the
package maps the whole file into memory, which counts as the process's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nbkit.errors import ExportError

BLOCK = 32  # weights that share one scale in q8_0
HALF_STEP = 2.0**-11  # relative rounding of float16
CHUNK = 2**22  # weights handled at once


class GgufFile:
    """Raises: ExportError if the file cannot be read, or a field of `expected` is not in its header exactly so."""

    def __init__(self, path: Path, expected: Mapping[str, Any]) -> None:
        import gguf

        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            for key, value in expected.items():
                _compare_field(reader.get_field(key), key, value)
            # (offset, type, shape with rows first) of each tensor; the reader and its mapping end here.
            self._where = {
                str(t.name): (int(t.data_offset), t.tensor_type, tuple(reversed(t.shape.tolist()))) for t in reader.tensors
            }
        except (ValueError, KeyError, IndexError) as error:  # a UnicodeDecodeError is a ValueError
            raise ExportError(f"The GGUF file cannot be read back ({error}); it was removed: check the disk.") from error

    def names(self) -> set[str]:
        return set(self._where)

    def read(self, name: str) -> Tensor:
        """The whole tensor, dequantised to float32."""
        shape = self._where[name][2]
        value = torch.empty(shape)
        flat = value.reshape(-1, shape[-1])
        at = 0
        while at < len(flat):
            rows = self._rows(name, at)
            flat[at : at + len(rows)] = rows
            at += len(rows)
        return value

    def compare(self, name: str, merged: Tensor) -> None:
        """Raises: ExportError if a weight differs from `merged` by more than its type rounds."""
        _, kind, shape = self._where[name]
        right = tuple(merged.shape) == shape
        expected = merged.reshape(-1, shape[-1])
        at = 0
        while right and at < len(expected):
            found = self._rows(name, at)
            part = expected[at : at + len(found)]
            right = bool(((found - part).abs() <= _bound(part, kind.name)).all())
            at += len(found)
        if not right:
            raise ExportError(f"The GGUF file, read back, has another {name} than the trained model; it was removed.")

    def _rows(self, name: str, start: int) -> Tensor:
        """About CHUNK weights from row `start` on, (rows, columns) float32; a vector is one row."""
        import gguf

        offset, kind, shape = self._where[name]
        columns = shape[-1]
        total = torch.Size(shape).numel() // columns
        count = min(max(1, CHUNK // columns), total - start)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = columns // block * size
        raw = np.fromfile(self.path, dtype=np.uint8, count=count * row_bytes, offset=offset + start * row_bytes)
        if raw.size != count * row_bytes:
            raise ExportError(f"The GGUF file ends within {name}; it was removed: check the disk.")
        return torch.from_numpy(gguf.quants.dequantize(raw.reshape(count, row_bytes), kind).reshape(count, columns))


def _compare_field(field: Any, key: str, value: Any) -> None:
    found = None if field is None else field.contents()
    if isinstance(value, float):
        value = float(np.float32(value))
    if found != value:
        wrong, right = str(found)[:60], str(value)[:60]
        raise ExportError(f"The GGUF file, read back, has {key} = {wrong!r} in place of {right!r}; it was removed.")


def _bound(merged: Tensor, kind: str) -> Tensor:
    """How far rounding may move each weight: half a step of its type, and float16's rounding of a q8_0 scale."""
    if kind == "F32":
        return torch.zeros(())
    if kind == "F16":
        return merged.abs() * HALF_STEP + 2.0**-25
    largest = merged.reshape(-1, BLOCK).abs().amax(dim=1, keepdim=True)
    return (largest * (0.5 / 127 + HALF_STEP) * 1.001 + 2.0**-18).expand(-1, BLOCK).reshape(merged.shape)
