"""Messages to the token ids the model was trained on: the tokenizer's own chat template, nothing added, nothing doubled.

A control token that a user spells in a message stays plain text, as it does in training, so that nobody can end their own
turn and speak as the assistant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nbkit.data.findings import RowFault
from nbkit.data.template import Rendered, Renderer
from nbkit.errors import DataError

Messages = Sequence[Mapping[str, str]]
ROLES = ("system", "user", "assistant")
MARK = "\ue000"  # stands for a reply where the template is asked what follows one


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


def encode(tokenizer: Any, conversations: Iterable[Sequence[Mapping[str, str]]]) -> list[list[int]]:
    """Token ids of each conversation up to where the reply begins. No special token is added to the template's own.

    Raises: DataError if there is no chat template or it refuses the messages.
    """
    renderer = Renderer(tokenizer)
    found = []
    for messages in conversations:
        text = _rendered(tokenizer, messages)
        if any(control in message["content"] for message in messages for control in renderer.controls):
            found.append(_plainly(renderer, messages, text))
        else:
            found.append(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return found


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template's own code may raise
        raise DataError(f"The chat template refuses these messages: {str(error).strip() or type(error).__name__}") from error


def _plainly(renderer: Renderer, messages: Sequence[Mapping[str, str]], text: str) -> list[int]:
    """The ids of a text whose messages spell control tokens."""
    try:
        # As training renders it, with the generation prompt after it: so both have the same ids.
        rendered = renderer.render([dict(m) for m in messages])
        if not text.startswith(rendered.text):
            raise RowFault("template_rewrites", "the chat template changes texts, so a control token in them cannot stay plain")
        whole: Rendered = replace(rendered, text=text, trained=())
        labelled = renderer.label([whole])[0]
        if isinstance(labelled, RowFault):
            raise labelled
    except RowFault as fault:
        raise DataError(f"The prompt cannot be asked: {fault.sentence}; leave the control token out.") from fault
    return labelled.input_ids


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end a reply: those the checkpoint names, and the token its chat template puts after one."""
    found: set[int] = set()
    configs = (getattr(model, "generation_config", None), model.config)
    for value in (tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs)):
        found |= {value} if isinstance(value, int) else set(value or ())
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}], tokenize=False
    )
    after = text.partition(MARK)[2].lstrip()
    specials = [token for token in Renderer(tokenizer).controls if token and after.startswith(token)]
    if specials:
        found.add(tokenizer.convert_tokens_to_ids(max(specials, key=len)))
    return found
