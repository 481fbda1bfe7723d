"""A model of the llama, mistral or qwen2 type as GGUF tensors and header fields.

Names and fields follow the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md). llama.cpp computes Mistral as its
architecture "llama", which rotates neighbouring pairs of a head where transformers rotates halves; so rows of q and k are
permuted. Its "qwen2" rotates halves.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from nbkit.errors import ExportError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ROPE_FACTORS = "rope_freqs.weight"
_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class GgufModel:
    """The facts of one transformers config, as GGUF has them.

    Raises: ExportError for a model type or a rope that this writer does not know.
    """

    def __init__(self, config: Any) -> None:
        if config.model_type not in ARCHITECTURES:
            raise ExportError(
                f"GGUF export knows {', '.join(ARCHITECTURES)}, not {config.model_type!r}; export merged_16bit and convert that."
            )
        if config.hidden_act != "silu":
            raise ExportError(f"llama.cpp has silu here, the model {config.hidden_act}; export merged_16bit instead.")
        self.config = config
        self.architecture = ARCHITECTURES[config.model_type]
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.rope = _rope(config)

    def name(self, name: str) -> str:
        """The GGUF name of a checkpoint's tensor."""
        if name in TOP:
            return TOP[name]
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in LAYER:
            raise ExportError(f"GGUF has no place for the model's tensor {name}; export merged_16bit instead.")
        return f"blk.{match[1]}.{LAYER[match[2]]}.{match[3]}"

    def reorder(self, name: str, value: Tensor, back: bool = False) -> Tensor:
        """Rows of q and k from transformers' order (halves) to llama.cpp's (neighbours), or back; others as they are.

        Row h * K + half * K/2 + i of head h goes to h * K + 2 * i + half.
        """
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(name.split(".")[-2])
        if self.architecture != "llama" or heads is None:
            return value
        parts = (heads, value.shape[0] // heads // 2, 2) if back else (heads, 2, value.shape[0] // heads // 2)
        return value.reshape(*parts, *value.shape[1:]).transpose(1, 2).reshape(value.shape)

    def context(self) -> tuple[int, str]:
        """(tokens, remark). llama.cpp attends to everything in these architectures, so a sliding window bounds the context."""
        config = self.config
        window = getattr(config, "sliding_window", None)
        slides = "sliding_attention" in (getattr(config, "layer_types", None) or ()) or config.model_type == "mistral"
        if window and slides and window < config.max_position_embeddings:
            return window, f"context {window}: the model's sliding window, which llama.cpp lacks here"
        return config.max_position_embeddings, ""

    def fields(self) -> dict[str, Any]:
        """Header fields of the architecture by their full key; int is uint32, float is float32."""
        config = self.config
        found = {
            "vocab_size": config.vocab_size,
            "context_length": self.context()[0],
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "rope.dimension_count": self.head_dim,
            "rope.freq_base": float(self.rope["rope_theta"]),
        }
        if self.rope["rope_type"] in ("linear", "yarn"):
            found |= {"rope.scaling.type": self.rope["rope_type"], "rope.scaling.factor": float(self.rope["factor"])}
        if self.rope["rope_type"] == "yarn":
            found["rope.scaling.original_context_length"] = int(self.rope["original_max_position_embeddings"])
        return {f"{self.architecture}.{key}": value for key, value in found.items()}

    def rope_factors(self) -> Tensor | None:
        """(head_dim / 2,) float32 by which llama.cpp divides rope's frequencies, for the type "llama3"; else None."""
        if self.rope["rope_type"] != "llama3":
            return None
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        plain = self.rope["rope_theta"] ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)
        return plain / scaled.float()


def _rope(config: Any) -> dict[str, Any]:
    """`rope_parameters`, or what an older transformers has in its place. Raises: ExportError for a type GGUF lacks."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError(f"GGUF cannot hold this model's rope ({rope['rope_type']}) exactly; export merged_16bit instead.")
    if rope["rope_type"] == "yarn":
        odd = {"attention_factor", "mscale", "mscale_all_dim", "truncate"} & {k for k, v in rope.items() if v is not None}
        usual = rope.get("beta_fast") in (None, 32, 32.0) and rope.get("beta_slow") in (None, 1, 1.0)
        if odd or not usual:
            raise ExportError("GGUF export knows yarn with its usual settings only; export merged_16bit instead.")
        rope.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    return rope
