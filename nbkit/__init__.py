"""nbkit: fine-tuning LLMs fast, exact and pleasant inside a notebook.

    import nbkit
    session = nbkit.Session()
    session.load("smollm2-135m-instruct")
    session.add_lora(rank=8)
    session.use_data("sample:ships-log")
    run = session.train(nbkit.TrainConfig(max_steps=40, learning_rate=1e-3))
    run.wait()

Importing nbkit changes nothing and loads neither torch nor transformers; names are resolved when used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Session": "nbkit.engine",
    "RunConfig": "nbkit.config",
    "ModelConfig": "nbkit.config",
    "LoraConfig": "nbkit.config",
    "DataConfig": "nbkit.config",
    "DataRecipe": "nbkit.config",
    "TrainConfig": "nbkit.config",
    "ExportConfig": "nbkit.config",
    "NbkitError": "nbkit.errors",
    "read_events": "nbkit.events",
    "patch": "nbkit.models.patch",
    "unpatch": "nbkit.models.patch",
    "certify": "nbkit.models.certify",
    "find_overflow": "nbkit.models.overflow",
    "doctor": "nbkit.hardware.doctor",
    "inspect": "nbkit.inspection",
    "get_chat_template": "nbkit.chat_templates",
    "train_on_responses_only": "nbkit.chat_templates",
    "standardize_sharegpt": "nbkit.data.reshape",
    "to_sharegpt": "nbkit.data.reshape",
    "studio": "nbkit.widgets.studio",
}
__all__ = sorted([*_WHERE, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'nbkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
