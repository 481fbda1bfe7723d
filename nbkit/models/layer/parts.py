"""One decoder layer seen through its family's facts: dims, norms, weight groups. Straight-line steps read only this."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbkit.families import Family
from nbkit.models.layer.adapters import (
    Unfit,
    Watch,
    base_of,
    differ,
    foreign,
    hooks_made,
    kind_of,
    of_others,
    other_method,
    part_of,
)
from nbkit.models.layer.weights import Group, Scratch

SILU = ("SiLUActivation", "SiLU")  # torch's class and transformers' of it


class Parts:
    """The parts of one decoder layer. Raises: Unfit where the layer is not of the declared form."""

    def __init__(self, layer: nn.Module, index: int, family: Family, config: Any, scratch: Scratch) -> None:
        require_declared(family)
        require_own(layer)
        self.layer, self.index = layer, index
        attention, mlp = part_of(layer, family.attention.module), part_of(layer, family.mlp.module)
        facts = family.attention
        self.qkv = Group("qkv", attention, (facts.q, facts.k, facts.v), scratch)
        self.o = Group("o", attention, (facts.o,), scratch)
        self.gate_up = Group("gate_up", mlp, (family.mlp.gate, family.mlp.up), scratch)
        self.down = Group("down", mlp, (family.mlp.down,), scratch)
        self.groups = (self.qkv, self.o, self.gate_up, self.down)
        self.norm_names, self.eps_name = (family.norm.attention, family.norm.mlp), family.norm.eps
        self.eps = 0.0
        self.norms = self._norms()
        self.weights = self._weights()  # of the norms
        self.norms_trained = (False, False)
        self.blocks = (attention, mlp)
        self.odd: str | None = None  # what of the layer is not as its class has it
        self.seen: tuple[Any, ...] = ()  # what tells that it has to be looked for again
        self.k = int(getattr(attention, "head_dim", 0) or config.hidden_size // config.num_attention_heads)
        self.h, self.g = config.num_attention_heads, config.num_key_value_heads
        self.d, self.f = self.qkv.inputs, self.down.inputs
        self.scale = float(getattr(attention, "scaling", self.k**-0.5))
        self.window = window_of(family, config, index)
        self.softcap = softcap_of(family, config)
        if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
            raise Unfit(f"the activation is {config.hidden_act}, not {family.mlp.activation}")
        act = type(getattr(mlp, "act_fn", None)).__name__
        if act not in (*SILU, "NoneType"):
            raise Unfit(f"the activation is {act}, not {family.mlp.activation}")
        if getattr(attention, "is_causal", True) is False or getattr(config, "is_causal", True) is False:
            raise Unfit("attention is not causal (is_causal is False)")
        if self.qkv.sizes != (self.h * self.k, self.g * self.k, self.g * self.k):
            raise Unfit("q, k and v have other sizes than the config says")
        if float(getattr(attention, "attention_dropout", 0.0) or 0.0) > 0:
            raise Unfit(f"attention_dropout is {attention.attention_dropout}")
        self.dtype = self._dtype()

    def refresh(self) -> bool:
        """Read the adapters again; True if any changed. Raises: Unfit."""
        self.qkv.scratch.changes += 1
        eps, norms, weights = self.eps, self.norms, self.weights
        self.norms = self._norms()
        self.weights = self._weights()
        trained = tuple(weight.requires_grad for weight in self.weights)
        changed = eps != self.eps or trained != self.norms_trained or differ(norms, self.norms) or differ(weights, self.weights)
        self.norms_trained = trained
        for group in self.groups:
            changed |= group.refresh()
            group.bring_bias()
        self.dtype = self._dtype()
        seen = (hooks_made(), *(vars(module).get("forward") for module in (*self.blocks, *self.norms)))
        if changed or self.odd is not None or seen != self.seen:
            self.odd, self.seen = foreign(self._inside()), seen
        if self.odd is not None:
            raise Unfit(self.odd)
        return changed

    def used(self) -> tuple[Any, ...]:
        """What a forward reads now, for `use` in its backward."""
        return (self.norms, self.weights, self.norms_trained, *(group.used for group in self.groups))

    def use(self, used: tuple[Any, ...]) -> None:
        """Put back what a forward read: adapters, and with them copies of linears and norms, may have been switched since,
        or weights were lent for that forward alone (`torch.func.functional_call`)."""
        self.qkv.scratch.changes += 1
        self.norms, self.weights, self.norms_trained, *of_groups = used
        for group, one in zip(self.groups, of_groups, strict=True):
            group.use(one)

    def _dtype(self) -> torch.dtype:
        """In which the linears compute. Raises: Unfit where they differ."""
        if len({g.dtype for g in self.groups}) != 1:
            raise Unfit("the linears compute in different dtypes")
        return self.qkv.dtype

    def _norms(self) -> tuple[Any, Any]:
        found = [part_of(self.layer, name) for name in self.norm_names]
        for name, module in zip(self.norm_names, found, strict=True):
            if "base_layer" in module._modules:
                raise other_method(name, module)
        first, second = map(base_of, found)
        for name, norm in zip(self.norm_names, (first, second), strict=True):
            if not hasattr(norm, self.eps_name):
                raise Unfit(f"{name} is a {kind_of(norm)}, not an RMSNorm")
        if getattr(first, self.eps_name) != getattr(second, self.eps_name):
            raise Unfit("its norms differ in epsilon")
        self.eps = float(getattr(first, self.eps_name))
        return first, second

    def _weights(self) -> tuple[Any, Any]:
        """Of the norms. Raises: Unfit where one is no parameter."""
        first, second = (norm._parameters.get("weight") for norm in self.norms)
        if first is None or second is None:
            raise Unfit("the weight of a norm is made anew in each forward (pruned or parametrized)")
        return first, second

    def _inside(self) -> list[tuple[str, nn.Module]]:
        """Every module whose work the fused steps do."""
        return [(name, module) for name, module in self.layer.named_modules() if name]

    def report_to(self, everything: Watch) -> bool:
        """Add what `refresh` looks at; False if it has to be asked each time."""
        everything.places += [(vars(m), "forward", vars(m).get("forward")) for m in (*self.blocks, *self.norms)]
        everything.places += [(vars(m), self.eps_name, vars(m).get(self.eps_name)) for m in self.norms]
        everything.places += [(norm._parameters, "weight", p) for norm, p in zip(self.norms, self.weights, strict=True)]
        everything.places += [(vars(self), "norms", self.norms), (vars(self), "weights", self.weights)]
        for name in self.norm_names:
            everything.look(*_parent(self.layer, name))
        return all([group.report_to(everything) for group in self.groups])

    @property
    def one_pass(self) -> bool:
        """Whether the activation's backward may make LoRA's gradients as it goes: one term a linear, no linear trained itself."""
        starts = [t.start for t in self.gate_up.terms]
        return len(self.down.terms) < 2 and len(set(starts)) == len(starts) and not self.down.own and not self.gate_up.own

    def parameters(self) -> list[Tensor]:
        """All that is trained, group by group and then the norms: the order in which the backward gives their gradients."""
        norms = [weight for weight, trained in zip(self.weights, self.norms_trained, strict=True) if trained]
        return [p for group in self.groups for p in group.parameters()] + norms


def require_own(layer: nn.Module) -> None:
    """Raises: Unfit for a decoder layer that does not run the forward of transformers' class, which the fused steps stand for."""
    bound = vars(layer).get("forward")
    function = getattr(bound, "__func__", bound)
    if of_others(layer, "transformers"):
        raise Unfit(f"it is a {kind_of(layer)}, whose own forward a fused layer does not call")
    if bound is not None and function is not type(layer).forward:
        if getattr(function, "__module__", "").startswith("nbkit."):
            raise Unfit("it is a layer of another patched model")
        raise Unfit("another library has bound a forward of its own to the layer")


