"""Rows become labelled sequences, chunk by chunk: read and rendered on this thread, tokenised on another.

Tokenising lets go of the interpreter, so both go on at once; whatever the number of rows, no more than a few chunks of them
are held. What became of each row is told as an `Outcome`.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from nbkit.config import DataRecipe
from nbkit.data import fitting
from nbkit.data.findings import RowFault
from nbkit.data.fitting import Piece, Turns
from nbkit.data.formats import Conversation, to_conversation
from nbkit.data.sources import Row, Source
from nbkit.data.template import Labelled, Rendered, Renderer
from nbkit.data.template import Row as Asked
from nbkit.errors import DataError

CHUNK = 256  # rows that are tokenised together, by as many threads as the tokenizer likes
CHUNK_CHARACTERS = 1 << 21  # and no more text than this, but for a single row
UNUSED_TEMPLATE = "vicuna"  # raw text needs none, and base models often have none
AHEAD = 2  # chunks that are rendered before the first of them must be tokenised


@dataclass(frozen=True)
class Outcome:
    """One row and what is made of it: `pieces` to train on, several if it was split; none if there is a `fault`.

    `length`: tokens of the row as it came, 0 if it has none; without `counted` it has more. `notes` are worth a warning:
    (kind, sentence)."""

    row: Row
    pieces: tuple[Piece, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    fault: RowFault | None = None
    length: int = 0
    liked: bool | None = None
    counted: bool = True


@dataclass
class _Asked:
    """A row on its way: its conversation, and the text of it and of its rejected twin."""

    row: Row
    conversation: Conversation | None = None
    rendered: list[Rendered] = field(default_factory=list)
    fault: RowFault | None = None


class Mapping:
    """How rows of one recipe are mapped. `outcomes` may be asked for again and again, by one thread at a time.

    Of preferences and of KTO the completion alone bears labels, as that is what these methods compare.

    Args:
        recipe: as `detect` has filled it.
        limit: tokens of the longest sequence, max_seq_length.
    Raises: DataError if the tokenizer has no template where one is needed.
    """

    def __init__(self, recipe: DataRecipe, tokenizer: Any, limit: int) -> None:
        self.recipe, self.limit = recipe, limit
        plain = recipe.format == "text" and recipe.template is None and not tokenizer.chat_template
        template = UNUSED_TEMPLATE if plain else recipe.template
        train_on = "completions" if recipe.format in ("preference", "kto") else recipe.train_on
        self.renderer = Renderer(tokenizer, template=template, train_on=train_on)

    def outcomes(self, rows: Iterable[Row]) -> Generator[Outcome, None, None]:
        """What becomes of each row, in order. To be closed if it is not read to its end."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="nbkit-tokens")
        waiting: deque[tuple[list[_Asked], Future[list[Labelled | RowFault]]]] = deque()
        try:
            for chunk in _chunks(map(self._ask, rows)):
                self._render(chunk)
                waiting.append((chunk, pool.submit(self._label, chunk)))
                if len(waiting) > AHEAD:
                    yield from self._settled(*waiting.popleft(), pool)
            while waiting:
                yield from self._settled(*waiting.popleft(), pool)
        finally:  # whoever asked may have had enough
            pool.shutdown(cancel_futures=True)

    def _ask(self, row: Row) -> _Asked:
        try:
            if row.fault is not None:
                raise row.fault
            return _Asked(row, to_conversation(row.value, self.recipe))
        except RowFault as fault:
            return _Asked(row, fault=fault)

    def _render(self, chunk: list[_Asked]) -> None:
        """Conversations become texts; of a row with a fault only the fault stays."""
        asked = [(one, side) for one in chunk if one.conversation is not None for side in _sides(one.conversation)]
        for (one, _), found in zip(asked, self.renderer.render_rows([side for _, side in asked]), strict=True):
            if isinstance(found, RowFault):
                one.fault = one.fault or found
            else:
                one.rendered.append(found)
        for one in chunk:
            if one.fault is not None:
                one.rendered.clear()

    def _label(self, chunk: list[_Asked]) -> list[Labelled | RowFault]:
        """On the thread that tokenises, and there alone: a tokenizer must not be set up while it is at work."""
        for one in chunk:
            if one.conversation is not None and one.conversation.text is not None:
                one.rendered.append(self.renderer.render_text(one.conversation.text))
        most = None if self.recipe.too_long == "split" else self.limit  # what is split is wanted whole
        return self.renderer.label([text for one in chunk for text in one.rendered], most)

    def _settled(
        self, chunk: list[_Asked], labelled: Future[list[Labelled | RowFault]], pool: ThreadPoolExecutor
    ) -> Iterator[Outcome]:
        results = iter(labelled.result())
        settled: list[Outcome] = []
        long: list[tuple[int, Turns]] = []
        for asked in chunk:
            outcome, turns = self._outcome(asked, [next(results) for _ in asked.rendered])
            if turns is not None:
                long.append((len(settled), turns))
            settled.append(outcome)
        if long:
            measure = functools.partial(self._measure, pool)
            made = fitting.fit(
                [turns for _, turns in long], self.recipe.too_long, self.limit, measure, self.renderer.tokenizer.bos_token_id
            )
            for (place, _), result in zip(long, made, strict=True):
                settled[place] = self._fitted(settled[place], result)
        yield from settled

    def _outcome(self, asked: _Asked, results: Sequence[Labelled | RowFault]) -> tuple[Outcome, Turns | None]:
        """What became of a row, and its turns if it is too long and the recipe has a way with that."""
        fault = asked.fault or next((result for result in results if isinstance(result, RowFault)), None)
        if fault is not None or asked.conversation is None:
            return Outcome(asked.row, fault=fault), None
        conversation, labels = asked.conversation, [result for result in results if isinstance(result, Labelled)]
        notes = tuple(dict.fromkeys((*conversation.notes, *(note for one in asked.rendered for note in one.notes))))
        length = max(map(_size, labels))
        piece = Piece(conversation.messages, asked.rendered[0], labels[0])
        if len(labels) == 2:
            piece = Piece(piece.messages, piece.rendered, piece.labelled, (asked.rendered[1], labels[1]))
        fault = self._fault(piece, length)
        counted = all(one.whole for one in labels)
        outcome = Outcome(asked.row, () if fault else (piece,), notes, fault, length, conversation.label, counted)
        if fault is None or fault.kind != "too_long" or self.recipe.too_long not in ("cut", "split"):
            return outcome, None
        return outcome, Turns(conversation, piece)

    def _fault(self, piece: Piece, length: int) -> RowFault | None:
        if length > self.limit:
            whole = piece.labelled if piece.rejected is None else max(piece.labelled, piece.rejected[1], key=_size)
            remedy = "raise max_seq_length or shorten the row"
            return RowFault("too_long", f"the row has {whole.size}, max_seq_length is {self.limit:,}; {remedy}")
        if not piece.trains:
            return RowFault("no_trained_token", "the tokenizer makes no token of the reply, so nothing would be trained")
        return None

    def _measure(self, pool: ThreadPoolExecutor, conversations: Sequence[Conversation]) -> list[Piece | RowFault]:
        """Many conversations rendered and labelled together; a fault where the template or the tokenizer refuses one."""
        rendered = self.renderer.render_rows([_sides(conversation)[0] for conversation in conversations])
        good = [one for one in rendered if isinstance(one, Rendered)]
        results = iter(pool.submit(self.renderer.label, good, self.limit).result())
        made: list[Piece | RowFault] = []
        for conversation, one in zip(conversations, rendered, strict=True):
            result = one if isinstance(one, RowFault) else next(results)
            if isinstance(one, Rendered) and isinstance(result, Labelled):
                made.append(Piece(conversation.messages, one, result))
            elif isinstance(result, RowFault):
                made.append(result)
        return made

    @staticmethod
    def _fitted(outcome: Outcome, result: fitting.Fitted) -> Outcome:
        if not result.pieces:
            fault = RowFault("too_long", f"{outcome.fault}; {result.sentence}")
            return replace(outcome, fault=fault)
        return replace(outcome, pieces=tuple(result.pieces), notes=(*outcome.notes, (result.kind, result.sentence)), fault=None)


