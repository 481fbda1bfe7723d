"""Many prompts at once, before and after: batched greedy replies, the share of right fields, both side by side."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from nbkit.chat.conversation import text_pieces
from nbkit.chat.decode import answering, check_room, explained, greedy, tokens
from nbkit.chat.prompt import conversation, encode, stop_ids
from nbkit.errors import ConfigError

Prompt = str | Sequence[Mapping[str, str]]
SHOWN = 600  # characters of a reply in the table


def answer_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    use_adapter: bool = True,
    batch_size: int = 15,
    system: str | None = None,
) -> list[str]:
    """Greedy replies in the order of the prompts. Prompts of like length share a batch, padded on the left.

    Args:
        prompts: texts, or conversations that end in the user's message.
    Raises: DataError for a prompt that cannot be asked, ConfigError for a setting out of range.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.")
    encoded = encode(tokenizer, [conversation(prompt, system) for prompt in prompts])
    if not encoded:
        return []
    room = [check_room(model, len(ids), max_new_tokens) for ids in encoded]
    stops = stop_ids(model, tokenizer)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    replies: list[list[int]] = [[] for _ in encoded]
    pad_id = tokenizer.pad_token_id or 0
    with answering(model, use_adapter):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            _answer(model, encoded, batch, pad_id, room, stops, replies)
    return ["".join(text_pieces(tokenizer, iter(ids))) for ids in replies]


def _answer(
    model: Any,
    encoded: Sequence[Sequence[int]],
    batch: Sequence[int],
    pad_id: int,
    room: Sequence[int],
    stops: set[int],
    replies: list[list[int]],
) -> None:
    try:
        for step in tokens(model, [encoded[i] for i in batch], pad_id, [room[i] for i in batch], greedy, stops):
            for i, token in zip(batch, step, strict=True):
                if token is not None:
                    replies[i].append(token)
    except RuntimeError as error:  # torch's out of memory is one
        if (sentence := explained(error)) is error:
            raise
        raise sentence from None


def field_accuracy(reply: str, expected: str) -> tuple[int, int]:
    """(right, all): how many of the expected fields the reply has at their place.

    Fields are parted by ";" or a new line; case and white space do not count. Further fields in the reply gain nothing.

    >>> field_accuracy("06:30; Wind West 5; sea calm; all well", "06:30; wind west 5; sea rough")
    (2, 3)
    """
    want, got = _fields(expected), _fields(reply)
    return sum(a == b for a, b in zip(want, got, strict=False)), len(want)


def _fields(text: str) -> list[str]:
    trimmed = text.strip("; \n\t\r")
    return [" ".join(part.split()).casefold() for part in re.split(r"[;\n]", trimmed)] if trimmed else []


@dataclass(frozen=True)
class Comparison:
    """Prompts with the base model's and the tuned model's replies; `expected` where it is known."""

    prompts: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    expected: tuple[str, ...] | None = None

    def __str__(self) -> str:
        blocks = []
        for i, prompt in enumerate(self.prompts):
            lines = [_line("prompt", prompt), _line("before", self.before[i]), _line("after", self.after[i])]
            if self.expected is not None:
                lines.append(_line("expected", self.expected[i]))
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks)

    def _repr_html_(self) -> str:
        columns = {"prompt": self.prompts, "before": self.before, "after": self.after}
        if self.expected is not None:
            columns["expected"] = self.expected
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in columns)
        rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in zip(*columns.values(), strict=True))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def compare(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    expected: Sequence[str] | None = None,
    max_new_tokens: int = 64,
    system: str | None = None,
) -> Comparison:
    """The same prompts through the base model and with the adapter, greedy, both from the weights in memory.

    Raises: ConfigError if `expected` has another length than `prompts`; as `answer_all`.
    """
    if expected is not None and len(expected) != len(prompts):
        raise ConfigError(f"There are {len(prompts)} prompts and {len(expected)} expected replies; give one for each.")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "system": system}
    before = answer_all(model, tokenizer, prompts, use_adapter=False, **options)
    after = answer_all(model, tokenizer, prompts, use_adapter=True, **options)
    asked = tuple(prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts)
    return Comparison(asked, tuple(before), tuple(after), None if expected is None else tuple(expected))


def _line(name: str, text: str) -> str:
    return textwrap.fill(_shortened(text), width=110, initial_indent=f"{name:<9} ", subsequent_indent=" " * 10)


def _cell(text: str) -> str:
    return f"<td dir='auto' style='text-align:left;vertical-align:top;white-space:pre-wrap'>{escape(_shortened(text))}</td>"


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"
