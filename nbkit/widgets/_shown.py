"""How panels and the studio are displayed: live where there is a kernel, as plain HTML where there is none."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets
from IPython.core.getipython import get_ipython
from IPython.display import display

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
OUTPUTS = 4  # newest displayed outputs that are kept up to date


class Shown:
    """Something with a root `widget` and a `static_html`.

    A notebook output holds both: front ends with a kernel show the widget, GitHub, Kaggle's saved versions, nbconvert and
    screen readers the HTML, which is brought up to date when work ends.
    """

    widget: widgets.Widget

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._holders: list[Shown] = []

    def held_by(self, holder: Shown) -> None:
        """`holder` shows this too: its static form is brought up to date along with this one's."""
        self._holders.append(holder)

    def static_html(self) -> str:
        raise TypeError(f"{type(self).__name__} shows nothing; it must define static_html")

    def _repr_html_(self) -> str:
        return self.static_html()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        return {WIDGET_VIEW: view, "text/html": str(self.static_html()), "text/plain": repr(self)}

    def _ipython_display_(self) -> None:
        if get_ipython() is None:
            print(repr(self))
            return
        handle = display(self._repr_mimebundle_(), raw=True, display_id=True)
        self._handles = [*self._handles[1 - OUTPUTS :], handle]

    def update_saved(self) -> None:
        """Bring the static form of displayed outputs up to date, so that a saved notebook shows how the work ended."""
        for handle in self._handles:
            if handle is not None:
                handle.update(self._repr_mimebundle_(), raw=True)
        for holder in self._holders:
            holder.update_saved()
