"""`patch` and `unpatch`: nbkit's kernels on the instances of one model.

Nothing but instances is changed: no class, no other model, no module of another package. The model stays transformers' own,
so PEFT (before or after), TRL, saving, caches and `generate` go on as they were, and `unpatch` gives the stock forward back.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nbkit.errors import ModelError
from nbkit.families import Family, find
from nbkit.kernels._launch import launch_note, runs_on
from nbkit.models.asked import MARK as ASKED
from nbkit.models.asked import UNASKED, Asked, unasked
from nbkit.models.busy import require_free
from nbkit.models.checkpointing import check_way, set_checkpointing
from nbkit.models.forwards import GRAPHS, MARK, bind, is_bound, unbind
from nbkit.models.graphs import Graphs
from nbkit.models.head import head_of, plain_head
from nbkit.models.layer import bind as bind_whole
from nbkit.models.layer import binding_of
from nbkit.models.layer.bind import forget
from nbkit.models.layer.parts import SILU
from nbkit.models.obstacles import mixed_devices, stock_reason, weight_format
from nbkit.models.running import numbers

TITLES = {
    "layer": "whole decoder layer, one node with a hand-written backward",
    "graphs": "micro-steps recorded as CUDA graphs where launches set the pace",
    "rms_norm": "RMSNorm",
    "rope": "attention with rope",
    "swiglu": "gated MLP with swiglu",
    "linear_cross_entropy": "loss of the labelled rows without logits",
}


@dataclass(frozen=True)
class Bound:
    """A module that runs nbkit's forward. `note` says what is special about it, if anything."""

    path: str
    op: str
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """A module that runs stock, and why. The path "" is the model itself."""

    path: str
    reason: str


