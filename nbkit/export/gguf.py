"""One GGUF file for llama.cpp, Ollama and LM Studio: merged weights in f16 or q8_0, tokenizer, chat template.

Tensors are merged, converted and written one by one. The file is then read back: every header field must be equal, every
tensor equal to within its type's rounding, and a replay with the file's weights must answer as the trained model does.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nbkit.errors import ExportError
from nbkit.export.gguf_file import BLOCK, CHUNK, GgufFile
from nbkit.export.gguf_model import ROPE_FACTORS, GgufModel
from nbkit.export.gguf_vocab import vocabulary_fields
from nbkit.export.replay import GATE, Probe, Verdict, judge, probe, replay
from nbkit.export.report import ExportReport
from nbkit.export.target import GGUF_MARK, Target
from nbkit.export.weights import LiveWeights

KIND = "gguf"
TYPES = ("f16", "q8_0")
GATE_Q8 = 1e-1  # measured on SmolLM2: 2e-2; each tensor is also held to the rounding of its type


def export_gguf(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    *,
    quantization: str | None = None,
    source_folder: str | Path | None = None,
    progress: bool = True,
) -> ExportReport:
    """Write base + scale * B @ A and the tokenizer into one file.

    Args:
        model: a PeftModel of the llama, mistral or qwen2 type whose adapter was trained.
        path: ends in .gguf.
        quantization: "f16", or "q8_0" (the default). Norms and biases stay float32.
        source_folder: the base's folder; its name goes into the header.
    Raises: ExportError if the model or tokenizer has something GGUF lacks, the place cannot be written, or the file read
        back does not equal what was trained. Nothing is left behind then.
    """
    quantization = quantization or "q8_0"
    if quantization not in TYPES:
        raise ExportError(f"GGUF type {quantization!r} is not one of {', '.join(TYPES)}; use q8_0, or f16 for full 16 bits.")
    if importlib.util.find_spec("gguf") is None:
        raise ExportError("GGUF export needs the package gguf; install it with: pip install 'nbkit-llm[gguf]'")
    started = time.perf_counter()
    weights = LiveWeights(model)
    target = Target(path, KIND, suffix=".gguf")
    form = GgufModel(weights.causal.config)
    plan = {name: _tensor_type(entry.shape, quantization) for name, entry in weights.entries.items()}
    fields = _fields(form, tokenizer, quantization, source_folder)
    needed = sum(_byte_count(weights.entries[n].shape, kind) for n, kind in plan.items()) + 64 * form.config.vocab_size + 2**20
    with target.staged(needed) as folder, _bar(3 * weights.numel, progress) as bar:
        expected = probe(weights, tokenizer)
        file = folder / target.path.name
        _write(file, form, weights, plan, fields, bar)
        verdict = _read_back(file, form, weights, plan, fields, expected, bar)
    remark = form.context()[1]
    return ExportReport(
        kind=f"{KIND} {quantization}",
        path=target.path,
        bytes=target.path.stat().st_size,
        seconds=time.perf_counter() - started,
        verdict=f"read back: header and {len(plan)} tensors right, {verdict.sentence()}{'; ' + remark if remark else ''}",
        check={
            "max_relative_logit_difference": verdict.to_adapter,
            "max_relative_logit_difference_to_base": verdict.to_base,
            "tensors": len(plan),
            "context_length": form.context()[0],
        },
    )


def _fields(form: GgufModel, tokenizer: Any, quantization: str, source_folder: str | Path | None) -> dict[str, Any]:
    import gguf

    file_type = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[quantization]
    name = Path(source_folder).name if source_folder is not None else form.config.model_type
    return {
        GGUF_MARK: f"{KIND} {quantization}",
        "general.name": f"{name}-tuned",
        "general.type": "model",
        "general.file_type": int(file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **form.fields(),
        **vocabulary_fields(tokenizer, form.config.vocab_size),
    }


def _tensor_type(shape: tuple[int, ...], quantization: str) -> Any:
    """Matrices take the file's type (q8_0 only in whole blocks, else f16); vectors stay float32, as llama.cpp has them."""
    from gguf import GGMLQuantizationType as Type

    if len(shape) == 1:
        return Type.F32
    return Type.Q8_0 if quantization == "q8_0" and shape[-1] % BLOCK == 0 else Type.F16


