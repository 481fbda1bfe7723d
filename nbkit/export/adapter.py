"""The LoRA adapter alone, as PEFT writes it: a few megabytes that load onto the same base model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from nbkit.errors import ExportError
from nbkit.export.report import ExportReport, size_text
from nbkit.export.target import Target, bytes_under, write_mark
from nbkit.export.weights import LiveWeights
from nbkit.models.positions import save_beside

KIND = "adapter"
STRETCHED = "; the rope of its base was stretched: load the base with the config.json beside the adapter"
WEIGHTS = "adapter_model.safetensors"
SMALL_FILES = 32_000_000  # room for a tokenizer, a config and a card


def export_adapter(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    *,
    quantization: str | None = None,
    source_folder: str | Path | None = None,
    progress: bool = True,
) -> ExportReport:
    """Write adapter_model.safetensors, adapter_config.json and the tokenizer into a folder, and read the tensors back.

    Args:
        model: a PeftModel whose adapter was trained.
        quantization, source_folder, progress: of the other exports; nothing here depends on them.
    Raises: ExportError for an adapter that is not finite or was never trained, a place that cannot be written, or
        tensors on disk that are not bit-equal to the live ones. Nothing is left behind then.
    """
    if quantization is not None:
        raise ExportError(f"quantization={quantization!r} goes with GGUF only; leave it out for the adapter.")
    started = time.perf_counter()
    LiveWeights(model)  # refuses what has no trained, finite adapter
    target = Target(path, KIND)
    live = _state(model)
    needed = sum(t.numel() * t.element_size() for t in live.values()) + SMALL_FILES
    with target.staged(needed) as folder:
        # "auto" would ask the hub for the base model's config, to see whether the vocabulary has grown.
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        tokenizer.save_pretrained(folder)
        stretched = save_beside(model, folder)
        _compare(folder / WEIGHTS, live)
        verdict = f"read back: {len(live)} tensors, all bit-equal" + STRETCHED * stretched
        check: dict[str, float | int | str] = {"tensors": len(live), "max_difference": 0.0}
        write_mark(folder, KIND, {"check": check})
    return ExportReport(
        kind=KIND,
        path=target.path,
        bytes=bytes_under(target.path),
        seconds=time.perf_counter() - started,
        verdict=verdict,
        check=check,
    )


def _state(model: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _compare(path: Path, live: dict[str, torch.Tensor]) -> None:
    """Raises: ExportError unless the file holds exactly these tensors, bit by bit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ExportError(f"PEFT wrote no {path.name}; nothing was exported.")
    try:
        written = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ExportError(f"The written {path.name} cannot be read back ({error}); it was removed: check the disk.") from error
    if written.keys() != live.keys():
        odd = sorted(written.keys() ^ live.keys())
        raise ExportError(f"The written adapter has other tensors than the live one, such as {odd[0]}; it was removed.")
    for name, tensor in live.items():
        if not torch.equal(written[name], tensor.detach().cpu()):
            raise ExportError(
                f"{name} of the written adapter ({size_text(path.stat().st_size)}) differs from the live one; "
                "it was removed: check the disk and export again."
            )
