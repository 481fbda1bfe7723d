"""`save_pretrained` of a model whose weights lie in buffers of the fused layers, beside LoRA's: each has to have its own again.

transformers and safetensors look for weights that share memory and take only those whose rows follow each other. So for the time
of saving every linear has a weight of its own, one group of them after the other, and afterwards they go back.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from nbkit.models.layer import binding_of

_NAME = "save_pretrained"


def bind_saving(base: nn.Module) -> None:
    """Let this instance's `save_pretrained` bring weights back first."""
    if _NAME not in vars(base):
        vars(base)[_NAME] = MethodType(_save_pretrained, base)


def unbind_saving(base: nn.Module) -> None:
    """Give the instance its class's own back."""
    if getattr(vars(base).get(_NAME), "__func__", None) is _save_pretrained:
        del vars(base)[_NAME]


def _save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As the class's own, with contiguous weights."""
    binding = binding_of(self)  # none in a copy
    if binding is not None and any(not p.is_contiguous() for p in self.parameters()):
        for layer in binding.bound:
            for group in layer.parts.groups:
                group.release()
    try:
        return type(self).save_pretrained(self, *args, **kwargs)
    finally:
        if binding is not None:
            with torch.inference_mode(False), torch.no_grad():
                binding.refresh()


_save_pretrained.__name__ = _NAME  # a bound method is pickled as its object and this name
