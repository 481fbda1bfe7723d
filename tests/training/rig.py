"""A tiny model with LoRA, pre-tokenised rows of unequal lengths, and the config of a run over them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbkit.config import DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from tests.tiny import VOCAB, tiny_model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Rows:
    """What training reads of a DataReport."""

    examples: list[dict[str, list[int]]]
    held_out_examples: list[dict[str, list[int]]] = field(default_factory=list)
    fingerprint: str = "rows-1"

    @property
    def rows_in(self) -> int:
        return len(self.examples)

    @property
    def trained_tokens(self) -> int:
        return sum(label != -100 for example in self.examples for label in example["labels"])


def examples(count: int, seed: int = 0, longest: int = 40) -> list[dict[str, list[int]]]:
    """Rows whose reply is 1 to 30 tokens, so that a mean of means differs clearly from a mean over tokens."""
    draw = random.Random(seed)
    made = []
    for index in range(count):
        prompt, reply = draw.randint(2, longest - 30), 1 if index % 3 == 0 else draw.randint(2, 30)
        ids = [draw.randrange(3, VOCAB) for _ in range(prompt + reply)]
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def rows(count: int = 12, seed: int = 0, held_out: int = 0) -> Rows:
    return Rows(examples(count, seed), examples(held_out, seed + 100))


def lora_model(dropout: float = 0.0, rank: int = 4, family: str = "llama", base: Any = None) -> Any:
    """A tiny model with seeded LoRA on all linear layers, float32."""
    import torch
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    torch.manual_seed(7)
    settings = PeftLora(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return get_peft_model(base if base is not None else tiny_model(family), settings)


def config(run_dir: Path | str | None, **train: Any) -> RunConfig:
    """Four steps of two rows unless told otherwise."""
    settings = {"max_steps": 4, "batch_size": 2, "learning_rate": 1e-2, "gradient_checkpointing": False, **train}
    return RunConfig(
        model=ModelConfig(name="tiny"),
        lora=LoraConfig(rank=4),
        data=DataConfig(source="rows"),
        train=TrainConfig(**settings),
        run_dir=None if run_dir is None else str(run_dir),
    )


def adapter(model: Any) -> dict[str, Any]:
    """Copies of all trainable tensors, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def failing(model: Any, at: int, error: BaseException) -> Any:
    """The model, with a forward that raises at its call number `at`."""
    base, calls = model.get_base_model(), []
    forward = base.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise error
        return forward(*args, **kwargs)

    base.forward = fail
    return model
