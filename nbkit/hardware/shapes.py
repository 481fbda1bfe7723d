"""The shape of a model, and every number that follows from it alone: parameters, linear modules, LoRA sizes.

Counts are exact for declared families; a model type without one is counted as Llama and marked `exact=False`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nbkit.errors import ModelError, nearest
from nbkit.families import all_families, checkpoint, find
from nbkit.families._family import Family

_GENERIC = Family(name="unknown", title="Unknown", model_types=())


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder-only model. `context` is in tokens, `vocab` counts the rows of the embedding matrix."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    context: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    exact: bool = True

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(out, in) features of the linear modules of one layer, by name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' linear modules: what 4-bit loading quantises."""
        return self.layers * sum(out * features for out, features in self.linear.values())

    @property
    def embedding_parameters(self) -> int:
        """Embeddings, and the head where it is a matrix of its own."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        biases = 0
        if self.qkv_bias:
            biases += (self.heads + 2 * self.kv_heads) * self.head_dim
        if self.o_bias:
            biases += self.hidden
        if self.mlp_bias:
            biases += 2 * self.intermediate + self.hidden
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return self.linear_parameters + self.embedding_parameters + self.layers * (biases + norms) + self.hidden

    def lora_parameters(self, rank: int, targets: Iterable[str]) -> int:
        """Trainable parameters of LoRA: rank * (in + out) for each adapted module (arXiv 2106.09685).

        Raises: ModelError for a target that is no linear module of a layer.
        """
        sizes = self.linear
        for target in targets:
            if target not in sizes:
                raise ModelError(
                    f"LoRA target {target!r} matches no linear module; there are {', '.join(sizes)}.{nearest(target, sizes)}"
                )
        return self.layers * rank * sum(sum(sizes[target]) for target in set(targets))

    def adapter_bytes(self, rank: int, targets: Iterable[str]) -> int:
        """Bytes of the adapter on disk: float32, without the file's header of some kilobytes."""
        return 4 * self.lora_parameters(rank, targets)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape a transformers config dict describes (`config.to_dict()`, or a parsed config.json).

    Raises: ModelError if a size is missing.
    """
    config = {**config, **(config.get("text_config") or {})}
    model_type = str(config.get("model_type") or "")
    family = find(model_type)
    facts = family or _GENERIC
    if family is None and config.get("hidden_size") and not config.get("intermediate_size"):
        config["intermediate_size"] = 4 * config["hidden_size"]  # GPT-2 and its kin leave it out
    missing = [key for key in _SIZES if not config.get(key)]
    if missing:
        raise ModelError(f"The config of model type {model_type or 'unknown'!r} lacks {', '.join(missing)}.")
    heads = config["num_attention_heads"]
    biased = bool(facts.attention.bias_key and config.get(facts.attention.bias_key))
    return ModelShape(
        model_type=model_type,
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        context=config.get("max_position_embeddings") or 2048,
        qkv_bias=facts.attention.qkv_bias or biased,
        o_bias=facts.attention.o_bias or biased,
        mlp_bias=bool(facts.mlp.bias_key and config.get(facts.mlp.bias_key)),
        qk_norm=facts.attention.qk_norm,
        exact=family is not None,
    )


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def known_shape(name: str) -> ModelShape:
    """The shape of a checkpoint that a family declares, by its name or hub id.

    Raises: ModelError for any other name, with the nearest known ones.
    """
    found = checkpoint(name)
    if found is None:
        names = [entry.name for family in all_families() for entry in family.checkpoints]
        raise ModelError(f"The size of {name!r} is not known before it is loaded.{nearest(name, names)}")
    family, entry = found
    return shape_of(family.config_of(entry))
