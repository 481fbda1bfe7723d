"""One CUDA graph of what a function launches, and nothing left behind where it cannot be recorded.

torch gives a failed recording back in part only. Where the driver refuses to end it, the stream that was recorded stays the
current one, and the allocator goes on as if in the recording, with all memory of its pool. cuBLAS's workspace for that stream
stays in the pool in any case. And what was computed hangs on the traceback as long as anybody holds the error.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def capture(run: Callable[[], T], pool: Any, device: torch.device) -> tuple[torch.cuda.CUDAGraph, T, int]:
    """(the graph of what `run` launches on `device`, what `run` returned, bytes that the graph's pool grew by).

    `pool`: of a graph to share memory with, or None.

    Raises: RuntimeError in the words of what failed first; the recording's memory has been given back then.
    """
    graph, stream, why = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), ""
    pool = pool or torch.cuda.graph_pool_handle()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # the graph has memory of its own: what the eager steps left would lie idle beside it
    before = torch.cuda.memory_reserved(device)
    with ExitStack() as otherwise:
        otherwise.callback(_let_go, graph, pool, device, stream)
        try:
            # Other threads (a data loader's pinning, a panel) may use the GPU meanwhile; only this thread's stream is recorded.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                try:
                    made = run()
                except RuntimeError as error:
                    why = reason_of(error)  # where the recording cannot be ended either, that is what is raised
                    raise
            otherwise.pop_all()
            return graph, made, torch.cuda.memory_reserved(device) - before
        except RuntimeError as error:
            why, made = why or reason_of(error), None
            forget(error)
    raise RuntimeError(why)


def _let_go(graph: Any, pool: Any, device: torch.device, stream: Any) -> None:
    """End a failed recording for torch: its stream, its pool, the graph."""
    torch.cuda.set_stream(stream)
    try:
        graph.pool()
    except RuntimeError:  # the driver did not end it, so torch's allocator did not either
        with suppress(RuntimeError):  # raised where it never began
            torch._C._cuda_endAllocateToPool(device.index, pool)
            torch._C._cuda_releasePool(device.index, pool)
    graph.reset()
    give_back()


def give_back() -> None:
    """What torch holds of the GPU's memory for no tensor. cuBLAS's workspaces are made anew by the next products."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # meanwhile autograd's own thread lets go of the node that failed
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def forget(error: BaseException) -> None:
    """Let go of everything that functions held when `error` was raised in them, whoever holds the error."""
    one: BaseException | None = error
    while one is not None:
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None  # a frame that is cleared still holds its function, and that what it was made with
        one = one.__context__


def reason_of(error: BaseException) -> str:
    """The first sentence of an error, to go on from a colon; with the bytes, where memory ran out."""
    first = (str(error).splitlines() or [""])[0].replace(". Tried to", "; tried to")
    return first.split(". ")[0].removesuffix(".") or type(error).__name__
