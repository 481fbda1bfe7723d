"""What a chat template writes around the texts of a conversation, found by rendering the conversation with marks in their place.

    marked      <|im_start|>user\n①<|im_end|>\n<|im_start|>assistant\n②<|im_end|>\n
    rendered    <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there<|im_end|>\n

Conversations of one shape (the same roles, the same fields) share one skeleton. A rendering is held against it piece by piece:
either every text stands where its mark stood, perhaps with its white space trimmed, or the template treats this text otherwise
than the mark and the row is refused, never guessed at.

Texts are contents, thinking, and every string in a tool call. Content with a <think> block is taken apart as templates do it:
the thinking and what follows it are texts of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nbkit.data.findings import RowFault
from nbkit.data.masks import Span

Message = Mapping[str, Any]
MARK = re.compile("\ue000(\\d{7})\ue001")  # nine characters, the length of a tool call's id with Mistral
THOUGHT = re.compile(r"(?:(.*)(<think>\s*))?(.*?)(\s*</think>\s*)(?!.*</think>)(\S.*)", re.DOTALL)
THINKING = ("reasoning_content", "thinking", "reasoning")  # the names thinking goes by; templates read the first two
JSON_BEGINS = ("{", "[")  # templates tell by these whether a tool answered with JSON
LITERAL = ("role", "type")  # what templates ask for by its value


@dataclass(frozen=True)
class Marked:
    """A conversation with its texts taken out.

    Attributes:
        key: equal for conversations of one shape.
        messages: the messages with marks.
        texts: the text for each mark, by the mark's number.
        owners: the message of each text.
        kinds: what each text is: "content", "thinking", "call" (of a tool) or "other" (which need not be shown).
        heads: message → what its content begins with before the first mark.
    """

    key: str
    messages: list[dict[str, Any]]
    texts: list[str]
    owners: list[int]
    kinds: list[str]
    heads: dict[int, str]


@dataclass(frozen=True)
class Turn:
    """A reply in a skeleton: its first and last text by their place in `order`, and the characters around them to train."""

    message: int
    first: int
    last: int
    lead: int
    tail: int


@dataclass(frozen=True)
class Skeleton:
    """What the template writes around the texts.

    Attributes:
        pieces: one more than `order`: before, between and after the texts.
        order: the numbers of the texts, as they appear.
        turns: the replies.
        notes: what is worth a warning: (kind, sentence).
    """

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    turns: tuple[Turn, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()


def prepared(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as transformers gives them to a template: no nulls, thinking under both of its usual names."""
    made = []
    for message in messages:
        plain = {key: value for key, value in message.items() if value is not None}
        thought = next((plain[name] for name in THINKING if plain.get(name)), None)
        if thought is not None:
            plain = {**plain, "reasoning_content": thought, "thinking": thought}
        made.append(plain)
    return made


def mark(messages: Sequence[Message]) -> Marked:
    """The conversation with a mark for every text that is not blank. `messages` are `prepared`."""
    found = Marked("", [], [], [], [], {})
    for owner, message in enumerate(messages):
        changed: dict[str, Any] = {}
        for name, value in message.items():
            if name in LITERAL:
                changed[name] = value
            elif name in THINKING:  # one text under two names
                changed[name] = (
                    changed.get("reasoning_content") or changed.get("thinking") or _inside(value, found, owner, "thinking")
                )
            elif name == "content" and isinstance(value, str) and message["role"] == "assistant" and (parts := _thinking(value)):
                changed[name] = _apart(parts, found, owner)
            elif name == "content" and message["role"] == "tool" and isinstance(value, str) and value[:1] in JSON_BEGINS:
                changed[name] = value[:1] + _inside(value[1:], found, owner, "content")
            else:
                changed[name] = _inside(value, found, owner, {"content": "content", "tool_calls": "call"}.get(name, "other"))
        found.messages.append(changed)
    return replace(found, key=json.dumps(found.messages, ensure_ascii=False, sort_keys=True))


def _inside(value: Any, found: Marked, owner: int, kind: str) -> Any:
    """A value with marks for the texts in it."""
    if isinstance(value, str):
        if not value.strip():
            return value
        found.texts.append(value)
        found.owners.append(owner)
        found.kinds.append(kind)
        return f"\ue000{len(found.texts) - 1:07d}\ue001"
    if isinstance(value, Mapping):
        return {
            name: item if name in LITERAL else _inside(item, found, owner, "other" if name == "id" else kind)
            for name, item in value.items()
        }
    return [_inside(item, found, owner, kind) for item in value] if isinstance(value, (list, tuple)) else value


def _thinking(content: str) -> re.Match[str] | None:
    """Content taken apart: what is before the thinking, the opening tag, the thinking, the closing tag, the text."""
    return THOUGHT.fullmatch(content) if "</think>" in content else None


def _apart(parts: re.Match[str], found: Marked, owner: int) -> str:
    """Content with marks for its thinking and its text; the tags stay, and the white space around them."""
    before, opening, thought, closing, text = parts.groups(default="")
    changed = _inside(before, found, owner, "thinking") + opening + _inside(thought, found, owner, "thinking") + closing
    changed += _inside(text, found, owner, "content")
    found.heads[owner] = MARK.split(changed, maxsplit=1)[0]
    return changed


