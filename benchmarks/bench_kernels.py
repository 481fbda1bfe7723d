"""Every kernel against plain torch on a GPU: times, rates, largest errors; a row an op, case and dtype; what a launch costs.

usage: python benchmarks/bench_kernels.py [--ops rms_norm,rope] [--dtypes bfloat16,float32] [--compile rms_norm] [--out FILE.csv]

Times are medians in ms of triton.testing.do_bench (L2 flushed), of the forward ("fwd") and of forward + backward ("f+b") under
a random upstream gradient, with weights frozen as under LoRA; "ref" is plain torch, or what else would be used (BASELINES
below); "gain" is ref / op of the whole. LoRA's two products have a row each as well, against cuBLAS. GB/s counts every input,
output and gradient once: what had to move. TFLOP/s where GEMMs are most of it. Errors are against the reference in float64 at
the same widths and at most CHECK_ROWS rows, over the largest element, for the output and all gradients; beside them the error
of plain torch in the same dtype. An op whose error is over twice torch's plus the dtype's tolerance is marked WRONG, one that
raises FAILED, and the exit code is 1. torch.compile is timed for the last case of the ops in --compile, while --seconds last.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nbkit.kernels import Case, KernelOp, _launch, adamw, adamw8bit, add_rms_norm, all_ops

from nbkit.kernels import lora_border, lora_products, nf4, qk_norm_rope, rms_norm, swiglu  # isort: skip

CHECK_ROWS = 256
DEVICE = "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
RESULTS = Path(__file__).resolve().parent / "results" / "kernels.csv"
FROZEN = {"weight", "bias", "q_weight", "k_weight"}  # parameters that are not trained when times are taken
GEMM_FLOPS: dict[str, Callable[[Mapping[str, int]], float]] = {
    "linear_cross_entropy": lambda s: 2.0 * s["N"] * s["D"] * s["V"] * (1 - s.get("ignored", 40) / 100)
}
COMPILED = "rms_norm,layer_norm,swiglu,geglu"

# -- what is timed where the public function copies, or plain torch is not what would be used ------


def adamw_of_torch(param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, step: Any, lr: float, weight_decay: float) -> Any:
    """torch's fused AdamW, which wants one dtype for all."""
    m, v = (held(state, lambda s=state: s.to(param.dtype)) for state in (exp_avg, exp_avg_sq))
    args = {
        "lr": lr,
        "beta1": 0.9,
        "beta2": 0.999,
        "weight_decay": weight_decay,
        "eps": 1e-8,
        "amsgrad": False,
        "maximize": False,
    }
    torch._fused_adamw_([param], [grad], [m], [v], [], [step.float()], **args)
    return param


def adamw_step(param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, step: Any, **rates: Any) -> Any:
    adamw.adamw_(param, grad, exp_avg, exp_avg_sq, step, adamw.Rates(**rates))
    return param


def adamw8bit_step(param: Any, grad: Any, state: Any, sizes: list[int], missing: int, **rates: Any) -> Any:
    """The step alone: the table of addresses is made once, as the optimizer has it."""
    table = held(param, lambda: adamw8bit.table_of(sizes, param.device))
    params, grads = held((id(param), id(grad)), lambda: (param.split(sizes), grad.split(sizes)))
    adamw8bit.adamw8bit_(params, grads, state, adamw.Rates(**rates), table)
    return param


def adamw_of_torch_for_8_bits(param: Any, grad: Any, state: Any, sizes: list[int], missing: int, **options: Any) -> Any:
    """torch's fused AdamW over the same tensors, with 32-bit states."""

    def make() -> Any:
        found = [torch.nn.Parameter(p) for p in param.split(sizes)]
        for p, g in zip(found, grad.split(sizes), strict=True):
            p.grad = g
        return torch.optim.AdamW(found, fused=True, **options)

    held((id(param), id(grad), "torch"), make).step()
    return param


def dequantise_and_multiply(x: Any, packed: Any, lora: Any = None, residual: Any = None) -> Any:
    weight = held(packed.data, lambda: torch.empty(packed.shape, dtype=x.dtype, device=x.device))
    nf4.dequantize_nf4(packed, weight)
    y = x @ weight.t() if residual is None else torch.addmm(residual, x, weight.t())
    return y if lora is None else y.addmm_(lora[0], lora[1].t(), alpha=lora[2])


def borders(sources: Any, factors: Any, dtype: torch.dtype, one_by_one: bool = False) -> Any:
    """The copies alone: destinations and the table of addresses are made once."""

    def make() -> Any:
        out, copies = lora_border._places(sources, factors, dtype)
        return out, partial(lora_border.write_borders, copies) if one_by_one else lora_border.BorderWriter(copies).write

    out, write = held((id(sources), one_by_one), make)
    write()
    return out


