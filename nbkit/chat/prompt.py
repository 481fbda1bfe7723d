"""Messages to the token ids the model was trained on: the tokenizer's own chat template, nothing added, nothing doubled.

A control token that a user spells in a message stays plain text, as it does in training, so that nobody can end their own
turn and speak as the assistant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nbkit.data.findings import RowFault
from nbkit.data.template import Renderer, Row
from nbkit.errors import DataError

Messages = Sequence[Mapping[str, str]]
ROLES = ("system", "user", "assistant")


def conversation(prompt: str | Messages, system: str | None = None) -> list[dict[str, str]]:
    """A prompt as messages; `system` is put first if there is no system message.

    Raises: DataError for an empty conversation, an unknown role, or a last message that is not the user's.
    """
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
    for number, message in enumerate(given, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            roles = ", ".join(ROLES)
            raise DataError(f"Message {number} must have a role ({roles}) and a content that is text; it is {str(message)[:80]}.")
    if not given or given[-1]["role"] != "user" or not given[-1]["content"].strip():
        raise DataError("The conversation must end in a message of the user that is not empty; write a question first.")
    if system is not None and given[0]["role"] != "system":
        given.insert(0, {"role": "system", "content": system})
    return given


def encode(tokenizer: Any, conversations: Iterable[Sequence[Mapping[str, str]]], template: str | None = None) -> list[list[int]]:
    """Token ids of each conversation up to where the reply begins. No special token is added to the template's own.

    `template` is that of the recipe; None is the tokenizer's own.

    Raises: DataError if there is no chat template or it refuses the messages.
    """
    found = Renderer(tokenizer, template).prompt_ids([Row(messages) for messages in conversations])
    for one in found:
        if isinstance(one, RowFault):
            raise DataError(f"The prompt cannot be asked: {one.sentence}; change it, or choose another template.") from one
    return [one for one in found if not isinstance(one, RowFault)]


def stop_ids(model: Any, tokenizer: Any, template: str | None = None) -> set[int]:
    """Ids that end a reply: those the checkpoint names, and the token its chat template puts after one."""
    found: set[int] = set()
    configs = (getattr(model, "generation_config", None), model.config)
    for value in (tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs)):
        found |= {value} if isinstance(value, int) else set(value or ())
    if stop := Renderer(tokenizer, template).stop_token():
        found.add(tokenizer.convert_tokens_to_ids(stop))
    return found
