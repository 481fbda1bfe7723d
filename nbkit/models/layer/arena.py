"""Where the gradients of LoRA's matrices lie in a recorded step: side by side in one buffer, which the layers' backward fills.

Layer by layer and group by group: dA of all terms as one matrix, its rows padded like the border's columns (with ranks in steps
of 16 nothing is), then dB of each term. A matrix begins where an allocation of its own could, and has the strides it would have:
so the kernels and GEMMs that make it are those of an eager step, and so are its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nbkit.models.layer.parts import Parts
from nbkit.models.layer.weights import Group, round_up

ALIGNED = 128  # elements: what GEMMs and Triton ask of an address is no more than that


class Place(NamedTuple):
    """Of one matrix in a buffer: where it begins, in elements, and its shape, row by row."""

    start: int
    shape: tuple[int, int]

    def of(self, flat: Tensor) -> Tensor:
        """The matrix, a view of `flat`, which begins where its storage does. One call of torch: a step makes hundreds."""
        return flat.as_strided(self.shape, (self.shape[1], 1), self.start)


class Arena:
    """The buffer `flat` for layers that train nothing but LoRA; `places` of the gradients, in the order of their parameters."""

    def __init__(self, layers: Sequence[Parts], dtype: torch.dtype, device: torch.device) -> None:
        self.places: list[Place] = []
        self._rooms: dict[Group, list[Place]] = {}
        size = 0
        for group in (group for parts in layers for group in parts.groups):
            shapes = [(group.rank, group.inputs), *((t.stop - t.start, t.rank) for t in group.terms)]
            rooms = self._rooms[group] = []
            for shape in shapes if group.terms else ():
                rooms.append(Place(size, shape))
                size += round_up(shape[0] * shape[1], ALIGNED)
            for t, db in zip(group.terms, rooms[1:], strict=True):
                self.places += [Place(rooms[0].start + t.offset * group.inputs, (t.rank, group.inputs)), db]
        self.flat = torch.empty(size, dtype=dtype, device=device)

    def rooms(self, group: Group) -> list[Tensor]:
        """Memory for dA (R, I) of all terms of a group, then for dB (O_t, R_t) of each; nothing for a group without LoRA."""
        return [place.of(self.flat) for place in self._rooms[group]]

    def bring(self, gradients: Sequence[Tensor]) -> None:
        """Copy in what was not written in place: sums over tiles in another dtype, parameters of another dtype."""
        for place, gradient in zip(self.places, gradients, strict=True):
            room = place.of(self.flat)
            if gradient.data_ptr() != room.data_ptr():
                room.copy_(gradient)
