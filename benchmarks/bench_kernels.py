"""Every kernel on a GPU against plain torch and the peers' kernels: times, rates, largest errors; a row an op, case and dtype.

usage: python -m benchmarks.bench_kernels [--ops rms_norm,rope] [--dtypes bfloat16,float32] [--compile rms_norm] [--out FILE.csv]

Times are medians in ms of triton.testing.do_bench (L2 flushed before each call; a call whose host time is longer than the flush
counts that), of the forward ("fwd") and of forward + backward ("f+b") under a random upstream gradient, with weights frozen as
under LoRA; "ref" is plain torch, cuBLAS, or what else would be used, "peer" Liger's or bitsandbytes' kernel where installed
(_peers.py). "gain" is ref / op of the whole, "over peer" likewise. Of LoRA's two products y += xa B^T has a row as well.
GB/s counts every input and output once: what had to move; TFLOP/s where GEMMs are most of it. "of limit" is that over what
this GPU gave for a copy of 1 GiB, or for a GEMM of 8192, at the start. Errors are against the reference in float64 at
the same widths and at most CHECK_ROWS rows, over the largest element, for the output and all gradients; beside them the error
of plain torch in the same dtype. An op whose error is over twice torch's plus the dtype's tolerance is marked WRONG, one that
raises FAILED, and the exit code is 1. Rows are written as they are measured; none is begun after --budget seconds, and no
torch.compile (for the last case of the ops in --compile) after --seconds. What a launch costs the host comes first.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks._peers import BASELINES, HELD, IN_PLACE, PEERS, TIMED, products
from benchmarks._results import ROOT, append, stamp
from nbkit.kernels import Case, KernelOp, _launch, all_ops, lora_products, nf4, rms_norm, swiglu

CHECK_ROWS = 256
DEVICE = "cuda"
LIMITS = (8192, 1024)  # of the GEMM and the copy, in MiB, that the limits are measured with
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
RESULTS = ROOT / "benchmarks" / "results" / "kernels.csv"
FROZEN = {"weight", "bias", "q_weight", "k_weight"}  # parameters that are not trained when times are taken
GEMM_FLOPS: dict[str, Callable[[Mapping[str, int]], float]] = {
    "linear_cross_entropy": lambda s: 2.0 * s["N"] * s["D"] * s["V"] * (1 - s.get("ignored", 40) / 100)
}
COMPILED = "rms_norm,layer_norm,swiglu,geglu"

# -- one row ---------------------------------------------------------------------------------------


def inputs_of(op: KernelOp, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The op's inputs, random numbers made on the GPU: on one CPU core they would take longer than all that is measured."""
    maker = torch.Generator
    with torch.device(DEVICE), mock.patch.object(torch, "Generator", lambda: maker(DEVICE)):
        return op.inputs(case, dtype, DEVICE, 0)


def small(case: Case) -> Case:
    """The case at its real widths with fewer rows and one batch, so that float64 fits anywhere."""
    limits = {"B": 1, "T": CHECK_ROWS, "N": CHECK_ROWS, "P": 100_000, "tensors": 3}
    return replace(case, sizes={k: min(v, limits.get(k, v)) for k, v in case.sizes.items()})


