"""The fused layer on the instances of one model: which layers take it, and what each forward of the decoder does first."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from nbkit.families import Family
from nbkit.kernels.lora_border import BorderWriter
from nbkit.models import attention, planner
from nbkit.models.embedding import Embedding, gather
from nbkit.models.layer.adapters import OURS, Columns, Unfit, Watch
from nbkit.models.layer.arena import Arena
from nbkit.models.layer.bound import MARK as MARK
from nbkit.models.layer.bound import BoundLayer, forward
from nbkit.models.layer.function import GradientRows
from nbkit.models.layer.inputs import aside, causal_only, check_tokens, documents_of
from nbkit.models.layer.inputs import autocast_differs as autocast_differs
from nbkit.models.layer.keep import Keep
from nbkit.models.layer.made import layers_of, made_from
from nbkit.models.layer.offload import Host
from nbkit.models.layer.parts import Parts
from nbkit.models.layer.stack import Stacks
from nbkit.models.layer.weights import Scratch
from nbkit.models.unshared import Unshared

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
PACK = "_nbkit_documents"  # attribute of what stands for the mask: the documents of a pack, or None
LAST = "_nbkit_last_norm"  # instance attribute of the norm after the layers: their Binding
OURS.add(gather)  # a parked embedding's


class Binding(Unshared):
    """All decoder layers of one model on the fused path, bound by `bind` and taken off by `release`.

    `reasons` says for each layer index that runs stock why it does; it is brought up to date by every forward. `asides` are
    the reasons for which all layers stood aside in a training forward, by what it was given.
    `keep` is what all layers keep; None: what the planner says.
    """

    def __init__(self, decoder: nn.Module, family: Family, config: Any) -> None:
        self.decoder, self.family, self.config, self.vocab = decoder, family, config, config.vocab_size
        self.scratch, self.rows, self.shapes = Scratch(), GradientRows(), attention.Shapes()
        self.reasons: dict[int, str] = {}
        self.asides: dict[str, None] = {}
        self.stands_aside = False  # in the forward that runs now
        self.bound: list[BoundLayer] = []
        self.keep: Keep | None = None
        self.planner = planner.Planner()
        self.planning: list[Callable[[], None]] = []  # called before memory is planned: who holds some that it may give back
        self.records: Callable[[int], bool] = _never  # whether steps of so many tokens are recorded, where memory allows it
        self.how: set[str] = set()  # the attention implementations met, for the report
        self.everything: Columns | None = None
        self.looked = False  # the model's forward has read the adapters: the decoder's, which it calls next, need not
        self.plain: bool | None = None  # whether the mask needs no look, where the model's forward has looked
        self.version = 0  # goes up when anything changes that a recorded step holds fixed
        self.writer: BorderWriter | None = None
        # As a trainer or `patch` asks for it; "auto" and False: what fits. None: as transformers' own switch on the model says.
        self.checkpoint: bool | str | None = None
        self.optimizer_bytes: float = 8  # of state for a LoRA parameter: float32 Adam, unless a trainer says otherwise
        self.host: Host | None = None  # made when a plan first asks for host RAM
        self.arena: Arena | None = None  # takes the gradients of a step that is being recorded as a CUDA graph
        self.stacks = Stacks(self, forward)
        self.norm: nn.Module | None = None  # after the last layer
        self.embedding = Embedding(decoder)
        self.tied = bool(getattr(config, "tie_word_embeddings", False))
        self.documents: attention.Documents | None = None  # of a pack, in a forward that has one
        self.causal: Tensor | None = None  # stands for the mask in a forward that needs none but the causal one
        forget(decoder)
        self.stepping: int | None = None  # the thread whose training forward is under way
        self.made = Watch()  # layers, their blocks and their settings
        self._bind_layers()
        self.names = tuple(inspect.signature(type(decoder).forward).parameters)[1:]
        vars(decoder)[MARK] = self
        self._hooks = [
            decoder.register_forward_pre_hook(_before, with_kwargs=True),
            decoder.register_forward_hook(_after, always_call=True),
        ]

    def _bind_layers(self) -> None:
        """Bind every layer of the decoder that fits, as it is now."""
        layers = list(layers_of(self.decoder, self.family))
        self.made = made_from(self.decoder, self.family, self.config)
        for index, layer in enumerate(layers):
            try:
                if sum(one is layer for one in layers) > 1:
                    raise Unfit("the same layer runs at several places")
                parts = Parts(layer, index, self.family, self.config, self.scratch)
            except Unfit as reason:
                self.reasons[index] = str(reason)
                continue
            self.bound.append(BoundLayer(self, parts))

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
    def recording(self) -> bool:
        """Whether a step is being recorded as a CUDA graph."""
        return self.arena is not None

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
    def planned(self) -> planner.Plan | None:
        """The plan that the next forward goes by; None before the first, and where what is kept was set by hand."""
        return self.planner.plan if self.keep is None else None

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
        changed = not self.made.fresh()
        if changed:  # layers, their blocks or their settings were replaced
            for layer in self.bound:
                layer.release()
            self.bound.clear()
            self.reasons.clear()
            self._bind_layers()
        for layer in self.bound:
            changed |= layer.refresh()
        if changed or self.writer is None or self.writer.stale():
            self.writer = BorderWriter([c for b in self.bound for g in b.parts.groups for c in g.borders()])
            self.version += 1
        self.everything = self._everything()

    def _everything(self) -> Columns | None:
        """What tells at the next forward that nothing changed; None where a full look is needed each time."""
        found = Watch()
        found.add(self.made)
        found.places += [(vars(self.decoder), key, vars(self.decoder).get(key)) for key in ("training", "gradient_checkpointing")]
        for bound in self.bound:
            layer = bound.parts.layer
            found.places += [
                (vars(layer), key, vars(layer).get(key)) for key in ("training", "gradient_checkpointing", "forward")
            ]
            if self.reasons or not bound.parts.report_to(found):
                return None
        return Columns(found)

    def before(self, kwargs: dict[str, Any]) -> None:
        """At the start of each training forward: bring the borders up to date, and say once for all layers what the mask is.

        A forward without gradients runs stock and changes nothing here: it may come from another thread in the midst of a step.
        """
        if not torch.is_grad_enabled():
            if self.stepping in (None, get_ident()):
                self.rest()
            return
        self.stepping = get_ident()
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if ids is not None or embeds is not None:  # if neither is there, the decoder says so
            check_tokens(ids, embeds)
        if not self.looked:
            self.refresh()
        self.looked = False
        self.stands_aside = bool(self.bound) and self._aside(kwargs)
        self.plan(kwargs)
        self.scratch.owner.clear()  # adapters may have been stepped since: what was dequantised with them is old
        self.writer.write()
        self.causal = self.documents = None
        self.shapes.begin()
        self.stacks.begin()
        if self.host is not None:
            self.host.begin()
        self.embedding.park(self.planned is not None and self.planned.park)
        if not self.bound:
            return
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache") is None and self.decoder.training:
            kwargs["use_cache"] = False  # a cache of what is being trained on is of no use, and would be kept until the backward
        plain, self.plain = self.plain, None
        if self.reasons or self.stands_aside or not (causal_only(kwargs.get("attention_mask")) if plain is None else plain):
            return
        self.documents, plain = documents_of(kwargs)
        if plain or self.documents is not None:
            # A mask of four axes is handed to the layers as it is, so the stock decoder builds none.
            kwargs["attention_mask"] = self.causal = torch.empty(1, 1, 1, 1, device=self.bound[0].parts.qkv.device)
            setattr(self.causal, PACK, self.documents)  # for a layer that runs again in the backward

    def again(self, mask: Tensor | None) -> bool:
        """Before a layer that runs again in a backward, as under checkpoints around single layers.

        Returns: whether `mask` stands for the causal one.
        """
        self.refresh()
        causal = hasattr(mask, PACK)
        self.documents = getattr(mask, PACK, None)
        return causal

    def rest(self) -> None:
        """Between steps: whoever evaluates or generates may want the memory, and finds all weights on their device."""
        self.stacks.rest()
        with torch.inference_mode(False):  # what is moved is trained with later
            self.embedding.park(False)

    def _aside(self, kwargs: dict[str, Any]) -> bool:
        """Whether the layers stand aside in this forward. Said once for each reason: it is slower than it could be."""
        parts = self.bound[0].parts
        weight = getattr(self.decoder.get_input_embeddings(), "weight", None)
        embedded = parts.dtype if weight is None else weight.dtype
        why = aside(kwargs, parts.qkv.device.type, parts.dtype, embedded, self.config, bool(self.reasons), self.decoder.training)
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
    def stand_ins(self, leaves: list[Tensor], arena: Arena) -> Iterator[None]:
        """Within: the layers take `leaves`, one for each LoRA parameter in order, in place of the parameters themselves.

        Their gradients are written into `arena`.
        """
        real, place, self.arena = [layer.params for layer in self.bound], 0, arena
        for layer in self.bound:
            count = len(layer.params)
            layer.params, place = leaves[place : place + count], place + count
        try:
            yield
        finally:
            self.arena = None
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
        self.records = _never
        self.embedding.park(False)
        self.host = None
        if self.norm is not None:
            vars(self.norm).pop(LAST, None)
        vars(self.decoder).pop(MARK, None)


def _never(rows: int) -> bool:
    return False


def _before(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    binding = vars(decoder).get(MARK)
    if binding is not None:
        kwargs = {**dict(zip(binding.names, args, strict=False)), **kwargs}  # what was given by place gets its name
        args = ()
        binding.before(kwargs)
    return args, kwargs


def _after(decoder: nn.Module, args: tuple, output: Any) -> None:
    binding = vars(decoder).get(MARK)
    if binding is not None and torch.is_grad_enabled():
        binding.causal = binding.documents = binding.stacks.ahead = binding.stepping = None


def forget(root: nn.Module) -> None:
    """Take off what is left of a binding in a copy of a bound model: its Binding is None, its hooks would run beside new ones."""
    for module in root.modules():
        state = vars(module)
        for mark in (MARK, LAST):
            if state.get(mark, module) is None:
                del state[mark]
        if MARK not in state and getattr(state.get("forward"), "__func__", None) in (forward, type(module).forward):
            del state["forward"]  # a pickle has made it the class's own
        if MARK in state:
            continue
        for key in [k for kind in _HOOKS[:2] for k, hook in state[kind].items() if hook in (_before, _after)]:
            for kind in _HOOKS:
                state[kind].pop(key, None)


def bind(model: nn.Module, family: Family) -> Binding:
    """Put every fitting decoder layer of a causal-LM `model` of `family` on the fused path; once, however often it is called."""
    decoder = model.get_submodule(family.decoder.base)
    held = vars(decoder).get(MARK)
    if held is not None:
        return held
    binding = Binding(decoder, family, model.config)
    binding.lead(model.get_submodule(family.decoder.final_norm))
    return binding


def binding_of(model: nn.Module) -> Binding | None:
    """The binding of a model (or a PEFT model of one), or None if it has none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = (vars(module).get(MARK) for module in base.modules())
    return next((one for one in found if isinstance(one, Binding)), None)
