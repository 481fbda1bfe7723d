"""The chat panel: one prompt, the base model's reply beside the tuned one's, streamed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import ipywidgets as widgets

from nbkit.errors import ConfigError, DataError, TrainingError
from nbkit.widgets import _code, _fields, _html
from nbkit.widgets._panel import Panel

if TYPE_CHECKING:
    from nbkit.engine import Session

INTERVAL = 0.1  # seconds between two drawings, so at most 10 a second
SEED = 3407
KEPT = 8  # exchanges that stay in sight
REPLY_LIMIT = 6000  # characters of a reply that are shown


@dataclass
class Exchange:
    """One prompt and its replies. `tuned` is None where there is no adapter; `expected` where the prompt is nobody's."""

    prompt: str
    base: str = ""
    tuned: str | None = None
    expected: str | None = None
    writing: str = ""  # the side that is being written: "base", "tuned" or ""


class ChatPanel(Panel):
    """Ask the model before and after training. Buttons: `send`, `stop`, `example`; settings: prompt, max_new_tokens, temperature.

    In a notebook: `panel.set(prompt=…)`, `panel.click("send")`, then `await panel.finished()` and read `panel.exchanges`.
    """

    name: ClassVar[str] = "chat"
    title: ClassVar[str] = "Chat, before and after"

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.exchanges: list[Exchange] = []
        self._halt = False
        self._writing: Any = None  # the stream of the reply that is being written
        self._example = -1
        self._talk = _html.html(self._talk_html())
        prompt = self._field("prompt", _fields.area("Prompt", hint="Ask something; both models answer"))
        tokens = self._field("max_new_tokens", _fields.whole("Most tokens", 128))
        temperature = self._field("temperature", _fields.real("Temperature", 0.0))
        send = self._button("send", "Send", self._send, "Ask the base model and the tuned one", primary=True)
        stop = self._button("stop", "Stop", self._stop, "Stop writing")
        example = self._button("example", "Held-out prompt", self._take_example, "Fill in a prompt that was not trained on")
        row = widgets.HBox([tokens, temperature, send, stop, example])
        row.add_class("nbk-row")
        self._enable({"stop": False})
        self._compose(prompt, row, self._talk)

    def require_silence(self) -> None:
        """Raises: TrainingError while a reply is being written, as that switches the adapter off and on."""
        if any(exchange.writing for exchange in self.exchanges):
            raise TrainingError("A reply is being written; press Stop in the chat or wait for its end, then start.")

    def _send(self) -> None:
        values = self.values()
        prompt = values["prompt"]
        if not prompt.strip():
            raise ConfigError("The prompt is empty; write a question first.")
        if values["max_new_tokens"] < 1 or values["temperature"] < 0:
            raise ConfigError("The longest reply must be at least 1 token, and the temperature must not be below 0.")
        exchange = Exchange(prompt, expected=self._expected(prompt))
        sides = [("base", False)] if self.session.lora is None else [("base", False), ("tuned", True)]
        # The first stream is made here, so that what cannot be asked is refused before anything is shown.
        first = self._stream(exchange, values, sides[0][1])
        self._halt = False
        self.exchanges = [*self.exchanges[1 - KEPT :], exchange]
        exchange.writing = sides[0][0]
        self._enable({"send": False, "stop": True})
        self._launch(lambda: self._answer(exchange, values, sides, first))

    def _stream(self, exchange: Exchange, values: dict[str, Any], adapter: bool) -> Any:
        return self.session.chat(exchange.prompt, **_asking(values), adapter=adapter)

    async def _answer(self, exchange: Exchange, values: dict[str, Any], sides: list[tuple[str, bool]], first: Any) -> None:
        """One reply after the other: both come from the same weights, with the adapter switched off and on."""
        try:
            for side, adapter in sides:
                if self._halt:
                    break
                stream = first if side == sides[0][0] else self._stream(exchange, values, adapter)
                exchange.writing = side
                setattr(exchange, side, "")
                await self._write(exchange, side, stream)
        finally:
            exchange.writing = ""
            self._enable({"send": True, "stop": False})
            self._draw()
        self.update_saved()

    async def _write(self, exchange: Exchange, side: str, stream: Any) -> None:
        """Read the stream on another thread, so that the kernel goes on answering, and show what has come ten times a second."""
        pieces: list[str] = []

        def read() -> None:
            for piece in stream:
                pieces.append(piece)

        self._writing = stream
        reader = asyncio.ensure_future(asyncio.to_thread(read))
        try:
            while not reader.done():
                await asyncio.wait({reader}, timeout=INTERVAL)
                setattr(exchange, side, "".join(pieces))
                self._draw()
            await reader
        except asyncio.CancelledError:
            self._stop()  # the interrupt button: the reply ends with its current token
            raise

    def _stop(self) -> None:
        self._halt = True
        if self._writing is not None:
            self._writing.stop()

    def _take_example(self) -> None:
        """The next prompt of the held-out rows."""
        rows = self._held_out()
        if not rows:
            raise DataError("There are no held-out rows; map data with held_out to have prompts that were not trained on.")
        self._example = (self._example + 1) % len(rows)
        self.set(prompt=_asked(rows[self._example]))

    def _held_out(self) -> list[Any]:
        return [] if self.session.data is None else list(self.session.data.held_out_rows)

    def _expected(self, prompt: str) -> str | None:
        return next((row[-1]["content"] for row in self._held_out() if _asked(row) == prompt), None)

    # -- how it looks ------------------------------------------------------------------------------

    def _draw(self) -> None:
        _html.show(self._talk, self._talk_html())
        self._refresh()

    def _talk_html(self) -> _html.Markup:
        return _html.tag("div", {"class": "nbk-talk"}, *(self._exchange_html(one) for one in reversed(self.exchanges)))

    def _exchange_html(self, one: Exchange) -> _html.Markup:
        if one.tuned is None and self.session.lora is None:
            sides = [("Model", one.base, one.writing == "base")]
        else:
            tuned = "" if one.tuned is None else one.tuned
            sides = [("Base model", one.base, one.writing == "base"), ("With the adapter", tuned, one.writing == "tuned")]
        if one.expected is not None:
            sides.append(("Expected", one.expected, False))
        return _html.tag(
            "div",
            {"class": "nbk-exchange"},
            _html.tag("div", {"class": "nbk-prompt", "dir": "auto"}, _html.tag("b", None, "Prompt "), _html.text(one.prompt)),
            _html.tag("div", {"class": "nbk-columns"}, *(_reply(*side) for side in sides)),
        )

    def _summary(self) -> str:
        return f"{len(self.exchanges)} asked" if self.exchanges else ""

    def _calls(self) -> list[str]:
        values = self.values()
        usual = {"max_new_tokens": 128, "temperature": 0.0, "seed": None}
        keywords = {name: value for name, value in _asking(values).items() if value != usual[name]}
        after = [] if self.session.lora is None else [_code.call("print", [self._ask(values["prompt"], keywords)])]
        return [_code.call("print", [self._ask(values["prompt"], keywords | {"adapter": False})]), *after]

    def _ask(self, prompt: str, keywords: dict[str, Any]) -> _code.Source:
        return _code.Source(f"{_code.call('session.chat', [prompt], keywords)}.text")

    def _static_body(self) -> _html.Markup:
        return self._talk_html()


def _asking(values: dict[str, Any]) -> dict[str, Any]:
    """How both sides are asked: where chance plays a part, with the same seed."""
    seed = SEED if values["temperature"] > 0 else None
    return {"max_new_tokens": values["max_new_tokens"], "temperature": values["temperature"], "seed": seed}


def _asked(row: Any) -> str:
    """The user's last message of a row of messages."""
    return row[-2]["content"]


def _reply(label: str, said: str, writing: bool) -> _html.Markup:
    state = _html.tag("span", {"class": "nbk-writing"}, " writing …") if writing else ""
    body = _html.tag("div", {"class": "nbk-said", "dir": "auto"}, _html.text(said, REPLY_LIMIT) if said else "\u2007")
    return _html.tag("div", {"class": "nbk-reply"}, _html.tag("b", None, label), state, body)
