"""Which LoRA terms a linear carries right now: PEFT's own parameters are the truth, read afresh where anything changed.

PEFT wraps a linear `m` in a layer with `base_layer`, `lora_A[name]`, `lora_B[name]`, `scaling[name]`. A term adds
scale * b (a x). Adapters that are disabled or merged into the base weight add nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

OURS: set[Callable[..., Any]] = set()  # the forwards that nbkit itself binds to parts of a layer: the fused steps stand for them
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EVERYWHERE: list[dict[int, Any]] = [getattr(torch.nn.modules.module, f"_global{kind}") for kind in HOOKS]
_KNOWN = ("torch", "transformers", "peft", "bitsandbytes")  # whose forwards the fused steps stand for
# transformers leaves hooks on attention for `output_attentions`; they do nothing where it is not asked for.
# Those that make embeddings ask for a gradient are for reentrant checkpointing, and those of bind.py are nbkit's own.
_IDLE_HOOKS = ("transformers.utils.output_capturing", "nbkit.models.layer.bind")
_ASK_FOR_GRADIENTS = "make_inputs_require_grad"


def plain_tensors() -> AbstractContextManager[Any]:
    """Within: subclasses of Tensor are looked at as plain ones. bitsandbytes' packed weights take 3 us an attribute otherwise."""
    return torch._C.DisableTorchFunctionSubclass()


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


def base_of(module: Any) -> Any:
    """The linear or norm itself, without PEFT's wrapper. Of what PEFT has copies of (`modules_to_save`): that in use."""
    copies = module._modules.get("modules_to_save")
    if copies is not None:
        used = [] if module.disable_adapters else [name for name in module.active_adapters if name in copies]
        module = copies[used[0]] if used else module.original_module
    return module._modules.get("base_layer", module)


def kind_of(thing: object) -> str:
    """A class with the library it is from: many are called Linear."""
    return f"{type(thing).__name__} of {type(thing).__module__.split('.')[0]}"


