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
from nbkit.models.layer.adapters import base_of, hooked

SMALL_HEAD = 3e11  # rows times weights of the head: 1.5 ms of an H200, forward and backward


class Targets:
    """What each row of a step is to predict: labels (N,) int64, -100 for none.

    Which rows have a label is asked of the device before it is given the layers' work, so that by the time of the loss the
    answer is there; else the host would wait for the whole forward. `every`: all rows are to be projected, nothing is asked.
    """

    def __init__(self, labels: torch.Tensor, every: bool = False) -> None:
        self.labels, self.every = labels, every
        self.order = self.count = self.counted = None
        if labels.is_cuda and not every:
            wanted = labels != IGNORE_INDEX
            self.order = torch.sort(wanted, descending=True, stable=True).indices
            self.count = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(wanted.sum(), non_blocking=True)
            self.counted = torch.cuda.current_stream(labels.device).record_event()

    @property
    def index(self) -> torch.Tensor:
        """The labelled rows, ascending, int64."""
        if self.order is None or self.count is None or self.counted is None:
            return (self.labels != IGNORE_INDEX).nonzero().squeeze(1)
        self.counted.synchronize()
        return self.order[: int(self.count)]


def targets_of(model: nn.Module, family: Family, labels: torch.Tensor) -> Targets:
    """The targets of a step, labels (B, T), on the head's device; to be called before its forward."""
    head: Any = head_of(model, family)
    if plain_head(head) is not None:
        return Targets(labels.reshape(-1))
    rows = labels.reshape(-1).to(head.weight.device)
    return Targets(rows, every=host_sets_pace(rows, head.weight))


def head_loss(
    model: nn.Module, family: Family, hidden: torch.Tensor, targets: Targets, num_items: float | torch.Tensor | None
) -> torch.Tensor:
    """Mean cross-entropy of the rows of hidden (B, T, D) that have a target, or their sum over `num_items`."""
    head: Any = head_of(model, family)
    softcap, scale = shaping(model, family)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if plain_head(head) is None:
        return linear_cross_entropy(
            rows.to(head.weight.device), head.weight, targets.labels, num_items=num_items, softcap=softcap, logit_scale=scale,
            labelled_only=not targets.every, index=None if targets.every else targets.index,
        )  # fmt: skip
    index = targets.index
    z = _shaped(head(rows[index.to(rows.device)]).float(), softcap, scale)
    losses = functional.cross_entropy(z, targets.labels[index].to(z.device), reduction="sum")
    count = max(len(index), 1) if num_items is None else num_items
    return losses / (count.to(losses.device).clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))


def host_sets_pace(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether projecting every row (N of `rows`) by a head (V, D) costs less than asking the device which have a label.

    In a small step the host is not far ahead of the device, so it would wait for the answer, and each launch counts.
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
    if "forward" in vars(head) or hooked(head):
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
