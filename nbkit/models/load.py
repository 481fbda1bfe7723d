"""`load`: a checkpoint's name to a model and tokenizer in memory, ready for LoRA.

Weights come from safetensors only and no code of a checkpoint is ever run. Nothing of torch or transformers is changed.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nbkit.config import ModelConfig
from nbkit.errors import ModelError
from nbkit.families import Family, find
from nbkit.hardware.shapes import ModelShape, shape_of
from nbkit.models.adapters import count_parameters
from nbkit.models.files import read_json, size_text
from nbkit.models.positions import mark, stretch
from nbkit.models.quiet import quiet_libraries
from nbkit.models.resolve import resolve, suggest

PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|PAD_TOKEN|>", "<|endoftext|>", "<unk>")


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory. `source`: "folder", "cache", "hub" or "wheel"; `family` is None where none is declared."""

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    name: str
    folder: Path
    source: str
    message: str = field(repr=False)
    family: Family | None = field(repr=False)
    shape: ModelShape = field(repr=False)


def load(config: ModelConfig, *, token: str | None = None, progress: bool = True) -> LoadedModel:
    """Load `smollm2-135m-instruct`, a hub id or a local folder; on the GPU if there is one, else on the CPU.

    Args:
        config: dtype "auto" is bfloat16 from capability 8.0, float16 on older GPUs, float32 on CPU.
        token: the hub's access token, for gated checkpoints; passed on and stored nowhere.
        progress: show bars, and print one line that says where the weights came from.
    Raises: ModelError.
    """
    found = resolve(config.name, config.revision, token, progress)
    facts = read_json(found.folder / "config.json")
    _require_native(facts, config.name)
    quantization = _quantization(facts, config)
    family = find(facts.get("model_type", ""))
    shape = shape_of(facts if family else _usual_names(found.folder, config.name))
    device, dtype = _place(config.dtype)
    _require_memory(config, shape, device, dtype, quantized=bool(quantization or facts.get("quantization_config")))
    with _bars(progress), quiet_libraries():
        tokenizer = _tokenizer(found.folder, config.name)
        native = _config(found.folder, config.name)
        stretched = stretch(native, config.max_seq_length, family, config.name, config.rope_scaling)
        model = _model(found.folder, config.name, device, dtype, quantization, native)
    _settle_4bit(model, dtype)
    _set_pad(tokenizer, model)
    if stretched and family:
        mark(model, stretched)
        shape = replace(shape, context=config.max_seq_length)
        tokenizer.model_max_length = max(tokenizer.model_max_length, config.max_seq_length)
    model.eval()
    held = "4-bit NF4" if getattr(model, "is_loaded_in_4bit", False) else str(dtype).removeprefix("torch.")
    count = count_parameters(model)[1]
    message = f"{found.message} {count:,} parameters in {held} on {'the GPU' if device == 'cuda' else 'the CPU'}."
    if family is None:
        message += f" Model type {shape.model_type!r} is not among nbkit's families, so it runs on transformers' own code."
    message += f" {stretched}" if stretched else ""
    if progress:
        print(message)
    return LoadedModel(model, tokenizer, config.name, found.folder, found.source, message, family, shape)


def fetch(name: str, *, revision: str | None = None, token: str | None = None, progress: bool = True) -> str:
    """Bring a checkpoint into the cache without loading it. Returns the line that says where it came from and lies.

    Raises: ModelError.
    """
    return resolve(name, revision, token, progress).message


