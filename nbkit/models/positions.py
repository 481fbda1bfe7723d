"""Rope for rows longer than a checkpoint's positions: its config is changed before the model is made, and nothing else.

The positions a checkpoint reaches are M, the tokens asked for L > M; w are the waves' frequencies, by kind of `rope_parameters`:

    default   becomes linear position interpolation (Chen et al., arXiv 2306.15595): w M / L
    linear    its factor grows by L / M
    llama3    its factor grows by L / M: long waves are stretched, short ones stay, those between in part
    yarn      its factor becomes L / original (Peng et al., arXiv 2309.00071), and the scores' temperature that of the factor
    dynamic   is held at what its formula gives for L, whatever a row's length, so that cached keys and packs see one rope:
              kind default, rope_theta (factor L / M - factor + 1) ** (d / (d - 2)) for the d columns of a head that turn

Where every layer has a sliding window of at most M, no token sees another one farther away than that: rope stays as it is.
Exports carry the change, since it is in the config: merged models and GGUF files by themselves, adapters by `save_beside`.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from torch import nn

from nbkit.errors import ModelError
from nbkit.families import Family

MARK = "_nbkit_positions"  # on the model: the sentence of what was changed


def stretch(config: Any, length: int, family: Family | None, name: str, wish: str = "auto") -> str | None:
    """Change `config` so that rows of `length` tokens train sensibly, and say it in a sentence.

    Args:
        config: of transformers, read from the checkpoint; changed in place.
        family: None where none is declared: nothing is changed then, and the sentence says what does not reach.
        name: of the checkpoint, for errors.
        wish: "auto", or "none" to keep rope's frequencies as they are.
    Returns: None where the rows fit, and the config is as it was.
    Raises: ModelError where `wish` forbids it, or the kind of rope has no formula for other lengths.
    """
    stated = getattr(config, "max_position_embeddings", None)
    if not stated or length <= stated:
        return None
    if family is None:
        _require_wish(wish, length, stated, name)
        return f"Its config names {stated:,} positions, which nbkit stretches for its own families only; keep rows within them."
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kept = _kept(config, rope, length)
    if kept is None:
        most = _reach(config, rope)
        _require_wish(wish, length, most, name)
        rope, how = _stretched(config, rope, length, most, name)
        kept = f"Its {most:,} positions are stretched to the {length:,} tokens of max_seq_length by {how}."
    config.rope_parameters = rope
    config.max_position_embeddings = length
    return kept


def mark(model: nn.Module, sentence: str) -> None:
    """Remember on the model that its config is no longer the checkpoint's."""
    setattr(model, MARK, sentence)


def save_beside(model: Any, folder: str | Path) -> bool:
    """Write config.json beside an adapter if its base was stretched, which the adapter's own files do not tell.

    `AutoModelForCausalLM.from_pretrained(base, config=AutoConfig.from_pretrained(folder))` is the base that it fits.
    Returns: whether it was written.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if MARK not in vars(base):
        return False
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    return True


def _require_wish(wish: str, length: int, most: int, name: str) -> None:
    if wish == "none":
        raise ModelError(
            f"max_seq_length is {length:,} and {name} has {most:,} positions, which rope_scaling='none' keeps; "
            f"set max_seq_length to at most {most}, or rope_scaling='auto'."
        )


def _reach(config: Any, rope: dict[str, Any]) -> int:
    """Positions the checkpoint reaches: by its rope, where the config still names those before an earlier stretching."""
    most = int(config.max_position_embeddings)
    if rope.get("rope_type") == "yarn" and rope.get("factor"):
        return max(most, round(rope["factor"] * rope["original_max_position_embeddings"]))
    if rope.get("rope_type") == "linear":  # as the checkpoints of LongChat and Vicuna 16k have it
        return max(most, int(getattr(config, "max_sequence_length", None) or 0))
    return most


def _kept(config: Any, rope: dict[str, Any], length: int) -> str | None:
    """Why rope's frequencies reach so far as they are; None if they do not."""
    stated, most, kind = int(config.max_position_embeddings), _reach(config, rope), rope.get("rope_type")
    if length <= most:
        return f"Its {kind} rope reaches {most:,} positions, beyond the {stated:,} that its config names, and stays as it is."
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"] * (config.model_type == "mistral")
    slides = bool(layers) and all(layer == "sliding_attention" for layer in layers)
    steady = kind in ("default", "linear", "llama3") or (kind == "yarn" and rope.get("factor"))
    if window and slides and window <= most and steady:
        return (
            f"Rows of {length:,} tokens go beyond its {most:,} positions, but its sliding window of {window:,} keeps what "
            "sees each other within them, so rope stays as it is."
        )
    return None


def _stretched(config: Any, rope: dict[str, Any], length: int, most: int, name: str) -> tuple[dict[str, Any], str]:
    """(`rope_parameters` for rows of `length`, what was done). Raises: ModelError."""
    kind, factor = rope.get("rope_type"), rope.get("factor")
    rope.pop("type", None)  # the older name of rope_type, which would speak of another kind
    if kind == "default":
        return {**rope, "rope_type": "linear", "factor": length / most}, f"rope scaling 'linear' with factor {length / most:g}"
    if kind in ("linear", "llama3") and factor:
        grown = factor * length / most
        return {**rope, "factor": grown}, f"its rope scaling {kind!r} with factor {grown:g}, {factor:g} before"
    if kind == "yarn":
        return _yarn(rope, length, most)
    if kind == "dynamic" and factor:
        theta = _dynamic_theta(config, rope, length)
        how = f"its rope scaling 'dynamic', held at rope_theta {theta:,.0f} for every row"
        return {**{k: v for k, v in rope.items() if k != "factor"}, "rope_type": "default", "rope_theta": theta}, how
    raise ModelError(
        f"max_seq_length is {length:,} and {name} reaches {most:,} positions by rope scaling {kind!r}, whose factors hold for "
        f"that length only; set max_seq_length to at most {most}, or give its config.json rope_parameters of another kind."
    )


def _yarn(rope: dict[str, Any], length: int, most: int) -> tuple[dict[str, Any], str]:
    original = rope["original_max_position_embeddings"]
    before, grown = rope.get("factor") or most / original, length / original
    if (told := rope.get("attention_factor")) is not None and math.isclose(told, 0.1 * math.log(before) + 1, rel_tol=1e-3):
        del rope["attention_factor"]  # it is the formula's for the factor before, and follows the factor when left out
    return {**rope, "factor": grown}, f"its rope scaling 'yarn' with factor {grown:g}, {before:g} before"


def _dynamic_theta(config: Any, rope: dict[str, Any], length: int) -> float:
    """NTK-aware base, as transformers' "dynamic" has it for a row of `length` tokens."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    d = int(head * rope.get("partial_rotary_factor", 1.0))
    factor, most = rope["factor"], config.max_position_embeddings
    return rope["rope_theta"] * ((factor * length / most) - (factor - 1)) ** (d / (d - 2))
