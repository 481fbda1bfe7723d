"""The label oracle: what each named template writes and which characters of it are trained, written down by hand.

Nothing here comes from the production code: no Jinja, no spans found in a rendering, no offsets. A conversation is put together
as pieces (text, whose reply it is), and tokens are mapped to characters by their own bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

IGNORED = -100
Pieces = list[tuple[str, int | None]]  # (text, the message that is trained by it; None if nothing is)
Messages = list[dict[str, Any]]
BOS, EOS = "<s>", "</s>"

# -- what the templates write ----------------------------------------------------------------------


def own_system(messages: Messages) -> tuple[str, Messages]:
    return (messages[0]["content"], messages[1:]) if messages[0]["role"] == "system" else ("", messages)


def places(messages: Messages) -> list[tuple[int, dict[str, Any]]]:
    """The messages without a first system message, each with its place among all."""
    skipped = int(messages[0]["role"] == "system")
    return [(place, message) for place, message in enumerate(messages) if place >= skipped]


def turns(opening: str, closing: str, after: str) -> Callable[[Messages], Pieces]:
    """ChatML and its like: every message between an opening with its role and a closing token."""

    def write(messages: Messages) -> Pieces:
        made: Pieces = []
        for place, message in enumerate(messages):
            mine = place if message["role"] == "assistant" else None
            made += [(opening.format(message["role"]), None), (message["content"] + closing, mine), (after, None)]
        return made

    return write


chatml = turns("<|im_start|>{}\n", "<|im_end|>", "\n")
phi_4 = turns("<|im_start|>{}<|im_sep|>", "<|im_end|>", "")
zephyr = turns("<|{}|>\n", EOS, "\n")


def phi_3(messages: Messages) -> Pieces:
    return [*turns("<|{}|>\n", "<|end|>", "\n")(messages), (EOS, None)]


def phi_35(messages: Messages) -> Pieces:
    blank = messages[0]["role"] == "system" and not messages[0]["content"]
    made = phi_3(messages[1:] if blank else messages)
    return [(text, None if mine is None else mine + blank) for text, mine in made]


def gemma_chatml(messages: Messages) -> Pieces:
    return [(BOS, None), *chatml(messages)]


def llama_2(messages: Messages) -> Pieces:
    system, _ = own_system(messages)
    made: Pieces = []
    for number, (place, message) in enumerate(places(messages)):
        if message["role"] == "user":
            folded = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and number == 0 else ""
            made.append((f"{BOS}[INST] {(folded + message['content']).strip()} [/INST]", None))
        else:
            made.append((f" {message['content'].strip()} {EOS}", place))
    return made


def headed(messages: Messages, first: int = 0) -> Pieces:
    made: Pieces = []
    for place, message in enumerate(messages, first):
        mine = place if message["role"] == "assistant" else None
        header = f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n"
        made += [(header, None), (message["content"].strip() + "<|eot_id|>", mine)]
    return made


def llama_3(messages: Messages) -> Pieces:
    return [(BOS, None), *headed(messages)]


def llama_31(messages: Messages) -> Pieces:
    system, rest = own_system(messages)
    block = "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    return [(BOS + block + system.strip() + "<|eot_id|>", None), *headed(rest, len(messages) - len(rest))]


def mistral_1(messages: Messages) -> Pieces:
    system, _ = own_system(messages)
    made: Pieces = [(BOS, None)]
    for number, (place, message) in enumerate(places(messages)):
        if message["role"] == "user":
            before = system + "\n\n" if system and number == 0 else ""
            made.append((f" [INST] {before}{message['content']} [/INST]", None))
        else:
            made.append((f" {message['content']}{EOS}", place))
    return made


def mistral(blank: str, seven: bool) -> Callable[[Messages], Pieces]:
    def write(messages: Messages) -> Pieces:
        system, _ = own_system(messages)
        made: Pieces = [(BOS, None)]
        if seven and messages[0]["role"] == "system":
            made.append((f"[SYSTEM_PROMPT]{blank}{system}[/SYSTEM_PROMPT]", None))
        last = max(place for place, message in enumerate(messages) if message["role"] == "user")
        for place, message in places(messages):
            if message["role"] == "user":
                before = system + "\n\n" if system and place == last and not seven else ""
                made.append((f"[INST]{blank}{before}{message['content']}[/INST]", None))
            else:
                made.append((f"{blank}{message['content'].rstrip()}{EOS}", place))
        return made

    return write


def gemma(messages: Messages) -> Pieces:
    system, _ = own_system(messages)
    made: Pieces = [(BOS, None)]
    for number, (place, message) in enumerate(places(messages)):
        mine = message["role"] == "assistant"
        before = system + "\n\n" if messages[0]["role"] == "system" and number == 0 else ""
        made.append((f"<start_of_turn>{'model' if mine else 'user'}\n{before}", None))
        made += [(message["content"].strip() + "<end_of_turn>", place if mine else None), ("\n", None)]
    return made


def qwen_25(messages: Messages) -> Pieces:
    if messages[0]["role"] == "system":
        return chatml(messages)
    made = chatml(
        [{"role": "system", "content": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."}, *messages]
    )
    return [(text, None if mine is None else mine - 1) for text, mine in made]


def qwen_3(messages: Messages) -> Pieces:
    made: Pieces = []
    for place, message in enumerate(messages):
        content, mine = message["content"], message["role"] == "assistant"
        thought = message.get("reasoning_content", "")
        if mine and "</think>" in content and not thought:
            thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
        if mine and place == len(messages) - 1:
            stripped = thought.strip("\n")
            content = f"<think>\n{stripped}\n</think>\n\n" + content.lstrip("\n")
        made += [(f"<|im_start|>{message['role']}\n", None), (content + "<|im_end|>", place if mine else None), ("\n", None)]
    return made


def plain(default: str, after: str, user: str, between: str, assistant: str, lead: str, end: str) -> Callable[[Messages], Pieces]:
    """Templates without control tokens: Vicuna's, Alpaca's, Unsloth's."""

    def write(messages: Messages) -> Pieces:
        system, _ = own_system(messages)
        given = messages[0]["role"] == "system"
        made: Pieces = [(BOS + (system if given else default) + after, None)]
        for place, message in places(messages):
            if message["role"] == "user":
                made.append((user + message["content"] + between, None))
            else:
                last = place == len(messages) - 1
                made += [
                    (assistant, None),
                    (lead + message["content"] + EOS, place),
                    ("" if end == "\n\n" and last else end, None),
                ]
        return made

    return write


