"""Norms and clipping as torch's, a step that the optimizer skips by itself, and where an overflow comes from."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import nbkit
from nbkit.errors import TrainingError
from nbkit.events import MessageEvent, StepEvent
from nbkit.models import overflow
from nbkit.models.checkpointing import set_checkpointing
from nbkit.training.runner import Run
from nbkit.training.watch import Guard, Norms
from tests.models.layer.rig import batch
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training import rig


def with_gradients() -> Any:
    model = rig.lora_model().train()
    model(**batch(), use_cache=False).loss.backward()
    return model


@pytest.mark.parametrize("most", [None, 1e-3, 1e6])
def test_norms_and_clipping_are_torchs_own(most: float | None) -> None:
    model = with_gradients()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    twins = [torch.nn.Parameter(p.detach().clone()) for _, p in named]
    for twin, (_, p) in zip(twins, named, strict=True):
        twin.grad = None if p.grad is None else p.grad.clone()
    norms = Norms(named)
    measured = norms.measure(most)
    wanted = torch.nn.utils.clip_grad_norm_(twins, math.inf if most is None else most)
    assert torch.equal(measured, wanted) and norms.each is not None and len(norms.each) == len(named)
    assert all(torch.equal(twin.grad, p.grad) for twin, (_, p) in zip(twins, named, strict=True))  # type: ignore[arg-type]


def test_without_any_gradient_the_norm_is_zero() -> None:
    assert Norms([("w", torch.nn.Parameter(torch.ones(2)))]).measure(1.0) == 0


@pytest.mark.parametrize("figure", [math.inf, math.nan, 1.0])
def test_the_optimizer_skips_a_step_that_is_not_finite(figure: float) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = Guard(optimizer)
    for value in (1.0, figure):
        weight.grad = torch.full((3,), value)
        before, state = weight.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
        assert guard.arm(torch.tensor([1.0, value]))
        optimizer.step()
    if math.isfinite(figure):
        assert not torch.equal(weight, before)
    else:
        assert torch.equal(weight, before)
        after = optimizer.state_dict()["state"][0]
        assert all(torch.equal(after[name], state[0][name]) for name in after)
    guard.release()
    assert "found_inf" not in vars(optimizer)


def test_other_optimizers_are_asked_before_the_step() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    for optimizer in (torch.optim.SGD([weight], lr=0.1), torch.optim.AdamW([weight], lr=0.1, fused=False)):
        assert not Guard(optimizer).arm(torch.tensor([1.0]))


def test_the_highest_layer_whose_gradient_is_not_finite_is_named() -> None:
    names = [f"base_model.model.model.layers.{i}.mlp.down_proj.lora_A.default.weight" for i in (0, 7, 3)]
    found = overflow.highest_bad_gradient(names, torch.tensor([math.inf, math.nan, 1.0]))
    assert found == "model.layers.7.mlp.down_proj"
    assert overflow.highest_bad_gradient(names, torch.ones(3)) is None
    tops = ["model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight", "lm_head.weight"]
    assert overflow.highest_bad_gradient(tops, torch.full((3,), math.nan)) == "lm_head"


def test_the_first_output_that_is_not_finite_is_named() -> None:
    model = tiny_model()
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    assert nbkit.find_overflow(model, inputs) is None
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = math.inf
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    assert nbkit.find_overflow(model, inputs) == "model.layers.1.mlp.up_proj"
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    model = with_gradients()
    assert nbkit.find_overflow(model) is None
    layer = next(p for n, p in model.named_parameters() if "layers.1.self_attn.k_proj.lora_B" in n)
    layer.grad[0] = math.nan  # type: ignore[index]
    assert nbkit.find_overflow(model) == "model.layers.1.self_attn.k_proj"


def test_a_run_names_the_layer_and_leaves_the_weights(tmp_path: Any) -> None:
    model = rig.lora_model()
    weight = next(p for n, p in model.named_parameters() if "layers.1.mlp.up_proj.lora_B" in n)
    calls = []
    weight.register_hook(lambda gradient: calls.append(1) or (gradient * math.inf if len(calls) == 4 else gradient))
    kept: list[dict[str, torch.Tensor]] = []
    model.register_forward_pre_hook(lambda *args: kept.append(rig.adapter(model)))
    run = Run(rig.config(tmp_path / "run", max_steps=8), model, tiny_tokenizer(), rig.rows())
    sentence = (
        r"Step 4: the gradient norm is (inf|nan), first in model\.layers\.1\.mlp\.up_proj; the weights are as after step 3\."
    )
    with pytest.raises(TrainingError, match=sentence):
        run.wait(progress=False)
    assert [e.step for e in run.events if isinstance(e, StepEvent)] == [1, 2, 3]
    assert all(torch.equal(p, kept[3][name]) for name, p in rig.adapter(model).items())
    assert "zero_grad" not in vars(model)


@pytest.mark.parametrize("asked", ["nbkit", "unsloth", True, False])
def test_checkpointing_is_a_wish_to_the_planner_where_layers_are_fused(asked: bool | str) -> None:
    from nbkit.families import find
    from nbkit.models.layer import bind

    model = rig.lora_model()
    nbkit.patch(model)
    binding = bind(model.get_base_model(), find("llama"))  # type: ignore[arg-type]
    assert set_checkpointing(model, asked) == ""
    assert binding.checkpoint == (asked or None)
    assert not any(getattr(layer.parts.layer, "gradient_checkpointing", False) for layer in binding.bound)
    set_checkpointing(model, False)
    assert binding.checkpoint is None
    binding.release()


@pytest.mark.parametrize("checkpointing", [False, "nbkit"])
def test_a_run_over_fused_layers_takes_the_steps_of_a_stock_one(tmp_path: Any, checkpointing: Any) -> None:
    from nbkit.families import find
    from nbkit.models.layer import bind

    losses = []
    for name in ("stock", "fused"):
        model = rig.lora_model()
        if name == "fused":
            nbkit.patch(model)
            binding = bind(model.get_base_model(), find("llama"))  # type: ignore[arg-type]
        settings: dict[str, Any] = {"gradient_checkpointing": checkpointing, "learning_rate": 1e-3, "max_steps": 7}
        run = Run(rig.config(tmp_path / name, **settings), model, tiny_tokenizer(), rig.rows(12))
        run.wait(progress=False)
        losses.append([event.loss for event in run.events if isinstance(event, StepEvent)])
    assert losses[1] == pytest.approx(losses[0], abs=3e-6) and binding.how and not binding.reasons
    said = [event.text for event in run.events if isinstance(event, MessageEvent)]
    assert sum(text.startswith("Memory: keep ") for text in said) == 1
    assert any(text.startswith("Attention: ") for text in said) and binding.checkpoint is None