def part_of(module: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`. Raises: Unfit where there is none: another library has put a module of its own there."""
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise Unfit(f"{kind_of(module)} has no {path}") from error


def hooks_made() -> int:
    """Goes up with every hook that is registered anywhere: whether one is new costs no look at any module."""
    return RemovableHandle.next_id


def hooked(module: nn.Module) -> bool:
    """Whether it has any hook."""
    return any(vars(module)[kind] for kind in HOOKS)


def differ(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether these are not the very same objects."""
    return any(a is not b for a, b in zip(some, others, strict=True))


def of_others(module: nn.Module, *known: str) -> bool:
    """Whether its class has a forward of none of the libraries `known`: one's own subclass, say, or a class that was patched."""
    return type(module).forward.__module__.partition(".")[0] not in known


def _idle(hook: Any) -> bool:
    """Whether a hook changes nothing in a fused step, nor learns anything of it."""
    return getattr(hook, "__module__", "") in _IDLE_HOOKS or getattr(hook, "__name__", "").startswith(_ASK_FOR_GRADIENTS)


def own_forward(module: nn.Module) -> bool:
    """Whether a module of transformers runs another forward than theirs."""
    return "forward" in vars(module) or of_others(module, "transformers")


def foreign(modules: Iterable[tuple[str, nn.Module]], who: str = "a fused layer") -> str | None:
    """The first module that would not do what its class does, and why: `who` would pass over it. None if there is none."""
    if any(_EVERYWHERE):
        return f"all modules are hooked (register_module_forward_hook and the like), and {who} calls none"
    for name, module in modules:
        if of_others(module, *_KNOWN):
            return f"{name} is a {kind_of(module)}, whose own forward {who} does not call"
        bound = vars(module).get("forward")
        if bound is not None:
            function = getattr(bound, "__func__", bound)
            if function is not type(module).forward and function not in OURS:
                return f"another library has bound a forward of its own to {name}"
        for kind in HOOKS:
            if not all(map(_idle, vars(module)[kind].values())):
                return f"{name} is hooked, and {who} does not call it"
    return None


class Watch:
    """Tells whether anything changed that the terms of some linears were made from; cheap: it is asked in every forward.

    `places` are (dict, key, value): fresh as long as each dict still holds that very value. Lists of merged adapters change
    in place, so of those it is the emptiness that counts.
    """

    def __init__(self, parent: nn.Module | None = None, names: Sequence[str] = ()) -> None:
        self.places: list[tuple[dict[str, Any], str, Any]] = []
        self.merged: list[tuple[list[str], bool]] = []
        self.trained: list[tuple[Tensor, bool]] = []
        self.addresses: list[tuple[Tensor, int]] = []
        self.hooked: list[tuple[dict[int, Any], int]] = []
        self.hooks = hooks_made()
        if parent is not None:
            self.look(parent, names)

    def look(self, parent: nn.Module, names: Sequence[str]) -> None:
        """Watch the linears or norms `names` of `parent`."""
        for name in names:
            module: Any = parent._modules[name]
            self.see(parent._modules, name)
            base = base_of(module)
            self.trained += [(p, p.requires_grad) for p in base.parameters()]
            self._see_hooks(*{id(one): one for one in (parent, module, base)}.values())
            state = vars(module)
            if "_disable_adapters" in state:
                self.see(state, "_disable_adapters", "_active_adapter")
            if "scaling" not in state:
                continue
            self.see(state, "training", "scaling")
            self.merged.append((module.merged_adapters, bool(module.merged_adapters)))
            for adapter in module.active_adapters:
                if adapter in module.lora_A:
                    self.see(state["scaling"], adapter)
                    for half in (module.lora_A, module.lora_B):
                        self.see(half._modules, adapter)
                        self._see_hooks(half[adapter])
                        self.see(half[adapter]._parameters, "weight")

    def _see_hooks(self, *modules: nn.Module) -> None:
        self.hooked += [(hooks := vars(module)[kind], len(hooks)) for module in modules for kind in HOOKS]

    def see_hooks_of_all(self) -> None:
        """Watch the hooks that torch calls for every module there is."""
        self.hooked += [(hooks, len(hooks)) for hooks in _EVERYWHERE]

    def see(self, held: dict[str, Any], *keys: str) -> None:
        """Watch what a dict holds under these keys."""
        self.places += [(held, key, held.get(key)) for key in keys]

    def add(self, watch: Watch) -> None:
        """Watch what `watch` watches too: one flat list for all layers, since it is asked before the GPU has work."""
        self.places += watch.places
        self.merged += watch.merged
        self.trained += watch.trained
        self.hooked += watch.hooked
        self.addresses += watch.addresses

    def fresh(self) -> bool:
        """Whether everything is as it was."""
        with plain_tensors():
            return self._fresh()

    def _fresh(self) -> bool:
        if self.hooks != hooks_made():
            if any(len(hooks) != many for hooks, many in self.hooked):
                return False
            self.hooks = hooks_made()
        for held, key, value in self.places:
            if held.get(key) is not value:
                return False
        for p, was in self.trained:
            if p.requires_grad is not was:
                return False
        for p, at in self.addresses:
            if p.data_ptr() != at:
                return False
        return all(bool(names) is there for names, there in self.merged)


class Columns:
    """All of a `Watch` by columns, asked in every step: its thousands of places are seldom in the cache by then.

    A column is walked in C, and in the order of addresses: the memory is waited for less often.
    """

    def __init__(self, watch: Watch) -> None:
        """`watch` is done: what is added to it later is not seen."""
        places = sorted(watch.places, key=lambda place: id(place[0]))
        self.dicts, self.keys, self.values = ([place[i] for place in places] for i in range(3))
        addresses = sorted(watch.addresses, key=lambda one: id(one[0]))
        self.placed, self.at = ([one[i] for one in addresses] for i in range(2))
        trained = sorted(watch.trained, key=lambda one: id(one[0]))
        self.trained, self.trains = ([one[i] for one in trained] for i in range(2))
        self.merged, self.there = ([one[i] for one in watch.merged] for i in range(2))
        self.hooked, self.many = ([one[i] for one in watch.hooked] for i in range(2))
        self.hooks = watch.hooks

    def fresh(self) -> bool:
        """Whether everything is as it was."""
        if self.hooks != hooks_made():
            if list(map(len, self.hooked)) != self.many:
                return False
            self.hooks = hooks_made()
        with plain_tensors():
            return (
                all(map(is_, map(dict.get, self.dicts, self.keys), self.values))
                and list(map(torch.Tensor.data_ptr, self.placed)) == self.at
                and list(map(attrgetter("requires_grad"), self.trained)) == self.trains
                and list(map(bool, self.merged)) == self.there
            )


def other_method(name: str, module: nn.Module) -> Unfit:
    """The reason of a part that another method of PEFT than LoRA has wrapped."""
    return Unfit(f"{name} carries an adapter of {type(module).__module__.removesuffix('.layer')}, which is not LoRA")


def terms(module: nn.Module, start: int, stop: int, offset: int, name: str) -> list[Term]:
    """The LoRA terms of one linear.

    Raises: Unfit for what changes the formula (DoRA and other variants, dropout while training, a bias in B).
    """
    if not hasattr(module, "base_layer"):
        return []
    if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
        raise other_method(name, module)
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
