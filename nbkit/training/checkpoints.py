"""Checkpoints that are whole or absent.

A checkpoint is written into a hidden folder beside its place; its manifest, with the size and SHA-256
of every file, is written last; then one rename publishes it as `checkpoint-000040`. A kill at any moment
leaves either the whole checkpoint or a hidden folder that the next run removes. Resuming takes the newest
checkpoint whose files are all as the manifest says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from nbkit.errors import TrainingError

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 2  # 1 had optimizer, schedule and random states in pickles
KEEP = 2  # whole checkpoints kept in a run folder
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk. `manifest` holds step, data fingerprint, config, versions, files."""

    path: Path
    step: int
    manifest: Mapping[str, Any]


def name_of(step: int) -> str:
    """`checkpoint-000040`: sorts by name, and is a name that transformers' resume accepts."""
    return f"checkpoint-{step:06d}"


@contextlib.contextmanager
def staged(folder: Path, step: int, facts: Mapping[str, Any], needed_bytes: int) -> Iterator[Path]:
    """Yields an empty folder to write a checkpoint into; publishes it if the body ends without an error.

    Args:
        facts: what a resume compares, put into the manifest beside step, versions and files.
        needed_bytes: refused before anything is written if the disk has less.
    Raises: TrainingError if the disk is too full; whatever the body raises. Neither leaves files behind.
    """
    require_space(folder, needed_bytes, f"The checkpoint of step {step}")
    target = folder / name_of(step)
    staging = folder / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    staging.mkdir()
    try:
        yield staging
        files = {path.name: _fact_of(path) for path in sorted(staging.iterdir())}
        manifest = {"schema": MANIFEST_SCHEMA, "step": step, "versions": _versions(), **facts, "files": files}
        _write_durably(staging / MANIFEST, json.dumps(manifest, indent=1).encode())
        replace_folder(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a run folder, and one sentence for each newer one that is damaged.

    Raises: TrainingError if it is of an older nbkit, whose state this one does not open.
    """
    passed_over = []
    for step, path in sorted(_candidates(folder), reverse=True):
        manifest, fault = _verify(path)
        if manifest is not None:
            if manifest["schema"] < MANIFEST_SCHEMA:
                raise TrainingError(
                    f"{path} is of an older nbkit that pickled the optimizer's state, and pickles are not opened; "
                    "finish that run with the older nbkit, or start a new run in another run_dir."
                )
            return Checkpoint(path, step, manifest), passed_over
        passed_over.append(f"{path.name} was passed over: {fault}.")
    return None, passed_over


def prune(folder: Path, keep: int = KEEP) -> None:
    """Removes all but the newest `keep` checkpoints, each by a rename first, so that none is ever seen in part."""
    for _, path in sorted(_candidates(folder), reverse=True)[keep:]:
        _discard(path)


def sweep(folder: Path) -> None:
    """Removes what a killed run left half-written. Only the owner of the folder's lock may call it."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path)


def replace_folder(staging: Path, target: Path) -> None:
    """Renames `staging` to `target`; what stood there before is moved aside first and then removed."""
    old = None
    if target.exists():
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        target.rename(old)
    _sync_files(staging)
    staging.rename(target)
    _sync_entries(target.parent)
    if old is not None:
        shutil.rmtree(old)


def remove(folder: Path) -> None:
    """Removes a staging folder, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises: TrainingError with the bytes needed and free if the folder's disk has too few."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise TrainingError(
            f"Disk full: {what} needs {size_text(needed_bytes)}, {folder} has {size_text(free)} free; "
            "make room there or choose a run_dir on another disk."
        )


def load_adapter(model: Any, folder: Path) -> None:
    """Copies a checkpoint's adapter tensors into `model` in place, keeping the dtypes of the model.

    Raises: TrainingError if tensors are missing or do not belong to this model.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result = set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = sorted(trainable & set(result.missing_keys))
    if missing or result.unexpected_keys:
        name = (missing or result.unexpected_keys)[0]
        raise TrainingError(
            f"{folder} does not fit this model: {len(missing)} adapter tensors are missing and "
            f"{len(result.unexpected_keys)} are foreign, {name} first; resume with the model and LoRA settings of that run."
        )


def _candidates(folder: Path) -> list[tuple[int, Path]]:
    return [(int(m[1]), path) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name)) and path.is_dir()]


def _verify(path: Path) -> tuple[Mapping[str, Any] | None, str]:
    """(manifest, "") of a whole checkpoint, else (None, what is wrong)."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["schema"] > MANIFEST_SCHEMA:
            return None, f"its schema {manifest['schema']} is of a newer nbkit"
        for name, fact in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return None, f"{name} is missing"
            if _fact_of(file) != fact:
                return None, f"{name} is not as it was written"
    except FileNotFoundError:
        return None, f"it has no {MANIFEST}, so another program wrote it or that file was deleted"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return None, f"its manifest cannot be read ({type(error).__name__})"
    return manifest, ""


def _fact_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _discard(path: Path) -> None:
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    path.rename(aside)
    shutil.rmtree(aside)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    _sync_entries(folder)


def _sync_entries(folder: Path) -> None:
    """The names in a folder, on to the disk. Windows cannot open a folder for that and needs no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def size_text(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
