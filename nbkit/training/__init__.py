"""Training: a worker thread that trains, a supervisor that is awaited, checkpoints that are whole or absent.

`Run` is what a session starts; `held_out_loss` measures. Nothing here is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbkit.training.evaluate import held_out_loss
    from nbkit.training.optim import AdamW8bit
    from nbkit.training.runner import Run

__all__ = ["AdamW8bit", "Run", "held_out_loss"]


def __getattr__(name: str) -> Any:
    if name == "Run":
        from nbkit.training.runner import Run

        return Run
    if name == "held_out_loss":
        from nbkit.training.evaluate import held_out_loss

        return held_out_loss
    if name == "AdamW8bit":
        from nbkit.training.optim import AdamW8bit

        return AdamW8bit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
