"""One decoder layer whose instance runs nbkit's forward: fused where it can be, and otherwise as it was before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nbkit.models.layer.adapters import OURS, Unfit
from nbkit.models.layer.forward import Call
from nbkit.models.layer.function import LayerFunction
from nbkit.models.layer.inputs import mask_of
from nbkit.models.layer.parts import Parts
from nbkit.models.layer.stack import attend
from nbkit.models.unshared import Unshared

if TYPE_CHECKING:
    from nbkit.models.layer.bind import Binding

MARK = "_nbkit_layers"  # instance attribute: of the decoder its Binding, of each layer its BoundLayer


class BoundLayer(Unshared):
    """One decoder layer whose instance runs `forward` below in place of its class's."""

    def __init__(self, binding: Binding, parts: Parts) -> None:
        self.binding, self.parts = binding, parts
        self.params: list[Tensor] = []
        self.unread = True  # whether `params` are to be read from the parts, whatever these say of changes
        layer = vars(parts.layer)
        self.before = layer.get("forward")  # what another library bound; None: the class's own
        layer[MARK] = self
        layer["forward"] = MethodType(forward, parts.layer)

    def refresh(self) -> bool:
        """True if the adapters changed. A reason to run stock goes to the binding's `reasons`."""
        layer, reasons = self.parts.layer, self.binding.reasons
        # Checkpointing is a level here. transformers' own would repeat the whole layer, which some versions wrap around this.
        switched = self.binding.switched_on
        try:
            changed = self.parts.refresh() or self.unread
        except Unfit as reason:
            reasons[self.parts.index] = str(reason)
            self.unread = True
            _switch(layer, switched)
            return True
        if changed:
            self.params, self.unread = self.parts.parameters(), False
        reasons.pop(self.parts.index, None)
        _switch(layer, False)
        return changed

    def stock(self, hidden: Tensor, **kwargs: Any) -> Any:
        """The layer as it was before, checkpointed where transformers is told to and this layer was spared it."""
        layer: Any = self.parts.layer
        run = self.before or partial(type(layer).forward, layer)
        fused = self.parts.index not in self.binding.reasons
        if not (fused and self.binding.switched_on and layer.training and torch.is_grad_enabled()):
            return run(hidden, **kwargs)
        if kwargs.get("past_key_values") is not None:  # what a second forward would fill twice
            return run(hidden, **kwargs)
        return layer._gradient_checkpointing_func(partial(self._once, run, **kwargs), hidden)

    def _once(self, run: Callable[..., Any], hidden: Tensor, **kwargs: Any) -> Any:
        """`run` with transformers' switch off: at the backward a trainer may have turned it on again, and it would nest."""
        layer: Any = self.parts.layer
        on, layer.gradient_checkpointing = layer.gradient_checkpointing, False
        try:
            return run(hidden, **kwargs)
        finally:
            layer.gradient_checkpointing = on

    def release(self) -> None:
        layer = vars(self.parts.layer)
        if layer.pop(MARK, None) is self and getattr(layer.get("forward"), "__func__", None) is forward:
            del layer["forward"]
            if self.before is not None:
                layer["forward"] = self.before
        _switch(self.parts.layer, self.binding.switched_on)
        for group in self.parts.groups:
            group.release()


def _switch(layer: Any, on: bool) -> None:
    if getattr(layer, "gradient_checkpointing", on) != on:
        layer.gradient_checkpointing = on


def fits(hidden: Tensor, mask: Tensor | None, turned: Any, parts: Parts) -> bool:
    """Whether a fused layer can take what its decoder hands it."""
    plain = mask is None or isinstance(mask, Tensor) and mask.dim() == 4
    return hidden.dtype == parts.dtype and turned is not None and plain


@torch.compiler.disable
def forward(self: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """The decoder layer's forward: fused where it can be, else the layer's own with the same arguments."""
    bound: BoundLayer | None = vars(self).get(MARK)
    if bound is None:  # a copy of a bound layer
        return type(self).forward(self, hidden_states, attention_mask=attention_mask, **kwargs)
    binding, parts = bound.binding, bound.parts
    if hidden_states is binding.stacks.ahead:
        return hidden_states
    causal = attention_mask is not None and attention_mask is binding.causal
    grad = torch.is_grad_enabled()
    alone = grad and binding.stepping is None
    if alone:  # the decoder has not called it
        if torch._C._current_graph_task_id() < 0:  # by hand: nobody has brought adapters up to date, or said what the mask means
            return bound.stock(hidden_states, attention_mask=attention_mask, **kwargs)
        causal = binding.again(attention_mask)
    mask = None if causal else attention_mask
    turned = kwargs.get("position_embeddings")
    if parts.index in binding.reasons or binding.stands_aside or not grad or not fits(hidden_states, mask, turned, parts):
        if causal:  # taken from the stock layers by `before`
            mask = mask_of(binding.documents, parts.window, hidden_states)
        return bound.stock(hidden_states, attention_mask=mask, **kwargs)
    cos, sin = turned
    if causal and not alone and (call := binding.stacks.call(bound, hidden_states, cos, sin)) is not None:
        return binding.stacks.run(call, hidden_states, cos, sin)
    b, t, _ = hidden_states.shape
    how = attend(binding, parts, hidden_states, mask, binding.documents if causal else None)
    keep = binding.keep_of(parts.index)
    parcel = binding.memory_of_host().parcel() if keep.offload else None
    call = Call(parts, keep, how, b, t, [], parcel, binding.arena)
    return LayerFunction.apply(hidden_states, cos, sin, mask, call, binding.rows, *bound.params)


OURS.add(forward)
