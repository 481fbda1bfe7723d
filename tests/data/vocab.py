"""Tiny fast tokenizers of the kinds that are about: byte-level, byte-level with trimmed offsets, and two of SentencePiece's."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
CONTROLS = (
    *("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<start_of_turn>", "<end_of_turn>"),
    *("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CONTENT]"),
)
KINDS = ("bytes", "trimmed", "legacy", "metaspace")
TEXT = (
    "Hello there, how are you? assistant user system model I am fine [INST] [/INST] the wind is west 5; rain\n\n  think "
    "0123456789 Below is an instruction that describes a task. ### Instruction:\n### Response:\n USER: ASSISTANT: >>> User: "
    "A chat between a curious user and an artificial intelligence assistant. <think>\n\n</think>\n\n Today Date: 26 Jul 2024"
)


@cache
def core(kind: str, controls: bool) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    names = (BOS, EOS, UNK, *(CONTROLS if controls else ()))
    specials: list[Any] = [AddedToken(token, special=True, normalized=False) for token in names]
    settings: dict[str, Any] = {"show_progress": False}
    if kind in ("bytes", "trimmed"):
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        settings |= {"vocab_size": 700, "special_tokens": specials, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    else:
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token=UNK))
        if kind == "legacy":  # Llama 2: a blank before every stretch of text
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:  # a blank before the first
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        blank, one = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
        made.decoder = decoders.Sequence([blank, decoders.ByteFallback(), decoders.Fuse(), one])
        settings |= {"vocab_size": 900, "special_tokens": [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]}
    made.train_from_iterator([TEXT] * 8, trainers.BpeTrainer(**settings))
    if kind == "trimmed":  # as GPT-2's and Llama 3's: white space is not in the offsets
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(content)  # a byte's token is an ordinary one


def tokenizer(kind: str = "bytes", controls: bool = True) -> Any:
    """A tokenizer without a template; pad == eos. Without `controls` it has only BOS, EOS and <unk>, as base models do."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(core(kind, controls)),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNK,
        additional_special_tokens=list(CONTROLS) if controls else [],
    )
