"""Every implementation of attention on a GPU at Llama-3.1-8B's heads: forward, backward, rates, peak memory, compile time.

usage: python -m benchmarks.bench_attention [--seconds 55] [--heads 32,8,128] [--dtype bfloat16] [--out FILE.csv]

A row is one kind (nbkit/models/attention.py) on one task: T tokens in a row (rows enough for 4,096 tokens), causal, with or
without a sliding window, a softcap, packed documents of 512 tokens on average. ms are medians over a few calls by CUDA events;
TFLOP/s count the scores that may be seen, 4 K each forward and 10 K backward. MiB is what forward and backward take at their
peak beyond q, k, v and the gradient of out. "first" is the seconds of the first forward and backward, compilation included.
"apart" is how far out or a gradient lies at most from those of the task's first kind, relative to their norm; a result that is
not finite is a failure. A kind that cannot do a task, or fails, says so in its row and ends nothing; none is begun after
--seconds. "tells" marks the fastest of each task. Last, what `choose` costs the host.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks._results import ROOT, append, stamp
from nbkit.models.attention import Attend, Documents, Shapes, backward, choose, forward

RESULTS = ROOT / "benchmarks" / "results" / "attention.csv"
AVERAGE = 512  # tokens of a packed document
PLAIN_UP_TO = 8192  # tokens; the formulas in float32 take seconds beyond
COLUMNS = (("task", 34), ("kind", 20), ("forward_ms", 10), ("backward_ms", 11), ("forward_tflops", 14), ("backward_tflops", 15),
           ("mib", 7), ("first_s", 7), ("apart", 8), ("tells", 0))  # fmt: skip


class Task(NamedTuple):
    tokens: int
    window: int | None = None
    softcap: float | None = None
    packed: bool = False

    def __str__(self) -> str:
        parts = [f"T {self.tokens}", self.window and f"window {self.window}", self.softcap and f"softcap {self.softcap:g}"]
        return ", ".join(str(p) for p in (*parts, self.packed and "packed") if p)

    def kinds(self) -> list[str]:
        plain = ["plain"] if self.tokens <= PLAIN_UP_TO else []
        if self.softcap:
            return ["flex", *plain]
        if self.packed:
            return ["flash documents", "efficient documents", "flex", *plain]
        return ["flash", "efficient window", "flex", *plain] if self.window else ["cudnn", "flash", "efficient", "flex", *plain]


TASKS = (
    *(Task(t, softcap=50.0) for t in (512, 4096, 32768)),
    *(Task(t, window=min(4096, t // 4)) for t in (4096, 32768)),
    *(Task(t, packed=True) for t in (4096, 32768)),
    *(Task(t) for t in (512, 4096, 32768)),
    *(Task(t, window=t // 8, softcap=50.0) for t in (4096, 32768)),
    Task(4096, softcap=50.0, packed=True),
    Task(4096, window=256, packed=True),
    Task(8192, window=4096),
    Task(8192, softcap=50.0),
)


def documents_of(tokens: int) -> Documents:
    make = torch.Generator().manual_seed(0)
    lengths = torch.randint(AVERAGE // 4, 2 * AVERAGE - AVERAGE // 4, (2 * tokens // AVERAGE,), generator=make)
    ends = lengths.cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[ends < tokens], torch.tensor([tokens])])
    return Documents(starts.to("cuda", torch.int32), int(starts.diff().max()))


def pairs(task: Task, rows: int, documents: Documents | None) -> int:
    """Scores that may be seen, of one head."""
    lengths = documents.starts.diff().tolist() if documents else [task.tokens] * rows
    total = 0
    for n in lengths:
        w = min(task.window or n, n)
        total += w * (w + 1) // 2 + (n - w) * w
    return total


def measured(call: Any, seconds: float = 0.15) -> float:
    """Median ms of a call that has run before."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found: list[float] = []
    begun = time.monotonic()
    while len(found) < 3 or (len(found) < 20 and time.monotonic() - begun < seconds):
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return sorted(found)[len(found) // 2]


def apart(mine: list[Tensor], right: list[Tensor]) -> float:
    """The largest relative distance of a tensor to its like. Raises: RuntimeError where one holds NaN or infinity."""
    for name, x in zip(("out", "dq", "dk", "dv"), mine, strict=True):
        if not x.isfinite().all():
            raise RuntimeError(f"{name} is not finite")
    return max(float((x.float() - y.float()).norm() / y.float().norm()) for x, y in zip(mine, right, strict=True))


def row(task: Task, kind: str, heads: tuple[int, int, int], dtype: torch.dtype, right: list[Tensor]) -> dict[str, Any]:
    """One line of the table; `right` holds out, dq, dk, dv of the task's first kind, or nothing yet: then it gets these."""
    h, g, k = heads
    rows = 1 if task.packed else max(1, 4096 // task.tokens)
    make = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(rows, task.tokens, h + 2 * g, k, generator=make, device="cuda", dtype=dtype).transpose(1, 2)
    q, key, v = x[:, :h], x[:, h : h + g], x[:, h + g :]
    do = torch.randn(rows, task.tokens, h, k, generator=make, device="cuda", dtype=dtype).transpose(1, 2)
    documents = documents_of(task.tokens) if task.packed else None
    how = Attend(kind, k**-0.5, task.window, documents=documents, softcap=task.softcap)
    torch.cuda.synchronize()
    begun = time.monotonic()
    out, kept, numbers = forward(how, q, key, v, None)
    if kind == "flex" and not numbers:
        raise RuntimeError("FlexAttention gave way to the formulas")
    found = [out, *backward(how, do, q, key, v, out, None, kept, numbers)]
    torch.cuda.synchronize()
    first = time.monotonic() - begun
    distance = apart(found, right or found)
    if not right:
        right.extend(x.clone() for x in found)
    del found
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - sum(t.numel() * t.element_size() for t in (out, *kept) if t is not None)
    there = measured(lambda: forward(how, q, key, v, None))
    back = measured(lambda: backward(how, do, q, key, v, out, None, kept, numbers))
    peak = torch.cuda.max_memory_allocated() - before
    flops = pairs(task, rows, documents) * h * k
    return {
        "forward_ms": round(there, 3), "backward_ms": round(back, 3), "forward_tflops": round(4e-9 * flops / there, 1),
        "backward_tflops": round(1e-8 * flops / back, 1), "mib": round(peak / 2**20), "first_s": round(first, 2),
        "apart": f"{distance:.1e}",
    }  # fmt: skip


def show(one: dict[str, Any]) -> None:
    print("  ".join(str(one.get(name, "")).ljust(width) for name, width in COLUMNS), flush=True)


def host_time() -> None:
    """What `choose` costs in the first layer of a forward and in the others."""
    like, shapes = torch.empty(1, device="cuda", dtype=torch.bfloat16), Shapes()

    def layers(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            choose((2, 32, 2048, 128), like, scale=0.1, mask=None, window=None, shapes=shapes)
        return (time.perf_counter() - begun) * 1e6

    for _ in range(2):
        shapes.begin()
        first, more = layers(1), layers(1000) / 1000
    print(f"choose: {first:.1f} us for the first layer of a forward, {more:.2f} us for each other")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=55)
    parser.add_argument("--heads", default="32,8,128", help="query heads, key/value heads, width")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--commit", default="", help="written to the CSV; found from git if not given")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given, start = parser.parse_args(), time.monotonic()
    h, g, k = (int(n) for n in given.heads.split(","))
    where = stamp(given.commit) | {"heads": given.heads, "dtype": given.dtype}
    show({name: name for name, _ in COLUMNS})
    failed = False
    for task in TASKS:
        found: list[dict[str, Any]] = []
        right: list[Tensor] = []
        for kind in task.kinds():
            one: dict[str, Any] = {"task": str(task), "kind": kind}
            if time.monotonic() - start > given.seconds:
                found.append(one | {"tells": "no time"})
                continue
            try:
                one |= row(task, kind, (h, g, k), getattr(torch, given.dtype), right)
            except Exception as error:  # one implementation that fails is a result
                one["tells"] = f"FAILED {str(error).splitlines()[0] if str(error) else type(error).__name__}"[:120]
                failed = True
                torch.cuda.synchronize()  # raises where the device itself is past use
            found.append(one)
            torch.cuda.empty_cache()
        timed = [one for one in found if "forward_ms" in one]
        if timed:
            min(timed, key=lambda one: one["forward_ms"] + one["backward_ms"])["tells"] = "fastest"
        for one in found:
            show(one)
        append(given.out, [where | dict.fromkeys((name for name, _ in COLUMNS), "") | one for one in found])
    host_time()
    print(f"{time.monotonic() - start:.0f} s; rows added to {given.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