class Reread:
    """Rows of a source that are looked at once more. Going forward it reads on, going back it begins anew."""

    def __init__(self, source: Source, mapping: Mapping) -> None:
        self._source, self._mapping = source, mapping
        self._lock = threading.Lock()
        self._rows: Iterator[Row] = iter(())
        self._last: Row | None = None

    @property
    def tokenizer(self) -> Any:
        return self._mapping.renderer.tokenizer

    @property
    def renderer(self) -> Renderer:
        return self._mapping.renderer

    def outcome(self, number: int) -> Outcome:
        """What becomes of the row of this number. Raises: DataError if it is no longer there."""
        with self._lock:
            (outcome,) = self._mapping.outcomes([self._row(number)])
        return outcome

    def outcomes(self, numbers: Iterable[int]) -> Iterator[Outcome]:
        """The same of many rows, in order of their numbers."""
        wanted = sorted(set(numbers))
        with self._lock:
            yield from self._mapping.outcomes(self._row(number) for number in wanted)

    def _row(self, number: int) -> Row:
        if self._last is not None and self._last.number == number:
            return self._last
        if isinstance(self._source.rows, list):
            self._rows = iter(self._source.rows[number - 1 : number])
        elif self._last is None or self._last.number > number:
            self._rows = iter(self._source.rows)
        for row in self._rows:
            if row.number >= number:
                break
        else:
            raise DataError(f"Row {number} is no longer in {self._source.name}; read the data again.")
        self._last = row
        if row.number > number:
            raise DataError(f"Row {number} is no longer in {self._source.name}; read the data again.")
        return row


def _size(labelled: Labelled) -> int:
    return len(labelled.input_ids)


def _sides(conversation: Conversation) -> list[Asked]:
    """What is to be rendered of a conversation: nothing of raw text, both answers of a preference."""
    sides = [conversation.messages, *([] if conversation.rejected is None else [conversation.rejected])]
    start, tools = conversation.completion_start, conversation.tools
    return [] if conversation.text is not None else [Asked(messages, tools, start) for messages in sides]


def _chunks(asked: Iterable[_Asked]) -> Iterator[list[_Asked]]:
    chunk: list[_Asked] = []
    characters = 0
    for one in asked:
        chunk.append(one)
        if one.conversation is not None:
            characters += len(one.conversation.text or "") + sum(len(m.get("content") or "") for m in one.conversation.messages)
        if len(chunk) == CHUNK or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
