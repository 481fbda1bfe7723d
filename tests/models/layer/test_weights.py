"""Weights that somebody replaces, casts, prunes or merges under the fused layers, which hold them in buffers of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn
from torch.nn.utils import parametrize, prune

from tests.models.layer.rig import batch, fill, lora, step, worst
from tests.models.layer.test_layer import bound


def assert_followed(make: Callable[[], Any], change: Callable[[Any], Any], fused: bool = True) -> Any:
    """A step, `change(model)`, which may give another model, and a step: the same fused as stock. The binding."""
    stock, ours = make(), make()
    binding = bound(ours)
    assert step(ours, **batch())[0] == pytest.approx(step(stock, **batch())[0], rel=1e-5) and binding.how
    changed = change(stock)
    stock = stock if changed is None else changed
    changed = change(ours)
    ours = ours if changed is None else changed
    binding.how.clear()
    loss, truth = step(stock, **batch())
    found, grads = step(ours, **batch())
    assert found == pytest.approx(loss, rel=1e-5) and worst(grads, truth)[0] < 1e-5
    assert bool(binding.how) is fused
    binding.release()
    for name, p in ours.named_parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), name
    return binding


def linear(model: Any, layer: int, name: str) -> Any:
    return model.get_base_model().model.layers[layer].get_submodule(name).base_layer


def biased() -> Any:
    model, make = lora("qwen2"), torch.Generator().manual_seed(2)
    for layer in range(2):
        for name in "qkv":
            nn.init.normal_(linear(model, layer, f"self_attn.{name}_proj").bias, std=0.2, generator=make)
    return model


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"])
def test_one_weight_of_a_group_is_replaced(name: str) -> None:
    def data(model: Any) -> None:
        linear(model, 0, name).weight.data = linear(model, 1, name).weight.data * 1.5

    def parameter(model: Any) -> None:
        linear(model, 0, name).weight = nn.Parameter(linear(model, 1, name).weight.detach() * 1.5, requires_grad=False)

    for change in (data, parameter):
        assert_followed(lambda: lora("llama"), change)


@pytest.mark.parametrize("targets", [["k_proj"], ["v_proj", "up_proj"]])
def test_a_merge_that_replaces_weights_and_a_new_adapter(targets: list[str]) -> None:
    def change(model: Any) -> Any:
        made = get_peft_model(model.merge_and_unload(safe_merge=True), LoraConfig(r=8, target_modules=["q_proj", "down_proj"]))
        fill(made, 5)
        return made.train()

    assert_followed(lambda: lora("llama", targets=targets), change)


def test_biases_that_are_loaded_or_replaced() -> None:
    def load(model: Any) -> None:
        model.load_state_dict({name: p * 1.1 for name, p in model.state_dict().items()})

    def assign(model: Any) -> None:
        model.load_state_dict({name: p * 1.1 for name, p in model.state_dict().items()}, assign=True)

    def data(model: Any) -> None:
        linear(model, 1, "self_attn.v_proj").bias.data.mul_(3)

    for change in (load, assign, data):
        assert_followed(biased, change)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_is_cast_stays_so(dtype: torch.dtype) -> None:
    model = biased()
    binding = bound(model)
    step(model, **batch())
    model.to(dtype)
    binding.how.clear()
    loss = step(model, **batch())[0]
    assert {p.dtype for p in model.parameters()} == {dtype} and binding.how
    binding.release()
    assert loss == pytest.approx(step(model, **batch())[0], rel=1e-5 if dtype == torch.float64 else 1e-2)


def test_scales_of_adapters_that_are_changed() -> None:
    model, stock = lora("llama"), lora("llama")
    binding = bound(model)
    for one in (1.0, 3.0, 1.0, 0.5):
        losses = []
        for m in (model, stock):
            with rescale_adapter_scale(m, one):
                losses.append(step(m, **batch())[0])
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    binding.release()


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def pruned(model: Any) -> None:
    prune.l1_unstructured(linear(model, 0, "mlp.down_proj"), "weight", 0.3)


def parametrized(model: Any) -> None:
    for module in (linear(model, 0, "mlp.down_proj"), linear(model, 0, "self_attn.v_proj")):
        parametrize.register_parametrization(module, "weight", Doubled())


@pytest.mark.parametrize("change", [pruned, parametrized])
def test_weights_that_are_made_in_each_forward(change: Callable[[Any], None]) -> None:
    binding = assert_followed(lambda: lora("llama", num_hidden_layers=1), change, fused=False)
    name = "down_proj" if change is pruned else "q_proj, k_proj, v_proj"
    assert list(binding.reasons) == [0] and name in binding.reasons[0] and "made anew in each forward" in binding.reasons[0]