BY_HAND: dict[str, Callable[[Messages], Pieces]] = {
    "chatml": chatml,
    "gemma-chatml": gemma_chatml,
    "llama-2": llama_2,
    "llama-3": llama_3,
    "llama-3.1": llama_31,
    "mistral-v1": mistral_1,
    "mistral-v3": mistral(" ", False),
    "mistral-v3-tekken": mistral("", False),
    "mistral-v7": mistral(" ", True),
    "mistral-v7-tekken": mistral("", True),
    "zephyr": zephyr,
    "phi-3": phi_3,
    "phi-3.5": phi_35,
    "phi-4": phi_4,
    "gemma": gemma,
    "gemma-3": gemma,
    "qwen-2.5": qwen_25,
    "qwen-3": qwen_3,
    "vicuna": plain(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions.",
        " ", "USER: ", " ", "ASSISTANT:", " ", "",
    ),
    "alpaca": plain(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        "\n\n", "### Instruction:\n", "\n\n", "### Response:\n", "", "\n\n",
    ),
    "unsloth": plain("You are a helpful assistant to the user", "\n", ">>> User: ", "\n", ">>> Assistant: ", "", "\n"),
}  # fmt: skip
STOPS = {
    **dict.fromkeys(("chatml", "gemma-chatml", "phi-4", "qwen-2.5", "qwen-3"), "<|im_end|>"),
    **dict.fromkeys(("llama-3", "llama-3.1"), "<|eot_id|>"),
    **dict.fromkeys(("phi-3", "phi-3.5"), "<|end|>"),
    **dict.fromkeys(("gemma", "gemma-3"), "<end_of_turn>"),
}  # all others end a reply with EOS


def expected(template: str, messages: Messages, train_on: str, start: int | None, has_stop: bool) -> tuple[str, list[bool]]:
    """(the text, is each of its bytes trained?)"""
    pieces = BY_HAND[template](messages)
    if template in STOPS and not has_stop:  # a tokenizer without the template's stop token: EOS stands for it
        pieces = [(text, mine) for text, mine in pieces]
        texts = {message["content"].strip() for message in messages}
        assert not any(STOPS[template] in text for text in texts), "the oracle cannot tell them apart"
        pieces = [(text.replace(STOPS[template], EOS), mine) for text, mine in pieces]
    last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
    flags: list[bool] = []
    for text, mine in pieces:
        if train_on == "replies":
            trained = mine is not None
        elif train_on == "last_reply" or (train_on == "completions" and start is None):
            trained = mine == last
        elif train_on == "completions":
            trained = mine is not None and mine >= start
        else:
            trained = True
        flags += [trained] * len(text.encode())
    whole = "".join(text for text, _ in pieces)
    if train_on == "all" and whole.startswith(BOS):
        flags[: len(BOS)] = [False] * len(BOS)
    return whole, flags


def without(messages: Messages, controls: Sequence[str]) -> Messages:
    """The messages with the control tokens they spell blotted out: what a template then writes of them is its own."""
    made = [dict(message) for message in messages]
    for message in made:
        for name in {"content", "reasoning_content"} & set(message):
            for token in sorted(controls, key=len, reverse=True):
                message[name] = message[name].replace(token, "x" * len(token))
    return made


