"""Tiny random models of every declared family, made from the family's facts, and a tiny chat tokenizer. Built in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 320
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = (
    "system user assistant\nYou are a helpful assistant. The wind is west five, it rains, the cook cut his thumb.\n"
    "Write the ship's log line: 0630, 41 nm. W 5, rain. Cook cut thumb. 1234567890\n"
)


def tiny_tokenizer() -> Any:
    """A byte-level BPE of at most 320 tokens with a ChatML template; pad == eos == <|im_end|>, as SmolLM2 has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([TEXT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=512,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_config(family: str = "llama", **overrides: Any) -> Any:
    """A toy config of the family's real config class: width 32, 2 layers, 4 query and 2 key/value heads, vocabulary 320."""
    from transformers import AutoConfig

    from nbkit.families import all_families

    facts = next(f for f in all_families() if f.name == family)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return AutoConfig.for_model(facts.model_types[0], **{**sizes, **facts.tiny, **overrides})


def tiny_model(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A random float32 model in eval mode. The initial weights are wider than usual, so that logits differ clearly."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, initializer_range=0.1, **overrides))
    return model.float().eval()


def save_tiny(folder: str | Path, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """A checkpoint folder (config, safetensors, tokenizer with template) as a hub repository would have it."""
    tiny_model(family, seed, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
