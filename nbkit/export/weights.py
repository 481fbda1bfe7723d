"""The weights a merged model has, taken from the live one tensor by tensor; the live model is only read.

    W_merged = dequantised(W) + scale * B @ A        in float32

A 4-bit base is dequantised layer by layer, so that no second copy of the model is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nbkit.errors import ExportError

PACKED = ("Params4bit", "Int8Params")  # bitsandbytes
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Term:
    """One LoRA term of a weight: scale * b_OR @ a_RI."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint: the module that has it, and what LoRA adds."""

    module: nn.Module
    leaf: str
    shape: tuple[int, ...]
    terms: tuple[Term, ...] = field(default=())


class LiveWeights:
    """The tensors of a model with LoRA, under the names its checkpoint has.

    Raises: ExportError if there is no adapter, it was never trained or is not finite, or its kind cannot be merged.
    """

    def __init__(self, model: Any) -> None:
        from peft import PeftModel

        if not isinstance(model, PeftModel):
            raise ExportError("The model has no LoRA adapter, so there is nothing to export; add one and train it first.")
        self.model = model
        self.causal: Any = model.get_base_model()
        self.tied = bool(getattr(self.causal.config, "tie_word_embeddings", False))
        self.entries = dict(self._walk(self.causal, "", ()))
        terms = [term for entry in self.entries.values() for term in entry.terms]
        require_trained(terms)
        if self.tied and (head := self.entries.pop(HEAD, None)) is not None and head.terms:
            raise ExportError("The adapter changes lm_head, which is tied to the embeddings; only the adapter can be exported.")

    @property
    def numel(self) -> int:
        """Weights in all, a tied one counted once."""
        return sum(_count(entry.shape) for entry in self.entries.values())

    def _walk(self, module: nn.Module, path: str, terms: tuple[Term, ...]) -> Iterator[tuple[str, Entry]]:
        """Every tensor under `module`, with PEFT's wrappers left out of the names."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        if isinstance(module, BaseTunerLayer):
            yield from self._walk(module.get_base_layer(), path, _terms(module, path))
            return
        if isinstance(module, ModulesToSaveWrapper):
            yield from self._walk(module.modules_to_save[_only(module.active_adapters, path)], path, ())
            return
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ExportError(f"The adapter of {path} is a {type(module).__name__}, which cannot be merged; export the adapter.")
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield _join(path, leaf), Entry(module, leaf, _shape(parameter), terms if leaf == "weight" else ())
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield _join(path, leaf), Entry(module, leaf, tuple(buffer.shape))
        for name, child in module._modules.items():
            if child is not None:
                yield from self._walk(child, _join(path, name), ())

    def base(self, name: str) -> Tensor:
        """The base weight in float32 on its own device, dequantised if it is packed. Not a copy where it is float32."""
        entry = self.entries[name]
        value = getattr(entry.module, entry.leaf)
        if type(value).__name__ in PACKED:
            from peft.utils.integrations import dequantize_module_weight

            value = dequantize_module_weight(entry.module)
        return value.detach().float()

    @torch.no_grad()
    def merged(self, name: str) -> Tensor:
        """The weight with its LoRA terms, float32, on the CPU, contiguous. Its memory may be the live weight's: do not write."""
        value = self.base(name)
        for term in self.entries[name].terms:
            value = torch.addmm(value, term.b.detach().float(), term.a.detach().float(), alpha=term.scale)
        return value.cpu().contiguous()


def require_trained(terms: list[Term]) -> None:
    """Raises: ExportError for an adapter that is not finite, or whose b matrices are all zero as they start."""
    if not terms:
        raise ExportError("The model has no active LoRA adapter, so there is nothing to export; add one and train it first.")
    finite = touched = True
    with torch.no_grad():
        finite = all(bool(torch.isfinite(t).all()) for term in terms for t in (term.a, term.b))
        touched = any(bool((term.b != 0).any()) for term in terms)
    if not finite:
        raise ExportError("The adapter holds nan or infinity and was not exported; train again with a lower learning_rate.")
    if not touched:
        raise ExportError("The adapter was never trained: its B matrices are all zero, so it changes nothing; train first.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode without gradients; afterwards every module's mode is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _terms(layer: Any, path: str) -> tuple[Term, ...]:
    """The LoRA terms of one PEFT layer. Raises: ExportError for what is not plain LoRA on a linear."""
    if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) or not isinstance(layer.get_base_layer(), nn.Linear):
        raise ExportError(f"The adapter of {path} ({type(layer).__name__}) is not LoRA on a linear layer; export the adapter.")
    if layer.merged or layer.disable_adapters:
        state = "already merged into the live model" if layer.merged else "switched off"
        raise ExportError(f"The adapter of {path} is {state}; undo that and export again.")
    found = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b = layer.lora_A[name], layer.lora_B[name]
        if name in getattr(layer, "lora_variant", {}) or b.bias is not None or getattr(layer, "fan_in_fan_out", False):
            raise ExportError(f"The adapter of {path} is a variant of LoRA that cannot be merged; export the adapter.")
        found.append(Term(a.weight, b.weight, float(layer.scaling[name])))
    return tuple(found)


def _only(names: Any, path: str) -> str:
    if len(names) != 1:
        raise ExportError(f"{path} has {len(names)} active adapters; activate one and export again.")
    return names[0]


def _shape(parameter: Tensor) -> tuple[int, ...]:
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf
