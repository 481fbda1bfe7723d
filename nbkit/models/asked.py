"""Whether training steps ask the model's own head for their loss: recorded steps need that, and trainers may do otherwise."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from nbkit.models.unshared import Unshared

MARK = "_nbkit_asked"  # instance attribute of the norm after the layers, which every training step passes
AFTER = 4  # steps: by then a step that may be recorded has been asked for
UNASKED = (
    "no step was recorded, since its loss was computed outside the model's own head, as TRL's SFTTrainer and DPOTrainer do; "
    "nbkit's own trainer and model(..., labels=...) can record"
)


class Asked(Unshared):
    """Says once, where a step could have been recorded as a CUDA graph, that nobody asked for it."""

    def __init__(self, graphs: Any) -> None:
        self.graphs, self.passed = graphs, 0

    def step(self, hidden: Tensor) -> None:
        """A training step's hidden states (B, T, D) have passed."""
        graphs = self.graphs
        if self.passed >= AFTER or not unasked(graphs):
            return
        self.passed += 1
        if self.passed < AFTER:
            return
        if graphs.version != graphs.binding.version:
            graphs.learn()
        if graphs.fits(hidden[..., 0]):  # else its note has the true reason by now
            warnings.warn(f"Slower than it could be: {UNASKED}.", stacklevel=2)


def unasked(graphs: Any) -> bool:
    """Whether no step was asked of these graphs yet."""
    return graphs.note == type(graphs).note
