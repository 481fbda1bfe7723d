"""Chat templates for code written against TRL's and transformers' own objects, under the names that Unsloth's notebooks use.

    tokenizer = get_chat_template(tokenizer, chat_template="chatml", mapping={"role": "from", "content": "value",
                                                                             "user": "human", "assistant": "gpt"})
    trainer = train_on_responses_only(trainer, instruction_part="<|im_start|>user\\n", response_part="<|im_start|>assistant\\n")

`Session.use_data` needs none of this: `DataRecipe(template=..., train_on=...)` says the same.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from nbkit.config import IGNORE_INDEX
from nbkit.data.findings import rows_text, shorten
from nbkit.data.reshape import standardize_sharegpt, to_sharegpt
from nbkit.data.responses import labels_of, markers
from nbkit.data.templates.catalog import find, is_token
from nbkit.errors import DataError, nearest

__all__ = ["get_chat_template", "standardize_sharegpt", "to_sharegpt", "train_on_responses_only"]

MAPPED = ("role", "content", "user", "assistant", "system", "tool")
LOOKED_AT = 100  # rows of a stream that are looked at for the response's marker


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Give a tokenizer a chat template; returns the same tokenizer.

    Args:
        chat_template: a name (`nbkit.data.templates`), Jinja text, or (Jinja text, stop token); the stop token "eos_token" is
            the tokenizer's own.
        mapping: how the rows spell it: {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}. The
            standard names go on being understood.
        map_eos_token: the stop token becomes the tokenizer's end-of-sequence token if it is in the vocabulary; if not, the
            end-of-sequence token is written in its place, so that no token has to be added and learnt.
        system_message: put before conversations that have none.

    Raises: DataError for an unknown name or an unknown key of the mapping.
    """
    text, stop = _text_and_stop(tokenizer, chat_template)
    if stop is not None and map_eos_token:
        if is_token(tokenizer, stop):
            tokenizer.eos_token = stop
        elif tokenizer.eos_token:
            text = text.replace(stop, str(tokenizer.eos_token))
        else:
            raise DataError(f"The template ends a reply with {stop}, and the tokenizer has neither that nor an eos_token.")
    before = _renamed(mapping or {})
    if system_message is not None:
        said = json.dumps(system_message)
        before += (
            "{%- if messages[0]['role'] != 'system' -%}"
            "{%- set messages = [{'role': 'system', 'content': " + said + "}] + messages -%}{%- endif -%}"
        )
    tokenizer.chat_template = before + text
    return tokenizer


def _text_and_stop(tokenizer: Any, template: str | tuple[str, str]) -> tuple[str, str | None]:
    if isinstance(template, (tuple, list)):
        if len(template) != 2 or not all(isinstance(part, str) for part in template):
            raise DataError("A chat template of your own is (Jinja text, stop token); the stop token may be 'eos_token'.")
        text, stop = template
        return text, None if stop == "eos_token" else stop
    if "{{" in template or "{%" in template:
        return template, None
    named = find(template, tokenizer)
    return named.text, named.stop


def _renamed(mapping: Mapping[str, str]) -> str:
    """Jinja that gives the messages the standard names before the template reads them."""
    for key in mapping:
        if key not in MAPPED:
            raise DataError(f"The mapping has the key {key!r}; its keys are {', '.join(MAPPED)}.{nearest(key, MAPPED)}")
    changed = {key: name for key, name in mapping.items() if key != name}
    if not changed:
        return ""
    role, content = mapping.get("role", "role"), mapping.get("content", "content")
    roles = json.dumps({name: key for key, name in changed.items() if key not in ("role", "content")})
    return (
        "{%- set roles = " + roles + " -%}{%- set named = namespace(messages=[]) -%}{%- for message in messages -%}"
        f"{{%- set role = message[{json.dumps(role)}] if {json.dumps(role)} in message else message['role'] -%}}"
        f"{{%- set content = message[{json.dumps(content)}] if {json.dumps(content)} in message else message['content'] -%}}"
        "{%- set role = roles[role] if role in roles else role -%}"
        "{%- set named.messages = named.messages + [{'role': role, 'content': content}] -%}{%- endfor -%}"
        "{%- set messages = named.messages -%}"
    )


