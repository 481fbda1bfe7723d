"""The mixin: the exact loss of a step, what reaches the weights, and what is left of the model afterwards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nbkit.errors import TrainingError
from nbkit.events import MemoryEvent, MessageEvent, StepEvent
from nbkit.training.loader import BucketedBatches
from nbkit.training.runner import Run
from tests.tiny import tiny_tokenizer
from tests.training import rig


def trained(tmp_path: Any, model: Any, data: rig.Rows, name: str = "run", **train: Any) -> tuple[Run, list[StepEvent]]:
    run = Run(rig.config(tmp_path / name, **train), model, tiny_tokenizer(), data)
    run.wait(progress=False)
    return run, [event for event in run.events if isinstance(event, StepEvent)]


def oracle(data: rig.Rows, steps: int, rows_a_step: int, learning_rate: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Row by row in float64, with torch's AdamW and a straight-line schedule: losses before each step, weights after all."""
    model = rig.lora_model().double().train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    order = [i for epoch in range(20) for i in epoch_order(data, rows_a_step, epoch)]
    losses = []
    for step in range(steps):
        chosen = [data.examples[i] for i in order[step * rows_a_step : (step + 1) * rows_a_step]]
        total = sum(sum(label != -100 for label in row["labels"]) for row in chosen)
        value = 0.0
        for row in chosen:
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
            picked = [(i, label) for i, label in enumerate(row["labels"][1:]) if label != -100]
            logp = logits.log_softmax(-1)[[i for i, _ in picked], [label for _, label in picked]]
            part = -logp.sum() / total
            part.backward()
            value += float(part.detach())
        losses.append(value)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return losses, rig.adapter(model)


def epoch_order(data: rig.Rows, rows_a_step: int, epoch: int) -> list[int]:
    chosen = BucketedBatches([len(row["input_ids"]) for row in data.examples], rows_a_step, 1, 3407)
    chosen.set_epoch(epoch)
    return [row for batch in chosen for row in batch]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_the_loss_is_one_mean_over_the_trained_tokens_of_the_step(
    tmp_path: Any, batch: int, accumulation: int, checkpointing: bool
) -> None:
    data = rig.rows(16)
    expected, weights = oracle(data, steps=4, rows_a_step=8, learning_rate=1e-3)
    model = rig.lora_model()
    _, steps = trained(
        tmp_path,
        model,
        data,
        batch_size=batch,
        gradient_accumulation=accumulation,
        learning_rate=1e-3,
        gradient_checkpointing=checkpointing,
    )
    errors = [event.loss - value for event, value in zip(steps, expected, strict=True)]
    assert max(map(abs, errors)) < 2e-6, errors
    assert abs(sum(errors) / len(errors)) < 1e-6, errors
    moved = {name: (p.double() - weights[name]).abs().max() for name, p in rig.adapter(model).items()}
    assert max(moved.values()) < 2e-5, max(moved, key=lambda name: moved[name])
    assert max(w.abs().max() for n, w in weights.items() if "lora_B" in n) > 1e-3  # the oracle itself has learned


def test_a_mean_of_means_would_fail_the_test_above() -> None:
    data = rig.rows(16)
    order = epoch_order(data, 8, 0)
    counts = [[sum(label != -100 for label in data.examples[i]["labels"]) for i in step] for step in (order[:8], order[8:])]
    assert any(max(step) > 5 * min(step) for step in counts)


def test_step_events_count_tokens_and_show_the_schedule(tmp_path: Any) -> None:
    data = rig.rows(6)
    run, steps = trained(tmp_path, rig.lora_model(), data, max_steps=None, epochs=2, gradient_accumulation=2)
    assert [event.step for event in steps] == [1, 2, 3, 4]  # 3 batches of 2 rows: a step of two batches, one of the last
    per_epoch = sum(event.trained_tokens for event in steps[:2]), sum(event.total_tokens for event in steps[:2])
    assert per_epoch == (data.trained_tokens, sum(len(row["input_ids"]) for row in data.examples))
    assert [event.learning_rate for event in steps] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert all(event.seconds > 0 and event.grad_norm is not None and event.grad_norm > 0 for event in steps)
    memory = [event for event in run.events if isinstance(event, MemoryEvent)]
    assert {1, 4} <= {event.step for event in memory}  # the first and the last, and between them by the clock
    assert all(event.peak_bytes >= event.used_bytes > 1e7 for event in memory)


