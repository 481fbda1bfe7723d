"""Rows that are longer than max_seq_length, cut or split where one message ends and the next begins.

How long a shorter conversation is only its rendering tells, as templates treat first and last turns in their own way. So
each search is a generator that asks for one conversation to be measured at a time, and the searches of many rows go side by
side, so that what they ask for is tokenised together.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nbkit.config import IGNORE_INDEX
from nbkit.data.findings import RowFault
from nbkit.data.formats import Conversation, Message
from nbkit.data.template import Labelled, Rendered

SLACK = 64  # tokens by which a run may be shorter alone than within the whole conversation
LOOK_BACK = 64  # tokens that a piece of raw text may be shorter for, so that it ends between two words


@dataclass(frozen=True)
class Piece:
    """One sequence of a row: its messages (none for raw text), text and labels; `rejected` of a preference pair."""

    messages: list[Message]
    rendered: Rendered
    labelled: Labelled
    rejected: tuple[Rendered, Labelled] | None = None

    @property
    def trains(self) -> bool:
        """Whether a loss is borne; the label at position 0 has nothing before it to be predicted from."""
        sides = [self.labelled, *([self.rejected[1]] if self.rejected else [])]
        return all(bool((side.labels[1:] != IGNORE_INDEX).any()) for side in sides)


@dataclass(frozen=True)
class Turns:
    """A row that is too long: its conversation, and the whole of it as labelled."""

    conversation: Conversation
    whole: Piece


@dataclass(frozen=True)
class Fitted:
    """What fits, and a sentence on what was done. Without `pieces` nothing fits, and the sentence says why."""

    pieces: list[Piece]
    kind: str
    sentence: str


Measure = Callable[[list[Conversation]], list[Piece | RowFault]]
Search = Generator[Conversation, Piece | RowFault, Fitted]


def fit(rows: Sequence[Turns], way: str, limit: int, measure: Measure, bos: int | None = None) -> list[Fitted]:
    """Each row cut or split (`way`), so that every piece has at most `limit` tokens.

    Args:
        measure: renders and labels conversations.
        bos: the id that raw text may begin with; every piece of it then does.
    """
    searches = [_search(row, way, limit, bos) for row in rows]
    done: dict[int, Fitted] = {}
    asked: dict[int, Conversation] = {}
    for number, search in enumerate(searches):
        _go_on(search, None, number, asked, done)
    while asked:
        waiting, asked = asked, {}
        for number, result in zip(waiting, measure(list(waiting.values())), strict=True):
            _go_on(searches[number], result, number, asked, done)
    return [done[number] for number in range(len(rows))]


def _go_on(search: Search, result: Any, number: int, asked: dict[int, Conversation], done: dict[int, Fitted]) -> None:
    try:
        asked[number] = search.send(result)
    except StopIteration as stop:
        done[number] = stop.value


def _search(row: Turns, way: str, limit: int, bos: int | None) -> Search:
    if row.whole.rejected is not None:
        return _cannot(way, "a pair of answers can be neither cut nor split")
    if not row.conversation.messages:
        return _text(row.whole, way, limit, bos)
    return (_cut if way == "cut" else _split)(row, limit)


def _cannot(way: str, sentence: str) -> Search:
    return Fitted([], way, sentence)
    yield  # a generator that asks for nothing


def _ends(messages: Sequence[Message], first: int) -> list[int]:
    """Where a conversation may end: after a reply that the user answers (so no call is parted from its result), or at the very
    end; counted in messages."""
    return [
        end
        for end in range(first + 1, len(messages) + 1)
        if messages[end - 1]["role"] == "assistant" and (end == len(messages) or messages[end]["role"] == "user")
    ]


def _cut(row: Turns, limit: int) -> Search:
    messages, total = row.conversation.messages, len(row.whole.labelled.input_ids)
    first = row.conversation.completion_start or 0
    shorter = [end for end in _ends(messages, first) if end < len(messages)]
    at = _token_ends(row.whole)
    runs = [messages[:end] for end in shorter]
    found, place = yield from _longest(row.conversation, runs, [at[end] for end in shorter], limit)
    if found is None:
        return Fitted([], "cut", "cut after its first reply it would still be too long" if shorter else "it is a single turn")
    left, count = len(found.labelled.input_ids), len(messages) - shorter[place]
    said = f"{total - left:,} of {total:,} tokens" if row.whole.labelled.whole else f"{left:,} tokens are left"
    return Fitted([found], "cut", f"the last {count} of {len(messages)} turns are cut off, {said}")


def _split(row: Turns, limit: int) -> Search:
    messages, total = row.conversation.messages, len(row.whole.labelled.input_ids)
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), 0)
    system, ends = messages[:start], _ends(messages, start)
    if len(ends) < 2 or row.conversation.completion_start:
        return Fitted([], "split", "it has no turns between which it could be split")
    at = _token_ends(row.whole)
    pieces: list[Piece] = []
    left_out: list[str] = []
    while further := [end for end in ends if end > start]:
        runs = [[*system, *messages[start:end]] for end in further]
        sizes = [at[len(system)] + at[end] - at[start] for end in further]
        found, place = yield from _longest(row.conversation, runs, sizes, limit)
        if found is None:
            left_out.append(f"{start + 1} to {further[0]}")
        else:
            pieces.append(found)
        start = further[max(place, 0)]
    if not pieces:
        return Fitted([], "split", "each of its turns alone is too long")
    again = ", each with the system message" if system and len(pieces) > 1 else ""
    without = f"; the turns {', '.join(left_out)} are too long alone and are left out" if left_out else ""
    made = f"{len(pieces)} conversations" if len(pieces) > 1 else "one shorter conversation"
    return Fitted(pieces, "split", f"the row of {total:,} tokens is made into {made}{again}{without}")


def _longest(
    conversation: Conversation, runs: list[list[Message]], sizes: list[int], limit: int
) -> Generator[Conversation, Piece | RowFault, tuple[Piece | None, int]]:
    """The longest of the runs, which grow, that has at most `limit` tokens and trains something; and its place, or -1.

    `sizes` are what the runs take up in the whole conversation, which is about what they take up alone: the first guess is from
    them, and a run that is longer by more than `SLACK` is not tried. From there the search steps, and then halves what is left.
    """
    low, high, best, step = -1, max(1, sum(size <= limit + SLACK for size in sizes)), None, 0
    high = min(high, len(runs))
    place = min(max(sum(size <= limit for size in sizes) - 1, 0), high - 1)
    while high - low > 1:
        piece = yield replace(conversation, messages=list(runs[place]))
        if isinstance(piece, Piece) and len(piece.labelled.input_ids) <= limit and piece.trains:
            low, best = place, piece
        else:
            high = place
        step += 1
        beside = low + 1 if low == place else high - 1
        place = beside if step < 3 else (low + high) // 2
    return best, low


def _token_ends(whole: Piece) -> list[int]:
    """About how many tokens there are up to the end of each message, the end of none (0) first: where its text ends in the
    rendering, or in the same share of the characters where the template has changed the text."""
    text, ends = whole.rendered.text, whole.labelled.spans[:, 1]
    at, places = 0, [0]
    for message in whole.messages:
        content = message.get("content") or ""
        found = text.find(content, at)
        at = found + len(content) if found >= 0 else min(len(text), at + len(content))
        places.append(at)
    return np.searchsorted(np.maximum.accumulate(ends), places).tolist()


def _text(whole: Piece, way: str, limit: int, bos: int | None) -> Search:
    """Raw text, in pieces of about equal length that end between two words where there is such a place nearby."""
    ids = whole.labelled.input_ids
    begins = bool(bos is not None and len(ids) and ids[0] == bos)
    edges, room = [int(begins)], limit - begins
    while len(ids) - edges[-1] > room:
        left = len(ids) - edges[-1]
        edges.append(_edge(whole, edges[-1], edges[-1] + -(-left // -(-left // room))))
        if way == "cut":
            edges[-1] = _edge(whole, edges[0], edges[0] + room)
            break
    if way == "split":
        edges.append(len(ids))
    pieces = [_part(whole, begins, start, end) for start, end in zip(edges, edges[1:], strict=False)]
    pieces = [piece for piece in pieces if piece.trains]
    if way == "cut":
        return Fitted(pieces, way, f"the text is cut after {edges[1]:,} of {whole.labelled.size}, so that it has no stop token")
    first = "each begins with BOS, " if begins else ""
    said = f"the text of {len(ids):,} tokens is made into {len(pieces)} pieces; {first}only the last has the end of the text"
    return Fitted(pieces, way, said)
    yield


def _edge(whole: Piece, start: int, end: int) -> int:
    """The last place before token `end` at which a word begins, at most `LOOK_BACK` tokens back; else where a character does."""
    text, spans = whole.rendered.text, whole.labelled.spans
    nearby = range(end, max(start + 1, end - LOOK_BACK), -1)
    for place in nearby:
        at = int(spans[place, 0])
        if text[at : at + 1].isspace() or text[at - 1 : at].isspace():
            return place
    return next((place for place in nearby if int(spans[place, 0]) >= int(spans[place - 1, 1])), end)


def _part(whole: Piece, begins: bool, start: int, end: int) -> Piece:
    ids, labels, spans = whole.labelled.input_ids, whole.labelled.labels, whole.labelled.spans
    head = slice(0, int(begins))
    lead = int(spans[0, 1]) if begins else 0
    first = int(spans[start, 0])
    text = whole.rendered.text[:lead] + whole.rendered.text[first : int(spans[end - 1, 1])]
    labelled = Labelled(
        np.concatenate([ids[head], ids[start:end]]),
        np.concatenate([labels[head], labels[start:end]]),
        np.concatenate([spans[head], spans[start:end] - first + lead]),
    )
    return Piece([], replace(whole.rendered, text=text, trained=(), texts=()), labelled)