def train_on_responses_only(trainer: Any, instruction_part: str | None = None, response_part: str | None = None) -> Any:
    """Label the trainer's data so that only what follows `response_part`, up to the next `instruction_part`, is trained.

    Works on an unmodified TRL SFTTrainer, whose data is tokens already; returns the trainer. Parts left out are those that
    the tokenizer's chat template writes. Rows without the marker are left out, with a warning that names them.

    Raises: DataError if the marker occurs in no row, or the data has no tokens yet.
    """
    tokenizer = getattr(trainer, "processing_class", None) or trainer.tokenizer
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if instruction_part is None or response_part is None:
        instruction, response = markers(tokenizer)
        instruction_part, response_part = instruction_part or instruction, response_part or response
    for part, name in ((instruction_part, "instruction_part"), (response_part, "response_part")):
        if not part.strip():
            raise DataError(f"{name} is blank; give what stands before the text, such as '<|im_start|>user\\n'.")
    for name in ("train_dataset", "eval_dataset"):
        data = getattr(trainer, name, None)
        if isinstance(data, dict):
            made: Any = {key: _labelled(one, tokenizer, instruction_part, response_part) for key, one in data.items()}
        elif data is not None:
            made = _labelled(data, tokenizer, instruction_part, response_part)
        else:
            continue
        setattr(trainer, name, made)
    return trainer


def _labelled(data: Any, tokenizer: Any, instruction: str, response: str) -> Any:
    """The dataset with a column labels."""
    stream = not hasattr(data, "select")
    first = list(data.take(LOOKED_AT)) if stream else []
    columns = (list(first[0]) if first else []) if stream else data.column_names
    if "input_ids" not in columns:
        raise DataError(
            f"The trainer's data has no column input_ids, only {', '.join(columns) or 'no rows'}; "
            "give the data to TRL's SFTTrainer, which makes tokens of it, before train_on_responses_only."
        )

    def label(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        lengths = batch.get("seq_lengths")
        return {"labels": labels_of(tokenizer, batch["input_ids"], instruction, response, lengths)}

    if stream:
        rows: Any = [row["input_ids"] for row in first]
        _require_some(labels_of(tokenizer, rows, instruction, response), rows, tokenizer, response)
        return data.map(label, batched=True)
    made = data.map(label, batched=True, load_from_cache_file=False, desc="Labelling responses")
    good = [number for number, labels in enumerate(made["labels"]) if any(one != IGNORE_INDEX for one in labels)]
    if not good:
        _require_some([], data["input_ids"][:1], tokenizer, response, len(made))
    if len(good) == len(made):
        return made
    bad = sorted(set(range(len(made))) - set(good))
    warnings.warn(
        f"The response marker {response!r} does not occur in {rows_text([number + 1 for number in bad])}; they are left out.",
        stacklevel=3,
    )
    return made.select(good)


def _require_some(labels: list[list[int]], rows: Any, tokenizer: Any, response: str, count: int | None = None) -> None:
    """Raises: DataError if no label is trained."""
    if any(one != IGNORE_INDEX for row in labels for one in row):
        return
    text = tokenizer.decode(list(rows[0])[:200]) if len(rows) else ""
    try:
        hint = f"the chat template writes {markers(tokenizer)[1]!r} before a reply"
    except DataError:
        hint = "give as response_part what stands before a reply there"
    raise DataError(
        f"The response marker {response!r} occurs in none of the {count or len(rows):,} rows, so nothing would be trained: "
        f"row 1 reads {shorten(text, 120)}; {hint}."
    )
