"""The forwards that `nbkit.patch` binds to module instances, one for each kind of module.

Each takes what transformers' own forward takes and gives what it gives, with nbkit's kernels inside. A module that carries
no `MARK` (any more) runs its class's own forward: so `unpatch` holds even where another library has wrapped these since.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nbkit.config import IGNORE_INDEX
from nbkit.errors import ModelError
from nbkit.families import Family
from nbkit.kernels.rms_norm import rms_norm
from nbkit.kernels.rope import rope
from nbkit.kernels.swiglu import swiglu
from nbkit.models.asked import MARK as ASKED
from nbkit.models.head import head_loss, logits, targets_of
from nbkit.models.layer.adapters import OURS
from nbkit.models.layer.bind import LAST
from nbkit.models.layer.bind import MARK as LAYER_MARK
from nbkit.models.layer.function import FinalNorm
from nbkit.models.layer.inputs import causal_only, check_tokens, whole
from nbkit.models.layer.parts import SILU
from nbkit.models.obstacles import longer_than_positions
from nbkit.models.outputs import LossOutput
from nbkit.models.recorded import Pack

MARK = "_nbkit_family"  # instance attribute: the family whose facts the bound forward reads
PLAIN = {"input_ids", "attention_mask", "use_cache", "num_items_in_batch", "shift_labels"}  # what a recorded step can take
PACKED = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}  # what a collator says of a pack
GRAPHS = "_nbkit_graphs"  # instance attribute of the causal LM: its recorded steps, if it may have any
UNCOMPILED = "nbkit's forwards run as they are: the compiler would only break them up"
FORWARDS: dict[str, Callable[..., Any]] = {}  # by the name of the op


def _binds(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def keep(written: Callable[..., Any]) -> Callable[..., Any]:
        fn: Any = torch.compiler.disable(written, reason=UNCOMPILED)
        fn.__name__ = "forward"  # a bound method is pickled as its object and this name: a pickled model loads as a stock one
        FORWARDS[op] = fn
        OURS.add(fn)
        return fn

    return keep


def bind(module: nn.Module, op: str, family: Family) -> None:
    """Bind the forward of `op` to this instance. What it was before is the class's own forward, so nothing is to be kept."""
    vars(module)[MARK] = family
    vars(module)["forward"] = MethodType(FORWARDS[op], module)


def unbind(module: nn.Module) -> None:
    """Give the instance its class's forward back; nothing happens to a module that was not bound."""
    if vars(module).pop(MARK, None) is not None and is_bound(module):
        del vars(module)["forward"]


def is_bound(module: nn.Module) -> bool:
    """True if the instance's forward is one of these."""
    return getattr(vars(module).get("forward"), "__func__", None) in FORWARDS.values()


@_binds("rms_norm")
def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """RMSNorm."""
    family: Family | None = vars(self).get(MARK)
    if family is None:
        return type(self).forward(self, hidden_states)
    facts = family.norm
    binding = vars(self).get(LAST)
    if binding is not None and hidden_states.requires_grad and torch.is_grad_enabled() and binding.bound:
        asked = vars(self).get(ASKED)
        if asked is not None:
            asked.step(hidden_states)
        return FinalNorm.apply(hidden_states, self.weight, getattr(self, facts.eps), binding.rows, binding.width)
    return rms_norm(hidden_states, self.weight, getattr(self, facts.eps), offset=facts.offset, cast=facts.cast)


@_binds("swiglu")
def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    """down(silu(gate(x)) * up(x))."""
    family: Family | None = vars(self).get(MARK)
    if family is None or type(self.act_fn).__name__ not in SILU:  # an activation may be replaced after binding
        return type(self).forward(self, x)
    facts = family.mlp
    return getattr(self, facts.down)(swiglu(getattr(self, facts.gate)(x), getattr(self, facts.up)(x)))


