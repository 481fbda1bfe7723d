"""`Panel`: what every panel of nbkit is, whether a hand or a line of code drives it.

A panel has named settings (`set`, `values`), named buttons (`click`), the code that does the same (`code`), a form for
places without a kernel (`static_html`), and one area in which it says what happened: a sentence, never a traceback.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import ipywidgets as widgets

from nbkit.errors import ConfigError, NbkitError, nearest
from nbkit.widgets import _html
from nbkit.widgets._fields import Field
from nbkit.widgets._shown import Shown

if TYPE_CHECKING:
    from nbkit.engine import Session

CODE_LIMIT = 20_000  # characters of code that are shown; `print(panel.code())` has no limit
TOPICS = ("model", "lora", "data", "run")
LEVELS = {"info": "Note", "done": "Done", "busy": "Working", "warning": "Warning", "error": "Error"}


class Panel(Shown):
    """Base of all panels. A subclass adds fields and buttons, lays them out with `_compose`, and says its code.

    Attributes:
        widget: the root widget, for layouts of one's own.
        section: the same without the style sheet, as `studio` shows it.
        said: the area of its messages.
        error: what the last click or its background work raised, or None.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""

    def __init__(self, session: Session | None) -> None:
        super().__init__()
        self.session: Any = session
        self.error: BaseException | None = None
        self.number: int | None = None  # the step in a studio
        self._fields: dict[str, Field] = {}
        self._buttons: dict[str, widgets.Button] = {}
        self._actions: dict[str, Callable[[], Any]] = {}
        self._off: set[str] = set()  # buttons that have nothing to do now
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: dict[str, list[Callable[[Any], None]]] = {}
        self._quiet = False  # while code sets several values
        self._said = ("", "info")
        self._heading = _html.html(css_class="nbk-heading")
        self._show_code = widgets.ToggleButton(value=False, description="Show code", tooltip="The Python that does the same")
        self._fold = widgets.ToggleButton(value=True, description="Close", tooltip="Open or close this step")
        self._body = widgets.VBox([])
        self.said = _html.html()
        self._code = _html.html()
        for toggle in (self._show_code, self._fold):
            toggle.add_class("nbk-toggle")
            toggle.layout.width = "auto"
        self._fold.layout.display = "none"
        head = widgets.HBox([self._heading, self._show_code, self._fold])
        head.add_class("nbk-head")
        self.section = widgets.VBox([head, self._body, self.said, self._code])
        self.section.add_class("nbk-panel")
        self.widget = widgets.VBox([_html.html(_html.style()), self.section])
        self.widget.add_class("nbk")
        self._show_code.observe(lambda _: self._refresh(), "value")
        self._fold.observe(lambda _: self._folded(), "value")

    # -- for code ----------------------------------------------------------------------------------

    def values(self) -> dict[str, Any]:
        """All settings by name, as Python values. Raises: ConfigError where a box holds what it cannot take."""
        return {name: field.read() for name, field in self._fields.items()}

    def set(self, **values: Any) -> None:
        """Set settings by name, as a hand would.

        Raises: ConfigError for a name that is none or a value that cannot be; nothing is then set.
        """
        for name in values:
            self._known(name, self._fields, "setting")
        before = {}
        self._quiet = True
        try:
            for name, value in values.items():
                before[name] = [widget.value for widget in self._fields[name].watched]
                self._fields[name].write(value)
        except ConfigError:
            for name, old in before.items():
                for widget, value in zip(self._fields[name].watched, old, strict=True):
                    widget.value = value
            raise
        finally:
            self._quiet = False
        self.error = None
        for name in values:
            self._react(name)
        if self.error is not None:
            raise self.error

    def click(self, name: str) -> None:
        """Press a button. What a user's click would show as a sentence is also raised here.

        Work that goes on in the background (training, replies) is awaited with `await panel.finished()`; where no event
        loop runs, as in a script, it is done when this returns.
        """
        self._known(name, self._buttons, "button")
        if self._buttons[name].disabled:
            raise ConfigError(f"The button {name} of the panel {self.name} has nothing to do now.")
        self.error = None
        self._buttons[name].click()
        if self.error is not None:
            raise self.error

    async def finished(self) -> None:
        """Wait for what the last click started, and raise what it raised."""
        for task in list(self._tasks):
            await task
        if self.error is not None:
            raise self.error

    def watch(self, name: str, callback: Callable[[Any], None]) -> None:
        """Call `callback(value)` whenever the setting `name` has changed to a value that can be read."""
        self._known(name, self._fields, "setting")
        self._watchers.setdefault(name, []).append(callback)

    def code(self) -> str:
        """Python that does the same on a `Session` called `session`."""
        return "\n".join(self._calls()) + "\n"

    def summary(self) -> str:
        """The state of this step in one line; empty while there is none."""
        return self._summary()

    # -- as a step of a studio ---------------------------------------------------------------------

    def step(self, number: int) -> None:
        """Show the number of the step, and a button that opens and closes it."""
        self.number = number
        self._fold.layout.display = ""
        self._refresh()

    def open(self) -> None:
        self._fold.value = True

    def close(self) -> None:
        self._fold.value = False

    # -- what it says ------------------------------------------------------------------------------

    def message(self, text: str, level: str = "info") -> None:
        """Show one sentence; levels are info, done, busy, warning and error."""
        self._said = (text, level)
        _html.show(self.said, self.said_markup())
        self._folded()

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Show that work is going on; the panel's buttons wait until it is done."""
        self.message(text, "busy")
        for button in self._buttons.values():
            button.disabled = True
        try:
            yield
        finally:
            if self._said == (text, "busy"):
                self.message("")
            self._show_buttons()

    def static_html(self) -> str:
        """The panel as HTML without a kernel: its state, its settings and what it shows."""
        return _html.join((_html.style(), self.static_markup()))

    def static_markup(self) -> _html.Markup:
        """`static_html` without the style sheet."""
        values = [(field.label, self._shown(field)) for field in self._fields.values()]
        return _html.tag(
            "div",
            {"class": "nbk nbk-static mathjax_ignore tex2jax_ignore"},
            _html.tag("h3", None, self.title),
            _html.paragraph("nbk-summary", self._summary()) if self._summary() else "",
            _html.pairs(values) if values else "",
            self._static_body(),
            self.said_markup(),
        )

    def __repr__(self) -> str:
        return f"<nbkit panel {self.name}: {_html.plain(self._summary() or 'nothing yet', 200)}>"

    # -- for subclasses ----------------------------------------------------------------------------

    def _field(self, name: str, field: Field) -> Any:
        """Register a setting; returns the widget to lay out."""
        self._fields[name] = field
        for widget in field.watched:
            widget.observe(lambda _, name=name: self._react(name), "value")
        return field.widget

    def _button(self, name: str, text: str, action: Callable[[], Any], hint: str, primary: bool = False) -> widgets.Button:
        """Register a button. `text` and `hint` must be fixed text."""
        button = widgets.Button(description=text, tooltip=hint, button_style="primary" if primary else "")
        button.layout.width = "auto"
        button.add_class("nbk-button")
        self._buttons[name], self._actions[name] = button, action
        button.on_click(lambda _: self._attempt(action))
        return button

    def _compose(self, *rows: widgets.Widget) -> None:
        """Lay out the panel and follow the session; the last thing a subclass's `__init__` does."""
        self._body.children = rows
        if self.session is not None:
            for topic in TOPICS:  # what the session has already
                self._session_changed(topic)
            self.session.subscribe(self._told)
        self._refresh()

    def _take(self, values: Mapping[str, Any]) -> None:
        """Show values that the session uses already: nothing is to be done about them."""
        self._quiet = True
        try:
            for name, value in values.items():
                try:
                    self._fields[name].write(value)
                except ConfigError as error:  # the session has it all the same
                    self.message(str(error), "warning")
        finally:
            self._quiet = False

    def _calls(self) -> list[str]:
        """The lines of `code`."""
        return []

    def _summary(self) -> str:
        """What `summary` says."""
        return ""

    def _static_body(self) -> _html.Markup:
        return _html.join(())

    def _changed(self, name: str) -> None:
        """A setting has changed. A ConfigError raised here is shown as a sentence."""

    def _session_changed(self, topic: str) -> None:
        """The session has a new "model", "lora", "data" or "run"."""

    def _enable(self, states: Mapping[str, bool]) -> None:
        """Which buttons have something to do."""
        self._off = (self._off | {name for name, on in states.items() if not on}) - {name for name, on in states.items() if on}
        self._show_buttons()

    def _launch(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine in the kernel's loop, so that the kernel goes on answering; without a loop, run it to its end."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(work())
            return
        task = loop.create_task(self._attempt_later(work))
        self._tasks.add(task)  # the loop itself keeps no hold of a task
        task.add_done_callback(self._tasks.discard)

    # -- inside ------------------------------------------------------------------------------------

    def _attempt(self, action: Callable[[], Any]) -> None:
        self.error = None
        try:
            action()
        except (Exception, KeyboardInterrupt) as error:  # the border to the user: shown, kept, raised again by `click`
            self._failed(error)

    async def _attempt_later(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except Exception as error:  # as above; raised again by `finished`
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        self.error = error
        if isinstance(error, NbkitError):
            self.message(str(error), "error")
        elif isinstance(error, KeyboardInterrupt):
            self.message("Interrupted.", "warning")
        else:
            first = (str(error).strip().splitlines() or [""])[0]
            self.message(f"{type(error).__name__}: {first} (the panel keeps the whole error in its attribute error)", "error")

    def _told(self, topic: str) -> None:
        try:
            self._session_changed(topic)
            self._refresh()
        except Exception as error:  # what the session did has succeeded; that the panel cannot show it is said in the panel
            self._failed(error)

    def _react(self, name: str) -> None:
        if self._quiet:
            return
        try:
            if self._said[1] == "error":
                self.message("")
            self._changed(name)
            value = self._fields[name].read()
            for callback in self._watchers.get(name, ()):
                callback(value)
        except Exception as error:  # as in _attempt; raised again by `set`
            self._failed(error)
        self._refresh()

    def _refresh(self) -> None:
        """Bring heading and code up to date."""
        step = _html.tag("span", {"class": "nbk-number"}, self.number) if self.number is not None else ""
        summary = _html.tag("span", {"class": "nbk-summary"}, _html.plain(self._summary(), 160))
        _html.show(self._heading, _html.tag("h3", None, step, self.title, " ", summary))
        if self._show_code.value:
            _html.show(self._code, self._code_html())
        self._code.layout.display = "" if self._show_code.value else "none"
        self._show_code.description = "Hide code" if self._show_code.value else "Show code"

    def _code_html(self) -> _html.Markup:
        try:
            code = self.code()
        except NbkitError as error:
            return _html.paragraph("nbk-hint", f"There is no code yet: {error}")
        if len(code) > CODE_LIMIT:
            return _html.paragraph("nbk-hint", f"The code has {len(code):,} characters; print the panel's code() to see it.")
        return _html.block(code, CODE_LIMIT, label=f"Code of the panel {self.title}")

    def said_markup(self) -> _html.Markup:
        said, level = self._said
        if not said:
            return _html.join(())
        role = "alert" if level == "error" else "status"
        attributes = {"class": f"nbk-message nbk-{level}", "role": role, "dir": "auto"}
        return _html.tag("div", attributes, _html.tag("b", None, LEVELS[level]), " ", _html.text(said, 1000))

    def _shown(self, field: Field) -> str:
        try:
            value = field.read()
        except ConfigError:
            return "not usable"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, dict):
            return ", ".join(f"{key}: {item}" for key, item in value.items()) or "–"
        if isinstance(value, (tuple, list)):
            return ", ".join(map(str, value))
        return "–" if value is None or value == "" else str(value)

    def _show_buttons(self) -> None:
        for name, button in self._buttons.items():
            button.disabled = name in self._off

    def _folded(self) -> None:
        """A closed step shows its heading, and what is going on or wrong."""
        opened = self._fold.value
        self._body.layout.display = "" if opened else "none"
        self.said.layout.display = "" if opened or self._said[1] in ("busy", "warning", "error") else "none"
        self._fold.description = "Close" if opened else "Open"

    def _known(self, name: str, names: Mapping[str, Any], what: str) -> None:
        if name not in names:
            hint = nearest(name, names) or f" It has {', '.join(names)}."
            raise ConfigError(f"The panel {self.name} has no {what} {name!r}.{hint}")