def _parent(layer: nn.Module, path: str) -> tuple[nn.Module, list[str]]:
    above, _, name = path.rpartition(".")
    return layer.get_submodule(above), [name]


def window_of(family: Family, config: Any, index: int) -> int | None:
    """The sliding window of layer `index` in tokens, or None."""
    width = getattr(config, "sliding_window", None)
    if family.attention.window == "none" or not width:
        return None
    if family.attention.window == "all":
        return int(width)
    kinds = getattr(config, "layer_types", None)
    return int(width) if kinds and kinds[index] == "sliding_attention" else None


def softcap_of(family: Family, config: Any) -> float | None:
    """The softcap on attention's scores, or None: of a family without one, or of a config that has none set."""
    key = family.attention.softcap_key
    value = getattr(config, key, None) if key else None
    return float(value) if value else None


def require_declared(family: Family) -> None:
    """Raises: Unfit for a fact that the fused layer has no step for yet."""
    a, m, n = family.attention, family.mlp, family.norm
    reasons = {
        "fused q/k/v": a.fused_qkv,
        "q/k norm": a.qk_norm,
        "attention sinks": a.sinks,
        "a fused gate/up projection": m.fused,
        "experts": m.experts_key is not None,
        f"the activation {m.activation}": m.activation != "silu",
        f"norms placed '{n.where}'": n.where != "pre",
        "a norm with weight offset or float32 weight": n.offset != 0.0 or n.cast != "before_weight",
        f"rope of kind {family.rope.kind}": family.rope.kind != "split_half" or family.rope.partial != 1.0,
    }
    found = [what for what, there in reasons.items() if there]
    if found:
        raise Unfit(f"family {family.name} has {', '.join(found)}")
