"""Safetensors written tensor by tensor, so that a shard is never in memory as a whole, and read one tensor at a time.

The format (github.com/huggingface/safetensors): 8 bytes, little endian, give the length of a JSON header padded with
spaces to a multiple of 8; it maps each name to dtype, shape and offsets into the bytes that follow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nbkit.models.files import INDEX, WEIGHTS

SHARD_BYTES = 5_000_000_000
CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def write_checkpoint(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    make: Callable[[str], Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model.safetensors`, or numbered shards with their index if it is larger than `shard_bytes`.

    Args:
        make: gives the named tensor in `dtype` on the CPU, contiguous; called once for each, in order.
    """
    size = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name in shapes:
        if shards[-1] and filled + size[name] > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size[name]
    if len(shards) == 1:
        _write_file(folder / WEIGHTS, shards[0], shapes, dtype, make)
        return
    where = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, names, shapes, dtype, make)
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(size.values())}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(
    path: Path, names: list[str], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, make: Callable[[str], Tensor]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        end = at + torch.Size(shapes[name]).numel() * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shapes[name]), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = make(name)
            if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shapes[name]):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, the header says {dtype} {shapes[name]}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read_tensor(folder: Path, names: Mapping[str, str], name: str) -> Tensor:
    """One tensor. The file is opened for it alone, so that no mapping of the whole stays in the process's memory."""
    from safetensors import safe_open

    with safe_open(folder / names[name], framework="pt") as file:
        return file.get_tensor(name).clone()


def names_of(folder: Path) -> dict[str, str]:
    """name → file, as the headers on disk have it."""
    from safetensors import safe_open

    from nbkit.models.files import weight_files

    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path.name))
    return found
