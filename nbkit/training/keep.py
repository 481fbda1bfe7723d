"""What TRL, transformers and accelerate change on a model object, recorded and put back.

TRL 1.x binds its own head forward to the instance and casts adapters on 4-bit weights to bfloat16;
accelerate binds an autocast wrapper; transformers sets `config.use_cache`. A model that has been trained
must chat, export and train again as if none of it had happened.
"""

from __future__ import annotations

from typing import Any

import torch

from nbkit.errors import TrainingError
from nbkit.models.layer import binding_of

# Instance attributes that those libraries and nbkit's trainer set.
_BOUND = ("forward", "_original_forward", "_is_accelerate_prepared", "zero_grad")
_MISSING = object()


class ModelState:
    """A record of one model, made before a trainer is."""

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._model = model
        self._bound = [(m, n, vars(m).get(n, _MISSING)) for m in dict.fromkeys((model, base)) for n in _BOUND]
        # The tensors themselves: a cast to bfloat16 and back would round them.
        self._weights = [(p, p.data) for p in model.parameters() if p.requires_grad]
        self._training = model.training
        self._use_cache = getattr(model.config, "use_cache", _MISSING)

    def restore_weights_and_forwards(self) -> None:
        """Undoes what a trainer's constructor did. Call it before a step is made: weights go back in value too."""
        for parameter, data in self._weights:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        self._weights = []
        self._restore_bound()

    def restore(self) -> None:
        """Undoes what training did to the object; trained weights stay."""
        self._restore_bound()
        self._model.train(self._training)
        if self._use_cache is not _MISSING:
            self._model.config.use_cache = self._use_cache
        set_checkpointing(self._model, False)

    def _restore_bound(self) -> None:
        for module, name, value in self._bound:
            if value is _MISSING:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value


def set_checkpointing(model: Any, asked: bool | str) -> str:
    """Checkpointing as a TrainConfig asks for it: "auto", False, True, "nbkit", "unsloth". Returns a sentence for the log, or "".

    Layers on the fused path take it as a wish to their planner, which chooses what they keep ("auto" is no wish: the fastest
    that fits); the others, and all layers of a model that is not patched or on a CPU, take transformers' own checkpointing,
    which repeats each layer whole.
    """
    binding = binding_of(model)
    _stock_checkpointing(model, bool(asked))
    if binding is None or not binding.bound:
        named = asked in ("nbkit", "unsloth")
        return f"gradient_checkpointing={asked!r} runs as transformers' own checkpointing." if named else ""
    binding.checkpoint = None if asked == "auto" else asked or None
    if asked:
        model.train()  # what fits depends on it: dropout is off in eval mode
        binding.refresh()
    fused: list[Any] = [one.parts.layer for one in binding.bound if one.parts.index not in binding.reasons]
    for layer in fused:
        layer.gradient_checkpointing = False
    if not asked or len(fused) == len(binding.bound) and not binding.reasons:
        return ""
    return f"{len(binding.reasons)} layers that are not fused take transformers' own checkpointing."


def tell_optimizer_bytes(model: Any, name: str) -> None:
    """Tell the planner what the optimizer of that name keeps of each trained parameter: two states of 4 bytes, or of 1."""
    binding = binding_of(model)
    if binding is not None:
        binding.optimizer_bytes = 2 if "8bit" in name.lower() else 8


def _stock_checkpointing(model: Any, on: bool) -> None:
    """transformers' own activation checkpointing, without reentrant autograd, on or off."""
    options = {"use_reentrant": False}
    renamed = hasattr(model, "activation_checkpointing_enable")  # in transformers 5.23; the old name warns there
    if not on:
        model.activation_checkpointing_disable() if renamed else model.gradient_checkpointing_disable()
        return
    if renamed:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # transformers also hooks the embeddings so that their output asks for a gradient. Only reentrant
    # checkpointing needs that; here it would cost the first layer a gradient that nobody reads.
    model.disable_input_require_grads()


def require_finite(model: Any, step: int) -> None:
    """Raises: TrainingError if a trained tensor holds nan or infinity; asked before anything is saved."""
    flags = [torch.isfinite(p).all() for p in model.parameters() if p.requires_grad]
    if not bool(torch.stack([flag.cpu() for flag in flags]).all()):
        raise TrainingError(f"After step {step} the adapter is not finite and was not saved; lower the learning_rate.")
