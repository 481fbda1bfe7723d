"""Where float16 leaves its range is found and named, stock and with fused layers; what a run says and counts of it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nbkit
from nbkit.families import find
from nbkit.models import overflow
from nbkit.models.layer import bind
from nbkit.training import job
from tests.models.layer.rig import batch, lora


def half(fused: bool) -> Any:
    model = lora("llama")
    model.get_base_model().to(torch.float16)
    nbkit.patch(model)
    if fused:
        bind(model.get_base_model(), find("llama"))  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("fused", [False, True], ids=["parts", "layers"])
def test_an_output_beyond_float16_names_its_module(fused: bool) -> None:
    model, inputs = half(fused), batch(padded=True)
    assert overflow.find_overflow(model, inputs) is None
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.mul_(6e4)
    loss = model(**inputs).loss
    assert not math.isfinite(loss.item())
    assert overflow.find_overflow(model, inputs) == "model.layers.1.mlp.up_proj"
    loss.backward()
    assert not math.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())


@pytest.mark.parametrize("fused", [False, True], ids=["parts", "layers"])
def test_gradients_beyond_float16_name_the_highest_layer(fused: bool) -> None:
    """The loss is finite; its scale is what a loss scaler would have to halve."""
    model, inputs = half(fused), batch(padded=True)
    loss = model(**inputs).loss
    loss.backward()
    assert overflow.find_overflow(model, inputs) is None  # without a scale all is finite
    model.zero_grad()
    model.get_base_model().model.layers[1].register_full_backward_pre_hook(lambda layer, grads: (grads[0] * 1e9,))
    model(**inputs).loss.backward()
    assert str(overflow.find_overflow(model, inputs)).startswith("model.layers.1.")
    model.zero_grad()
    assert overflow.find_overflow(model) is None


def test_a_run_counts_what_it_skipped() -> None:
    trainer = SimpleNamespace(skipped=3, state=SimpleNamespace(global_step=40))
    said = job._overflowed(trainer)
    assert said.text == "float16: 3 of 40 steps overflowed and were skipped; their rows were not learned from."
    assert said.level == "warning" and said.step == 40


def test_names_as_users_know_them() -> None:
    for raw, name in {
        "base_model.model.model.layers.7.mlp.down_proj.lora_A.default.weight": "model.layers.7.mlp.down_proj",
        "base_model.model.model.layers.7.mlp.down_proj.base_layer": "model.layers.7.mlp.down_proj",
        "model.norm.weight": "model.norm",
    }.items():
        assert overflow.module_of(raw) == name
