"""The device a benchmark runs on: the GPU, or the CPU for a look at a toy size, where memory is not counted."""

from __future__ import annotations

import gc

import torch

GIB = 2**30


class Device:
    """What differs between the two. Bytes are torch's own count of this process."""

    def __init__(self, name: str = "cuda") -> None:
        self.name, self.gpu = name, name == "cuda"

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def clean(self) -> None:
        """Give what is not in use back to the GPU, for the other processes."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.gpu else 0

    def reset_peak(self) -> None:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.gpu else 0

    def in_use(self) -> int:
        """Bytes of the whole card that are in use, by whichever process."""
        if not self.gpu:
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free

    def limit(self, most: int | None) -> None:
        """Let torch allocate `most` bytes, None: all there are."""
        self.clean()
        if self.gpu:
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, (most or total) / total))

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.name).manual_seed(seed)