def test_the_first_loss_is_that_of_stock_transformers(tmp_path: Any) -> None:
    data = rig.rows(2)
    model = rig.lora_model()
    width = max(len(row["input_ids"]) for row in data.examples)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in data.examples])
    labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in data.examples])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in data.examples])
    with torch.no_grad():
        stock = float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    _, steps = trained(tmp_path, model, data, max_steps=1)
    assert steps[0].loss == pytest.approx(stock, abs=1e-6)


def test_the_same_run_twice_gives_the_same_bits_and_another_seed_does_not(tmp_path: Any) -> None:
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        model = rig.lora_model(dropout=0.1)
        trained(tmp_path, model, rig.rows(), name, seed=seed)
        results.append(rig.adapter(model))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert not all(torch.equal(results[0][key], results[2][key]) for key in results[0])


def test_the_model_object_is_left_as_it_was(tmp_path: Any) -> None:
    model = rig.lora_model().eval()
    base = model.get_base_model()
    model.config.use_cache = True

    def own_forward(*args: Any, **kwargs: Any) -> Any:
        return type(base).forward(base, *args, **kwargs)

    base.forward = own_forward
    hooks = len(base.get_input_embeddings()._forward_hooks)
    trained(tmp_path, model, rig.rows(), gradient_checkpointing=True)
    assert base.forward is own_forward
    assert "forward" not in vars(model) and "_is_accelerate_prepared" not in vars(model)
    assert model.config.use_cache is True and not model.training
    assert len(base.get_input_embeddings()._forward_hooks) == hooks
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_special_tokens_of_the_model_are_not_rewritten(tmp_path: Any) -> None:
    model = rig.lora_model()
    model.config.eos_token_id = 7
    trained(tmp_path, model, rig.rows())
    assert model.config.eos_token_id == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_keep_their_dtype(tmp_path: Any, dtype: torch.dtype) -> None:
    from tests.tiny import tiny_model

    model = rig.lora_model(base=tiny_model().to(dtype))  # PEFT keeps adapters in float32
    before = {name: p.dtype for name, p in model.named_parameters()}
    _, steps = trained(tmp_path, model, rig.rows(), max_steps=6, learning_rate=2e-2)
    assert {name: p.dtype for name, p in model.named_parameters()} == before
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(math.isfinite(event.loss) for event in steps)
    assert "forward" not in vars(model)  # accelerate's autocast wrapper is gone


def test_two_precisions_one_after_the_other_in_one_process(tmp_path: Any) -> None:
    from tests.tiny import tiny_model

    for index, dtype in enumerate((torch.bfloat16, torch.float32, torch.bfloat16)):
        trained(tmp_path, rig.lora_model(base=tiny_model().to(dtype)), rig.rows(), str(index), max_steps=2)


