"""`nbkit.studio()`: all panels over one session, as five steps from a checkpoint to a chat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
from IPython.core.getipython import get_ipython
from IPython.display import display

from nbkit.errors import ConfigError, nearest
from nbkit.widgets import _html
from nbkit.widgets._panel import Panel
from nbkit.widgets._shown import Shown
from nbkit.widgets.chat import ChatPanel
from nbkit.widgets.dataset_mapper import DatasetMapper
from nbkit.widgets.live_plot import LivePlot
from nbkit.widgets.lora import LoraPanel
from nbkit.widgets.model_picker import ModelPicker
from nbkit.widgets.train import GOING, TrainPanel

if TYPE_CHECKING:
    from nbkit.engine import Session


class Studio(Shown):
    """The panels `model`, `lora`, `data`, `training` and `chat` of one session, each open or closed.

    From code: `studio.training.set(max_steps=40)`, or `studio.click("model.load")`; `await studio.train()` trains.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.model = ModelPicker(session)
        self.lora = LoraPanel(session, model=self.model.values()["name"])
        self.data = DatasetMapper(session)
        self.training = TrainPanel(session)
        self.chat = ChatPanel(session)
        self.panels: dict[str, Panel] = {
            panel.name: panel for panel in (self.model, self.lora, self.data, self.training, self.chat)
        }
        for number, panel in enumerate(self.panels.values(), 1):
            panel.step(number)
            panel.held_by(self)
        title = _html.tag("div", {"class": "nbk-title"}, "nbkit studio")
        steps = [panel.section for panel in self.panels.values()]
        self.widget = widgets.VBox([_html.html(_html.style()), _html.html(title), *steps])
        self.widget.add_class("nbk")
        self.widget.add_class("nbk-studio")
        self.model.watch("name", lambda name: self.lora.estimate_for(name or None))
        self.training.guards.append(self.chat.require_silence)
        self.data.inspector.settings = self.training.config
        session.subscribe(self._advance)
        self._open_for_state()

    @property
    def plot(self) -> LivePlot:
        return self.training.plot

    def click(self, name: str) -> None:
        """Press a button of a panel: `studio.click("model.load")`. Raises what the button's work raises."""
        panel, _, button = name.partition(".")
        if panel not in self.panels:
            hint = nearest(panel, self.panels) or f" It has {', '.join(self.panels)}."
            raise ConfigError(f"The studio has no panel {panel!r}.{hint}")
        self.panels[panel].click(button)

    async def train(self) -> Any:
        """Train with the settings shown (or go on waiting for the run that is training) and return the `Run`.

        The plot and the Stop button are shown in the cell that awaits this, where every front end keeps them live.
        Raises: what the run raises.
        """
        self.training.open()
        if get_ipython() is not None:
            display(_Live(self.training))
        run = self.session.run
        if run is None or run.status not in GOING:
            self.training.click("start")
            await self.training.finished()
        else:
            await run
        return self.session.run

    def code(self) -> str:
        """The whole session as a script."""
        lines = ["import nbkit", "", "session = nbkit.Session()"]
        for panel in self.panels.values():
            if panel is self.chat and not self.chat.values()["prompt"].strip():
                continue
            lines += [line for line in panel.code().splitlines() if line not in ("import nbkit", "")]
        return "\n".join(lines) + "\n"

    def static_html(self) -> str:
        """All panels as HTML without a kernel."""
        return _html.join((_html.style(), *(panel.static_markup() for panel in self.panels.values())))

    def __repr__(self) -> str:
        states = ", ".join(f"{name}: {_html.plain(panel.summary() or '–', 80)}" for name, panel in self.panels.items())
        return f"<nbkit studio: {states}>"

    # -- which step is open ------------------------------------------------------------------------

    def _open_for_state(self) -> None:
        """Open the first step that is not done."""
        session = self.session
        done = {"model": session.loaded, "lora": session.lora, "data": session.data, "training": session.run}
        following = next((name for name, state in done.items() if state is None), "chat")
        for name, panel in self.panels.items():
            if name == following:
                panel.open()
            else:
                panel.close()

    def _advance(self, topic: str) -> None:
        """A step that is done closes, the next one opens; the data stay open, to be looked at."""
        if topic == "model" and self.session.loaded is not None:
            self.model.close()
            self.lora.open()
        elif topic == "lora" and self.session.lora is not None:
            self.lora.close()
            self.data.open()
        elif topic == "data" and self.session.data is not None:
            self.training.open()
        elif topic == "run" and self.session.run is not None:
            for panel in (self.model, self.lora, self.data):
                panel.close()
            self.training.open()
            self.chat.open()


class _Live(Shown):
    """Buttons, plot and message of a training panel once more, for the cell that trains."""

    def __init__(self, training: TrainPanel) -> None:
        super().__init__()
        self.training = training
        self.widget = widgets.VBox([_html.html(_html.style()), training.live, training.said])
        self.widget.add_class("nbk")
        training.held_by(self)

    def static_html(self) -> str:
        said = _html.tag("div", {"class": "nbk"}, self.training.said_markup())
        return _html.join((_html.style(), self.training.plot.static_markup(), said))

    def __repr__(self) -> str:
        return repr(self.training)


def studio(session: Session | None = None) -> Studio:
    """All panels wired to one session; without one, a new `Session()` in the default workspace."""
    if session is None:
        from nbkit.engine import Session

        session = Session()
    return Studio(session)
