"""The fused layer on the instances of one model: which layers take it, and what each forward of the decoder does first."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from nbkit.families import Family
from nbkit.kernels.lora_border import BorderWriter
from nbkit.models import attention, planner
from nbkit.models.embedding import Embedding
from nbkit.models.layer.adapters import Unfit, Watch
from nbkit.models.layer.forward import Call
from nbkit.models.layer.function import GradientRows, LayerFunction
from nbkit.models.layer.inputs import aside, causal_only, documents_of, mask_of
from nbkit.models.layer.inputs import autocast_differs as autocast_differs
from nbkit.models.layer.keep import Keep
from nbkit.models.layer.offload import Host
from nbkit.models.layer.parts import Parts
from nbkit.models.layer.stack import Stacks, attend
from nbkit.models.layer.weights import Scratch

MARK = "_nbkit_layers"  # instance attribute: of the decoder its Binding, of each layer its BoundLayer
LAST = "_nbkit_last_norm"  # instance attribute of the norm after the layers: their Binding


class Binding:
    """All decoder layers of one model on the fused path, bound by `bind` and taken off by `release`.

    `reasons` says for each layer index that runs stock why it does; it is brought up to date by every forward. `asides` are
    the reasons for which all layers stood aside in a training forward, by what it was given.
    `keep` is what all layers keep; None: what the planner says.
    """

    def __init__(self, decoder: nn.Module, layers: list[nn.Module], family: Family, config: Any) -> None:
        self.decoder, self.family, self.config, self.vocab = decoder, family, config, config.vocab_size
        self.scratch, self.rows, self.shapes = Scratch(), GradientRows(), attention.Shapes()
        self.reasons: dict[int, str] = {}
        self.asides: dict[str, None] = {}
        self.stands_aside = False  # in the forward that runs now
        self.bound: list[BoundLayer] = []
        self.keep: Keep | None = None
        self.planner = planner.Planner()
        self.planning: list[Callable[[], None]] = []  # called before memory is planned: who holds some that it may give back
        self.how: set[str] = set()  # the attention implementations met, for the report
        self.everything: Watch | None = None
        self.looked = False  # the model's forward has read the adapters: the decoder's, which it calls next, need not
        self.version = 0  # goes up when anything changes that a recorded step holds fixed
        self.writer: BorderWriter | None = None
        # As a trainer or `patch` asks for it; "auto" and False: what fits. None: as transformers' own switch on the model says.
        self.checkpoint: bool | str | None = None
        self.optimizer_bytes: float = 8  # of state for a LoRA parameter: float32 Adam, unless a trainer says otherwise
        self.host: Host | None = None  # made when a plan first asks for host RAM
        self.recording = False  # a step is being recorded as a CUDA graph
        self.stacks = Stacks(self, forward)
        self.norm: nn.Module | None = None  # after the last layer
        self.embedding = Embedding(decoder)
        self.tied = bool(getattr(config, "tie_word_embeddings", False))
        self.documents: attention.Documents | None = None  # of a pack, in a forward that has one
        self.causal: Tensor | None = None  # stands for the mask in a forward that needs none but the causal one
        for index, layer in enumerate(layers):
            try:
                parts = Parts(layer, index, family, config, self.scratch)
            except Unfit as reason:
                self.reasons[index] = str(reason)
                continue
            self.bound.append(BoundLayer(self, parts))
        self.names = tuple(inspect.signature(type(decoder).forward).parameters)[1:]
        vars(decoder)[MARK] = self
        self._hooks = [
            decoder.register_forward_pre_hook(_before, with_kwargs=True),
            decoder.register_forward_hook(_after, always_call=True),
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())  # a copied or pickled model runs stock until it is patched itself

    def lead(self, norm: nn.Module) -> None:
        """Let the norm after the layers begin their gradient in the rows they take; its forward reads the mark."""
        if self.family.norm.offset == 0.0 and self.family.norm.cast == "before_weight":
            self.norm = norm
            vars(norm)[LAST] = self

    @property
    def checkpointed(self) -> bool:
        """Whether memory is to be saved: gradient checkpointing is on. Here it is a level, and the stock wrapper is not used."""
        if self.checkpoint is not None:
            return self.checkpoint not in (False, "auto")
        return self.switched_on and self.decoder.training

    @property
    def switched_on(self) -> bool:
        """Whether transformers' own checkpointing is switched on: what stock layers go by."""
        return bool(getattr(self.decoder, "gradient_checkpointing", False))

    @property
    def width(self) -> int:
        """Columns of the residual stream's gradient with room for LoRA's, as the last layer takes it."""
        p = self.bound[-1].parts
        return p.d + max(p.o.rank, p.down.rank)

    @property
    def chosen(self) -> Keep:
        """What the layers keep in the next forward, save the last ones where the plan has room for more."""
        return self.keep or self.planner.keep

    def keep_of(self, index: int) -> Keep:
        """What layer `index` keeps in the next forward."""
        return self.keep or self.planner.keep_of(index, len(self.bound))

    def refresh(self) -> None:
        """Read all adapters again; `version` goes up if anything changed."""
        if self.everything is not None and self.everything.fresh():
            return
        changed = False
        for layer in self.bound:
            changed |= layer.refresh()
        if changed or self.writer is None or self.writer.stale():
            self.writer = BorderWriter([c for b in self.bound for g in b.parts.groups for c in g.borders()])
            self.version += 1
        self.everything = self._everything()

    def _everything(self) -> Watch | None:
        """What tells at the next forward that nothing changed; None where a full look is needed each time."""
        found = Watch()
        found.places += [(vars(self.decoder), key, vars(self.decoder).get(key)) for key in ("training", "gradient_checkpointing")]
        for bound in self.bound:
            layer = bound.parts.layer
            found.places += [(vars(layer), key, vars(layer).get(key)) for key in ("training", "gradient_checkpointing")]
            if self.reasons or not bound.parts.report_to(found):
                return None
        return found

    def before(self, kwargs: dict[str, Any]) -> None:
        """At the start of each forward: bring the borders up to date, and say once for all layers what the mask is."""
        if not self.looked:
            self.refresh()
        self.looked = False
        self.stands_aside = torch.is_grad_enabled() and bool(self.bound) and self._aside(kwargs)
        self.plan(kwargs)
        self.scratch.owner.clear()  # adapters may have been stepped since: what was dequantised with them is old
        self.writer.write()
        self.causal = self.documents = None
        self.shapes.begin()
        self.stacks.begin()
        if self.host is not None:
            self.host.begin()
        training = torch.is_grad_enabled()
        self.embedding.park(training and self.planner.parks and self.keep is None)
        if not training or not self.bound:
            return
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False  # a cache of what is being trained on is of no use, and would be kept until the backward
        if self.reasons or self.stands_aside or not causal_only(kwargs.get("attention_mask")):
            return
        self.documents, plain = documents_of(kwargs)
        if plain or self.documents is not None:
            # A mask of four axes is handed to the layers as it is, so the stock decoder builds none.
            kwargs["attention_mask"] = self.causal = torch.empty(1, 1, 1, 1, device=self.bound[0].parts.qkv.device)

    def _aside(self, kwargs: dict[str, Any]) -> bool:
        """Whether the layers stand aside in this forward. Said once for each reason: it is slower than it could be."""
        parts = self.bound[0].parts
        weight = getattr(self.decoder.get_input_embeddings(), "weight", None)
        embedded = parts.dtype if weight is None else weight.dtype
        why = aside(kwargs, parts.qkv.device.type, parts.dtype, embedded, self.config, bool(self.reasons))
        if why is not None and why not in self.asides:
            self.asides[why] = None
            warnings.warn(f"nbkit's fused layers stand aside, so training is slower than it could be: {why}.", stacklevel=2)
        return why is not None

    def plan(self, kwargs: dict[str, Any]) -> None:
        """Before the first training step of so many tokens: see `prepare`."""
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if torch.is_grad_enabled() and tokens is not None and not self.stands_aside:
            self.prepare(tokens.shape[0] * tokens.shape[1])

    def prepare(self, rows: int) -> None:
        """Plan for training steps of `rows` tokens from the memory that is free: levels, a copy of NF4 weights, host RAM.

        A step does this by itself where it has more tokens than any before. Pinning tens of GiB of host RAM takes seconds.
        """
        if not self.bound or self.keep is not None or not self.planner.due(rows, self.checkpointed):
            return
        for give_back in self.planning:
            give_back()
        self.embedding.park(False)
        plan = self.planner.make(self, rows, self.checkpointed)
        self.copy_weights(plan.copy)
        self.refresh()
        self.embedding.park(plan.park)
        if plan.keep.offload:
            p, (inputs, outputs) = self.bound[0].parts, plan.on_host(len(self.bound))
            size = rows * max(p.d, p.h * p.k if outputs else 0) * p.dtype.itemsize
            self.memory_of_host().reserve(size, inputs + outputs)

    def may_park(self) -> bool:
        """Whether the embedding may lie in host RAM: it is not the head's own weight."""
        return not self.tied and self.embedding.may_park()

    def memory_of_host(self) -> Host:
        """The host RAM that takes what layers keep."""
        if self.host is None:
            self.host = Host(self.bound[0].parts.qkv.device)
        return self.host

    @contextmanager
    def stand_ins(self, leaves: list[Tensor]) -> Iterator[None]:
        """Within: the layers take `leaves`, one for each LoRA parameter in order, in place of the parameters themselves."""
        real, place, self.recording = [layer.params for layer in self.bound], 0, True
        for layer in self.bound:
            count = len(layer.params)
            layer.params, place = leaves[place : place + count], place + count
        try:
            yield
        finally:
            self.recording = False
            for layer, params in zip(self.bound, real, strict=True):
                layer.params = params

    def copy_weights(self, wanted: bool) -> None:
        """Hold dequantised copies of NF4 weights, or give them back."""
        for layer in self.bound:
            for group in layer.parts.groups:
                group.copy(wanted)

    def release(self) -> None:
        """Give every layer its stock forward and every linear its own weight back."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.bound:
            layer.release()
        self.bound.clear()
        self.writer = self.everything = None  # they hold views of the buffers, and this object lives until it is collected
        self.rows.handed = None
        self.scratch.clear()
        self.stacks.drop()
        self.stacks.binding = None  # with those who plan it ties this into cycles: the model would stay until they are collected
        self.planning.clear()
        self.embedding.park(False)
        self.host = None
        if self.norm is not None:
            vars(self.norm).pop(LAST, None)
        vars(self.decoder).pop(MARK, None)


class BoundLayer:
    """One decoder layer whose instance runs `forward` below in place of its class's."""

    def __init__(self, binding: Binding, parts: Parts) -> None:
        self.binding, self.parts = binding, parts
        self.params: list[Tensor] = []
        self.unread = True  # whether `params` are to be read from the parts, whatever these say of changes
        layer = vars(parts.layer)
        self.before = layer.get("forward")  # what another library bound; None: the class's own
        layer[MARK] = self
        layer["forward"] = MethodType(forward, parts.layer)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())

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


