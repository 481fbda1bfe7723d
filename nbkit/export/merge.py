"""The merged model: base plus adapter as one 16-bit transformers folder that anything can load.

It is written weight by weight, then read back from disk and compared with the live model before it gets its name.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nbkit.errors import ExportError
from nbkit.export.replay import GATE, Verdict, judge, plain_config, probe, replay
from nbkit.export.report import ExportReport
from nbkit.export.safetensors_file import names_of, read_tensor, write_checkpoint
from nbkit.export.target import Target, bytes_under, write_mark
from nbkit.export.weights import LiveWeights

KIND = "merged_16bit"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL_FILES = 32_000_000  # room for a tokenizer, configs and licences


def export_merged(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    *,
    quantization: str | None = None,
    source_folder: str | Path | None = None,
    progress: bool = True,
    dtype: str = "bfloat16",
) -> ExportReport:
    """Write base + scale * B @ A, computed in float32, as safetensors with config, tokenizer and generation config.

    A 4-bit base is dequantised, and the config names no quantisation. The live model stays as it is.

    Args:
        model: a PeftModel whose adapter was trained.
        source_folder: the base's folder; its licence files are copied.
        dtype: "bfloat16" or "float16".
    Raises: ExportError if the adapter was not trained, the place cannot be written, or the model on disk differs from the
        live one by more than 1e-2 of the largest logit or is nearer to the base. Nothing is left behind then.
    """
    if quantization is not None:
        raise ExportError(f"quantization={quantization!r} goes with GGUF only; the merged model is 16-bit.")
    if dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}; use bfloat16, or float16 for older GPUs.")
    started = time.perf_counter()
    weights = LiveWeights(model)
    target = Target(path, KIND)
    with target.staged(2 * weights.numel + SMALL_FILES) as folder, _bar(2 * weights.numel, progress) as bar:
        expected = probe(weights, tokenizer)
        _write_small_files(folder, weights.causal, tokenizer, dtype, source_folder)
        digests = _write_weights(folder, weights, DTYPES[dtype], bar)
        verdict = _read_back(folder, digests, expected, model, bar)
        check: dict[str, float | int | str] = {
            "max_relative_logit_difference": verdict.to_adapter,
            "max_relative_logit_difference_to_base": verdict.to_base,
            "tensors": len(weights.entries),
            "dtype": dtype,
        }
        write_mark(folder, KIND, {"check": check})
    return ExportReport(
        kind=KIND,
        path=target.path,
        bytes=bytes_under(target.path),
        seconds=time.perf_counter() - started,
        verdict=f"read back: {verdict.sentence()}",
        check=check,
    )


def _write_small_files(folder: Path, causal: Any, tokenizer: Any, dtype: str, source_folder: str | Path | None) -> None:
    config = plain_config(causal.config)
    config.dtype = dtype
    config.architectures = [type(causal).__name__]
    config.save_pretrained(folder)
    if getattr(causal, "generation_config", None) is not None:
        # Not save_pretrained: it refuses settings that contradict each other, and many a hub checkpoint has such.
        causal.generation_config.to_json_file(folder / "generation_config.json", use_diff=True)
    tokenizer.save_pretrained(folder)
    for pattern in ("LICENSE*", "NOTICE*"):
        for file in Path(source_folder).glob(pattern) if source_folder is not None else ():
            shutil.copyfile(file, folder / file.name)


def _write_weights(folder: Path, weights: LiveWeights, dtype: torch.dtype, bar: Any) -> dict[str, bytes]:
    """Returns the digest of every tensor as it was given to the writer."""
    digests = {}

    def make(name: str) -> Tensor:
        value = weights.merged(name)
        rounded = value.to(dtype)
        if dtype == torch.float16 and not bool(torch.isfinite(rounded).all()):
            raise ExportError(f"{name} has values beyond float16's range of 65504; export with dtype='bfloat16'.")
        bar.update(value.numel())
        digests[name] = _digest(rounded)
        return rounded

    write_checkpoint(folder, {name: entry.shape for name, entry in weights.entries.items()}, dtype, make)
    return digests


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()


def _read_back(folder: Path, digests: dict[str, bytes], expected: Any, model: Any, bar: Any) -> Verdict:
    """Config and weights from disk, through a stock model of that config."""
    from safetensors import SafetensorError
    from transformers import AutoConfig

    def fetch(name: str) -> Tensor:
        value = read_tensor(folder, files, name)
        # Logits would not show one flipped bit among millions of weights.
        if _digest(value) != digests.get(name):
            raise ExportError(f"{name} of the merged model is not on disk as it was written; it was removed: check the disk.")
        bar.update(value.numel())
        return value

    device = model.get_input_embeddings().weight.device
    try:
        files = names_of(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        logits = replay(config, fetch, expected.ids, device, names=set(files))
    except SafetensorError as error:
        raise ExportError(f"The merged model cannot be read back ({error}); it was removed: check the disk.") from error
    coarse = config.dtype == torch.bfloat16
    remedy = ": bfloat16 may be too coarse for this model, try dtype='float16'" if coarse else ""
    return judge("merged model", logits, expected, GATE, remedy)


def _bar(total: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="Merging and checking", unit="", unit_scale=True, disable=not shown)
