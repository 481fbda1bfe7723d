"""Chat templates as Jinja beside a rendering written by hand, and tiny tokenizers of two kinds: the label oracle's material."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

Pieces = list[tuple[str, bool]]  # (text, is it trained?)
Messages = list[dict[str, str]]
BOS, EOS, EOT = "<s>", "</s>", "<|eot_id|>"
SPECIALS = [BOS, EOS, "<unk>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", EOT]

JINJA = {
    # SmolLM2's own, with its default system message
    "chatml": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # the texts are trimmed, BOS comes from the template
    "llama-3": "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # headers are plain text, so that tokens may reach over the edge of a reply
    "zephyr": "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    # no generation prompt; a strict order; the system message is put into the first question
    "mistral": "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}{{ bos_token }}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{% set first = system + '\n\n' if loop.first and system else '' %}"
    "{{ '[INST] ' + first + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
    # a blank between the reply and its stop token
    "llama-2": "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    # an empty thinking block before the last reply, which the generation prompt does not hold
    "thinking": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}


def chatml(messages: Messages) -> Pieces:
    pieces: Pieces = []
    if messages[0]["role"] != "system":
        pieces.append(("<|im_start|>system\nYou are helpful<|im_end|>\n", False))
    for message in messages:
        mine = message["role"] == "assistant"
        pieces += [(f"<|im_start|>{message['role']}\n", False), (f"{message['content']}<|im_end|>", mine), ("\n", False)]
    return pieces


def llama_3(messages: Messages) -> Pieces:
    pieces: Pieces = [(BOS, False)]
    for message in messages:
        header = f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n"
        pieces += [(header, False), (message["content"].strip() + EOT, message["role"] == "assistant")]
    return pieces


def zephyr(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for message in messages:
        mine = message["role"] == "assistant"
        pieces += [(f"<|{message['role']}|>\n", False), (message["content"] + EOS, mine), ("\n", False)]
    return pieces


def mistral(messages: Messages) -> Pieces:
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    pieces: Pieces = [(BOS, False)]
    for number, message in enumerate(m for m in messages if m["role"] != "system"):
        if message["role"] == "user":
            before = f"{system}\n\n" if system and number == 0 else ""
            pieces.append((f"[INST] {before}{message['content']} [/INST]", False))
        else:
            pieces.append((f" {message['content']}{EOS}", True))  # the blank is not in the prompt: the model writes it
    return pieces


def llama_2(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for message in messages:
        content = message["content"]
        if message["role"] == "user":
            pieces.append((f"{BOS}[INST] {content.strip()} [/INST]", False))
        elif message["role"] == "system":
            pieces.append((f"<<SYS>>\n{content}\n<</SYS>>\n\n", False))
        else:
            pieces.append((f" {content.strip()} {EOS}", True))
    return pieces


def thinking(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for number, message in enumerate(messages, 1):
        mine = message["role"] == "assistant"
        block = "<think>\n\n</think>\n\n" if mine and number == len(messages) else ""
        pieces += [(f"<|im_start|>{message['role']}\n", False), (f"{block}{message['content']}<|im_end|>", mine), ("\n", False)]
    return pieces


BY_HAND: dict[str, Callable[[Messages], Pieces]] = {
    "chatml": chatml,
    "llama-3": llama_3,
    "zephyr": zephyr,
    "mistral": mistral,
    "llama-2": llama_2,
    "thinking": thinking,
}
EOS_OF = {"chatml": "<|im_end|>", "llama-3": EOT, "zephyr": EOS, "mistral": EOS, "llama-2": EOS, "thinking": "<|im_end|>"}
TEXT = "Hello there, how are you? assistant user system I am fine [INST] [/INST] the wind is west 5; rain\n\n  think 0123456789 "


@cache
def _core(kind: str) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "trimmed":  # byte level, with the offsets' white space trimmed off as GPT-2's are
        from tokenizers import processors

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core = Tokenizer(models.BPE(byte_fallback=kind == "metaspace", unk_token="<unk>" if kind == "metaspace" else None))
    specials: list[Any] = [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    if kind == "metaspace":  # as sentencepiece: a blank before the text, bytes for unknown letters
        core.normalizer = normalizers.NFC()
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
        )
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([TEXT] * 8, trainer)
    if kind == "trimmed":
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    return core.to_str()


def tokenizer(template: str, kind: str = "bytes") -> Any:
    """A tiny fast tokenizer with this template; pad == eos."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    eos = EOS_OF[template]
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_core(kind)),
        bos_token=BOS,
        eos_token=eos,
        pad_token=eos,
        unk_token="<unk>",
        additional_special_tokens=[token for token in SPECIALS if token not in (BOS, eos, "<unk>")],
    )
    made.chat_template = JINJA[template]
    return made