def _byte_count(shape: tuple[int, ...], kind: Any) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return torch.Size(shape).numel() // block * size


def _write(file: Path, form: GgufModel, weights: LiveWeights, plan: dict[str, Any], fields: dict[str, Any], bar: Any) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, form.architecture)
    try:
        for key, value in fields.items():
            writer.add_key_value(key, value, *_value_type(value))
        for name, kind in plan.items():
            shape = weights.entries[name].shape
            writer.add_tensor_info(form.name(name), shape, np.dtype(np.float32), _byte_count(shape, kind), raw_dtype=kind)
        factors = form.rope_factors()
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, tuple(factors.shape), np.dtype(np.float32), factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in plan.items():
            value = form.reorder(name, weights.merged(name)).contiguous()
            writer.write_tensor_data(_converted(name, value.numpy(), kind))
            bar.update(value.numel())
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
    finally:
        writer.close()


def _converted(name: str, value: np.ndarray, kind: Any) -> np.ndarray:
    """The tensor in its GGUF type, a few rows at a time. Raises: ExportError for values beyond float16's range."""
    import gguf

    if kind == gguf.GGMLQuantizationType.F32:
        return value
    limit = 65504.0 * (127 if kind == gguf.GGMLQuantizationType.Q8_0 else 1)  # q8_0 keeps max / 127 in float16
    if not (float(value.max()) <= limit and float(value.min()) >= -limit):
        raise ExportError(f"{name} has values beyond the range of {kind.name}; export merged_16bit in bfloat16 instead.")
    rows = max(1, CHUNK // value.shape[-1])
    parts = [gguf.quants.quantize(np.ascontiguousarray(value[i : i + rows]), kind) for i in range(0, value.shape[0], rows)]
    return np.concatenate(parts)


def _value_type(value: Any) -> tuple[Any, ...]:
    """(type, element type) of a header field."""
    from gguf import GGUFValueType as V

    if isinstance(value, list):
        kind = {str: V.STRING, int: V.INT32, float: V.FLOAT32}[type(value[0])] if value else V.STRING
        return V.ARRAY, kind
    return ({bool: V.BOOL, str: V.STRING, int: V.UINT32, float: V.FLOAT32}[type(value)],)


def _read_back(
    file: Path,
    form: GgufModel,
    weights: LiveWeights,
    plan: dict[str, Any],
    fields: dict[str, Any],
    expected: Probe,
    bar: Any,
) -> Verdict:
    factors = form.rope_factors()
    written = GgufFile(file, {"general.architecture": form.architecture, **fields})
    if written.names() != {form.name(name) for name in plan} | ({ROPE_FACTORS} if factors is not None else set()):
        raise ExportError("The GGUF file, read back, has other tensors than the model; it was removed.")
    if factors is not None and not torch.equal(written.read(ROPE_FACTORS), factors):
        raise ExportError("The GGUF file, read back, has other rope factors than the model; it was removed.")
    for name in plan:
        merged = form.reorder(name, weights.merged(name))
        written.compare(form.name(name), merged)
        bar.update(merged.numel())

    def fetch(name: str) -> Tensor:
        value = written.read(form.name(name))
        bar.update(value.numel())
        return form.reorder(name, value, back=True)

    device = weights.model.get_input_embeddings().weight.device
    logits = replay(form.config, fetch, expected.ids, device)
    return judge("GGUF file", logits, expected, GATE_Q8 if "Q8_0" in {kind.name for kind in plan.values()} else GATE)


def _bar(total: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="Writing and checking GGUF", unit="", unit_scale=True, disable=not shown)
