"""Where a number that is not finite comes from. Asked only after a loss or a gradient was seen not to be finite.

In a backward, what is not finite spreads from the layer where it arises to all layers below. So of the gradients that are not
finite those of the highest layer name the place; if the loss itself is not finite, one more forward with a look at every
module's output finds the first that is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


def find_overflow(model: nn.Module, batch: Mapping[str, Any] | None = None) -> str | None:
    """The module in which inf or nan arises first, "" apart from PEFT's prefixes; None if all is finite.

    For a plain loop, after `loss` or the gradient norm was not finite and before gradients are cleared:

        if not math.isfinite(norm):
            print(nbkit.find_overflow(model, batch))

    Args:
        batch: what the model was called with; None looks at the gradients alone. The forward is repeated without gradients.
    """
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    found = None if batch is None else first_bad_output(model, batch)
    if found is not None or not named:
        return found
    norms = torch.stack([grad.norm().float().to("cpu") for _, grad in named])
    return highest_bad_gradient([name for name, _ in named], norms)


def highest_bad_gradient(names: Iterable[str], norms: Tensor) -> str | None:
    """Of the parameters whose gradient norm (n,) is not finite, the module of the one in the highest layer; None if all are."""
    bad = [name for name, fine in zip(names, torch.isfinite(norms).tolist(), strict=True) if not fine]
    if not bad:
        return None
    highest = max(_depth(name) for name in bad)
    return module_of(next(name for name in reversed(bad) if _depth(name) == highest))


def first_bad_output(model: nn.Module, batch: Mapping[str, Any]) -> str | None:
    """The module whose output is the first to hold inf or nan in a forward over `batch`; None if no output does."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, Tensor) and first.is_floating_point() and not bool(torch.isfinite(first).all()):
                found.append(name)

        return look

    leaves = [(name, m) for name, m in model.named_modules() if _LAYER.search(name) or not any(True for _ in m.children())]
    hooks = [m.register_forward_hook(watch(name)) for name, m in leaves]
    try:
        with torch.no_grad():
            model(**{**batch, "use_cache": False})
    finally:
        for hook in hooks:
            hook.remove()
    return module_of(found[0]) if found else None


def module_of(name: str) -> str:
    """A parameter's or module's name as users know it: `model.layers.7.mlp.down_proj`."""
    return name.removeprefix("base_model.model.").split(".lora_")[0].removesuffix(".weight").removesuffix(".base_layer")


def _depth(name: str) -> int:
    """The layer's number; what lies behind the layers counts as higher than all, what lies before as lower."""
    found = _LAYER.search(name)
    if found:
        return int(found.group(1))
    return -1 if "embed" in name else 10**6
