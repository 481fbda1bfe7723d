"""What a checkpoint folder must hold before it is loaded: a config, whole safetensors weights, a tokenizer.

The safetensors format: 8 bytes (little endian) give the length of a JSON header, whose offsets give the length
of the data; so a truncated file is told apart from a whole one without reading its weights.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nbkit.errors import ModelError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
GIB = 2**30
MIB = 2**20


def size_text(count: int | float) -> str:
    """Bytes for people: '18.6 MiB', '4.2 GiB'."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def check_folder(folder: Path) -> dict[str, Any]:
    """Check a checkpoint folder; returns its parsed config.json.

    Raises: ModelError naming the file that is missing, damaged or of a refused kind.
    """
    config_path = folder / CONFIG
    if not config_path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder} holds a LoRA adapter, not a model; load the base model it was trained on.")
        raise ModelError(f"{folder} has no {CONFIG}; give the folder of a whole checkpoint, as save_pretrained writes it.")
    config = read_json(config_path)
    weights = weight_files(folder)
    for path in weights:
        check_safetensors(path)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES[:3])}); copy the tokenizer's files into it.")
    return config


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); fetch the checkpoint again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object; fetch the checkpoint again.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all there.

    Raises: ModelError for a missing shard, or where there are pickled weights only.
    """
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ModelError(f"{folder / INDEX} has no weight_map; fetch the checkpoint again.")
        names = sorted({str(name) for name in index.values()})
        foreign = [name for name in names if Path(name).name != name]
        if foreign:  # a path such as ../../secret would be read from outside the folder
            raise ModelError(f"{folder / INDEX} names a file outside its folder ({foreign[0]!r}); the checkpoint is refused.")
    else:
        names = [WEIGHTS]
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return [folder / name for name in names]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if names == [WEIGHTS] and pickled:
        raise ModelError(
            f"{folder} has weights only in {pickled[0]}, a pickle, which can run code when read; "
            "use a copy in safetensors (save_pretrained writes one)."
        )
    raise ModelError(f"{folder} lacks {missing[0]}; fetch the checkpoint again.")


def check_safetensors(path: Path) -> None:
    """Compare the file's length with what its header says. Raises: ModelError if they differ."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: Any = None
        if 0 < length <= min(size - 8, 100 * MIB):
            try:
                header = json.loads(file.read(length))
            except ValueError:
                header = None
    if not isinstance(header, dict):
        raise ModelError(f"{path} is no safetensors file, or its beginning is damaged; fetch the checkpoint again.")
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ModelError(f"{path} has {size:,} bytes, its header says {expected:,}; it is cut off or damaged: fetch it again.")


def is_whole(folder: Path) -> bool:
    """Whether the folder passes `check_folder`."""
    try:
        check_folder(folder)
    except ModelError:
        return False
    return True


def require_disk(folder: Path, needed: int, what: str) -> None:
    """Raises: ModelError if the disk of `folder` (made later, perhaps) has less than `needed` bytes free."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ModelError(
            f"Fetching {what} needs {size_text(needed)} of disk, {size_text(free)} are free at {folder}; "
            "free some space, or point the cache to another disk."
        )


def cache_home() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME or ~/.cache; %LOCALAPPDATA% on Windows."""
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def models_cache() -> Path:
    """Where nbkit keeps the checkpoints it converted itself."""
    return cache_home() / "nbkit" / "models"


def cached_names(hub_cache: Iterable[Path]) -> list[str]:
    """Names that load without a network: nbkit's own cache and the folders of the hub's cache."""
    own = models_cache()
    names = [path.name for path in own.iterdir() if not path.name.startswith(".")] if own.is_dir() else []
    for cache in hub_cache:
        if cache.is_dir():
            names += [path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*")]
    return sorted(names)
