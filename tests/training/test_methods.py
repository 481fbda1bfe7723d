"""The table of methods, the number of steps, and the arguments that TRL gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbkit.config import METHODS as DECLARED
from nbkit.errors import TrainingError
from nbkit.training import methods
from nbkit.training.trainer import Link, TrainerMixin
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training import rig


def build(tmp_path: Path, model: Any, **train: Any) -> Any:
    link = Link(rig.config(tmp_path, **train), tmp_path, {}, lambda event: None, lambda: False)
    return methods.build(link, model, tiny_tokenizer(), rig.rows().examples)


def test_every_declared_method_is_in_the_table() -> None:
    assert set(methods.METHODS) == set(DECLARED)


@pytest.mark.parametrize(
    ("train", "rows", "steps"),
    [
        ({"max_steps": 7}, 3, 7),
        ({"batch_size": 2}, 11, 6),
        ({"batch_size": 2, "gradient_accumulation": 4}, 11, 2),
        ({"batch_size": 2, "epochs": 2.5}, 8, 10),
        ({"batch_size": 8, "epochs": 0.01}, 3, 1),
        ({"packing": True, "pack_tokens": 40}, 1, 1),
        ({"packing": True, "pack_tokens": 40, "epochs": 3}, 2, 6),
    ],
)
def test_total_steps(train: dict[str, Any], rows: int, steps: int) -> None:
    made = [{"input_ids": [5] * 25, "labels": [5] * 25}] * rows
    assert methods.steps_of(rig.config(None, **{"max_steps": None, **train}), made) == steps


def test_the_trainer_is_the_mixin_before_trls(tmp_path: Path) -> None:
    from trl import SFTTrainer

    trainer = build(tmp_path, rig.lora_model())
    order = type(trainer).__mro__
    assert order.index(TrainerMixin) < order.index(SFTTrainer)
    names = {type(callback).__name__ for callback in trainer.callback_handler.callbacks}
    assert not names & {"ProgressCallback", "PrinterCallback", "NotebookProgressCallback"}
    trainer.close()


def test_on_a_cpu_the_precision_is_that_of_the_model_and_nothing_is_left_to_trls_defaults(tmp_path: Path) -> None:
    trainer = build(tmp_path, rig.lora_model(), schedule="cosine", warmup_steps=3, weight_decay=0.1, seed=5)
    args = trainer.args
    assert args.use_cpu and not args.bf16 and not args.fp16 and args.device.type == "cpu" and args.n_gpu <= 1
    assert not args.gradient_checkpointing and args.max_length is None and not args.packing
    assert (args.warmup_steps, args.weight_decay, args.seed, args.max_grad_norm) == (3, 0.1, 5, 1.0)
    assert str(args.lr_scheduler_type.value) == "cosine" and args.optim.value == "adamw_torch_fused"
    assert args.report_to in ([], "none", ["none"]) and not args.dataloader_pin_memory
    trainer.close()
    bf16 = build(tmp_path, rig.lora_model(base=tiny_model().bfloat16()))
    assert bf16.args.bf16
    bf16.close()


def test_float16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match='float16 does not train on a CPU; load the model with dtype="float32"'):
        build(tmp_path, rig.lora_model(base=tiny_model().half()))


def test_a_constant_schedule_with_warm_up_warms_up(tmp_path: Path) -> None:
    trainer = build(tmp_path, rig.lora_model(), schedule="constant", warmup_steps=2)
    assert trainer.args.lr_scheduler_type.value == "constant_with_warmup"
    trainer.close()


@pytest.mark.parametrize(
    ("name", "most", "expected"),
    [
        ("auto", 10**9, "AdamW"),
        ("auto", 10, "AdamW8bit"),
        ("adamw", 10, "AdamW"),
        ("adamw_8bit", 10**9, "AdamW8bit"),
        ("sgd", 10, "SGD"),
    ],
)
def test_optimizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: int, expected: str) -> None:
    """ "auto" goes by the number of trained parameters alone; the 8-bit one is nbkit's, with the groups of transformers."""
    monkeypatch.setattr(methods, "SMALL_ADAPTER", most)
    trainer = build(tmp_path, rig.lora_model(), optimizer=name, weight_decay=0.1, learning_rate=3e-3)
    optimizer = trainer.create_optimizer()
    assert type(optimizer).__name__ == expected and optimizer.param_groups[0]["lr"] == 3e-3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.__module__.startswith("nbkit.") is (expected == "AdamW8bit")
    trainer.close()


def test_bitsandbytes_own_is_there_under_its_name(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    trainer = build(tmp_path, rig.lora_model(), optimizer="adamw_bnb_8bit")
    assert "bitsandbytes" in type(trainer.create_optimizer()).__module__
    trainer.close()


@pytest.mark.parametrize(
    ("name", "told"), [("adamw_8bit", 2 + 8 / 256), ("OptimizerNames.ADAMW_8BIT", 2 + 8 / 256), ("adamw_torch_fused", 8)]
)
def test_the_planner_is_told_what_the_optimizer_keeps(monkeypatch: pytest.MonkeyPatch, name: str, told: float) -> None:
    from types import SimpleNamespace

    from nbkit.training import keep

    binding = SimpleNamespace(optimizer_bytes=None)
    monkeypatch.setattr(keep, "binding_of", lambda model: binding)
    keep.tell_optimizer_bytes(None, name)
    assert binding.optimizer_bytes == told
