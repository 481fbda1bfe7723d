"""One rule for the dtype that a model computes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nbkit.models.dtype import compute_dtype
from tests.tiny import tiny_model
from tests.training import rig


def four_bit(folder: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)


def test_four_bit_linears_say_it_themselves(tiny_model_dir: Path) -> None:
    model = four_bit(tiny_model_dir)
    assert compute_dtype(model) == torch.bfloat16 and model.get_input_embeddings().weight.dtype == torch.float32
    assert compute_dtype(rig.lora_model(base=model)) == torch.bfloat16
    for module in model.modules():  # as loading settles it on a machine without bfloat16
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float16
    assert compute_dtype(model) == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_others_compute_in_the_dtype_of_their_weights(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    assert compute_dtype(model) == dtype
    assert compute_dtype(rig.lora_model(base=model)) == dtype  # whose adapter is float32
