"""Which LoRA terms a linear carries right now: PEFT's own parameters are the truth, read afresh where anything changed.

PEFT wraps a linear `m` in a layer with `base_layer`, `lora_A[name]`, `lora_B[name]`, `scaling[name]`. A term adds
scale * b (a x). Adapters that are disabled or merged into the base weight add nothing here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class Unfit(Exception):
    """This layer, as it stands now, cannot take the fused path; the message says why, for the report."""


class Term(NamedTuple):
    """scale * b_OR @ a_RI on output rows start:stop of a group; rank columns offset:offset+r of its border."""

    a: Tensor
    b: Tensor
    scale: float
    start: int
    stop: int
    offset: int

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def base_of(module: nn.Module) -> nn.Module:
    """The linear itself, without PEFT's wrapper."""
    return getattr(module, "base_layer", module)


def snapshot(module: nn.Module) -> tuple[Any, ...]:
    """What decides on a linear's terms, cheap to read and to compare: it is read for every linear in every forward."""
    state = module.__dict__
    if "scaling" not in state:
        return (module,)
    active = state.get("_active_adapter", "default")
    names = (active,) if isinstance(active, str) else tuple(active)
    if state.get("_disable_adapters", False) or state.get("merged_adapters"):
        return (module, None)
    modules, scaling = module._modules, state["scaling"]
    a, b = modules["lora_A"]._modules, modules["lora_B"]._modules
    found = ((a[n]._parameters["weight"], b[n]._parameters["weight"], scaling[n]) for n in names if n in a)
    return (module, module.training, *found)


def same(one: tuple[Any, ...], other: tuple[Any, ...] | None) -> bool:
    """Whether two snapshots agree: parameters by identity (== on tensors compares elements), scales by value."""
    if other is None or len(one) != len(other):
        return False
    for x, y in zip(one, other, strict=True):
        if isinstance(x, tuple):
            if x[0] is not y[0] or x[1] is not y[1] or x[2] != y[2]:
                return False
        elif x is not y:
            return False
    return True


def terms(module: nn.Module, start: int, stop: int, offset: int, name: str) -> list[Term]:
    """The LoRA terms of one linear.

    Raises: Unfit for what changes the formula (DoRA and other variants, dropout while training, a bias in B).
    """
    if not hasattr(module, "base_layer"):
        return []
    if not hasattr(module, "lora_A"):
        raise Unfit(f"{name} is wrapped by {type(module).__name__}, which is not LoRA")
    if module.disable_adapters or module.merged:
        return []
    found = []
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        if adapter in getattr(module, "lora_variant", {}):
            raise Unfit(f"{name} uses a variant of LoRA ({type(module.lora_variant[adapter]).__name__})")
        if getattr(module, "fan_in_fan_out", False):
            raise Unfit(f"{name} has a transposed weight")
        dropout = module.lora_dropout._modules.get(adapter)
        if module.training and getattr(dropout, "p", 0.0) > 0:
            raise Unfit(f"{name} has lora_dropout {dropout.p}")
        a, b = module.lora_A[adapter], module.lora_B[adapter]
        if b.bias is not None:
            raise Unfit(f"{name} has a bias in its adapter")
        found.append(Term(a.weight, b.weight, float(module.scaling[adapter]), start, stop, offset))
        offset += a.weight.shape[0]
    return found
