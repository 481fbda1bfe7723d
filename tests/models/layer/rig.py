"""Toy models with LoRA, and one training step of them: what the tests of the layer compare."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import tiny_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(family: str, *, rank: int = 4, alpha: int = 6, seed: int = 0, targets: list[str] | None = None, **options: Any) -> Any:
    """A toy model of `family` in training mode whose LoRA matrices are all non-zero. `options`: of the config or LoRA."""
    adapter = {k: options.pop(k) for k in ("lora_dropout", "use_dora", "rank_pattern", "use_rslora") if k in options}
    model = tiny_model(family, seed=seed, **options)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets or TARGETS, **adapter))
    fill(model, seed)
    return model.train()


def fill(model: Any, seed: int = 0) -> None:
    make = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=make).to(p) * (0.1 if "lora_B" in name else p.shape[-1] ** -0.5))


def batch(rows: int = 3, tokens: int = 19, *, seed: int = 1, padded: bool = False) -> dict[str, torch.Tensor]:
    """Random ids with labels; `padded`: rows end early, on the right, with label -100 there."""
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (rows, tokens), generator=make)
    found = {"input_ids": ids, "labels": ids.clone()}
    if padded:
        mask = torch.ones_like(ids)
        for row in range(1, rows):
            mask[row, tokens - 3 * row :] = 0
        found["attention_mask"] = mask
        found["labels"][mask == 0] = -100
    return found


def step(model: Any, **inputs: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and every gradient of one forward and backward; gradients are cleared after."""
    loss = model(**inputs).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), grads


def worst(grads: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative error of any gradient, and whose it is."""
    assert grads.keys() == truth.keys()
    errors = {n: float((grads[n].double() - truth[n].double()).norm() / truth[n].double().norm().clamp(min=1e-30)) for n in truth}
    name = max(errors, key=errors.__getitem__)
    return errors[name], name
