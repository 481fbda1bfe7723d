"""Gradient checkpointing as it is asked for, mapped to what the layers of a model can do."""

from __future__ import annotations

from typing import Any

from nbkit.errors import ConfigError
from nbkit.models.layer import binding_of

WAYS = (True, False, "auto", "nbkit", "unsloth")


def set_checkpointing(model: Any, asked: bool | str) -> str:
    """Ask for checkpointing on a model, patched or not. Returns a sentence for the log, or "".

    Args:
        asked: True, "nbkit", "unsloth": the least memory. False: none is asked for. "auto": what fits.
    Fused layers take it as a wish to their planner: the first three give the leanest level, False and "auto" the fastest that
    fits, which is lean where memory is short. The others, and all layers of a model that is not patched or on a CPU, take
    transformers' own checkpointing, which repeats each layer whole, unless it is False.
    Raises: ConfigError for anything else.
    """
    check_way(asked)
    binding = binding_of(model)
    _stock_checkpointing(model, bool(asked))
    if binding is None or not binding.bound:
        named = asked in ("nbkit", "unsloth")
        return f"gradient_checkpointing={asked!r} runs as transformers' own checkpointing." if named else ""
    binding.checkpoint = asked or None
    if asked:
        model.train()  # what fits depends on it: dropout is off in eval mode
    binding.refresh()
    if not asked or not binding.reasons:
        return ""
    return f"{len(binding.reasons)} layers that are not fused take transformers' own checkpointing."


def check_way(asked: bool | str) -> None:
    """Raises: ConfigError for what is no way of checkpointing."""
    if not isinstance(asked, bool) and asked not in WAYS:
        ways = ", ".join(map(repr, WAYS))
        raise ConfigError(f"Gradient checkpointing {asked!r} is not known; give one of {ways}.")


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
