"""What the named templates are: whose, under which names, which token ends a reply. The Jinja files lie beside this file.

Each writes what its maker's writes, character for character, for conversations of text and, where the maker has them, of
tools; tests hold them against the makers' own. Dates are frozen (`nbkit.data.jinja_worker.TODAY`): a template that writes
today's date would give other tokens, another fingerprint and a broken resume every day.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nbkit.errors import DataError, nearest

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Named:
    """One template.

    Attributes:
        stop: the token that ends a reply; None where it is the tokenizer's own end-of-sequence token.
        instruction, response: what stands before the user's and before the assistant's text, as train_on_responses_only takes it.
        source: where the maker documents the format.
        system: what becomes of a system message.
        tools: does it show tools, tool calls and what tools answer?
        thinking: does it show thinking?
    """

    name: str
    stop: str | None
    instruction: str
    response: str
    source: str
    aliases: tuple[str, ...] = ()
    system: str = "a turn of its own"
    tools: bool = False
    thinking: bool = False

    @property
    def text(self) -> str:
        return _read(self.name)


@dataclass(frozen=True)
class Resolved:
    """The template of a tokenizer: its text, the token that ends a reply if that is known, and is it one of nbkit's?"""

    text: str
    stop: str | None
    known: bool
    name: str


@cache
def _read(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")
LLAMA_3 = ("<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n")
GEMMA = ("<start_of_turn>user\n", "<start_of_turn>model\n")
PHI_3 = ("<|user|>\n", "<|assistant|>\n")
FOLDED = "put into the first question"
LAST = "put into the last question"

NAMED = (
    Named("chatml", "<|im_end|>", *CHATML, "OpenAI's ChatML, as SmolLM2 and many others ship it", ("chat-ml",)),
    Named(
        "gemma-chatml", "<|im_end|>", *CHATML, "ChatML after Gemma's BOS, from Unsloth's documentation",
        ("gemma2-chatml", "gemma-2-chatml"),
    ),
    Named("llama-2", None, "[INST] ", " [/INST]", "meta-llama/llama, generation.py", ("llama", "llama2", "codellama"), FOLDED),
    Named("llama-3", "<|eot_id|>", *LLAMA_3, "meta-llama/llama3, tokenizer.py", ("llama3",)),
    Named(
        "llama-3.1", "<|eot_id|>", *LLAMA_3, "the chat template of Llama 3.1, 3.2 and 3.3",
        ("llama3.1", "llama-31", "llama-3.2", "llama3.2", "llama-32", "llama-3.3", "llama3.3", "llama-33"),
        "after the two dates", tools=True,
    ),
    Named("mistral-v1", None, " [INST] ", " [/INST]", "mistral-common, v1", ("mistral-1",), FOLDED),
    Named("mistral-v3", None, "[INST] ", "[/INST]", "mistral-common, v3", ("mistral-3",), LAST, tools=True),
    Named("mistral-v3-tekken", None, "[INST]", "[/INST]", "mistral-common, v3 on tekken", ("mistral-nemo",), LAST, tools=True),
    Named("mistral-v7", None, "[INST] ", "[/INST]", "mistral-common, v7", ("mistral-7",), tools=True),
    Named(
        "mistral-v7-tekken", None, "[INST]", "[/INST]", "mistral-common, v7 on tekken", ("tekken", "mistral-small"), tools=True
    ),
    Named("zephyr", None, "<|user|>\n", "<|assistant|>\n", "the chat template of zephyr-7b-beta"),
    Named("phi-3", "<|end|>", *PHI_3, "the chat template of Phi-3", ("phi3",)),
    Named("phi-3.5", "<|end|>", *PHI_3, "the chat template of Phi-3.5", ("phi3.5", "phi-35"), "a turn of its own, if not empty"),
    Named(
        "phi-4", "<|im_end|>", "<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>", "the chat template of phi-4",
        ("phi4",),
    ),
    Named(
        "gemma", "<end_of_turn>", *GEMMA, "the chat template of Gemma and Gemma 2", ("gemma-1", "gemma1", "gemma-2", "gemma2"),
        "refused",
    ),
    Named("gemma-3", "<end_of_turn>", *GEMMA, "the chat template of Gemma 3", ("gemma3", "gemma-3n", "gemma3n"), FOLDED),
    Named(
        "qwen-2.5", "<|im_end|>", *CHATML, "the chat template of Qwen2.5",
        ("qwen2.5", "qwen-25", "qwen25", "qwen-2.5-coder", "qwen2.5-coder", "qwen-2", "qwen2"),
        "a turn of its own; a default one where there is none", tools=True,
    ),
    Named("qwen-3", "<|im_end|>", *CHATML, "the chat template of Qwen3", ("qwen3",), tools=True, thinking=True),
    Named("vicuna", None, "USER: ", "ASSISTANT:", "lm-sys/FastChat, vicuna_v1.1", (), "instead of the default one"),
    Named(
        "alpaca", None, "### Instruction:\n", "### Response:\n",
        "tatsu-lab/stanford_alpaca, the prompt without input; a line break before the response, as fine-tuning guides have it",
        (), "instead of the default one",
    ),
    Named(
        "unsloth", None, ">>> User: ", ">>> Assistant: ", "Unsloth's plain template", (), "instead of the default one"
    ),
)  # fmt: skip
_BY_NAME = {alias: named for named in NAMED for alias in (named.name, *named.aliases)}


def find(name: str, tokenizer: Any = None) -> Named:
    """The template of that name, however the name is written; "mistral" is the version that fits the tokenizer.

    Raises: DataError with the names that are most like it.
    """
    plain = name.strip().casefold().replace("_", "-").replace(" ", "-")
    if plain == "mistral":
        plain = _mistral(tokenizer)
    if plain not in _BY_NAME:
        known = [*_BY_NAME, "mistral"]
        raise DataError(
            f"There is no chat template {name!r}; the names are {', '.join(named.name for named in NAMED)}."
            f"{nearest(plain, known)} A template of your own is given as Jinja text."
        )
    return _BY_NAME[plain]


def _mistral(tokenizer: Any) -> str:
    """The version of Mistral's format by the control tokens of a tokenizer; tekken is told by its byte-level words."""
    if tokenizer is None:
        return "mistral-v3"
    if not is_token(tokenizer, "[INST]"):
        return "mistral-v1"
    version = "mistral-v7" if is_token(tokenizer, "[SYSTEM_PROMPT]") else "mistral-v3"
    return f"{version}-tekken" if is_token(tokenizer, "\u0120the") else version


def is_token(tokenizer: Any, text: str) -> bool:
    """Is the text one token of the tokenizer's vocabulary?"""
    found = tokenizer.convert_tokens_to_ids(text)
    return found is not None and (found != tokenizer.unk_token_id or text == tokenizer.unk_token)


def fitted(named: Named, tokenizer: Any) -> Resolved:
    """A named template for this tokenizer: where its stop token is none of the tokenizer's, the end-of-sequence token stands.

    Raises: DataError if replies need an end-of-sequence token and there is none.
    """
    text, stop = named.text, named.stop
    if stop is None or not is_token(tokenizer, stop):
        eos = tokenizer.eos_token
        if not eos:
            raise DataError(
                f"The chat template {named.name} ends a reply with {stop or 'the end-of-sequence token'}, which the tokenizer "
                "does not have; set tokenizer.eos_token, or name a template whose stop token is in its vocabulary."
            )
        if stop is not None:
            text = text.replace(stop, str(eos).replace("\\", "\\\\").replace("'", "\\'"))
        stop = str(eos)
    return Resolved(text, stop, True, named.name)


def resolve(template: str | None, tokenizer: Any, tools: bool = False) -> Resolved:
    """The template that is meant: None is the tokenizer's own, text with Jinja in it is a template, the rest is a name.

    Raises: DataError if the tokenizer has no template of its own, or there is none of that name.
    """
    if template is not None and not any(mark in template for mark in ("{{", "{%", "{#")):
        return fitted(find(template, tokenizer), tokenizer)
    if template is None:
        template = _own(tokenizer, tools)
        if not template:
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise DataError(
                f"The tokenizer of {name} has no chat template, as is usual for base models; load an instruct checkpoint, "
                "or name the template the model is to learn, such as DataRecipe(template='chatml')."
            )
    same = next((named for named in NAMED if fits(named, template, tokenizer)), None)
    return Resolved(template, same.stop if same else None, same is not None, same.name if same else "its own")


def adopt(tokenizer: Any, template: str | None) -> None:
    """Make the template of a recipe the tokenizer's, so that chat, checkpoints and exports write what was trained.

    None gives the tokenizer back the one that it had before the first call.

    Raises: DataError as `resolve` does.
    """
    if template is not None:
        text = resolve(template, tokenizer).text
        _BEFORE.setdefault(tokenizer, tokenizer.chat_template)
        tokenizer.chat_template = text
    elif tokenizer in _BEFORE:
        tokenizer.chat_template = _BEFORE.pop(tokenizer)


_BEFORE: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _own(tokenizer: Any, tools: bool) -> str | None:
    """The tokenizer's template; some have another one for conversations with tools."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        return own.get("tool_use" if tools else "default") or own.get("default")
    return own


def fits(named: Named, template: str, tokenizer: Any) -> bool:
    """Is the text that of a named template, as it is or fitted to the tokenizer?"""
    return template == named.text or (bool(tokenizer.eos_token) and template == fitted(named, tokenizer).text)
