"""One reply, streamed as it is written."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from nbkit.chat.prompts import Message, answering, render, room, settings


class TextStream:
    """The pieces of a reply, as they are written by a worker thread; iterate over it, or read `.text`.

    The worker starts with the first piece that is asked for. As a cell's last expression it prints itself piece by piece.
    """

    def __init__(self, write: Any) -> None:
        self._write = write  # write(put, stopped): generates, and puts pieces of text
        self._pieces: list[str] = []
        self._news = threading.Condition()
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self._ended = False
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        """Yields pieces of text from the start; leaving the loop early ends the reply. Raises: what generation raised."""
        self._start()
        seen = 0
        try:
            while True:
                with self._news:
                    while len(self._pieces) == seen and not self._ended:
                        self._news.wait()
                    fresh = self._pieces[seen:]
                if not fresh:
                    break
                seen += len(fresh)
                yield from fresh
        except BaseException:
            self.stop()
            raise
        if self._error is not None:
            raise self._error

    @property
    def text(self) -> str:
        """The whole reply; waits for its end. Raises: what generation raised."""
        return "".join(self)

    def stop(self) -> None:
        """End the reply after the token that is being written."""
        self._halt.set()

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"TextStream({''.join(self._pieces)!r}{'' if self._ended else ' …'})"

    def _ipython_display_(self) -> None:
        for piece in self:
            print(piece, end="", flush=True)
        print()

    def _start(self) -> None:
        with self._news:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="nbkit-chat", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        try:
            self._write(self._put, self._halt.is_set)
        except BaseException as error:  # raised again where the stream is read
            self._error = error
        finally:
            self._write = None  # lets go of the model
            with self._news:
                self._ended = True
                self._news.notify_all()

    def _put(self, piece: str) -> None:
        if piece:
            with self._news:
                self._pieces.append(piece)
                self._news.notify_all()


def stream(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    use_adapter: bool = True,
    seed: int | None = None,
    system: str | None = None,
) -> TextStream:
    """The reply to a conversation that ends with the user's message.

    Args:
        temperature: 0 is greedy.
        top_p: nucleus sampling (arXiv 1904.09751), used when temperature is above 0.
        use_adapter: False asks the base model, with the LoRA adapter switched off.
        seed: of the sampling; None goes on with torch's random state.
    Raises: ModelError for a prompt that fills the context, a tokenizer without a chat template, settings out of range.
    """
    text = render(tokenizer, messages, system)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    limit = room(model, inputs["input_ids"].shape[1], max_new_tokens)
    choices = settings(model, tokenizer, temperature, top_p)
    device = model.get_input_embeddings().weight.device

    def write(put: Any, stopped: Any) -> None:
        import torch

        ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
        with answering(model, use_adapter), torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            streamer = _streamer(tokenizer, put)
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=limit,
                streamer=streamer,
                stopping_criteria=_criteria(stopped),
                **choices,
            )

    return TextStream(write)


def _streamer(tokenizer: Any, put: Any) -> Any:
    """transformers' TextStreamer, whose pieces go to `put`: it holds words back until their bytes are whole."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            put(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _criteria(stopped: Any) -> Any:
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Asked(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((input_ids.shape[0],), stopped(), dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([Asked()])