def _nothing() -> None:
    return None


def _switch(layer: Any, on: bool) -> None:
    if getattr(layer, "gradient_checkpointing", on) != on:
        layer.gradient_checkpointing = on


def _before(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    binding = vars(decoder).get(MARK)
    if binding is not None:
        kwargs = {**dict(zip(binding.names, args, strict=False)), **kwargs}  # what was given by place gets its name
        args = ()
        binding.before(kwargs)
    return args, kwargs


def _after(decoder: nn.Module, args: tuple, output: Any) -> None:
    binding = vars(decoder).get(MARK)
    if binding is not None:
        binding.causal = binding.documents = binding.stacks.ahead = None


def forward(self: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """The decoder layer's forward: fused where it can be, else the layer's own with the same arguments."""
    bound: BoundLayer | None = vars(self).get(MARK)
    if bound is None:  # a copy of a bound layer
        return type(self).forward(self, hidden_states, attention_mask=attention_mask, **kwargs)
    binding, parts = bound.binding, bound.parts
    if hidden_states is binding.stacks.ahead:
        return hidden_states
    causal = attention_mask is not None and attention_mask is binding.causal
    mask = None if causal else attention_mask
    turned = kwargs.get("position_embeddings")
    if parts.index in binding.reasons or binding.stands_aside or not torch.is_grad_enabled():
        return bound.stock(hidden_states, attention_mask=mask, **kwargs)
    if hidden_states.dtype != parts.dtype or turned is None or not (mask is None or isinstance(mask, Tensor) and mask.dim() == 4):
        if causal:  # taken from the stock layers by `before`
            mask = mask_of(binding.documents, parts.window, hidden_states)
        return bound.stock(hidden_states, attention_mask=mask, **kwargs)
    cos, sin = turned
    if causal and (call := binding.stacks.call(bound, hidden_states, cos, sin)) is not None:
        return binding.stacks.run(call, hidden_states, cos, sin)
    b, t, _ = hidden_states.shape
    how = attend(binding, parts, hidden_states, mask, binding.documents if causal else None)
    keep = binding.keep_of(parts.index)
    parcel = binding.memory_of_host().parcel() if keep.offload else None
    call = Call(parts, keep, how, b, t, [], parcel)
    return LayerFunction.apply(hidden_states, cos, sin, mask, call, binding.rows, *bound.params)


def bind(model: nn.Module, family: Family) -> Binding:
    """Put every fitting decoder layer of a causal-LM `model` of `family` on the fused path; once, however often it is called."""
    decoder = model.get_submodule(family.decoder.base)
    held = vars(decoder).get(MARK)
    if held is not None:
        return held
    binding = Binding(decoder, list(model.get_submodule(family.decoder.layers)), family, model.config)
    binding.lead(model.get_submodule(family.decoder.final_norm))
    return binding


def binding_of(model: nn.Module) -> Binding | None:
    """The binding of a model (or a PEFT model of one), or None if it has none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = (vars(module).get(MARK) for module in base.modules())
    return next((one for one in found if isinstance(one, Binding)), None)