@dataclass(frozen=True, repr=False)
class PatchReport:
    """What `patch` did. `str()` is made to be read; `bound` and `skipped` list every module it looked at. It holds no model.

    After the first training step it also says what was chosen then: what is kept, which attention, whether steps are recorded,
    and what has come to run stock since, by the adapters that were added or by what the steps were given.
    """

    model: str
    family: str | None
    device: str
    runs: str
    bound: tuple[Bound, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    chosen: Callable[[], list[str]] = field(default=list, compare=False)

    def __str__(self) -> str:
        family = f"family {self.family}" if self.family else "no declared family"
        head = f"{self.model} ({family}) on {self.device}: {len(self.bound)} modules bound, {len(self.skipped)} skipped"
        lines = [f"{head}; {self.runs}."]
        for op, count in Counter(one.op for one in self.bound).items():
            paths = dict.fromkeys(_stars(one.path) or self.model for one in self.bound if one.op == op)
            lines.append(f"  bound    {count:>4} x {TITLES.get(op, op)}: {', '.join(paths)}")
        lines += [f"  note     {one.path or self.model}: {one.note}" for one in self.bound if one.note]
        for reason, count in Counter(one.reason for one in self.skipped).items():
            paths = dict.fromkeys(_stars(one.path) or self.model for one in self.skipped if one.reason == reason)
            lines.append(f"  skipped  {count:>4} x {', '.join(paths)}: {reason}")
        return "\n".join(lines + self.chosen())

    __repr__ = __str__  # what a notebook shows at the end of a cell


def patch(model: Any, *, graphs: bool = True, use_gradient_checkpointing: bool | str | None = None) -> PatchReport:
    """Bind nbkit's forwards to the modules of one model; patching twice changes nothing but what is asked for.

    Args:
        model: a transformers causal LM of a declared family, or a PEFT model of one, on any device, also in 4 bits.
        graphs: whether training steps of a shape that returns may be recorded as CUDA graphs. A recorded step gives the
            loss and the gradients of all LoRA parameters; logits read from it carry no gradient.
        use_gradient_checkpointing: True, "nbkit" or "unsloth": the fused layers keep the least. "auto": what fits is kept.
            False: the same, and what runs stock is not checkpointed. None: as the model's own switch says, now and later
            (`model.gradient_checkpointing_enable()`, which trainers call). Layers that run stock, and a model on a CPU, take
            transformers' own checkpointing.
    With labels the loss is computed from the labelled rows alone; the output's `logits` are then made when they are read.
    A family that is not declared, or a GPU below capability 7.0, runs stock; the report says so.
    In an unmodified TRL SFTTrainer or DPOTrainer the layers are nbkit's and the head is TRL's: from 1.x on a chunked one that
    TRL binds over this one, in 0.29 whole logits, which its entropy and accuracy read at every step (one projection without
    gradient more). Neither records steps. nbkit's own trainer keeps this head, and records.
    Raises: ModelError for an object that is no transformers model, or one that a run is training; ConfigError for another way
        of checkpointing.
    """
    base = base_model(model)
    require_free(base, "patch")
    if use_gradient_checkpointing is not None:
        check_way(use_gradient_checkpointing)
    family = find(base.config.model_type)
    device = next(base.parameters()).device
    about = {"model": type(base).__name__, "family": family.name if family else None, "device": str(device)}
    reason = stock_reason(base, family, device)
    if family is None or reason is not None:
        if use_gradient_checkpointing is not None:
            set_checkpointing(model, use_gradient_checkpointing)
        return PatchReport(**about, runs="everything runs stock", skipped=(Skipped("", str(reason)),))
    found: list[Bound | Skipped] = []
    for index, layer in enumerate(base.get_submodule(family.decoder.layers)):
        found += bind_layer(layer, family, f"{family.decoder.layers}.{index}")
    found.append(_bind(base, family.decoder.final_norm, "rms_norm", family))
    found.append(_bind_head(base, family))
    several, form = mixed_devices(base, family), weight_format(base)
    found += [Skipped(family.decoder.layers, why) for why in (several, form) if why is not None]
    if _fuses(device) and several is None:
        found += _bind_whole_layers(base, family, graphs)
    if use_gradient_checkpointing is not None:
        set_checkpointing(model, use_gradient_checkpointing)
    skipped, held = tuple(one for one in found if isinstance(one, Skipped)), weakref.ref(base)
    return PatchReport(
        **about,
        runs=_runs(device),
        bound=tuple(one for one in found if isinstance(one, Bound)),
        skipped=skipped,
        chosen=lambda: _chosen(held(), {one.reason for one in skipped}),
    )


def _fuses(device: torch.device) -> bool:
    """Whether whole layers are fused: a CPU gains nothing by it."""
    return device.type == "cuda"


def _runs(device: torch.device) -> str:
    if not runs_on(device):
        return "plain PyTorch in place of the kernels" + ("" if device.type == "cuda" else ", as there is no GPU")
    note = launch_note()
    return f"Triton kernels ({note.removesuffix('.')})" if note else "Triton kernels"


def _chosen(base: Any, told: set[str]) -> list[str]:
    """Lines on what the engine has chosen so far. `told`: reasons that the report names anyway."""
    if base is None:  # gone, though its report is still here
        return []
    if not any(MARK in vars(module) for module in base.modules()):
        return ["  unpatched     since: the model runs stock"]
    binding, graphs = binding_of(base), vars(base).get(GRAPHS)
    if binding is None:
        return []
    lines = []
    if binding.how:
        lines += [f"  attention     {'; '.join(sorted(binding.how))}"]
        lines += [f"  memory        {binding.planner.plan}"] if binding.planner.plan is not None else []
        lines += [f"  graphs        {UNASKED if unasked(graphs) else graphs.note}"] if graphs is not None else []
    reasons: dict[str, list[int]] = {}
    for index, why in binding.reasons.items():
        reasons.setdefault(why, []).append(index)
    lines += [f"  stock         {numbers(which)} not fused: {why}" for why, which in reasons.items() if _said(why) not in told]
    return lines + [f"  stock         no layer is fused in some steps: {why}" for why in binding.asides]


def _said(why: str) -> str:
    return f"{why}; its parts are bound one by one"


def unpatch(model: Any) -> None:
    """Give every module of the model its stock forward back.

    Raises: ModelError for an object that is no transformers model, or one that a run is training.
    """
    base = base_model(model)
    require_free(base, "unpatch")
    vars(base).pop(GRAPHS, None)
    binding = binding_of(base)
    if binding is not None:
        binding.release()
    forget(base)
    for module in base.modules():
        vars(module).pop(ASKED, None)
        unbind(module)


def bind_layer(layer: nn.Module, family: Family, path: str) -> list[Bound | Skipped]:
    """Decide for one decoder layer what of it is bound: its norms, its attention and its MLP, each by itself.

    This is the place where a forward for a whole layer comes in: it binds the layer and says so instead, and the pieces
    bound here serve it where it hands a call on to the stock layer.
    """
    found = [_bind(layer, name, "rms_norm", family, path) for name in dict.fromkeys((family.norm.attention, family.norm.mlp))]
    for name, op, reason in (
        (family.attention.module, "rope", _attention_reason(family)),
        (family.mlp.module, "swiglu", _mlp_reason(layer, family)),
    ):
        found.append(_bind(layer, name, op, family, path) if reason is None else Skipped(f"{path}.{name}", reason))
    return found


def _bind_whole_layers(base: Any, family: Family, graphs: bool) -> list[Bound | Skipped]:
    """The fused layer where it fits. What it hands on to the layer's own forward finds the pieces above bound there."""
    binding = bind_whole(base, family)
    binding.refresh()  # adapters that do not fit are known now and not in the middle of a run
    path, reasons = family.decoder.layers, binding.reasons
    fused = [one.parts.index for one in binding.bound if one.parts.index not in reasons]
    found: list[Bound | Skipped] = [Bound(f"{path}.{index}", "layer") for index in fused]
    found += [Skipped(f"{path}.{index}", _said(why)) for index, why in reasons.items()]
    if graphs and _is_causal_lm(base) and plain_head(head_of(base, family)) is None:
        vars(base)[GRAPHS] = graphs_of_model = Graphs(base, family, binding)
        vars(base.get_submodule(family.decoder.final_norm))[ASKED] = Asked(graphs_of_model)
        found.append(Bound("", "graphs"))
    else:
        vars(base).pop(GRAPHS, None)
        vars(base.get_submodule(family.decoder.final_norm)).pop(ASKED, None)
    return found


def _bind(root: nn.Module, name: str, op: str, family: Family, prefix: str = "", note: str = "") -> Bound | Skipped:
    """Bind what lies at `name`; where PEFT trains a copy of it (`modules_to_save`), the original and every copy."""
    found = root.get_submodule(name)
    path = f"{prefix}.{name}" if prefix else name
    copies = found._modules.get("modules_to_save")
    modules: list[nn.Module] = [found] if copies is None else [found.get_submodule("original_module"), *copies.children()]
    for module in modules:
        if MARK in vars(module) and (is_bound(module) or not _runs_class_forward(module)):
            continue  # bound before; another library may have wrapped it since
        if not type(module).__module__.startswith("transformers.models."):
            return Skipped(path, f"{type(module).__name__} is not transformers' own class")
        if not _runs_class_forward(module):
            return Skipped(path, "another library has bound a forward of its own to it")
        bind(module, op, family)
    return Bound(path, op, note)


def _runs_class_forward(module: nn.Module) -> bool:
    bound = vars(module).get("forward")
    return bound is None or getattr(bound, "__func__", None) is type(module).forward


def _is_causal_lm(base: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _bind_head(base: Any, family: Family) -> Bound | Skipped:
    if not _is_causal_lm(base):
        return Skipped("", f"{type(base).__name__} has no next-token loss; its own forward stays")
    reason = plain_head(head_of(base, family))
    return _bind(base, "", "linear_cross_entropy", family, note=f"{family.head.module}: {reason}" if reason else "")


def base_model(model: Any) -> Any:
    """The transformers model inside `model`. Raises: ModelError if there is none."""
    from transformers import PreTrainedModel

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise ModelError(
            f"nbkit patches a transformers model or a PEFT model of one, not a {type(model).__name__}; "
            "pass the model itself, before it is compiled or wrapped for several processes."
        )
    return base


def _attention_reason(family: Family) -> str | None:
    """Why the family's attention is not bound; None if it is."""
    facts, rope = family.attention, family.rope
    if facts.fused_qkv or facts.qk_norm or facts.sinks or facts.softcap_key:
        return f"the attention of {family.title} is not among those nbkit binds"
    if rope.kind != "split_half" or rope.partial != 1.0:
        return f"the rope of {family.title} ({rope.kind}, {rope.partial:g} of a head) is not among those nbkit binds"
    return None


def _mlp_reason(layer: nn.Module, family: Family) -> str | None:
    facts = family.mlp
    if facts.fused or facts.experts_key or facts.activation != "silu":
        return f"the MLP of {family.title} is not among those nbkit binds"
    act = getattr(layer.get_submodule(facts.module), "act_fn", None)
    if type(act).__name__ not in SILU:
        return f"its activation is {type(act).__name__}, the kernel has silu"
    return None


def _stars(path: str) -> str:
    """model.layers.7.mlp as model.layers.*.mlp."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)
