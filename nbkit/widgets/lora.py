"""The LoRA panel: rank, alpha, targets and dropout, with what they cost as they change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import ipywidgets as widgets

from nbkit.config import ALL_LINEAR, LoraConfig
from nbkit.errors import ConfigError, NbkitError
from nbkit.widgets import _code, _fields, _html
from nbkit.widgets._fields import Field
from nbkit.widgets._panel import Panel

if TYPE_CHECKING:
    from nbkit.engine import Session


class LoraPanel(Panel):
    """Set up the adapter and put it on the model. Press `add`; settings: rank, alpha, dropout, targets, use_rslora.

    Args:
        model: the checkpoint whose figures are shown while none is loaded.
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA adapter"

    def __init__(self, session: Session, model: str | None = None) -> None:
        super().__init__(session)
        self.model = model
        self._boxes = {target: _check_box(target) for target in ALL_LINEAR}
        self._figures = _html.html()
        rank = self._field("rank", _fields.whole("Rank", 16))
        alpha = self._field("alpha", _fields.optional("Alpha", _number, "a number, or nothing for alpha = rank", "= rank"))
        dropout = self._field("dropout", _fields.real("Dropout", 0.0))
        rslora = self._field("use_rslora", _fields.check("rsLoRA scale (alpha / √rank)", False))
        targets = self._field("targets", self._targets())
        add = self._button("add", "Add LoRA", self._add, "Put a fresh adapter on the loaded model", primary=True)
        row = widgets.HBox([rank, alpha, dropout, rslora, add])
        row.add_class("nbk-row")
        self._show_cost()
        self._compose(row, targets, self._figures)

    def _targets(self) -> Field:
        """The usual modules as boxes to tick, any others as text."""
        others = _fields.labelled(widgets.Text(placeholder="qkv_proj, …", continuous_update=False), "Other modules")
        caption = _html.html(_html.paragraph("nbk-caption", "Target modules"))
        row = widgets.HBox([caption, *self._boxes.values(), others])
        row.add_class("nbk-row")

        def read() -> tuple[str, ...]:
            named = [word.strip() for word in others.value.split(",")]
            return tuple(dict.fromkeys([*(name for name, box in self._boxes.items() if box.value), *filter(None, named)]))

        def write(new: Any) -> None:
            names = [new] if isinstance(new, str) else list(new)
            if not all(isinstance(name, str) and name.strip() and "," not in name for name in names):
                raise ConfigError(f"Target modules are names such as q_proj, not {_fields.short(new)}.")
            for name, box in self._boxes.items():
                box.value = name in names
            _fields.keep("Other modules", others, ", ".join(name for name in names if name not in self._boxes))

        return Field("Target modules", row, (*self._boxes.values(), others), read, write)

    def estimate_for(self, model: str | None) -> None:
        """Show the figures of this checkpoint while none is loaded."""
        self.model = model
        self._show_cost()
        self._refresh()

    def cost(self) -> tuple[int, int, int]:
        """(trainable parameters, parameters of the model, adapter bytes) of the loaded model, or of the one picked."""
        config = self._config()
        loaded = self.session.loaded is not None
        return self.session.lora_size(None if loaded else self.model, rank=config.rank, targets=config.targets)

    def _config(self) -> LoraConfig:
        return LoraConfig(**self.values())

    def _changed(self, name: str) -> None:
        self._show_cost()
        self._config()

    def _show_cost(self) -> None:
        _html.show(self._figures, self._cost_html())

    def _cost_html(self) -> _html.Markup:
        of = self.session.loaded.name if self.session.loaded is not None else self.model
        if of is None:
            return _html.paragraph("nbk-hint", "Pick or load a model to see what the adapter costs.")
        try:
            trainable, total, size = self.cost()
        except ConfigError:
            return _html.paragraph("nbk-hint", "What the adapter costs is seen when its settings are right.")
        except NbkitError as error:
            return _html.paragraph("nbk-hint", f"What the adapter costs is seen when the model is loaded: {error}")
        share = f"{100 * trainable / total:.2f} % of {_html.amount(total)}"
        facts = [("Trainable parameters", f"{trainable:,}"), ("Share", share), ("Adapter on disk", _html.size(size))]
        facts += [("Scale", f"{self._config().scale:.3g}"), ("Model", _html.plain(of, 80))]
        return _html.tag("div", {"class": "nbk-facts"}, *(_html.fact(name, value) for name, value in facts))

    def _add(self) -> None:
        config = self._config()
        with self.busy("Adding the adapter …"):
            self.session.add_lora(**_code.changed(config))
            self.message(f"The adapter is on the model: {self.cost()[0]:,} parameters will be trained.", "done")

    def _session_changed(self, topic: str) -> None:
        lora = self.session.lora
        if topic == "lora" and lora is not None:
            self._take({name: getattr(lora, name) for name in self._fields})
        if topic in ("model", "lora"):
            self._show_cost()

    def _summary(self) -> str:
        lora = self.session.lora
        return "" if lora is None else f"✓ rank {lora.rank} on {len(lora.targets)} kinds of modules"

    def _calls(self) -> list[str]:
        return [_code.call("session.add_lora", [], _code.changed(self._config()))]

    def _static_body(self) -> _html.Markup:
        return self._cost_html()


def _check_box(label: str) -> widgets.Checkbox:
    box = widgets.Checkbox(value=True, description=label, indent=False)
    box.layout.width = "auto"
    box.add_class("nbk-check")
    return box


def _number(said: str) -> float:
    value = float(said)
    return int(value) if value.is_integer() else value