def test_four_bit_weights_train_with_float32_adapters(tmp_path: Any, tiny_model_dir: Any) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=settings, dtype=torch.float32)
    model = rig.lora_model(base=base)
    start = rig.adapter(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    for p in model.parameters():
        if p.requires_grad:
            assert p.dtype == torch.float32
    _, steps = trained(tmp_path, model, rig.rows(2), max_steps=12, learning_rate=3e-2)
    end = rig.adapter(model)
    assert {p.dtype for p in end.values()} == {torch.float32}  # TRL alone would have made them bfloat16
    assert all(not torch.equal(start[name], end[name]) for name in start)
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)
    assert steps[-1].loss < steps[0].loss - 0.1


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path: Any) -> None:
    model = rig.lora_model()
    base = model.get_base_model()
    calls = []

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        outputs = type(base).forward(base, *args, **kwargs)
        calls.append(rig.adapter(model))
        if len(calls) == 3:
            outputs.loss = outputs.loss * math.nan
        return outputs

    base.forward = spoiled
    run = Run(rig.config(tmp_path / "run"), model, tiny_tokenizer(), rig.rows())
    with pytest.raises(TrainingError, match=r"Step 3: the loss is nan; the weights are as after step 2.*rate below 0.01"):
        run.wait(progress=False)
    assert all(torch.equal(p, calls[2][name]) for name, p in rig.adapter(model).items())
    assert not (run.dir / "adapter").exists() and [e.step for e in run.events if isinstance(e, StepEvent)] == [1, 2]


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Any) -> None:
    model = rig.lora_model()
    weight = next(p for n, p in model.named_parameters() if "lora_B" in n)
    weight.register_hook(lambda gradient: gradient * math.inf)
    run = Run(rig.config(tmp_path / "run"), model, tiny_tokenizer(), rig.rows())
    with pytest.raises(TrainingError, match="Step 1: the gradient norm is"):
        run.wait(progress=False)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("warmup", [0, 2])
def test_an_adapter_without_gradient_is_named(tmp_path: Any, warmup: int) -> None:
    model = rig.lora_model()
    dead = next(m for n, m in model.named_modules() if n.endswith("layers.1.self_attn.v_proj"))
    dead.forward = dead.base_layer.forward  # as a kernel that forgets the adapter would
    run = Run(rig.config(tmp_path / "run", warmup_steps=warmup), model, tiny_tokenizer(), rig.rows())
    sentence = rf"Step {2 + (warmup > 0)}: 2 adapter tensors get no gradient, in model\.layers\.1\.self_attn\.v_proj;"
    with pytest.raises(TrainingError, match=sentence):
        run.wait(progress=False)


def test_warmup_is_no_false_alarm(tmp_path: Any) -> None:
    _, steps = trained(tmp_path, rig.lora_model(), rig.rows(), warmup_steps=3, schedule="cosine", max_steps=5)
    assert steps[0].learning_rate == 0.0 and max(event.learning_rate for event in steps) == pytest.approx(1e-2)


@pytest.mark.parametrize("name", ["nbkit", "unsloth"])
def test_named_checkpointing_says_what_runs(tmp_path: Any, name: str) -> None:
    run, steps = trained(tmp_path, rig.lora_model(), rig.rows(), gradient_checkpointing=name)
    assert any(isinstance(e, MessageEvent) and name in e.text for e in run.events)
    _, plain = trained(tmp_path, rig.lora_model(), rig.rows(), "plain")
    assert [event.loss for event in steps] == pytest.approx([event.loss for event in plain], abs=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_patched_model_trains_the_same_and_stays_patched(tmp_path: Any, checkpointing: bool) -> None:
    import nbkit

    data = rig.rows(12, held_out=4)
    settings: dict[str, Any] = {"gradient_accumulation": 2, "gradient_checkpointing": checkpointing, "learning_rate": 1e-3}
    stock = rig.lora_model()
    stock_run, expected = trained(tmp_path, stock, data, "stock", **settings)
    model = rig.lora_model()
    report = nbkit.patch(model)
    bound = {path: vars(module).get("forward") for path, module in model.named_modules()}
    run, steps = trained(tmp_path, model, data, "patched", **settings)
    assert report.bound and {path: vars(module).get("forward") for path, module in model.named_modules()} == bound
    assert [event.loss for event in steps] == pytest.approx([event.loss for event in expected], abs=3e-6)
    assert run.result is not None and stock_run.result is not None
    assert run.result.held_out_before == pytest.approx(stock_run.result.held_out_before, abs=1e-5)
    assert run.result.held_out_after == pytest.approx(stock_run.result.held_out_after, abs=2e-5)
    for name, p in rig.adapter(model).items():
        assert torch.allclose(p, rig.adapter(stock)[name], atol=2e-5), name
