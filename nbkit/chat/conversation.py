"""One reply, streamed: a worker thread writes it, whoever iterates reads the pieces as they come."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nbkit.chat.decode import answering, check_room, explained, lock_of, sampler, tokens
from nbkit.chat.prompt import conversation, encode, stop_ids

BROKEN = "\ufffd"  # stands for bytes that are no whole character yet


def stream(
    model: Any,
    tokenizer: Any,
    messages: str | Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    use_adapter: bool = True,
    seed: int | None = None,
    system: str | None = None,
) -> TextStream:
    """Start a reply; it is written in a thread of its own, one at a time for each model.

    Args:
        messages: the user's text, or messages with role and content that end in the user's.
        temperature: 0 is greedy.
        use_adapter: False asks the base model; the adapter is only switched off while the reply is written.
        seed: for sampling; the same seed gives the same reply, and the global random state is left alone.
        system: a system message for a conversation that has none.
    Raises: DataError or ConfigError at once, for what cannot be asked; errors of the writing itself are raised to
        whoever reads the stream.
    """
    choose = sampler(temperature, top_p, seed)
    ids = encode(tokenizer, [conversation(messages, system)])[0]
    room = check_room(model, len(ids), max_new_tokens)
    stops = stop_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id or 0

    def write(should_stop: Callable[[], bool]) -> Iterator[str]:
        with answering(model, use_adapter, should_stop) as mine:
            if mine:
                steps = tokens(model, [ids], pad_id, [room], choose, stops, should_stop)
                yield from text_pieces(tokenizer, (token for (token,) in steps if token is not None))

    return TextStream(write)


def is_answering(model: Any) -> bool:
    """Whether a reply of this model is being written; it must not be trained, exported or changed meanwhile."""
    return lock_of(model).locked()


def text_pieces(tokenizer: Any, ids: Iterator[int]) -> Iterator[str]:
    """Text as it becomes certain. Joined, the pieces are the whole reply without special tokens.

    Each new token is decoded together with those of the piece before it, since some tokenizers write a token
    differently at the beginning of a text; bytes of an unfinished character wait for the rest.
    """
    kept: list[int] = []
    shown = 0  # tokens of `kept` whose text is out

    def text(of: Sequence[int]) -> str:
        return tokenizer.decode(of, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    for token in ids:
        kept.append(token)
        before, now = text(kept[:shown]), text(kept)
        if len(now) > len(before) and not now.endswith(BROKEN):
            yield now[len(before) :]
            kept = kept[shown:]
            shown = len(kept)
    rest = text(kept)[len(text(kept[:shown])) :]
    if rest:
        yield rest


class TextStream:
    """A reply that is being written. Iterate for its pieces (again and again, from the start), or read `.text` for all of it.

    As the last expression of a cell it writes itself into the output as it comes. A stream that nobody holds any more stops.
    """

    def __init__(self, write: Callable[[Callable[[], bool]], Iterator[str]]) -> None:
        self._page = _Page()
        # The thread knows the page, not the stream, so that a dropped stream is collected and stops it.
        self._worker = threading.Thread(target=self._page.fill, args=(write,), name="nbkit-chat", daemon=True)
        weakref.finalize(self, self._page.stop.set)
        self._worker.start()

    def __iter__(self) -> Iterator[str]:
        at = 0
        while True:
            try:
                piece = self._page.piece(at)
            except KeyboardInterrupt:
                self.stop()
                raise
            if piece is None:
                return
            yield piece
            at += 1

    @property
    def text(self) -> str:
        """The whole reply; waits for its end."""
        return "".join(self)

    @property
    def done(self) -> bool:
        """Whether no more will come."""
        return self._page.done

    def stop(self) -> None:
        """End the reply after the token that is being computed, and wait for that. What has come stays."""
        self._page.stop.set()
        self._worker.join()

    def _ipython_display_(self) -> None:
        for piece in self:
            print(_visible(piece), end="", flush=True)
        print()

    def __repr__(self) -> str:
        return f"TextStream({'done' if self.done else 'writing'}, {len(self._page.pieces)} pieces)"


class _Page:
    """What is shared between the writing thread and the readers."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.done = False
        self.error: Exception | None = None
        self.stop = threading.Event()
        self._changed = threading.Condition()

    def fill(self, write: Callable[[Callable[[], bool]], Iterator[str]]) -> None:
        pieces = write(self.stop.is_set)
        error: Exception | None = None
        try:
            if not self.stop.is_set():
                for piece in pieces:
                    with self._changed:
                        self.pieces.append(piece)
                        self._changed.notify_all()
        except Exception as caught:  # kept for whoever reads
            error = explained(caught)
        finally:
            pieces.close()  # type: ignore[attr-defined]  # lets the model go
            with self._changed:
                self.error, self.done = error, True
                self._changed.notify_all()

    def piece(self, at: int) -> str | None:
        """The piece at `at`, waited for; None at the end. Raises: the worker's error, after all pieces."""
        with self._changed:
            self._changed.wait_for(lambda: self.done or at < len(self.pieces))
            if at < len(self.pieces):
                return self.pieces[at]
            if self.error is not None:
                raise self.error
            return None


def _visible(piece: str) -> str:
    """Control characters as their pictures: a reply must not move the cursor or colour what follows."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in piece)
