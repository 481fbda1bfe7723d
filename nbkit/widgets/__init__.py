"""What a user sees: one panel, one class, one file, each over a `Session`; `studio` shows them together.

Panels are made of core ipywidgets that 7.7 and 8.1 share, so that they show in JupyterLab, Notebook 7, Colab, Kaggle,
VS Code and Binder. Importing this room loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Panel": "nbkit.widgets._panel",
    "ModelPicker": "nbkit.widgets.model_picker",
    "LoraPanel": "nbkit.widgets.lora",
    "DatasetMapper": "nbkit.widgets.dataset_mapper",
    "TrainPanel": "nbkit.widgets.train",
    "LivePlot": "nbkit.widgets.live_plot",
    "ChatPanel": "nbkit.widgets.chat",
    "Studio": "nbkit.widgets.studio",
    "studio": "nbkit.widgets.studio",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'nbkit.widgets' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
