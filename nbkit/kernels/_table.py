"""Many tensors in one launch: where each lies in a state that they share, and their addresses on the device.

A step over LoRA on an 8B model has 448 parameters of some kilobytes to megabytes. Launched one by one they cost more than their
bytes; copied into one buffer they would take memory of their own. So kernels read addresses from a table, as lora_border does.
Addresses of parameters stay, those of gradients may be new in every step: the table is sent again only where one differs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nbkit.kernels._launch import cdiv, tl

TYPES = {} if tl is None else {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Table:
    """Tensors of `sizes` elements side by side in blocks of `block`, each from a block of its own on.

    Attributes:
        first: for each tensor its first block; `blocks`: of all.
        place: (n, 2) int64 on the device: elements and first block of each tensor.
        entry: (programs, 2) int32 on the device: tensor, and which part of `blocks_a_program` blocks of it.
    """

    def __init__(self, sizes: Sequence[int], block: int, blocks_a_program: int, device: torch.device) -> None:
        self.sizes, self.block = tuple(sizes), block
        self.first: list[int] = []
        self.blocks = 0
        for n in self.sizes:
            self.first.append(self.blocks)
            self.blocks += cdiv(n, block)
        step = block * blocks_a_program
        parts = [(k, part) for k, n in enumerate(self.sizes) for part in range(cdiv(n, step))]
        self.programs = len(parts)
        self.place = torch.tensor(list(zip(self.sizes, self.first, strict=True)), dtype=torch.int64, device=device)
        self.entry = torch.tensor(parts, dtype=torch.int32, device=device)
        self._sent: list[int] = []
        self._rows: Tensor | None = None
        self._recorded: list[Tensor] = []  # what graphs read: it must outlive them

    def addresses(self, tensors: Sequence[Tensor], others: Sequence[Tensor | None]) -> Tensor:
        """(2 n,) int64 on the device: the addresses of `tensors`, then of `others`, 0 for None. Nothing waits for the device.

        Raises: RuntimeError where they differ from the last call's while a CUDA graph is recorded: host memory is sent.
        """
        found = [t.data_ptr() for t in tensors]
        found += [0 if t is None else t.data_ptr() for t in others]
        if self._rows is None or found != self._sent:
            device = self.place.device
            if device.type != "cuda":
                self._rows = torch.tensor(found, dtype=torch.int64, device=device)
            elif torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "A recorded optimizer step needs gradients that stay where they are: take one step before recording, "
                    "and clear gradients with zero_grad(set_to_none=False)."
                )
            else:  # from pinned memory, which torch does not use again before the copy is done
                self._rows = torch.tensor(found, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
            self._sent = found
        if self._rows.is_cuda and torch.cuda.is_current_stream_capturing():
            self._recorded.append(self._rows)
        return self._rows
