"""The frozen dataclasses that flow between the layers; `RunConfig` is the whole truth of a run.

Panels produce it, "Show code" prints it, `python -m nbkit run run.json` consumes it, the run folder
stores it. Every class checks itself when made and names the remedy in the error. Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from nbkit.errors import ConfigError, nearest

SCHEMA = 1
IGNORE_INDEX = -100  # the label of a token that bears no loss
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ROPE_SCALINGS = ("auto", "none")
FORMATS = ("auto", "alpaca", "sharegpt", "messages", "prompt_completion", "preference", "kto", "text")
TRAIN_ON = ("replies", "last_reply", "completions", "all")
TOO_LONG = ("refuse", "drop", "cut", "split")
SCHEDULES = ("linear", "cosine", "constant")
METHODS = ("sft",)
SMALL_ADAPTER = 2**26  # trained parameters up to which float32 states (8 bytes each) are no burden beside the weights
EXPORT_KINDS = ("adapter", "merged_16bit", "gguf")
GGUF_TYPES = ("f16", "q8_0")


def _require(ok: bool, sentence: str) -> None:
    if not ok:
        raise ConfigError(sentence)


def _choice(value: str, choices: tuple[str, ...], what: str) -> None:
    if value not in choices:
        raise ConfigError(f"{what} {value!r} is not known; use one of {', '.join(choices)}.{nearest(str(value), choices)}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoint is loaded, and how. `max_seq_length` in tokens bounds every training row."""

    name: str
    revision: str | None = None
    load_in_4bit: bool = False
    dtype: str = "auto"  # auto: bfloat16 from capability 8.0, float16 on older GPUs, float32 on CPU
    max_seq_length: int = 2048
    rope_scaling: str = "auto"  # rows beyond the model's positions: stretch its rope to max_seq_length, or "none": refuse

    def __post_init__(self) -> None:
        _require(bool(self.name.strip()), "The model name is empty; give a hub id, a local folder or smollm2-135m-instruct.")
        _choice(self.dtype, DTYPES, "dtype")
        _choice(self.rope_scaling, ROPE_SCALINGS, "rope_scaling")
        _require(self.max_seq_length >= 8, f"max_seq_length is {self.max_seq_length}; it must be at least 8 tokens.")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685): delta W = scale * b @ a, scale = alpha / rank (rsLoRA: alpha / sqrt(rank))."""

    rank: int = 16
    alpha: float | None = None  # None: equal to rank, so that scale is 1
    dropout: float = 0.0
    targets: tuple[str, ...] = ALL_LINEAR
    bias: str = "none"
    use_rslora: bool = False
    seed: int = 3407

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"LoRA rank is {self.rank}; it must be at least 1 (8, 16 and 32 are usual).")
        _require(
            self.alpha is None or self.alpha > 0, f"LoRA alpha is {self.alpha}; it must be above 0, or None for alpha = rank."
        )
        _require(0 <= self.dropout < 1, f"LoRA dropout is {self.dropout}; it must be at least 0 and below 1.")
        _choice(self.bias, ("none", "all", "lora_only"), "LoRA bias")
        _require(len(self.targets) > 0, "LoRA has no target modules; name at least one, such as q_proj.")

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.use_rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """How rows become trained tokens; every repair of the rows is a line here. `columns` maps a role of the format to
    the column that holds it; roles left out take the format's usual column (see `nbkit.data.formats`)."""

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)  # further names of speakers → the role each is
    prompt: str | None = None  # the prompt out of several columns: "{question}[[\n\nContext: {context}]]"; [[ ]] may be missing
    system: str | None = None  # a system message put before rows that have none; None adds none
    template: str | None = None  # None: the tokenizer's own; a name of nbkit's templates (chatml, llama-3 …); or Jinja text
    train_on: str = "replies"  # of a conversation: all replies, the last one, the completion after the prompt, or every token
    faulty: str = "refuse"  # rows with a fault: "refuse" (listed, not trained) or "drop" (agreed to, counted)
    # Rows above max_seq_length: "refuse", "drop", "cut" (at a message boundary, the end goes) or "split" (into several rows).
    too_long: str = "refuse"
    duplicates: str = "keep"  # rows equal to an earlier one: "keep" (told) or "drop"
    same_role: str = "keep"  # turns of one speaker in a row: "keep" (told) or "join" (into one, a blank line between)
    first_reply: str = "refuse"  # conversations that begin with a reply: "refuse", or "skip" that turn (told)

    def __post_init__(self) -> None:
        _choice(self.format, FORMATS, "Data format")
        _choice(self.train_on, TRAIN_ON, "train_on")
        _choice(self.faulty, ("refuse", "drop"), "faulty")
        _choice(self.too_long, TOO_LONG, "too_long")
        _choice(self.duplicates, ("keep", "drop"), "duplicates")
        _choice(self.same_role, ("keep", "join"), "same_role")
        _choice(self.first_reply, ("refuse", "skip"), "first_reply")
        for name in ("columns", "roles"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        for role in self.roles.values():
            _choice(role, ("system", "user", "assistant", "tool"), "The role of a speaker,")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`source` and `held_out`: a file, a hub id, or `sample:NAME`; `held_out` may also be a number of
    rows, or a share below 1, split off the source by `seed`. None holds nothing out."""

    source: str
    recipe: DataRecipe = field(default_factory=DataRecipe)
    held_out: str | int | float | None = None
    seed: int = 3407
    fingerprint: str | None = None  # of the rows' content; a resumed run refuses other rows

    def __post_init__(self) -> None:
        if isinstance(self.held_out, (int, float)):
            _require(self.held_out > 0, f"held_out is {self.held_out}; give a positive number of rows, a share below 1, or None.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run trains. A step is one optimizer step over `batch_size * gradient_accumulation` rows."""

    method: str = "sft"
    max_steps: int | None = None  # None: as many as `epochs` takes
    epochs: float = 1.0
    batch_size: int = 2
    gradient_accumulation: int = 1
    packing: bool = False  # several rows in one sequence, none sees another; a micro-batch is then one pack
    pack_tokens: int | None = None  # tokens of a pack; None: batch_size * max_seq_length
    learning_rate: float = 2e-4
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "auto"  # auto: adamw, above SMALL_ADAPTER adamw_8bit (nbkit's own); or any name of SFTConfig(optim=)
    # auto: what fits where the engine is bound, else transformers' own; True, "nbkit", "unsloth": the least memory; False: none
    gradient_checkpointing: bool | str = "auto"
    save_steps: int = 0  # 0: only at the end and on stop
    seed: int = 3407

    def __post_init__(self) -> None:
        _choice(self.method, METHODS, "Training method")
        _choice(self.schedule, SCHEDULES, "schedule")
        for name in ("batch_size", "gradient_accumulation"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1.")
        _require(self.pack_tokens is None or self.packing, f"pack_tokens={self.pack_tokens} goes with packing=True only.")
        _require(
            self.pack_tokens is None or self.pack_tokens >= 8, f"pack_tokens is {self.pack_tokens}; 8 is the least, or None."
        )
        for name in ("warmup_steps", "save_steps"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative.")
        _require(
            self.max_steps is None or self.max_steps >= 1,
            f"max_steps is {self.max_steps}; it must be at least 1, or None for whole epochs.",
        )
        _require(0 <= self.seed < 2**32, f"seed is {self.seed}; it must be from 0 to 4294967295.")
        _require(self.epochs > 0, f"epochs is {self.epochs}; it must be above 0.")
        _require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}; it must be above 0 (2e-4 is usual for LoRA).")
        _require(
            self.gradient_checkpointing in (True, False, "auto", "nbkit", "unsloth"),
            f"gradient_checkpointing is {self.gradient_checkpointing!r}; use 'auto', True, False, 'nbkit' or 'unsloth'.",
        )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """One export: adapter (PEFT folder), merged_16bit (transformers folder) or gguf (one file)."""

    kind: str
    path: str | None = None  # None: a folder or file of that name in the run folder
    quantization: str | None = None  # gguf only: f16 or q8_0

    def __post_init__(self) -> None:
        _choice(self.kind, EXPORT_KINDS, "Export kind")
        if self.kind == "gguf":
            object.__setattr__(self, "quantization", self.quantization or "q8_0")
            _choice(str(self.quantization), GGUF_TYPES, "GGUF type")
        else:
            _require(self.quantization is None, f"quantization={self.quantization!r} goes with kind='gguf' only.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run needs; equal configs on one machine train equal weights."""

    model: ModelConfig
    lora: LoraConfig
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    exports: tuple[ExportConfig, ...] = ()
    run_dir: str | None = None  # None: a new folder under the workspace
    schema: int = SCHEMA

    def replace(self, **changes: Any) -> Self:
        """A copy with fields changed, checked anew: `config.replace(run_dir="runs/two")`."""
        return dataclasses.replace(self, **changes)

    def to_json(self, path: str | Path | None = None) -> str:
        """The config as JSON text; also written to `path` if given."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """Read from a file path or from JSON text.

        Raises: ConfigError naming the unknown key, the wrong type or the missing field.
        """
        text = str(source)
        if not text.lstrip().startswith("{"):
            path = Path(source)
            if not path.is_file():
                raise ConfigError(f"There is no run file {path}; give the path of a run.json.")
            text = path.read_text(encoding="utf-8")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"The run file is not JSON: {error}.") from error
        if isinstance(values, dict) and values.get("schema", SCHEMA) > SCHEMA:
            raise ConfigError(
                f"The run file has schema {values['schema']}, this nbkit reads up to {SCHEMA}; install a newer nbkit-llm."
            )
        return _build(cls, values, "run file")


def _build(cls: Any, values: Any, where: str) -> Any:
    """A dataclass from a JSON value, every key and type checked; `where` names the place in errors."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be an object, not {type(values).__name__}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where} has an unknown key {key!r}.{nearest(key, fields)}")
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where} lacks the key {name!r}.")
    return cls(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        if any(_is_a(a, value) for a in args):
            return value
        raise ConfigError(f"{where} is {value!r}; it must be {' or '.join(getattr(a, '__name__', str(a)) for a in args)}.")
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if not _is_a(origin or hint, value):
        raise ConfigError(f"{where} is {value!r}; it must be {getattr(hint, '__name__', hint)}.")
    return float(value) if hint is float else value


def _is_a(hint: Any, value: Any) -> bool:
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