@_binds("rope")
def _attention(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with nbkit's rope. Scores, masks and caches are transformers' own, through its table of implementations."""
    family: Family | None = vars(self).get(MARK)
    if family is None or position_embeddings is None:
        return type(self).forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
    facts = family.attention
    lead = hidden_states.shape[:-1]
    heads = (*lead, -1, self.head_dim)
    cos, sin = position_embeddings
    q = rope(getattr(self, facts.q)(hidden_states).view(heads), cos, sin).transpose(1, 2)
    k = rope(getattr(self, facts.k)(hidden_states).view(heads), cos, sin).transpose(1, 2)
    v = getattr(self, facts.v)(hidden_states).view(heads).transpose(1, 2)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    if facts.window == "all":
        kwargs["sliding_window"] = getattr(self.config, "sliding_window", None)
    elif facts.window == "layer_types":
        kwargs["sliding_window"] = self.sliding_window
    eager = sys.modules[type(self).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
    dropout = self.attention_dropout if self.training else 0.0
    mixed, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
    return getattr(self, facts.o)(mixed.reshape(*lead, -1).contiguous()), weights


@_binds("linear_cross_entropy")
def _causal_lm(
    self: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    **kwargs: Any,
) -> Any:
    """With labels: the loss of the labelled rows alone, and logits only if somebody reads them. Without: the stock forward."""
    family = _family_of(self)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
    }
    all_logits = isinstance(logits_to_keep, int) and logits_to_keep == 0
    own_loss = self.loss_function is ForCausalLMLoss and kwargs.get("ignore_index", IGNORE_INDEX) == IGNORE_INDEX
    asked = kwargs.get("return_dict")
    as_dict = getattr(self.config, "return_dict", True) if asked is None else asked  # a tuple has logits at a fixed place
    if family is None or labels is None or not all_logits or not own_loss or not as_dict:
        return type(self).forward(self, **inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
    kwargs.pop("return_dict", None)
    labels = _check_batch(self, input_ids, inputs_embeds, labels, position_ids)
    targets = kwargs.get("shift_labels")
    if targets is None:  # tokens before n predict n
        targets = functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    binding = vars(self.get_submodule(family.decoder.base)).get(LAYER_MARK)  # None in a copy
    if binding is not None and torch.is_grad_enabled():
        binding.plain = causal_only(attention_mask, targets)
        if use_cache is None and past_key_values is None:
            inputs["use_cache"] = False  # who wants a loss to train on wants no cache, also in eval mode
    try:
        recorded = _recorded(self, inputs, targets, kwargs)
        if recorded is None:
            wanted = targets_of(self, family, targets)
            outputs = self.get_submodule(family.decoder.base)(**inputs, **kwargs)
    finally:
        if binding is not None and torch.is_grad_enabled():
            binding.looked, binding.plain = False, None  # also where the forward failed before it came to the layers
    if recorded is not None:
        loss, hidden = recorded
        made = LossOutput(loss=loss)
    else:
        hidden = outputs.last_hidden_state
        loss = head_loss(self, family, hidden, wanted, kwargs.get("num_items_in_batch"))
        made = LossOutput(
            loss=loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
    made.attach(_maker(self, family, hidden, loss), listed=not self.training)
    return made


def _family_of(model: Any) -> Family | None:
    """None: the model is not patched, and runs stock. Raises: ModelError for one that is, within a transform of torch.func."""
    family: Family | None = vars(model).get(MARK)
    if family is not None and torch._C._are_functorch_transforms_active():
        raise ModelError(
            "nbkit's kernels cannot be traced by torch.func (grad, vmap, jvp and the like); call nbkit.unpatch(model) first, or "
            "take gradients by loss.backward() or torch.autograd.grad."
        )
    return family


def _maker(model: Any, family: Family, hidden: torch.Tensor, loss: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Makes the logits when they are read. Where memory is short the hidden states are held until the backward only."""
    binding = vars(model.get_submodule(family.decoder.base)).get(LAYER_MARK)
    if binding is None or not binding.chosen.in_place or not loss.requires_grad:
        return lambda: logits(model, family, hidden)
    held = [hidden]
    loss.register_hook(lambda _: held.clear())

    def make() -> torch.Tensor:
        if not held:
            raise RuntimeError(
                "The logits of this step are gone: to save memory they can be made before its backward only; read outputs.logits "
                "before loss.backward(), or train without gradient checkpointing."
            )
        return logits(model, family, held[0])

    return make


def _check_batch(model: Any, ids: Any, embeds: Any, labels: Any, positions: torch.Tensor | None) -> torch.Tensor:
    """The labels (B, T) as int64; warns of rows longer than the model's positions, packs excepted.

    Raises: ModelError for a batch without tokens, or labels that do not go with it.
    """
    check_tokens(ids, embeds)
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if ids is not None and weight is not None:
        require_same_gpu(ids.device, weight.device)
    shape = tuple((embeds if ids is None else ids).shape[:2])
    labels = check_labels(model, labels, shape)
    if positions is None:
        sentence = longer_than_positions(shape[1], model.config)
        if sentence is not None:
            warnings.warn(sentence, stacklevel=3)
    return labels


def require_same_gpu(tokens: torch.device, embedding: torch.device) -> None:
    """Raises: ModelError for tokens on another GPU than the embedding's."""
    if tokens.type == embedding.type == "cuda" and tokens != embedding:
        raise ModelError(
            f"The tokens are on {tokens} and the model is on {embedding}; bring them together. nn.DataParallel, which "
            "transformers' Trainer takes by itself where it sees several GPUs, cannot copy a patched model: let it see one "
            "(CUDA_VISIBLE_DEVICES=0)."
        )


def check_labels(model: Any, labels: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """The labels as int64.

    Raises: ModelError for labels that are not one whole number for each token of `shape` (B, T); on a CPU also for a label that
    is no token. A GPU would have to be waited for: there such a label gives a loss of nan.
    """
    if not isinstance(labels, torch.Tensor):
        raise ModelError(f"labels are a {type(labels).__name__}; give a tensor of shape (rows, tokens).")
    if not whole(labels):
        raise ModelError(f"labels are {labels.dtype}; give whole numbers (int64), {IGNORE_INDEX} where no loss is wanted.")
    if labels.shape != shape:
        raise ModelError(
            f"labels are of shape {tuple(labels.shape)} and the batch of {shape}; give one label for each token, {IGNORE_INDEX} "
            "for none (the model shifts them by one itself)."
        )
    labels = labels.long()
    if labels.device.type == "cpu":
        tokens = max(model.config.vocab_size, getattr(model.get_output_embeddings(), "out_features", 0))
        odd = ((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= tokens)
        if odd.any():
            row, token = odd.nonzero()[0].tolist()
            raise ModelError(
                f"The label {int(labels[row, token])} in row {row}, token {token} is none of the {tokens} known tokens; "
                f"give a token's number, or {IGNORE_INDEX} where no loss is wanted."
            )
    return labels


def _recorded(
    model: Any, inputs: dict[str, Any], targets: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """This step's (loss, hidden states) from a recorded graph, or None if it has to run eagerly."""
    graphs = vars(model).get(GRAPHS)
    if graphs is None or graphs.binding is None or not model.training or not torch.is_grad_enabled():
        return None  # of a copied model the binding is None: it has no fused layers
    pack = _pack(inputs, kwargs)
    taken = PLAIN | (PACKED if pack is not None else set())
    more = sorted(name for name, value in (inputs | kwargs).items() if value is not None and name not in taken)
    if more or inputs["use_cache"] or not graphs.binding.plain:
        graphs.note = (
            f"steps that are given {', '.join(more)} run eagerly"
            if more
            else "a cache, padding on the left or labels on padding run eagerly"
        )
        return None
    return graphs.step(inputs["input_ids"], targets, kwargs.get("num_items_in_batch"), pack)


def _pack(inputs: dict[str, Any], kwargs: dict[str, Any]) -> Pack | None:
    """The documents of a pack whose collator says where they begin."""
    starts, longest, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q"), inputs["position_ids"]
    if starts is None or longest is None or positions is None or inputs["input_ids"] is None:
        return None
    if inputs["input_ids"].shape[0] != 1 or positions.shape != inputs["input_ids"].shape:
        return None
    return Pack(positions, starts.to(torch.int32), int(longest))
