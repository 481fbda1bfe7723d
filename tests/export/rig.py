"""Tiny models with an adapter that changes something, for the tests of export and chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nbkit.config import LoraConfig
from nbkit.models.adapters import add_lora
from tests.tiny import tiny_model, tiny_tokenizer

PROMPT = "<|im_start|>user\nThe wind is west 12, it rains?<|im_end|>\n<|im_start|>assistant\n"


def adapted(family: str = "llama", scale: float = 0.1, rank: int = 4, seed: int = 0, **overrides: Any) -> Any:
    """A tiny model in eval mode with LoRA whose B matrices are random, as if it had been trained."""
    return train(add_lora(tiny_model(family, seed, **overrides), LoraConfig(rank=rank, alpha=2 * rank)), scale)


def train(model: Any, scale: float = 0.1) -> Any:
    """Fill the B matrices with noise of this size."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, scale, generator=generator)
        elif name.endswith("bias"):  # biases of a fresh model are zero, and would hide a mistake
            parameter.data.normal_(0, 0.2, generator=generator)
    return model.eval()


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    if ids is None:
        ids = tiny_tokenizer()(PROMPT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def snapshot(model: Any) -> dict[str, Any]:
    """All that an export or a reply must leave as it was."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    return {"state": state, "modes": modes, "grads": grads, "config": model.config.to_json_string()}


def assert_same(model: Any, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(after["state"][name], before["state"][name]) for name in before["state"])
    assert {k: after[k] for k in ("modes", "grads", "config")} == {k: before[k] for k in ("modes", "grads", "config")}


def files_under(folder: Path) -> list[str]:
    """Every file and folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
