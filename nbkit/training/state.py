"""What a run carries beside its weights, as JSON and safetensors: optimizer, schedule, loss scaler, random states.

A pickle can run any code when it is opened, also in a checkpoint that somebody sent; nothing here writes or opens one.
`training_state.json` has the structure, with a name in place of each tensor; `training_state.safetensors` has the tensors.
Numbers are kept exactly: JSON writes a float so that it reads back as the same one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nbkit.errors import TrainingError

STRUCTURE, TENSORS = "training_state.json", "training_state.safetensors"


def save(folder: Path, parts: Mapping[str, Any]) -> None:
    """Write `parts` (trees of dicts, lists, tuples, numbers, strings, None and tensors) into `folder`.

    Raises: TrainingError for anything else in them.
    """
    from safetensors.torch import save_file

    packer = _Packer()
    structure = {name: packer.pack(tree, name) for name, tree in parts.items()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()  # paged optimizers keep their state in memory that the GPU writes to by itself
    save_file({name: _dense(tensor) for name, tensor in packer.tensors.items()}, folder / TENSORS)
    (folder / STRUCTURE).write_text(json.dumps(structure), encoding="utf-8")


def load(folder: Path, part: str) -> Any:
    """One of the parts that `save` wrote, tensors on the CPU; None if it was not among them.

    Raises: TrainingError if the files are not what `save` writes.
    """
    from safetensors import SafetensorError, safe_open

    try:
        structure = dict(json.loads((folder / STRUCTURE).read_text(encoding="utf-8")).items())
        if part not in structure:
            return None
        with safe_open(folder / TENSORS, framework="pt", device="cpu") as file:
            # A copy: what is read lies in the file's own pages, which a later clean-up of checkpoints takes away.
            return _unpacked(structure[part], lambda name: file.get_tensor(name).clone())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
        raise TrainingError(
            f"The {part} state in {folder} cannot be read ({type(error).__name__}: {error}); "
            "take that checkpoint away to resume from the one before it."
        ) from error


def bytes_of(optimizer: Any) -> int:
    """Bytes of an optimizer's tensors. Raises: TrainingError for a state that a checkpoint cannot keep."""
    packer = _Packer()
    packer.pack(optimizer.state_dict(), "optimizer")
    return sum(tensor.numel() * tensor.element_size() for tensor in packer.tensors.values())


def of_optimizer(optimizer: Any) -> dict[str, Any]:
    """An optimizer's part of the state."""
    return {"class": type(optimizer).__name__, "state": optimizer.state_dict()}


def restore_optimizer(saved: Any, optimizer: Any, folder: Path) -> None:
    """Raises: TrainingError if what was saved is of another kind of optimizer, or of other parameters."""
    was, now = (saved or {}).get("class", "none"), type(optimizer).__name__
    if was != now:
        raise TrainingError(
            f"The optimizer state in {folder} is of {was}, this run has {now}; resume with the optimizer of that run."
        )
    try:
        optimizer.load_state_dict(saved["state"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise TrainingError(f"The optimizer state in {folder} does not fit this run: {error}") from error


def of_random() -> dict[str, Any]:
    """The random states of Python, numpy, torch, and of the current GPU where one is used."""
    import numpy

    numpys: Any = numpy.random.get_state(legacy=False)
    numpys["state"]["key"] = numpys["state"]["key"].tolist()
    states = {"python": random.getstate(), "numpy": numpys, "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(saved: Any, folder: Path) -> str:
    """Puts the random states back. Returns a sentence where this process has a GPU and the one that saved had none, else "".

    Raises: TrainingError if there are none, or not such ones.
    """
    import numpy

    try:
        numpys = saved["numpy"]
        numpys["state"]["key"] = numpy.asarray(numpys["state"]["key"], dtype=numpy.uint32)
        random.setstate(saved["python"])
        numpy.random.set_state(numpys)
        torch.set_rng_state(saved["torch"])
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        if on_gpu and "cuda" in saved:
            torch.cuda.set_rng_state(saved["cuda"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise TrainingError(f"The random states in {folder} cannot be put back: {error}") from error
    if on_gpu == ("cuda" in saved):
        return ""
    return "The checkpoint was made on another kind of device; dropout draws other numbers than it would have there."


# -- trees and their two files ---------------------------------------------------------------------


class _Packer:
    """Trees for JSON. Their tensors are collected by their paths; one that comes twice (a table of all states, say) once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[Any, str] = {}

    def pack(self, tree: Any, path: str) -> Any:
        if tree is None or isinstance(tree, bool | str):
            return tree
        if isinstance(tree, Tensor):
            return {"tensor": self._name(tree, path)}
        if isinstance(tree, Integral):
            return int(tree)
        if isinstance(tree, Real):
            return float(tree)
        if isinstance(tree, Mapping):
            pairs = [(self.pack(key, f"{path}.key"), self.pack(value, f"{path}.{key}")) for key, value in tree.items()]
            return {"dict": pairs}
        if isinstance(tree, tuple | list):
            items = [self.pack(item, f"{path}.{i}") for i, item in enumerate(tree)]
            return items if isinstance(tree, list) else {"tuple": items}
        raise _not_kept(path, tree)

    def _name(self, tensor: Tensor, path: str) -> str:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_complex():
            raise _not_kept(path, tensor)
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        name = self._names.setdefault(place, path)
        self.tensors.setdefault(name, tensor)
        return name


def _unpacked(tree: Any, tensor: Any) -> Any:
    if isinstance(tree, list):
        return [_unpacked(item, tensor) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensor(value)
    if kind == "tuple":
        return tuple(_unpacked(item, tensor) for item in value)
    if kind == "dict":
        return {_unpacked(key, tensor): _unpacked(item, tensor) for key, item in value}
    raise ValueError(f"{kind!r} is no kind of value")


def _not_kept(path: str, value: Any) -> TrainingError:
    return TrainingError(
        f"{path} is a {type(value).__name__}, which a checkpoint cannot keep; "
        'choose another optimizer, such as optimizer="adamw" or "adamw_8bit".'
    )


def _dense(tensor: Tensor) -> Tensor:
    """On the CPU, with storage of its own and nothing else in it, as safetensors wants it."""
    found = tensor.detach().to("cpu").contiguous()
    return found if found.untyped_storage().nbytes() == found.numel() * found.element_size() else found.clone()
