"""The input embedding in host RAM while a training step needs its memory: one row per token is all that the step reads."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

MARK = "_nbkit_parked"  # instance attribute: the device that a parked embedding's rows go to
ROWS = 8192  # gathered at a time


class Embedding:
    """The token embedding of a decoder, which `park` moves between the device and host RAM.

    It stays where it is if it is trained, bound by another library, or no plain `nn.Embedding`.
    """

    def __init__(self, decoder: Any) -> None:
        found = decoder.get_input_embeddings() if hasattr(decoder, "get_input_embeddings") else None
        self.module = found if type(found) is nn.Embedding else None

    def may_park(self) -> bool:
        """Whether it can lie in host RAM as far as the module goes; whoever asks knows whether the head shares its weight."""
        module = self.module
        return module is not None and not module.weight.requires_grad and "forward" not in vars(module)

    def park(self, wanted: bool) -> None:
        """Move it to host RAM, or back to its device; nothing happens if it is there."""
        module = self.module
        if module is None or (MARK in vars(module)) == wanted:
            return
        if wanted:
            vars(module)[MARK] = module.weight.device
            module.weight.data = module.weight.data.to("cpu")
            vars(module)["forward"] = MethodType(gather, module)
        else:
            device = vars(module).pop(MARK)
            vars(module).pop("forward", None)
            module.weight.data = module.weight.data.to(device)


def gather(self: Any, input: Tensor) -> Tensor:
    """The rows of `input` (..,) on the device it came from, (.., D)."""
    device, ids = vars(self)[MARK], input.reshape(-1).cpu()
    out = torch.empty(len(ids), self.weight.shape[1], dtype=self.weight.dtype, device=device)
    for start in range(0, len(ids), ROWS):
        some = ids[start : start + ROWS]
        rows = torch.empty(len(some), out.shape[1], dtype=out.dtype, pin_memory=out.is_cuda)
        torch.index_select(self.weight.detach(), 0, some, out=rows)
        out[start : start + ROWS].copy_(rows, non_blocking=True)
    return out.view(*input.shape, -1)