def widened(value: Any) -> Any:
    """Floating tensors of 16 or 32 bits as float64, also inside tuples; a packed weight stays as it is."""
    if isinstance(value, nf4.Nf4):
        return value
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        parts = [widened(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors(value)
    return found


def call(fn: Callable[..., Any], names: tuple[str, ...], inputs: dict[str, Any], case: Case, upstream: Any) -> dict[str, Any]:
    """Output and gradients by name."""
    leaves = {k: v.detach().requires_grad_() if k in names else v for k, v in inputs.items()}
    out = fn(**leaves, **case.options)
    if not names:
        return {"output": out}
    return {"output": out.detach(), **dict(zip(names, grad(out, leaves, names, upstream), strict=True))}


def grad(out: Any, leaves: dict[str, Any], names: tuple[str, ...], upstream: Any) -> tuple[torch.Tensor, ...]:
    """Gradients of one output or of several."""
    outs, ups = (x if isinstance(x, tuple) else (x,) for x in (out, upstream))
    return torch.autograd.grad(outs, [leaves[name] for name in names], [u.to(o.dtype) for o, u in zip(outs, ups, strict=True)])


def errors(op: KernelOp, case: Case, dtype: torch.dtype) -> tuple[float, float, bool]:
    """(the op's error, the reference's own, whether the op's is within the rule), each over the largest element of a tensor."""
    case = small(case)
    inputs = inputs_of(op, case, dtype)
    wide = {k: widened(v) for k, v in inputs.items()}
    if "dtype" in wide:
        wide["dtype"] = torch.float64
    upstream = torch.randn_like(op.reference(**inputs, **case.options).float()).to(dtype)
    ours, eager = (call(fn, op.gradients, inputs, case, upstream) for fn in (op.fn, op.reference))
    truth = call(op.reference, op.gradients, wide, case, upstream)
    worst, right = [0.0, 0.0], True
    for name, exact in truth.items():
        scale = max(float(exact.double().abs().max()), 1e-12)
        one, other = (float((found[name].double() - exact.double()).abs().max()) / scale for found in (ours, eager))
        worst = [max(worst[0], one), max(worst[1], other)]
        right &= one <= 2 * other + TOLERANCE[dtype]
    return worst[0], worst[1], right


def bench(once: Callable[[], Any]) -> float:
    """Median ms of a call, the L2 cache flushed before each."""
    from triton.testing import do_bench

    return float(do_bench(once, warmup=10, rep=40, return_mode="median"))


def times(fn: Callable[..., Any], names: tuple[str, ...], inputs: dict[str, Any], case: Case) -> tuple[float, float | None]:
    """Median ms of (forward without autograd, forward and backward or None)."""
    with torch.no_grad():
        forward = bench(lambda: fn(**inputs, **case.options))
        if not names:
            return forward, None
        out = fn(**inputs, **case.options)
        upstream = tuple(map(torch.randn_like, out)) if isinstance(out, tuple) else torch.randn_like(out.float())
    leaves = {k: v.detach().requires_grad_() if k in names else v for k, v in inputs.items()}
    return forward, bench(lambda: grad(fn(**leaves, **case.options), leaves, names, upstream))


def limits_of(dtype: torch.dtype, size: int = 8192, megabytes: int = 1024) -> tuple[float, float]:
    """(GB/s of a copy, read and write counted, TFLOP/s of a square GEMM) of this device, now."""
    one = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=DEVICE)
    other = torch.empty_like(one)
    copy = bench(lambda: other.copy_(one))
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    found = 2 * one.numel() / copy / 1e6, 2.0 * size**3 / bench(lambda: a @ b) / 1e9
    print(f"limits measured: {found[0]:.0f} GB/s, {found[1]:.0f} TFLOP/s in {dtype}", flush=True)
    return found


def of_limit(value: float, limit: float, unit: str) -> dict[str, str]:
    return {"rate": f"{value:.0f} {unit}", "of_limit": f"{value / limit:.2f}"}


def rate(
    op: KernelOp, case: Case, inputs: dict[str, Any], fn: Callable[..., Any], ms: float, limits: tuple[float, float]
) -> dict[str, str]:
    """What the forward moved, or computed, a second, and its share of the limit."""
    if op.name in GEMM_FLOPS:
        return of_limit(GEMM_FLOPS[op.name](case.sizes) / ms / 1e9, limits[1], "TF/s")
    with torch.no_grad():
        out = fn(**inputs, **case.options)
    read_only = IN_PLACE.get(op.name)
    written = tensors([out] if read_only is None else (v for k, v in inputs.items() if k not in read_only))
    moved = sum(t.numel() * t.element_size() for t in [*tensors(inputs.values()), *written])
    return of_limit(moved / ms / 1e6, limits[0], "GB/s")


def compiled(op: KernelOp, inputs: dict[str, Any], names: tuple[str, ...], case: Case) -> tuple[str, str]:
    """(forward, forward + backward) ms under torch.compile, or why not."""
    try:
        forward, both = times(torch.compile(op.reference, dynamic=False), names, inputs, case)
    except Exception as problem:  # inductor needs a C compiler and more; the other columns do not depend on it
        return f"no: {type(problem).__name__}", ""
    finally:
        torch.compiler.reset()
    return f"{forward:.4f}", "" if both is None else f"{both:.4f}"


def peer_times(op: KernelOp, case: Case, inputs: dict[str, Any], names: tuple[str, ...]) -> dict[str, str]:
    """The peer's columns; what it raises is shown, and is no fault of the op's row."""
    peer = PEERS.get(op.name)
    if peer is None or not peer.there or not peer.fits(case):
        return {}
    try:
        forward, both = times(peer.fn, names, peer.prepare(inputs), case)
    except Exception as problem:  # another library's kernel: any fault of it is told in its column
        return {"peer": f"{peer.name}: {type(problem).__name__}: {str(problem)[:80]}"}
    return {"peer": peer.name, "peer_forward_ms": f"{forward:.4f}", "peer_both_ms": "" if both is None else f"{both:.4f}"}


def row(op: KernelOp, case: Case, dtype: torch.dtype, with_compile: bool, limits: tuple[float, float]) -> dict[str, Any]:
    error, own, right = errors(op, case, dtype)
    inputs = inputs_of(op, case, dtype)
    names = tuple(name for name in op.gradients if name not in FROZEN)
    fn, baseline = TIMED.get(op.name, op.fn), BASELINES.get(op.name, op.reference)
    forward, both = times(fn, names, inputs, case)
    plain_forward, plain_both = times(baseline, names, inputs, case)
    beside = peer_times(op, case, inputs, names)
    ours = both or forward
    if "peer_forward_ms" in beside:
        beside["gain_over_peer"] = f"{float(beside['peer_both_ms'] or beside['peer_forward_ms']) / ours:.2f}"
    compiled_forward, compiled_both = compiled(op, inputs, names, case) if with_compile else ("", "")
    return beside | rate(op, case, inputs, fn, forward, limits) | {
        "op": op.name, "case": case.reason, "dtype": str(dtype).removeprefix("torch."),
        "forward_ms": f"{forward:.4f}", "reference_forward_ms": f"{plain_forward:.4f}", "compiled_forward_ms": compiled_forward,
        "both_ms": "" if both is None else f"{both:.4f}", "reference_both_ms": "" if plain_both is None else f"{plain_both:.4f}",
        "compiled_both_ms": compiled_both, "gain": f"{(plain_both or plain_forward) / ours:.2f}",
        "error": f"{error:.1e}", "reference_error": f"{own:.1e}", "verdict": "ok" if right else "WRONG",
    }  # fmt: skip


def product_rows(case: Case, dtype: torch.dtype, limits: tuple[float, float]) -> Iterable[dict[str, Any]]:
    """The one of LoRA's two products that is nbkit's, against cuBLAS."""
    for name, ours, cublas, moved in products(case, inputs_of(lora_products.OP, case, dtype)):
        one, other = (times(fn, (), {}, Case("", {}))[0] for fn in (ours, cublas))
        yield {
            "op": "lora_products", "case": f"{name}: {case.reason}", "dtype": str(dtype).removeprefix("torch."),
            "forward_ms": f"{one:.4f}", "reference_forward_ms": f"{other:.4f}", "gain": f"{other / one:.2f}", "verdict": "ok",
        } | of_limit(sum(t.numel() * t.element_size() for t in moved) / one / 1e6, limits[0], "GB/s")  # fmt: skip


# -- what a launch costs the host ------------------------------------------------------------------


def launches() -> list[dict[str, Any]]:
    """Microseconds of host time a launch, of the same kernels launched Triton's ordinary way and by nbkit's launcher."""
    x = [torch.randn(16, 256, device=DEVICE, dtype=torch.float16) for _ in range(6)]
    rstd = torch.empty(16, device=DEVICE)
    many = (*x, *(t.stride(0) for t in x), 256)
    few = (x[0], x[1], x[2], rstd, x[2], 256, 256, 256, 1e-6)
    kernels = [
        ("swiglu backward, 13 arguments", swiglu._swiglu_backward_kernel, (16, 1), many, {"REBUILD": True, "BLOCK": 256}),
        ("rms_norm forward, 9 arguments", rms_norm._rms_norm_forward_kernel, (16,), few,
         {"OFFSET": 0.0, "CAST_LAST": False, "COPIES": False, "D": 256, "BLOCK": 256}),
    ]  # fmt: skip
    found = []
    for name, kernel, grid, args, constants in kernels:
        lean = isinstance(kernel, _launch.Launcher)
        ordinary = kernel.jit if lean else kernel
        slow = host_us(lambda o=ordinary, g=grid, a=args, c=constants: o[g](*a, **c, num_warps=4))
        fast = host_us(lambda k=kernel, g=grid, a=args, c=constants: k[g](*a, **c, num_warps=4)) if lean else slow
        found.append({"op": "launch", "case": name, "forward_us": fast, "reference_us": slow})
    found.append(
        {"op": "launch", "case": "torch add_, for scale", "forward_us": host_us(lambda: x[0].add_(1.0)), "reference_us": None}
    )
    raw = {"op": "launch", "case": "swiglu_backward with its checks", "reference_us": None}
    found.append(raw | {"forward_us": host_us(lambda: swiglu.swiglu_backward(*x[:5], h=x[5]))})
    for one in found:
        beside = "" if one["reference_us"] is None else f"   ordinary {one['reference_us']:6.2f} µs"
        print(f"{one['op']}: {one['case']:32} {one['forward_us']:6.2f} µs{beside}", flush=True)
    if _launch.launch_note():
        print(_launch.launch_note())
    return [
        {"op": "launch", "case": f"{one['case']} (µs)", "dtype": "float16", "forward_ms": f"{one['forward_us']:.2f}",
         "reference_forward_ms": "" if one["reference_us"] is None else f"{one['reference_us']:.2f}", "verdict": "ok"}
        for one in found
    ]  # fmt: skip


def host_us(once: Callable[[], Any], count: int = 300, rounds: int = 7) -> float:
    """The least host time a call over some rounds; the queue of the GPU is empty before each."""
    best = math.inf
    once()
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            once()
        best = min(best, (time.perf_counter() - start) / count)
    return best * 1e6


# -- the table -------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="", help='names, comma between, "launch" among them; all if not given')
    parser.add_argument("--dtypes", default="bfloat16", help="bfloat16, float16, float32, comma between")
    parser.add_argument("--compile", default=COMPILED, help="ops whose last case is timed under torch.compile too")
    parser.add_argument("--budget", type=float, default=110, help="no row is begun later than this")
    parser.add_argument("--seconds", type=float, default=40, help="no torch.compile is begun later than this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV that rows are appended to")
    parser.add_argument("--commit", default="", help="written to the CSV; found from git if not given")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device; the kernels' tests run without one: pytest tests/kernels")
    known = {op.name for op in all_ops()} | {"launch"}
    given.wanted = (set(given.ops.split(",")) - {""}) or known
    given.compiled = set(given.compile.split(",")) - {""}
    for unknown in sorted((given.wanted | given.compiled) - known):
        parser.error(f"no op is called {unknown}; there are {', '.join(sorted(known))}")
    return given


def main() -> int:
    given, start = arguments(), time.monotonic()
    where = stamp(given.commit, ("liger_kernel",))
    print(", ".join(f"{k} {v}" for k, v in where.items() if v), flush=True)
    bad = False

    def keep(one: dict[str, Any], shown: bool = True) -> None:
        nonlocal bad
        bad |= one["verdict"] not in ("ok", "no time")
        append(given.out, [where | dict.fromkeys(NAMES, "") | one])
        if shown:
            show(one)

    dtypes = [getattr(torch, name) for name in given.dtypes.split(",")]
    try:
        for one in launches() if "launch" in given.wanted else []:
            keep(one, shown=False)
    except Exception:
        traceback.print_exc()
        keep({"op": "launch", "verdict": "FAILED"})
    limits = limits_of(dtypes[0], *LIMITS)
    heading()
    for op in all_ops():
        for case in op.benchmark if op.name in given.wanted else ():
            for dtype in dtypes:
                gone = time.monotonic() - start
                with_compile = op.name in given.compiled and case is op.benchmark[-1] and gone < given.seconds
                for one in attempts(op, case, dtype, with_compile, limits, gone > given.budget):
                    keep(one)
    print(f"{time.monotonic() - start:.0f} s; rows added to {given.out}", flush=True)
    return 1 if bad else 0


def attempts(
    op: KernelOp, case: Case, dtype: torch.dtype, with_compile: bool, limits: tuple[float, float], late: bool
) -> Iterable[dict[str, Any]]:
    """The rows of a case; what raises is shown with its traceback, and does not end the others."""
    about = {"op": op.name, "case": case.reason, "dtype": str(dtype).removeprefix("torch.")}
    if late:
        yield about | {"verdict": "no time"}
        return
    try:
        yield row(op, case, dtype, with_compile, limits)
        if op.name == "lora_products":
            yield from product_rows(case, dtype, limits)
    except Exception:
        traceback.print_exc()
        yield about | {"verdict": "FAILED"}
        if DEVICE == "cuda":
            torch.cuda.synchronize()  # raises where the device itself is past use: then every later row would be a lie
    finally:
        HELD.clear()
        if DEVICE == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


COLUMNS = (
    ("op", "op", 21), ("case", "case", 39), ("dtype", "dtype", 9), ("forward_ms", "fwd ms", 9),
    ("reference_forward_ms", "ref", 9), ("compiled_forward_ms", "compile", 8), ("peer_forward_ms", "peer", 9),
    ("both_ms", "f+b ms", 9), ("reference_both_ms", "ref", 9), ("compiled_both_ms", "compile", 8), ("peer_both_ms", "peer", 9),
    ("gain", "gain", 6), ("gain_over_peer", "over", 6), ("peer", "peer", 13), ("rate", "forward", 11),
    ("of_limit", "of limit", 9), ("error", "error", 8), ("reference_error", "ref", 8), ("verdict", "", 8),
)  # fmt: skip
NAMES = tuple(name for name, _, _ in COLUMNS)


def heading() -> None:
    show({name: title for name, title, _ in COLUMNS})


def show(one: dict[str, Any]) -> None:
    """One line of the table."""
    cells = [str(one.get(name, ""))[: width - 1] for name, _, width in COLUMNS]
    print(
        "".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, (_, _, w)) in enumerate(zip(cells, COLUMNS, strict=True))),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
