"""The fused layer on the instances of one model: which layers take it, and what each forward of the decoder does first."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from nbkit.families import Family
from nbkit.kernels.lora_border import BorderWriter
from nbkit.models import attention
from nbkit.models.layer.adapters import Unfit
from nbkit.models.layer.forward import Call
from nbkit.models.layer.function import GradientRows, LayerFunction
from nbkit.models.layer.keep import DEFAULT, Keep
from nbkit.models.layer.parts import Parts
from nbkit.models.layer.weights import Scratch


class Binding:
    """All decoder layers of one model on the fused path, bound by `bind` and taken off by `release`.

    `reasons` says for each layer index that runs stock why it does; it is brought up to date by every forward.
    """

    def __init__(self, decoder: nn.Module, layers: list[nn.Module], family: Family, config: Any) -> None:
        self.decoder, self.family = decoder, family
        self.scratch, self.rows, self.shapes = Scratch(), GradientRows(), attention.Shapes()
        self.reasons: dict[int, str] = {}
        self.bound: list[BoundLayer] = []
        self.keep: Keep | None = None  # None: level 0, or 4 where gradient checkpointing was asked for
        self.how: set[str] = set()  # the attention implementations met, for the report
        self.writer: BorderWriter | None = None
        self.causal: Tensor | None = None  # stands for the mask in a forward that needs none but the causal one
        for index, layer in enumerate(layers):
            try:
                parts = Parts(layer, index, family, config, self.scratch)
            except Unfit as reason:
                self.reasons[index] = str(reason)
                continue
            self.bound.append(BoundLayer(self, parts))
        self._hooks = [
            decoder.register_forward_pre_hook(self.before, with_kwargs=True),
            decoder.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Bring the adapters' borders up to date, and say once for all layers what the mask is."""
        changed = False
        for layer in self.bound:
            changed |= layer.refresh()
        self.scratch.owner.clear()  # adapters may have been stepped since: what was dequantised with them is old
        if changed or self.writer is None or self.writer.stale():
            self.writer = BorderWriter([c for b in self.bound for g in b.parts.groups for c in g.borders()])
        self.writer.write()
        self.causal = None
        if not torch.is_grad_enabled():
            return args, kwargs
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False  # a cache of what is being trained on is of no use, and would be kept until the backward
        if not self.reasons and kwargs.get("position_ids") is None and causal_only(kwargs.get("attention_mask")):
            # A mask of four axes is handed to the layers as it is, so the stock decoder builds none.
            kwargs["attention_mask"] = self.causal = torch.empty(1, 1, 1, 1, device=self.bound[0].parts.qkv.device)
        return args, kwargs

    def after(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        self.causal = None

    def release(self) -> None:
        """Give every layer its stock forward and every linear its own weight back."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.bound:
            layer.release()
        self.bound.clear()


class BoundLayer:
    """One decoder layer whose instance calls `forward` here instead of its class's."""

    def __init__(self, binding: Binding, parts: Parts) -> None:
        self.binding, self.parts = binding, parts
        self.params: list[Tensor] = []
        self.checkpointed = False
        parts.layer.forward = MethodType(_forward, _Handle(self, parts.layer))

    def refresh(self) -> bool:
        """True if the adapters changed. A reason to run stock goes to the binding's `reasons`."""
        layer, reasons = self.parts.layer, self.binding.reasons
        try:
            changed = self.parts.refresh()
        except Unfit as reason:
            reasons[self.parts.index] = str(reason)
            return True
        if changed:
            self.params = self.parts.parameters()
        reasons.pop(self.parts.index, None)
        # Checkpointing is a level here. The stock wrapper would repeat the whole layer; older transformers wrap the call itself.
        self.checkpointed = bool(getattr(layer, "gradient_checkpointing", False)) and layer.training
        return changed

    def release(self) -> None:
        self.parts.layer.__dict__.pop("forward", None)
        for group in self.parts.groups:
            group.release()


class _Handle:
    """What the instance's forward is bound to: the layer, and its binding."""

    def __init__(self, bound: BoundLayer, layer: nn.Module) -> None:
        self.bound, self.layer = bound, layer


def _forward(self: _Handle, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The decoder layer's forward: fused where it can be, else the class's own with the same arguments."""
    bound, binding = self.bound, self.bound.binding
    parts = bound.parts
    causal = attention_mask is not None and attention_mask is binding.causal
    mask = None if causal else attention_mask
    if (
        parts.index in binding.reasons
        or kwargs.get("past_key_values") is not None
        or not torch.is_grad_enabled()
        or hidden_states.dtype != parts.dtype
        or (mask is not None and mask.dim() != 4)
        or kwargs.get("position_embeddings") is None
    ):
        return type(self.layer).forward(self.layer, hidden_states, attention_mask=mask, **kwargs)
    cos, sin = kwargs["position_embeddings"]
    b, t, _ = hidden_states.shape
    like = hidden_states.as_strided((b, parts.h, t, parts.k), (0, 0, 0, 0))  # only its shape, dtype and device are read
    how = attention.choose(like, scale=parts.scale, mask=mask, window=parts.window, shapes=binding.shapes)
    binding.how.add(f"{how.kind}: {how.why}")
    keep = binding.keep or (Keep(4) if bound.checkpointed else DEFAULT)
    call = Call(parts, keep, how, b, t, [])
    return LayerFunction.apply(hidden_states, cos, sin, mask, call, binding.rows, *bound.params)


def causal_only(mask: Tensor | None) -> bool:
    """Whether a 2-D padding mask (B, T) needs no masking beyond the causal one: no padding, or padding on the right alone.

    A real token never looks at what follows it, so right padding changes only the padding's own outputs, which nothing reads.
    Costs one wait for the device where the mask lies on a GPU.
    """
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    return not bool((mask[:, 1:] > mask[:, :-1]).any())


def bind(model: nn.Module, family: Family) -> Binding:
    """Put every fitting decoder layer of a causal-LM `model` of `family` on the fused path."""
    decoder = model.get_submodule(family.decoder.base)
    layers = list(model.get_submodule(family.decoder.layers))
    return Binding(decoder, layers, family, model.config)
