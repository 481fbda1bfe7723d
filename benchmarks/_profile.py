"""Where a step's time goes: device time by kernel, host time by function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def show(step: Callable[[], Any], title: str, kernels: int = 30, functions: int = 28) -> None:
    """Print both for `step`: the device's of one, the host's of three."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    gpu = torch.cuda.is_available()
    with profiled(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        step()
        if gpu:
            torch.cuda.synchronize()
    time_of = (lambda e: e.self_device_time_total) if gpu else (lambda e: e.self_cpu_time_total)
    table = [e for e in seen.key_averages() if time_of(e) > 0]
    total, launches = sum(map(time_of, table)), sum(e.count for e in table)
    print(f"PROFILE {title}: {total / 1e3:.1f} ms of {'device' if gpu else 'CPU'} time, {launches} launches")
    show_host(step, functions)
    for e in sorted(table, key=time_of, reverse=True)[:kernels]:
        print(f"  {time_of(e) / 1e3:8.2f} ms {e.count:5d} x {e.key[:110]}")


def show_host(step: Callable[[], Any], functions: int) -> None:
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    profiler.enable()
    for _ in range(3):
        step()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(functions)