def cut(text: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The pieces of a marked rendering, and the numbers of the marks between them."""
    parts = MARK.split(text)
    return tuple(parts[::2]), tuple(map(int, parts[1::2]))


def forms(text: str) -> Iterator[str]:
    """How a template may write a text: as it is, trimmed, or as the inside of a JSON string."""
    yield text
    if text[0].isspace() or text[-1].isspace():
        yield from dict.fromkeys(
            (text.strip(), text.rstrip(), text.lstrip(), text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))
        )
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]


def match(text: str, texts: Sequence[str], skeleton: Skeleton) -> list[Span] | None:
    """The span of each text in `skeleton.order`, or None if the text is not the pieces around the texts."""
    if not text.startswith(skeleton.pieces[0]):
        return None
    at, spans = len(skeleton.pieces[0]), []
    for number, index in enumerate(skeleton.order):
        after = skeleton.pieces[number + 1]
        last = number + 1 == len(skeleton.order)
        for form in forms(texts[index]):
            end = at + len(form)
            if text.startswith(form, at) and (text[end:] == after if last else text.startswith(after, end)):
                break
        else:
            return None
        spans.append((at, end))
        at = end + len(after)
    return spans if spans or text == skeleton.pieces[0] else None


# -- replies ---------------------------------------------------------------------------------------


def build(
    marked: Marked,
    full: str,
    before: Mapping[int, tuple[str, str] | None],
    stop_in: Callable[[str, bool], str],
    header: str,
) -> Skeleton:
    """The skeleton of a marked rendering.

    Args:
        full: the rendering of `marked.messages`.
        before: for each reply the rendering of what comes before it, without and with the generation prompt; None if the
            template refuses that.
        stop_in: what ends a reply in the text after it: (text, is it a tool call?) → everything up to and with the stop token.
        header: what a template without a generation prompt writes before a reply.

    Raises: RowFault if a reply is left out, written twice, or torn apart.
    """
    pieces, order = cut(full)
    notes: list[tuple[str, str]] = []
    found = []
    for index in before:
        places = [place for place, number in enumerate(order) if marked.owners[number] == index]
        _check(marked, index, [order[place] for place in places], notes)
        if places[-1] - places[0] != len(places) - 1:
            raise RowFault("template_rewrites", f"the chat template writes another text into the reply of turn {index + 1}")
        found.append((index, places))
    turns = []
    said = [places for index, places in found if not marked.messages[index].get("tool_calls")]
    stop = stop_in(pieces[said[-1][-1] + 1], False) if said else ""
    for index, places in found:
        after = pieces[places[-1] + 1]
        if marked.messages[index].get("tool_calls"):
            tail = stop_in(after, True)
        else:  # what stands only after earlier replies is not what ends one
            tail = stop if stop and after.startswith(stop) else ""
        if not tail:
            notes.append(("no_stop", f"the chat template puts no stop token after the reply of turn {index + 1}"))
        turns.append(
            Turn(index, places[0], places[-1], _lead(marked, index, pieces, order, places[0], before[index], header), len(tail))
        )
    first_of_kind = {kind: (kind, sentence) for kind, sentence in reversed(notes)}
    return Skeleton(pieces, order, tuple(turns), tuple(first_of_kind.values()))


def _check(marked: Marked, index: int, shown: Sequence[int], notes: list[tuple[str, str]]) -> None:
    """Is every text of a reply written, and once? Thinking, and text beside a tool call, may be left out, which is told."""
    mine = [number for number, owner in enumerate(marked.owners) if owner == index]
    calls = [number for number in mine if marked.kinds[number] == "call"]
    if any(shown.count(number) != 1 for number in calls):
        raise RowFault("tool_call", f"the chat template does not show the tool call of turn {index + 1} as it is")
    for number in mine:
        kind, times = marked.kinds[number], shown.count(number)
        if times == 0 and kind == "thinking":
            notes.append(("thinking_dropped", f"the chat template leaves out the thinking of turn {index + 1}"))
        elif times == 0 and kind == "content" and calls:
            notes.append(("text_dropped", f"the chat template leaves out the text beside the tool call of turn {index + 1}"))
        elif times != 1 and kind != "other":
            raise RowFault("template_rewrites", f"the chat template writes the reply of turn {index + 1} {times} times")
    if not shown:
        raise RowFault("template_rewrites", f"the chat template writes the reply of turn {index + 1} 0 times")


def _lead(
    marked: Marked,
    index: int,
    pieces: Sequence[str],
    order: Sequence[int],
    first: int,
    before: tuple[str, str] | None,
    header: str,
) -> int:
    """Characters between the generation prompt and the reply's first text: at inference the model itself writes them.

    Compared is what stands after the last text before the reply, so that it does not matter if earlier turns are written
    differently once there is a reply.
    """
    glue = pieces[first]
    head = marked.heads.get(index, "")
    own = len(head) if head and glue.endswith(head) else 0
    if before is None:
        return own
    plain, prompt = before
    (*_, end), numbers = cut(prompt)
    if numbers and first and numbers[-1] != order[first - 1]:
        return own
    if not glue.startswith(end):
        return own
    lead = glue[len(end) :]
    if prompt == plain:  # there is no generation prompt, so that the header of the turn is still to come
        return len(lead) - len(header) if lead.startswith(header) else own
    return len(lead)
