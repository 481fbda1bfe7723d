"""What a model family is: typed facts and nothing else. Each field is a question a contributor answers.

Paths are dotted attribute names: those of `Decoder` start at the causal-LM model, those of the other
parts start at one decoder layer. A field that names a config key (`*_key`) says that the checkpoint decides.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Where the decoder's parts lie in the causal-LM model."""

    base: str = "model"
    embeddings: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm: y = (offset + weight) * x * rsqrt(mean(x^2) + eps).

    `cast`: "before_weight" rounds the normalised x to the activations' dtype and then multiplies by the weight
    (Llama); "last" does all in float32 and rounds once (Gemma). `where`: "pre" has two norms a layer, before
    attention and before the MLP; "sandwich" also norms what they give; "post" norms only that.
    """

    offset: float = 0.0
    cast: str = "before_weight"
    where: str = "pre"
    attention: str = "input_layernorm"
    mlp: str = "post_attention_layernorm"
    eps: str = "variance_epsilon"  # the attribute of the norm module


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """down(act(gate(x)) * up(x)). `fused`: gate and up are one linear module. `experts_key`: config key of their number."""

    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: bool = False
    activation: str = "silu"
    bias_key: str | None = None  # None: no bias
    experts_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal attention with grouped key/value heads; scores are scaled by head_dim ** -0.5.

    `window`: "none"; "all" (every layer, of `sliding_window` tokens if that is set); "layer_types" (the layers that
    the config's list calls "sliding_attention").
    """

    module: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    fused_qkv: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    bias_key: str | None = None  # where set, the config decides on all four biases
    qk_norm: bool = False  # RMSNorm over each head of q and k, before rope
    window: str = "none"
    softcap_key: str | None = None
    sinks: bool = False


@dataclass(frozen=True, kw_only=True)
class Rope:
    """`kind` "split_half": the first half of a head is rotated with its second half. `bases`: 2 for local and global layers."""

    kind: str = "split_half"
    partial: float = 1.0  # share of the head that is rotated
    bases: int = 1
    types: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True, kw_only=True)
class Head:
    """The output projection. Where `tie_word_embeddings` is set it shares the embeddings' weight."""

    module: str = "lm_head"
    softcap_key: str | None = None
    logit_scale_key: str | None = None
    embedding_scale: bool = False  # embeddings are multiplied by sqrt(hidden_size)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One chat format: the text right before a reply, and the tokens that end one. The template is the tokenizer's own."""

    name: str
    reply_marker: str
    stop: tuple[str, ...]


CHATML = Chat(name="chatml", reply_marker="<|im_start|>assistant\n", stop=("<|im_end|>",))
LLAMA2 = Chat(name="llama2", reply_marker="[/INST]", stop=("</s>",))
LLAMA3 = Chat(name="llama3", reply_marker="<|start_header_id|>assistant<|end_header_id|>\n\n", stop=("<|eot_id|>",))
MISTRAL = Chat(name="mistral", reply_marker="[/INST]", stop=("</s>",))
ZEPHYR = Chat(name="zephyr", reply_marker="<|assistant|>\n", stop=("</s>",))


class Dims(NamedTuple):
    """Sizes of a checkpoint. `head` None is hidden // heads."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    head: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Weights a user can pick. `name` is what `load` takes; `context` is in tokens."""

    name: str
    dims: Dims
    context: int
    chat: Chat | None
    licence: str
    tied: bool = False
    window: int | None = None  # of sliding-window attention, in tokens
    hub_id: str = ""  # "": the name is the hub id

    @property
    def repository(self) -> str:
        return self.hub_id or self.name


@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts of one architecture. `tiny` overrides the toy config that tests build it at."""

    name: str
    title: str
    model_types: tuple[str, ...]
    decoder: Decoder = Decoder()
    norm: Norm = Norm()
    mlp: Mlp = Mlp()
    attention: Attention = Attention()
    rope: Rope = Rope()
    head: Head = Head()
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tiny: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: tuple[Checkpoint, ...] = ()

    def config_of(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The keys of the checkpoint's transformers config that decide its size."""
        dims = checkpoint.dims
        return {
            "model_type": self.model_types[0],
            "hidden_size": dims.hidden,
            "num_hidden_layers": dims.layers,
            "num_attention_heads": dims.heads,
            "num_key_value_heads": dims.kv_heads,
            "intermediate_size": dims.intermediate,
            "vocab_size": dims.vocab,
            "head_dim": dims.head or dims.hidden // dims.heads,
            "tie_word_embeddings": checkpoint.tied,
            "max_position_embeddings": checkpoint.context,
            "sliding_window": checkpoint.window,
        }
