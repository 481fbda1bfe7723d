"""A second CUDA stream beside the layer's own, for work that the layer itself does not wait for.

LoRA's gradients are thin products that read much and compute little, and nothing else in the backward needs them; the residual
that a GEMM adds to has to be copied first. On a stream of their own they fill what the large GEMMs leave free: 0.7 % of a step of
8B at 4,096 tokens. In recorded steps of fewer tokens they gained nothing as branches of the graph.

A tensor that the second stream reads must not be freed, or written again, before it has done so: it is held here until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FEWEST = 2048  # rows from which the GPU sets the pace of an eager step: a fork costs the host some 20 us


class Side:
    """The second stream of one model on `device`, a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.held: list[Tensor] = []

    @contextmanager
    def beside(self, *held: Tensor) -> Iterator[None]:
        """Within: work goes to the second stream, after all that was asked for so far. `held` is what it reads and writes."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        self.held += held
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> torch.cuda.Event:
        """The work of the second stream so far, for `wait`."""
        return self.stream.record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        """Let what is asked for next wait for the work before `mark`."""
        torch.cuda.current_stream(self.stream.device).wait_event(mark)

    def join(self) -> None:
        """Let what is asked for next wait for all work of the second stream, and let go of its tensors."""
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        self.held.clear()


@contextmanager
def beside(side: Side | None, *held: Tensor) -> Iterator[None]:
    """`Side.beside`, or nothing where there is no second stream."""
    if side is None:
        yield
    else:
        with side.beside(*held):
            yield
