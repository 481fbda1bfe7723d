"""The head of a causal LM: its loss over the labelled rows without logits, and its logits where somebody reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nbkit.config import IGNORE_INDEX
from nbkit.families import Family
from nbkit.kernels._launch import capability_of
from nbkit.kernels.linear_cross_entropy import linear_cross_entropy
from nbkit.models.layer.adapters import base_of

SMALL_HEAD = 3e11  # rows times weights of the head: 1.5 ms of an H200, forward and backward


def head_loss(
    model: nn.Module, family: Family, hidden: torch.Tensor, targets: torch.Tensor, num_items: float | torch.Tensor | None
) -> torch.Tensor:
    """Mean cross-entropy of the rows of hidden (B, T, D) that have a target (B, T), or their sum over `num_items`."""
    head: Any = head_of(model, family)
    softcap, scale = shaping(model, family)
    rows = hidden.reshape(-1, hidden.shape[-1])
    targets = targets.reshape(-1).to(rows.device)
    if plain_head(head) is None:
        if rows.device != head.weight.device:
            rows, targets = rows.to(head.weight.device), targets.to(head.weight.device)
        return linear_cross_entropy(
            rows, head.weight, targets, num_items=num_items, softcap=softcap, logit_scale=scale,
            labelled_only=not host_sets_pace(rows, head.weight),
        )  # fmt: skip
    index = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    z = _shaped(head(rows[index]).float(), softcap, scale)
    losses = functional.cross_entropy(z, targets[index].to(z.device), reduction="sum")
    count = max(len(index), 1) if num_items is None else num_items
    return losses / (count.to(losses.device).clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))


def host_sets_pace(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether projecting every row (N, D) by a head (V, D) costs less than the wait for the device to count those with a label.

    Until the wait is over the host asks for nothing more; on a fast GPU that is some milliseconds of a small step.
    """
    return rows.is_cuda and len(rows) * weight.numel() <= SMALL_HEAD and capability_of(rows) >= (9, 0)


def head_of(model: nn.Module, family: Family) -> nn.Module:
    """The model's head; where PEFT trains a copy of it (`modules_to_save`), the one in use now."""
    head = model.get_submodule(family.head.module)
    return base_of(head) if "modules_to_save" in head._modules else head


def plain_head(head: nn.Module) -> str | None:
    """None if the head is one matrix that may be multiplied by directly; else why it is not."""
    if hasattr(head, "base_layer"):
        return "it carries an adapter and makes its own projection of the labelled rows"
    if type(head) is not nn.Linear:
        return f"{type(head).__name__} makes its own projection of the labelled rows"
    if head.bias is not None:
        return "it has a bias and makes its own projection of the labelled rows"
    if type(head.weight) is not nn.Parameter and type(head.weight) is not torch.Tensor:
        return f"its weight is a {type(head.weight).__name__}, so it makes its own projection of the labelled rows"
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return "another library has hooked it, so it makes its own projection of the labelled rows"
    return None


def shaping(model: Any, family: Family) -> tuple[float | None, float]:
    """(softcap or None, logit scale) of the model's head, by the config keys that the family names."""
    facts = family.head
    softcap = getattr(model.config, facts.softcap_key, None) if facts.softcap_key else None
    scale = getattr(model.config, facts.logit_scale_key, None) if facts.logit_scale_key else None
    return softcap, 1.0 if scale is None else scale


def _shaped(logits: torch.Tensor, softcap: float | None, scale: float) -> torch.Tensor:
    z = logits if scale == 1.0 else logits * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def logits(model: nn.Module, family: Family, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of hidden (B, T, D) by the head itself, whatever is on it."""
    return _shaped(model.get_submodule(family.head.module)(hidden), *shaping(model, family))
