"""transformers' and TRL's own trainers, unmodified, over a patched model: in float32 each takes the steps that it takes stock.

Adapters are added before or after `patch`; parts are bound one by one as on a CPU, or whole layers are fused as on a GPU.
Evaluation and `generate` follow training on the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import nbkit
from nbkit.models import patch as room
from nbkit.models.layer import binding_of
from tests.models.layer.rig import TARGETS, batch, fill
from tests.tiny import tiny_model, tiny_tokenizer

WAYS = [(way, when) for way in ("parts", "layers") for when in ("before", "after")]


class Trained(NamedTuple):
    """What training left: the loss of each step, that of the evaluation after it, trained weights, and greedy tokens."""

    losses: list[float]
    evaluated: float
    weights: dict[str, torch.Tensor]
    tokens: list[int]


def adapted(way: str | None, when: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """A model with LoRA, patched before or after LoRA was added; `way` None: stock."""
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(room, "_fuses", lambda device: way == "layers")
    model = tiny_model()
    if way is not None and when == "after":
        nbkit.patch(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **options))  # type: ignore[arg-type]
    fill(model)
    if way is not None and when == "before":
        nbkit.patch(model)
    return model


def finish(trainer: Any, model: Any) -> Trained:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = trainer.evaluate()["eval_loss"]
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.eval()
    ids = batch(rows=1, tokens=7)["input_ids"]
    return Trained(losses, evaluated, weights, model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0].tolist())


def assert_equal(ours: Trained, stock: Trained) -> None:
    assert ours.losses == pytest.approx(stock.losses, rel=1e-5) and len(stock.losses) == 3
    assert len(set(stock.losses)) == 3 and ours.evaluated == pytest.approx(stock.evaluated, rel=1e-5)
    assert ours.weights.keys() == stock.weights.keys() and ours.tokens == stock.tokens
    for name, p in stock.weights.items():  # Adam divides by the gradient's size: where that is tiny, its sign is rounding
        assert torch.allclose(ours.weights[name], p, atol=2e-5), name


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "seed": 1,
    }  # fmt: skip


def with_transformers(kind: str, model: Any, folder: Path) -> Trained:
    import transformers

    rows = [{k: v[0] for k, v in batch(rows=1, tokens=9, seed=seed).items()} for seed in range(12)]
    for number, row in enumerate(rows):  # labels of unequal count: the loss of a step is one mean over all of its tokens
        row["labels"][: number % 5] = -100
    args = getattr(transformers, f"{kind.removesuffix('Trainer')}TrainingArguments")(**common(folder))
    return finish(getattr(transformers, kind)(model, args, train_dataset=rows, eval_dataset=rows[:4]), model)


def with_trl(method: str, model: Any, folder: Path, bf16: bool = False, **options: Any) -> Trained:
    import trl
    from datasets import Dataset

    rows = [{"prompt": f"The wind is west {i}", "completion": " it rains" + " now" * (i % 4) + ".", "chosen": " it rains.",
             "rejected": f" user {i}"} for i in range(12)]  # fmt: skip
    columns = ["prompt", "completion"] if method == "SFT" else ["prompt", "chosen", "rejected"]
    data = Dataset.from_list(rows).select_columns(columns)
    args = getattr(trl, f"{method}Config")(**common(folder), bf16=bf16, **options)
    kind = getattr(trl, f"{method}Trainer")
    trainer = kind(
        model=model, args=args, train_dataset=data, eval_dataset=data.select(range(4)), processing_class=tiny_tokenizer()
    )
    return finish(trainer, model)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """One stock run of each trainer is the measure of all."""
    found: dict[Any, Trained] = {}

    def made(run: Callable[..., Trained], name: str, **options: Any) -> Trained:
        key = (name, *options.items())
        if key not in found:
            with pytest.MonkeyPatch.context() as monkeypatch:
                found[key] = run(name, adapted(None, "before", monkeypatch), tmp_path_factory.mktemp("stock"), **options)
        return found[key]

    return made


def assert_fused(model: Any, way: str) -> None:
    binding = binding_of(model)
    assert (binding is not None and bool(binding.how) and not binding.reasons and not binding.asides) is (way == "layers")


@pytest.mark.parametrize(("way", "when"), WAYS)
@pytest.mark.parametrize("kind", ["Trainer", "Seq2SeqTrainer"])
def test_transformers(kind: str, way: str, when: str, stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(way, when, monkeypatch)
    assert_equal(with_transformers(kind, model, tmp_path), stock(with_transformers, kind))
    assert_fused(model, way)


TRL = [("SFT", {}), ("SFT", {"packing": True, "max_length": 48}), ("SFT", {"completion_only_loss": False}), ("DPO", {})]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "when"), WAYS)
@pytest.mark.parametrize(("method", "options"), TRL, ids=lambda value: str(value))
def test_trl(
    method: str, options: dict[str, Any], way: str, when: str, stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the arguments that TRL has for itself, gradient checkpointing among them; only its bfloat16 is off."""
    model = adapted(way, when, monkeypatch)
    assert_equal(with_trl(method, model, tmp_path, **options), stock(with_trl, method, **options))
    assert_fused(model, way)
    if way == "layers":
        binding = binding_of(model)
        assert binding is not None and binding.planner.checkpointed and binding.planner.keep.level == 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SFT", "DPO"])
def test_trl_in_its_own_bfloat16(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast over float32 weights: fused layers stand aside, and say so."""
    wanted = with_trl(method, adapted(None, "before", monkeypatch), tmp_path, bf16=True)
    model = adapted("layers", "before", monkeypatch)
    with pytest.warns(
        UserWarning, match="autocast asks for bfloat16 and the weights are float32; load the model with dtype=bfloat16"
    ):
        found = with_trl(method, model, tmp_path, bf16=True)
    assert found.losses == pytest.approx(wanted.losses, rel=2e-2) and len(wanted.losses) == 3
    assert not binding_of(model).how  # type: ignore[union-attr]
