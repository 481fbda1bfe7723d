"""Training on a CUDA device: precisions, 4-bit weights, the loss scaler, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nbkit.errors import TrainingError
from nbkit.events import MemoryEvent, MessageEvent, RunStarted, StepEvent
from nbkit.training import checkpoints, state
from nbkit.training.runner import Run
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training import rig

pytestmark = pytest.mark.gpu


def on_gpu(dtype: torch.dtype, dropout: float = 0.0) -> Any:
    return rig.lora_model(dropout, base=tiny_model().to("cuda", dtype)).to("cuda")


def train(folder: Path, model: Any, resume: bool = False, **settings: Any) -> Run:
    run = Run(rig.config(folder, **settings), model, tiny_tokenizer(), rig.rows(12), resume=resume)
    run.wait(progress=False)
    return run


def losses(run: Run) -> list[float]:
    return [event.loss for event in run.events if isinstance(event, StepEvent)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_float32_losses_are_those_of_the_cpu(tmp_path: Path, checkpointing: bool) -> None:
    there = train(tmp_path / "cpu", rig.lora_model())
    here = train(tmp_path / "gpu", on_gpu(torch.float32), gradient_checkpointing=checkpointing)
    assert losses(here) == pytest.approx(losses(there), abs=2e-4)
    started = next(event for event in here.events if isinstance(event, RunStarted))
    assert started.device.startswith("cuda:0 (")
    assert {event.memory for event in here.events if isinstance(event, MemoryEvent)} == {"VRAM"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_follows_float32_with_float32_adapters(tmp_path: Path, dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"max_steps": 30, "learning_rate": 3e-3}
    exact = losses(train(tmp_path / "exact", on_gpu(torch.float32), **settings))
    model = on_gpu(dtype)
    run = train(tmp_path / "half", model, **settings)
    skipped = [event for event in run.events if isinstance(event, MessageEvent) and "was skipped" in event.text]
    assert len(skipped) <= 3
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert "forward" not in vars(model) and "_is_accelerate_prepared" not in vars(model)
    last, expected = sum(losses(run)[-6:]) / 6, sum(exact[-6:]) / 6
    assert last == pytest.approx(expected, rel=0.03) and expected < exact[0]
    checkpoint, _ = checkpoints.newest(run.dir)
    assert checkpoint is not None and (state.load(checkpoint.path, "scaler") is not None) is (dtype == torch.float16)
    assert state.load(checkpoint.path, "random")["cuda"].dtype == torch.uint8


def test_float16_that_never_finds_a_scale_ends_in_a_sentence(tmp_path: Path) -> None:
    model = on_gpu(torch.float16)
    before = rig.adapter(model)
    next(p for n, p in model.named_parameters() if "lora_B" in n).register_hook(lambda gradient: gradient * math.inf)
    sentence = r"Step 5: the gradient norm is (nan|inf), first in model\.layers\.0\.\S+ in float16, 5 steps"
    with pytest.raises(TrainingError, match=sentence):
        train(tmp_path / "run", model, max_steps=20)
    assert all(torch.equal(p, before[name]) for name, p in rig.adapter(model).items())


@pytest.mark.parametrize("optimizer", ["auto", "adamw_8bit"])
def test_four_bit_weights_train(tmp_path: Path, tiny_model_dir: Path, optimizer: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=settings, dtype=torch.bfloat16, device_map={"": 0}
    )
    model = rig.lora_model(base=base)
    run = train(tmp_path / "run", model, max_steps=40, learning_rate=1e-2, optimizer=optimizer)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert sum(losses(run)[-6:]) < sum(losses(run)[:6]) - 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, dtype: torch.dtype, optimizer: str) -> None:
    settings: dict[str, Any] = {"schedule": "constant", "optimizer": optimizer}
    whole = on_gpu(dtype, dropout=0.1)
    expected = losses(train(tmp_path / "whole", whole, max_steps=8, **settings))
    train(tmp_path / "parts", on_gpu(dtype, dropout=0.1), max_steps=5, **settings)
    model = on_gpu(dtype, dropout=0.1)
    again = train(tmp_path / "parts", model, resume=True, max_steps=8, **settings)
    assert losses(again) == pytest.approx(expected[5:], abs=1e-6)
    for name, p in rig.adapter(whole).items():
        assert torch.allclose(p, rig.adapter(model)[name], atol=1e-6), name


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_an_overflow_is_skipped_by_the_optimizer_itself(tmp_path: Path, optimizer: str) -> None:
    """A gradient that is not finite once every tensor has been seen to train: nobody waits before the step, and none is made."""
    model = on_gpu(torch.bfloat16)
    calls: list[int] = []
    before: list[dict[str, torch.Tensor]] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            before.append(rig.adapter(model))
            return gradient * math.nan
        return gradient

    next(p for n, p in model.named_parameters() if "lora_B" in n).register_hook(spoil)
    sentence = r"Step 6: the gradient norm is nan, first in model\.layers\.0\.self_attn\.q_proj; the weights are as after step 5"
    with pytest.raises(TrainingError, match=sentence):
        train(tmp_path / "run", model, max_steps=20, optimizer=optimizer)
    assert all(torch.equal(p, before[0][name]) for name, p in rig.adapter(model).items())
