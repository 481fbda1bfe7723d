"""Each reason for which something runs stock is a sentence that says what, and what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nbkit
from nbkit.families import find
from nbkit.models import obstacles, running
from nbkit.models.layer import bind
from tests.models.layer.rig import batch, lora
from tests.tiny import tiny_model


def quantised(**settings: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(quantization_config=settings))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quant_method": "gptq", "bits": 4}, "weights in GPTQ run stock"),
        ({"quant_method": "awq"}, "weights in AWQ run stock"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "weights in 8 bits (bitsandbytes) run stock"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "weights in fp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, None),
    ],
)
def test_weight_formats(settings: dict[str, Any], sentence: str | None) -> None:
    said = obstacles.weight_format(quantised(**settings))
    assert said is None if sentence is None else said is not None and said.startswith(sentence) and "nf4" in said


def test_settings_as_an_object_and_none_at_all() -> None:
    from transformers import BitsAndBytesConfig

    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert obstacles.weight_format(SimpleNamespace(config=SimpleNamespace(quantization_config=four))) is None
    assert obstacles.weight_format(tiny_model()) is None


def test_an_unknown_format_is_in_the_report() -> None:
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "gptq"}
    report = nbkit.patch(model)
    assert report.bound and "weights in GPTQ run stock" in str(report) and report.skipped[0].path == "model.layers"


def test_layers_that_are_not_loaded_run_stock() -> None:
    model = tiny_model()
    model.model.layers[1].to("meta")
    report = nbkit.patch(model)
    assert not report.bound and "1 of 2 layers are not in memory (offloaded, device meta)" in str(report)


def test_layers_on_several_devices_are_not_fused() -> None:
    model, llama = tiny_model(), find("llama")
    assert llama is not None and obstacles.mixed_devices(model, llama) is None
    model.model.layers[1].to("meta")
    said = obstacles.mixed_devices(model, llama)
    assert said is not None and "several devices (cpu, meta)" in said and "device_map" in said


def test_what_runs_stock_is_told_while_training() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = lora("llama")
    nbkit.patch(model)
    assert running.stock_reasons(model) == [] and running.choices(model) == [] and running.recorded(model) is None
    assert "'gpt2' is no declared family" in running.stock_reasons(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2)))[0]
    bind(model.get_base_model(), find("llama"))  # type: ignore[arg-type]
    model(**batch()).loss.backward()
    assert running.choices(model)[0].startswith("Memory: keep ") and "Attention: plain" in running.choices(model)[1]


def test_numbers_of_layers() -> None:
    assert running.numbers([3]) == "layer 3 is"
    assert running.numbers([2, 0, 1]) == "layers 0 to 2 are"
    assert running.numbers([0, 2, 4]) == "3 layers (0, 2, 4) are"


def test_longer_than_the_positions() -> None:
    config = SimpleNamespace(max_position_embeddings=512)
    assert obstacles.longer_than_positions(512, config) is None
    assert "Rows of 1,000 tokens are longer than the 512 positions" in str(obstacles.longer_than_positions(1000, config))
    assert obstacles.longer_than_positions(10**6, SimpleNamespace()) is None


@pytest.mark.gpu
def test_adapters_that_do_not_fit_are_named_on_a_gpu() -> None:
    model = lora("llama", lora_dropout=0.1).cuda()
    nbkit.patch(model)
    model(**{k: v.cuda() for k, v in batch().items()}).loss.backward()
    torch.cuda.synchronize()
    said = running.stock_reasons(model)
    assert said == [] or "dropout" in said[0]  # until the fused layer takes dropout itself
