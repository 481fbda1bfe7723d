"""What clipping and the optimizer cost of a step: torch's fused AdamW, bitsandbytes' in 8 bits, nbkit's in 8 bits.

usage: python -m benchmarks.bench_optimizer 1b|8b|tiny... [--steps 40] [--out FILE.csv] [--commit NAME]
The tensors are LoRA's (rank 16, all seven linears, float32) of Llama-3.2-1B or Llama-3.1-8B: 224 or 448 of them; their gradients
are new tensors in each step, as autograd gives them. Three figures an arm, medians: `host` is how long the calls take without
waiting, `step` with waiting, `launches` what the GPU ran; `clip` is clip_grad_norm_, the same in all arms. `state` is in MB.
tiny runs on a CPU, for a look.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._results import stamp, write

WARM = 5
# layers, hidden, inner, key and value width
SIZES = {"1b": (16, 2048, 8192, 512), "8b": (32, 4096, 14336, 1024), "tiny": (2, 64, 128, 32)}


def shapes_of(name: str, rank: int = 16) -> list[tuple[int, int]]:
    """A and B of each linear, layer by layer."""
    layers, hidden, inner, keys = SIZES[name]
    linears = [
        (hidden, hidden),
        (hidden, keys),
        (hidden, keys),
        (hidden, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
    return [shape for _ in range(layers) for i, o in linears for shape in ((rank, i), (o, rank))]


def torchs(params: list[torch.nn.Parameter]) -> Any:
    return torch.optim.AdamW(params, lr=1e-4, fused=True)


def bitsandbytes(params: list[torch.nn.Parameter]) -> Any:
    from bitsandbytes import optim

    return optim.AdamW8bit(params, lr=1e-4)


def nbkits(params: list[torch.nn.Parameter]) -> Any:
    from nbkit.training.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-4)


ARMS: dict[str, Callable[[list[torch.nn.Parameter]], Any]] = {
    "torch fused, 32 bits": torchs,
    "bitsandbytes, 8 bits": bitsandbytes,
    "nbkit, 8 bits": nbkits,
}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(params: list[torch.nn.Parameter], call: Callable[[], Any], steps: int) -> tuple[float, float]:
    """Median ms of (the call alone, the call and waiting for it), with new gradients for each."""
    host, whole = [], []
    for step in range(WARM + steps):
        for p in params:
            p.grad = torch.empty_like(p).fill_(1e-3 * (step + 1))
        wait()
        start = time.perf_counter()
        call()
        middle = time.perf_counter()
        wait()
        if step >= WARM:
            host.append(middle - start)
            whole.append(time.perf_counter() - start)
    return statistics.median(host) * 1e3, statistics.median(whole) * 1e3


def launches(call: Callable[[], Any]) -> int | str:
    """Kernels that one call runs; "" on a CPU."""
    if not torch.cuda.is_available():
        return ""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(1 for name in on_gpu if not name.startswith(("Memcpy", "Memset", "Optimizer.")))


def measure(name: str, steps: int) -> list[dict[str, Any]]:
    device = "cpu" if name == "tiny" else "cuda"
    found = []
    for arm, make in ARMS.items():
        if "bitsandbytes" in arm and importlib.util.find_spec("bitsandbytes") is None:
            print(f"LEFT OUT {arm}: not installed")
            continue
        params = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.01) for shape in shapes_of(name)]
        optimizer = make(params)
        host, whole = seconds(params, optimizer.step, steps)
        clip = seconds(params, lambda params=params: torch.nn.utils.clip_grad_norm_(params, 1.0), steps)
        held = {t.data_ptr(): t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)}
        row: dict[str, Any] = {"row": name, "arm": arm, "tensors": len(params), "parameters": sum(p.numel() for p in params)}
        row |= {"host_ms": round(host, 3), "step_ms": round(whole, 3), "launches": launches(optimizer.step)}
        row |= {"clip_host_ms": round(clip[0], 3), "clip_ms": round(clip[1], 3), "state_mb": round(sum(held.values()) / 1e6, 1)}
        print("RESULT", row, flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=SIZES)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    given = parser.parse_args()
    where = stamp(given.commit)
    results = [{**one, **where} for row in given.rows for one in measure(row, given.steps)]
    if given.out:
        write(given.out, results)


if __name__ == "__main__":
    main()
