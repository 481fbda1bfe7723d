"""Training methods: which TRL trainer and config each is, and the arguments nbkit gives them.

One table row a method. The class is made once: nbkit's mixin before TRL's trainer. Arguments are chosen for
trl 0.29.1 to 1.16 over transformers 5.15 to 5.23, whose names and defaults differ (TRL turns bf16,
checkpointing and a length cut on by itself; all of them are set here).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbkit.config import SMALL_ADAPTER, RunConfig, TrainConfig
from nbkit.errors import TrainingError, nearest

if TYPE_CHECKING:
    from nbkit.training.trainer import Link


@dataclass(frozen=True)
class Method:
    """`trainer` and `config` are names in the module `library`; `loss` names a function of `nbkit.training.trainer`
    that replaces the trainer's `compute_loss`, or is None to keep TRL's own."""

    trainer: str
    config: str
    loss: str | None
    library: str = "trl"


METHODS = {"sft": Method(trainer="SFTTrainer", config="SFTConfig", loss="token_mean_loss")}


def total_steps(train: TrainConfig, batches: int) -> int:
    """Optimizer steps of a run of `batches` micro-batches an epoch: `max_steps`, or what `epochs` takes, the last step of an
    epoch being as short as the batches left."""
    if train.max_steps is not None:
        return train.max_steps
    return max(1, math.ceil(train.epochs * math.ceil(batches / train.gradient_accumulation)))


def steps_of(config: RunConfig, examples: Sequence[Any]) -> int:
    """Optimizer steps of the run that `config` says, over these rows.

    Raises: ConfigError if a row is longer than a pack.
    """
    from nbkit.training.loader import batches

    if config.train.max_steps is not None and not config.train.packing:
        return config.train.max_steps
    return total_steps(config.train, len(batches(config, examples)))


def build(link: Link, model: Any, tokenizer: Any, examples: Sequence[Any]) -> Any:
    """The trainer of `link.config.train.method`, ready for `.train()`.

    Args:
        model: wrapped by PEFT, adapters trainable.
        examples: pre-tokenised rows with "input_ids" and "labels".
    Raises: TrainingError for a precision that does not train on the model's device.
    """
    from datasets import Dataset

    from nbkit.models.dtype import compute_dtype
    from nbkit.training.loader import collator

    train = link.config.train
    method = METHODS[train.method]
    trainer_class, config_class = _classes(train.method)
    compute = compute_dtype(model)
    arguments = _arguments(train, link.folder, model, compute, steps_of(link.config, examples))
    if method.config == "SFTConfig":
        arguments |= {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    known = {field.name for field in fields(config_class)}
    args = config_class(**{name: value for name, value in arguments.items() if name in known})
    _ = args.device  # sets accelerate up, which counts the GPUs
    args._n_gpu = 1  # one process trains on one GPU; transformers would spread to all it sees (DataParallel)
    first = examples[0]
    stand_in = Dataset.from_dict({"input_ids": [list(first["input_ids"])], "labels": [list(first["labels"])]})
    return trainer_class(
        model=model,
        args=args,
        data_collator=collator(link.config, examples, tokenizer.pad_token_id),
        train_dataset=stand_in,  # TRL insists on a datasets.Dataset and looks at its first row
        processing_class=tokenizer,
        link=link,
        examples=examples,
    )


def check(train: TrainConfig) -> None:
    """Raises: TrainingError if the method's library is not installed, or transformers does not know the optimizer."""
    from transformers.training_args import OptimizerNames

    library = METHODS[train.method].library.split(".")[0]
    if importlib.util.find_spec(library) is None:
        raise TrainingError(
            f"Training by {train.method} needs the package {library}; install 'nbkit-llm[colab]' on Colab or Kaggle, "
            "'nbkit-llm[gpu]' or 'nbkit-llm[cpu]' elsewhere."
        )
    name, names = train.optimizer, ["auto", "adamw", *(one.value for one in OptimizerNames)]
    if name not in names:
        raise TrainingError(f"optimizer {name!r} is not known; use 'auto', 'adamw' or 'adamw_8bit'.{nearest(name, names)}")


@functools.cache
def _classes(name: str) -> tuple[type, type]:
    from nbkit.training import trainer as room

    method = METHODS[name]
    library = importlib.import_module(method.library)
    namespace: dict[str, Callable[..., Any]] = {} if method.loss is None else {"compute_loss": getattr(room, method.loss)}
    trainer = type(f"Nbkit{method.trainer}", (room.TrainerMixin, getattr(library, method.trainer)), namespace)
    return trainer, getattr(library, method.config)


def _arguments(train: TrainConfig, folder: Path, model: Any, compute: Any, steps: int) -> dict[str, Any]:
    import torch

    device = model.get_input_embeddings().weight.device
    on_cpu = device.type == "cpu"
    if compute == torch.float16 and on_cpu:
        raise TrainingError('float16 does not train on a CPU; load the model with dtype="float32".')
    if compute == torch.float16 and any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad):
        raise TrainingError("The adapter is in float16, which the loss scaler cannot train; add LoRA anew, in float32.")
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.schedule if train.schedule != "constant" or not train.warmup_steps else "constant_with_warmup",
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": _optimizer(train.optimizer, model),
        "seed": train.seed,
        "use_cpu": on_cpu,
        "bf16": compute == torch.bfloat16,  # autocast: adapters stay in float32, products run in half precision
        "fp16": compute == torch.float16,
        # The run sets checkpointing on the model itself: TRL's own way leaves a hook on the embeddings.
        "activation_checkpointing": False,  # its name from transformers 5.23 on
        "gradient_checkpointing": False,
        "save_strategy": "no",  # TrainerMixin decides
        "eval_strategy": "no",
        "logging_strategy": "no",  # TrainerMixin tells each step itself, with a single wait for the device
        "logging_nan_inf_filter": False,  # it would hide a loss that is not finite
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not on_cpu,
        "dataloader_num_workers": 0,
        "average_tokens_across_devices": False,
    }


def _optimizer(name: str, model: Any) -> str:
    """What "auto" means hangs on the model alone, so that a run resumes with the same optimizer on any card."""
    if name == "auto":
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return "adamw_8bit" if trained > SMALL_ADAPTER else "adamw_torch_fused"
    return "adamw_torch_fused" if name == "adamw" else name