# -- tokens by their bytes -------------------------------------------------------------------------


@cache
def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes as (GPT-2's bytes_to_unicode)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(hidden)}


def bytes_of(token: str, kind: str, specials: set[str]) -> bytes:
    if token in specials:
        return token.encode()
    if kind in ("bytes", "trimmed"):
        letters = _byte_letters()
        return bytes(letters[letter] for letter in token)
    if len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def labels_of(
    text: str, flags: Sequence[bool], ids: Sequence[int], tokens: Sequence[str], kind: str, specials: set[str]
) -> list[int]:
    """The label of each token: trained if one of the bytes it stands for is. A character cut into several tokens counts whole.

    The tokens must spell the text; only a blank that SentencePiece puts before a text may be one too many.
    """
    whole = text.encode()
    heads = [place for place, byte in enumerate(whole) if byte & 0xC0 != 0x80] + [len(whole)]
    first_of = [0] * len(whole)
    for start, end in zip(heads, heads[1:], strict=False):
        first_of[start:end] = [start] * (end - start)
    at, labels = 0, []
    for number, token in zip(ids, tokens, strict=True):
        spelled = bytes_of(token, kind, specials)
        if whole[at : at + len(spelled)] != spelled and spelled[:1] == b" " and whole[at : at + len(spelled) - 1] == spelled[1:]:
            spelled = spelled[1:]
        assert whole[at : at + len(spelled)] == spelled, f"token {token!r} does not stand at {whole[at : at + 20]!r}"
        trained = any(flags[at : at + len(spelled)])
        if not spelled:  # the blank alone
            trained = at < len(flags) and flags[at]
        labels.append(number if trained else IGNORED)
        at += len(spelled)
    assert at == len(whole), "the tokens end before the text"
    return labels


# -- chats -----------------------------------------------------------------------------------------

WORDS = (
    *(
        "wind",
        "west",
        "rain",
        "hello",
        "fine",
        "5",
        "0123456789",
        "assistant",
        "user",
        "system",
        "model",
        "tool",
        "im_end",
        "...",
    ),
    *(
        "é",
        "e\u0301",
        "日本語",
        "😀",
        "👩\u200d👩\u200d👧",
        "🇫🇷",
        "ﬁ",
        "\u200f",
        "مرحبا",
        "\u202eabc",
        "\ufeff",
        "\x00",
        "\xa0",
        "\u3000",
    ),
    *("[inst]", "USER:", "ASSISTANT:", "###", "<|im", "<think>", "think>", "[/", "<|", "|>", "<b>x</b>", "{{x}}", "{%if%}", "¡"),
    *("\ue000", "\ue0000000001\ue001"),
)
GAPS = ("", " ", "  ", "\n", "\n\n", "\t", "\r\n")
MARKERS = (
    "### Response:\n", ">>> User: ", "USER: ", "ASSISTANT:", "user\n", "assistant\n", "<<SYS>>\n", "Today Date: 26 Jul 2024\n\n",
)  # fmt: skip


def text(random_: random.Random, controls: Sequence[str] = ()) -> str:
    """A text that is not blank: words of all scripts, white space of all kinds, inside and at its ends; templates' own words;
    now and then one of the control tokens, spelled out."""
    made = random_.choice(GAPS) if random_.random() < 0.3 else ""
    for _ in range(random_.randint(1, 6)):
        made += random_.choice(MARKERS) if random_.random() < 0.1 else random_.choice(WORDS)
        made += random_.choice(controls) if controls and random_.random() < 0.1 else ""
        made += random_.choice(GAPS) if random_.random() < 0.4 else " "
    made += f"{random_.getrandbits(24):x}" if random_.random() < 0.7 else ""
    made = made if random_.random() < 0.3 else made.strip()
    return made if made.strip() else f"x{made}"


def chat(random_: random.Random, system: bool = True, thinking: bool = False, controls: Sequence[str] = ()) -> Messages:
    """One to four questions with their replies; now and then a reply is its question, or all replies are equal. One in five
    spells control tokens."""
    made: Messages = []
    spelled = controls if random_.random() < 0.2 else ()
    if system and random_.random() < 0.4:
        made.append({"role": "system", "content": "" if random_.random() < 0.2 else text(random_, spelled)})
    same = text(random_, spelled) if random_.random() < 0.15 else None
    for _ in range(random_.randint(1, 4)):
        question = text(random_, spelled)
        reply = same or (question if random_.random() < 0.1 else text(random_, spelled))
        made += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        if thinking and random_.random() < 0.4:
            made[-1]["content"] = f"<think>\n{text(random_, spelled).strip()}\n</think>\n\n{reply.lstrip()}"
        elif thinking and random_.random() < 0.4:
            made[-1]["reasoning_content"] = text(random_, spelled)
    return made