def held(key: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives, made once for a row of the table."""
    key = id(key) if isinstance(key, torch.Tensor) else key
    if key not in HELD:
        HELD[key] = make()
    return HELD[key]


HELD: dict[Any, Any] = {}
IN_PLACE = {"adamw": ("grad",), "adamw8bit": ("grad",), "lora_products": ("x", "a", "b")}  # which inputs are only read
TIMED: dict[str, Callable[..., Any]] = {
    "adamw": adamw_step,
    "adamw8bit": adamw8bit_step,
    "add_rms_norm": add_rms_norm.add_rms_norm,
    "lora_border": borders,
    "lora_products": lambda x, a, b, y: lora_products.lora_out_(y, lora_products.lora_in(x, a), b),
    "qk_norm_rope": qk_norm_rope.qk_norm_rope,
}
BASELINES: dict[str, Callable[..., Any]] = {
    "adamw": adamw_of_torch,
    "adamw8bit": adamw_of_torch_for_8_bits,
    "add_rms_norm": add_rms_norm.reference,
    "lora_border": partial(borders, one_by_one=True),
    "lora_products": lambda x, a, b, y: y.addmm_(x @ a.t(), b.t()),
    "nf4_gemv": dequantise_and_multiply,
    "qk_norm_rope": qk_norm_rope.reference,
}

# -- one row ---------------------------------------------------------------------------------------


def inputs_of(op: KernelOp, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The op's inputs, random numbers made on the GPU: on one CPU core they would take longer than all that is measured."""
    maker = torch.Generator
    with torch.device(DEVICE), mock.patch.object(torch, "Generator", lambda: maker(DEVICE)):
        return op.inputs(case, dtype, DEVICE, 0)


def small(case: Case) -> Case:
    """The case at its real widths with fewer rows and one batch, so that float64 fits anywhere."""
    limits = {"B": 1, "T": CHECK_ROWS, "N": CHECK_ROWS, "P": 100_000}
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


def times(fn: Callable[..., Any], names: tuple[str, ...], inputs: dict[str, Any], case: Case) -> tuple[float, float | None]:
    """Median ms of (forward without autograd, forward and backward or None)."""
    from triton.testing import do_bench

    def timed(one: Callable[[], Any]) -> float:
        return float(do_bench(one, warmup=10, rep=40, return_mode="median"))

    with torch.no_grad():
        forward = timed(lambda: fn(**inputs, **case.options))
        if not names:
            return forward, None
        out = fn(**inputs, **case.options)
        upstream = tuple(map(torch.randn_like, out)) if isinstance(out, tuple) else torch.randn_like(out.float())
    leaves = {k: v.detach().requires_grad_() if k in names else v for k, v in inputs.items()}
    return forward, timed(lambda: grad(fn(**leaves, **case.options), leaves, names, upstream))


def rate(op: KernelOp, case: Case, inputs: dict[str, Any], fn: Callable[..., Any], ms: float) -> str:
    """What the forward moved, or computed, a second."""
    if op.name in GEMM_FLOPS:
        return f"{GEMM_FLOPS[op.name](case.sizes) / ms / 1e9:.0f} TF/s"
    with torch.no_grad():
        out = fn(**inputs, **case.options)
    read_only = IN_PLACE.get(op.name)
    written = tensors([out] if read_only is None else (v for k, v in inputs.items() if k not in read_only))
    moved = sum(t.numel() * t.element_size() for t in [*tensors(inputs.values()), *written])
    return f"{moved / ms / 1e6:.0f} GB/s"


def compiled(op: KernelOp, inputs: dict[str, Any], names: tuple[str, ...], case: Case) -> tuple[str, str]:
    """(forward, forward + backward) ms under torch.compile, or why not."""
    try:
        forward, both = times(torch.compile(op.reference, dynamic=False), names, inputs, case)
    except Exception as problem:  # inductor needs a C compiler and more; the other columns do not depend on it
        return f"no: {type(problem).__name__}", ""
    finally:
        torch.compiler.reset()
    return f"{forward:.4f}", "" if both is None else f"{both:.4f}"


def row(op: KernelOp, case: Case, dtype: torch.dtype, with_compile: bool) -> dict[str, Any]:
    error, own, right = errors(op, case, dtype)
    inputs = inputs_of(op, case, dtype)
    names = tuple(name for name in op.gradients if name not in FROZEN)
    fn, baseline = TIMED.get(op.name, op.fn), BASELINES.get(op.name, op.reference)
    forward, both = times(fn, names, inputs, case)
    plain_forward, plain_both = times(baseline, names, inputs, case)
    compiled_forward, compiled_both = compiled(op, inputs, names, case) if with_compile else ("", "")
    return {
        "op": op.name, "case": case.reason, "dtype": str(dtype).removeprefix("torch."),
        "forward_ms": f"{forward:.4f}", "reference_forward_ms": f"{plain_forward:.4f}", "compiled_forward_ms": compiled_forward,
        "both_ms": "" if both is None else f"{both:.4f}", "reference_both_ms": "" if plain_both is None else f"{plain_both:.4f}",
        "compiled_both_ms": compiled_both, "gain": f"{(plain_both or plain_forward) / (both or forward):.2f}",
        "rate": rate(op, case, inputs, fn, forward), "error": f"{error:.1e}", "reference_error": f"{own:.1e}",
        "verdict": "ok" if right else "WRONG",
    }  # fmt: skip


# -- LoRA's products one by one --------------------------------------------------------------------


def products(dtype: torch.dtype) -> list[dict[str, Any]]:
    """x A^T, and y += xa B^T, each against cuBLAS: a row each for the sizes of lora_products."""
    rows = []
    for case in lora_products.OP.benchmark:
        made = inputs_of(lora_products.OP, case, dtype)
        x, a, b, y = (made[name] for name in ("x", "a", "b", "y"))
        xa = lora_products.lora_in(x, a)
        pairs = (
            ("x A^T", {"x": x, "a": a}, lora_products.lora_in, lambda x, a: x @ a.t()),
            ("y += xa B^T", {"y": y, "xa": xa, "b": b}, lora_products.lora_out_, lambda y, xa, b: y.addmm_(xa, b.t())),
        )
        for name, inputs, ours, cublas in pairs:
            one, other = (times(fn, (), inputs, Case("", {}))[0] for fn in (ours, cublas))
            moved = sum(t.numel() * t.element_size() for t in (*inputs.values(), xa if name == "x A^T" else y))
            rows.append({
                "op": "lora_products", "case": f"{name}: {case.reason}", "dtype": str(dtype).removeprefix("torch."),
                "forward_ms": f"{one:.4f}", "reference_forward_ms": f"{other:.4f}", "gain": f"{other / one:.2f}",
                "rate": f"{moved / one / 1e6:.0f} GB/s", "verdict": "ok",
            })  # fmt: skip
            show(rows[-1])
    return rows


# -- what a launch costs the host ------------------------------------------------------------------


def launches() -> list[dict[str, Any]]:
    """Microseconds of host time a launch, of the same kernels launched Triton's ordinary way and by nbkit's launcher."""
    x = [torch.randn(16, 256, device=DEVICE, dtype=torch.float16) for _ in range(6)]
    rstd = torch.empty(16, device=DEVICE)
    many = (*x, *(t.stride(0) for t in x), 256)
    few = (x[0], x[1], x[2], rstd, 256, 256, 1e-6)
    kernels = [
        ("swiglu backward, 13 arguments", swiglu._swiglu_backward_kernel, (16, 1), many, {"REBUILD": True, "BLOCK": 256}),
        ("rms_norm forward, 7 arguments", rms_norm._rms_norm_forward_kernel, (16,), few,
         {"OFFSET": 0.0, "CAST_LAST": False, "D": 256, "BLOCK": 256}),
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


def commit() -> str:
    """The checkout's commit, with a + if files differ from it; "" outside a checkout."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=RESULTS.parent.parent)
    return done.stdout.strip()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="", help='names, comma between, "launch" among them; all if not given')
    parser.add_argument("--dtypes", default="bfloat16", help="bfloat16, float16, float32, comma between")
    parser.add_argument("--compile", default=COMPILED, help="ops whose last case is timed under torch.compile too")
    parser.add_argument("--seconds", type=float, default=45, help="no torch.compile is begun later than this")
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
    stamp = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": given.commit or commit(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
    }
    print(", ".join(f"{k} {v}" for k, v in stamp.items()), flush=True)
    rows = launches() if "launch" in given.wanted else []
    heading()
    for op in all_ops():
        for case in op.benchmark if op.name in given.wanted else ():
            for dtype in (getattr(torch, name) for name in given.dtypes.split(",")):
                late = time.monotonic() - start > given.seconds
                rows.append(attempt(op, case, dtype, op.name in given.compiled and case is op.benchmark[-1] and not late))
                show(rows[-1])
                HELD.clear()
                gc.collect()
                torch.cuda.empty_cache()
    if "lora_products" in given.wanted:
        rows += products(getattr(torch, given.dtypes.split(",")[0]))
    append(given.out, [{**stamp, **dict.fromkeys(NAMES, ""), **one} for one in rows])
    print(f"{time.monotonic() - start:.0f} s")
    return 1 if any(one["verdict"] != "ok" for one in rows) else 0


def attempt(op: KernelOp, case: Case, dtype: torch.dtype, with_compile: bool) -> dict[str, Any]:
    """One row; one that raises is shown with its traceback and does not end the others."""
    try:
        return row(op, case, dtype, with_compile)
    except Exception:
        traceback.print_exc()
        return {"op": op.name, "case": case.reason, "dtype": str(dtype).removeprefix("torch."), "verdict": "FAILED"}


COLUMNS = (
    ("op", "op", 21), ("case", "case", 39), ("dtype", "dtype", 9), ("forward_ms", "fwd ms", 9),
    ("reference_forward_ms", "ref", 9), ("compiled_forward_ms", "compile", 9), ("both_ms", "f+b ms", 9),
    ("reference_both_ms", "ref", 9), ("compiled_both_ms", "compile", 9), ("gain", "gain", 7), ("rate", "forward", 11),
    ("error", "error", 9), ("reference_error", "ref", 9), ("verdict", "", 7),
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


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to the CSV; a new file starts with the names of the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        if fresh:
            table.writeheader()
        table.writerows(rows)
    print(f"{len(rows)} rows added to {path}")


if __name__ == "__main__":
    raise SystemExit(main())
