"""Where Triton runs and where the plain-torch path does, and small helpers for launches.

Triton runs on CUDA tensors of 16 or 32 bits on GPUs of capability 7.0 and above. Everywhere else (CPU, float64, older
GPUs, no triton installed) the plain path runs. Under Triton's own interpreter, which tests use, CPU tensors take
the kernels too. bfloat16 arithmetic is wrong there, so kernels load, compute in float32 and cast at the store.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # native Windows and macOS have none
    triton = None
    tl: Any = None  # type: ignore[no-redef]

MIN_CAPABILITY = (7, 0)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Triton decides when it is imported whether it interprets; its own functions tell what it decided.
INTERPRETED = triton is not None and not isinstance(tl.sum, triton.JITFunction)


def jit(fn: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself where triton is missing (it is never called there)."""
    return fn if triton is None else triton.jit(fn)


def runs_on(device: torch.device) -> bool:
    """True if kernels can run on tensors of this device."""
    if triton is None:
        return False
    if device.type == "cuda":
        return _capability(device.index if device.index is not None else torch.cuda.current_device()) >= MIN_CAPABILITY
    return INTERPRETED and device.type == "cpu"


def use_triton(*tensors: torch.Tensor) -> bool:
    """True if a kernel can take all these tensors."""
    return all(t.dtype in _DTYPES for t in tensors) and runs_on(tensors[0].device)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one for a launch; Triton launches on the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(…, D) as (N, D) with neighbouring columns next to each other; a view where that is possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def check_rows(name: str, x: torch.Tensor) -> None:
    """Raises: ValueError unless x is (N, D) with stride 1 along D, as kernels address it."""
    if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"{name} must be (N, D) with stride 1 along D, not {tuple(x.shape)} with strides {x.stride()}.")