def _require_native(facts: dict[str, Any], name: str) -> None:
    """Refuse a checkpoint whose class only its own code has, or that transformers does not know."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = facts.get("model_type", "")
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if facts.get("auto_map"):
        raise ModelError(
            f"{name} brings its own Python code, which nbkit never runs; choose a checkpoint of a model type that "
            f"transformers knows.{suggest(name)}"
        )
    raise ModelError(f"{name} is of model type {model_type or 'unknown'!r}, which is no causal language model of transformers.")


def _usual_names(folder: Path, name: str) -> dict[str, Any]:
    """The config with the usual names of sizes, where a model type has its own (n_embd for hidden_size)."""
    config = _config(folder, name)
    return {**config.to_dict(), **{key: getattr(config, key) for key in config.attribute_map if hasattr(config, key)}}


def _config(folder: Path, name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"The config of {name} in {folder} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _place(dtype: str) -> tuple[str, Any]:
    """("cuda" or "cpu", torch dtype)."""
    import torch

    if not torch.cuda.is_available():
        chosen = "float32" if dtype == "auto" else dtype
        return "cpu", getattr(torch, chosen)
    # By capability: torch says that a T4 has bfloat16, which is then emulated and slow.
    modern = torch.cuda.get_device_capability()[0] >= 8
    chosen = ("bfloat16" if modern else "float16") if dtype == "auto" else dtype
    return "cuda", getattr(torch, chosen)


def _quantization(facts: dict[str, Any], config: ModelConfig) -> Any | None:
    """A BitsAndBytesConfig for 4-bit loading; None where none is wanted or the checkpoint is already quantised."""
    stored = facts.get("quantization_config")
    method = str(stored.get("quant_method", "bitsandbytes")) if stored else ""
    if stored and method not in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        raise ModelError(
            f"{config.name} is quantised with {method}, which nbkit does not train; load its 16-bit original, "
            "with load_in_4bit=True if memory is short."
        )
    if not (stored or config.load_in_4bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("4-bit weights need the package bitsandbytes; install it with: pip install 'nbkit-llm[gpu]'")
    if stored:
        return None  # transformers reads the stored settings; passing others would be ignored with a warning
    from transformers import BitsAndBytesConfig

    _, dtype = _place(config.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _require_memory(config: ModelConfig, shape: ModelShape, device: str, dtype: Any, *, quantized: bool) -> None:
    """Refuse weights larger than the whole memory: on CPU loading them would get the notebook's process killed."""
    from nbkit.hardware.fit import weight_bytes
    from nbkit.hardware.probe import probe

    needed = weight_bytes(shape, load_in_4bit=quantized, bytes_per_weight=dtype.itemsize)
    machine = probe()
    total = machine.vram_total_bytes if device == "cuda" else machine.ram_total_bytes
    if total and needed > total:
        advice = "choose a smaller checkpoint" if quantized else "choose a smaller checkpoint, or load_in_4bit=True"
        raise ModelError(
            f"The weights of {config.name} need {size_text(needed)}, this machine has {size_text(total)} of "
            f"{'GPU memory' if device == 'cuda' else 'memory'}; {advice}."
        )


def _model(folder: Path, name: str, device: str, dtype: Any, quantization: Any | None, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    options = {"quantization_config": quantization} if quantization is not None else {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map={"": device},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except ModelError:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise ModelError(f"{name} does not fit into the free GPU memory; close other notebooks, or use 4-bit.") from error
        raise ModelError(f"{name} cannot be loaded from {folder}: {_first_line(error)}") from error
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"The weights in {folder} lack {len(missing)} tensors of the model, such as {missing[0]}; fetch the checkpoint again."
        )
    return model


def _tokenizer(folder: Path, name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"The tokenizer of {name} cannot be loaded from {folder}: {_first_line(error)}") from error


def _settle_4bit(model: Any, dtype: Any) -> None:
    """4-bit layers compute in the dtype that suits this machine, also where a stored checkpoint names another.

    On CPUs with avx512_bf16, bitsandbytes would also repack each weight in place in its first evaluation (rounding the
    scales to bfloat16, failing on rows shorter than a block), and training would go on with that: it is switched off.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = dtype
            module.compute_type_is_set = True
            module.support_avx512bf16_for_cpu = False


def _set_pad(tokenizer: Any, model: Any) -> None:
    """A pad token from the vocabulary as it is: no token is added and eos stays what it was.

    Where nothing better is there pad is eos; labels are then masked by position, never by id.
    """
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        known = [token for token in PAD_TOKENS if token in vocabulary and token != tokenizer.eos_token]
        tokenizer.pad_token = known[0] if known else tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError("The tokenizer has neither a pad nor an end-of-sequence token; set tokenizer.eos_token in its files.")
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """transformers' own bars on or off, and afterwards as they were."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
