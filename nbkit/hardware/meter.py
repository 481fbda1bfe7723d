"""Measured memory: what is in use now, the most there was, and giving it back."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nbkit.hardware.probe import ram

STATUS = Path("/proc/self/status")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """`memory`: "VRAM" (the whole device, as nvidia-smi shows it) or "RSS" (this process). Bytes."""

    memory: str
    used_bytes: int
    peak_bytes: int
    total_bytes: int


class Meter:
    """Reads memory: VRAM once torch uses a GPU, else this process's resident memory.

    Peaks count from the start of the process; `reset=True` begins that of VRAM anew (that of RSS cannot be).
    """

    def __init__(self, *, reset: bool = False) -> None:
        self._peak = 0
        torch = _cuda_torch()
        if reset and torch is not None:
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> Reading:
        torch = _cuda_torch()
        if torch is not None:
            return self._vram(torch)
        used = psutil.Process().memory_info().rss
        self._peak = max(self._peak, used, process_peak())
        return Reading(memory="RSS", used_bytes=used, peak_bytes=self._peak, total_bytes=ram()[0])

    def _vram(self, torch: Any) -> Reading:
        cuda = torch.cuda
        free, total = cuda.mem_get_info()
        used = total - free
        # What other processes and the CUDA context hold, and on top the most that torch had reserved.
        others = max(used - cuda.memory_reserved(), 0)
        self._peak = max(self._peak, used, others + cuda.max_memory_reserved())
        return Reading(memory="VRAM", used_bytes=used, peak_bytes=self._peak, total_bytes=total)


def process_peak() -> int:
    """The largest resident memory of this process so far, in bytes (Linux VmHWM, Windows peak working set)."""
    if STATUS.is_file():
        match = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
        if match:
            return int(match.group(1)) * 1024
    peak = getattr(psutil.Process().memory_info(), "peak_wset", 0)  # Windows
    if not peak and sys.platform == "darwin":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes there, kilobytes on Linux
    return int(peak)


def release_memory() -> None:
    """Collect garbage and hand freed memory back: torch's cached VRAM, and glibc's arenas on Linux."""
    gc.collect()
    torch = _cuda_torch()
    if torch is not None:
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _cuda_torch() -> Any | None:
    """torch, if it is loaded and has begun to use a GPU. Asking must not start CUDA by itself."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        return torch
    return None
