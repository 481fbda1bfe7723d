"""Each kernel's op against its plain-torch reference on a GPU: time and largest error, one row a case and dtype.

usage: python benchmarks/bench_kernels.py [--ops rms_norm,rope] [--dtypes bfloat16,float32] [--out FILE.csv]

Times are medians in ms of triton.testing.do_bench (L2 flushed), of the forward and of forward + backward under a random
upstream gradient; "gain" is reference / op. GB/s counts every input, output and gradient once: what had to move.
Errors are against the reference in float64 at the same widths and at most CHECK_ROWS rows, for the output and all gradients,
divided by the largest element; beside them the error of the reference in the same dtype. An op whose error is over twice the
reference's plus the dtype's tolerance is marked WRONG and the exit code is 1.
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nbkit.kernels import Case, KernelOp, all_ops

CHECK_ROWS = 256
DEVICE = "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
RESULTS = Path(__file__).resolve().parent / "results" / "kernels.csv"


def small(case: Case) -> Case:
    """The case at its real widths with fewer rows and one batch, so that float64 fits anywhere."""
    limits = {"B": 1, "T": CHECK_ROWS, "N": CHECK_ROWS}
    return replace(case, sizes={k: min(v, limits.get(k, v)) for k, v in case.sizes.items()})


def call(fn: Callable[..., Any], op: KernelOp, inputs: dict[str, Any], case: Case, upstream: Any) -> dict[str, torch.Tensor]:
    """Output and gradients by name."""
    leaves = {k: v.detach().requires_grad_() if k in op.gradients else v for k, v in inputs.items()}
    out = fn(**leaves, **case.options)
    if not op.gradients:
        return {"output": out}
    return {"output": out.detach(), **dict(zip(op.gradients, grad(out, leaves, op, upstream), strict=True))}


def grad(out: torch.Tensor, leaves: dict[str, Any], op: KernelOp, upstream: Any) -> tuple[torch.Tensor, ...]:
    given = None if upstream is None else upstream.to(out.dtype)
    return torch.autograd.grad(out, [leaves[name] for name in op.gradients], given, retain_graph=False)


def errors(op: KernelOp, case: Case, dtype: torch.dtype) -> tuple[float, float, bool]:
    """(the op's error, the reference's own, whether the op's is within the rule), each over the largest element of a tensor."""
    case = small(case)
    inputs = op.inputs(case, dtype, DEVICE, 0)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    upstream = torch.randn_like(op.reference(**inputs, **case.options).float()).to(dtype)
    ours, eager = (call(fn, op, inputs, case, upstream) for fn in (op.fn, op.reference))
    truth = call(op.reference, op, wide, case, upstream)
    worst = [0.0, 0.0]
    right = True
    for name, exact in truth.items():
        scale = max(float(exact.double().abs().max()), 1e-12)
        one, other = (float((found[name].double() - exact.double()).abs().max()) / scale for found in (ours, eager))
        worst = [max(worst[0], one), max(worst[1], other)]
        right &= one <= 2 * other + TOLERANCE[dtype]
    return worst[0], worst[1], right


def times(fn: Callable[..., Any], op: KernelOp, inputs: dict[str, Any], case: Case) -> tuple[float, float | None]:
    """Median ms of (forward without autograd, forward and backward or None)."""
    from triton.testing import do_bench

    with torch.no_grad():
        forward = do_bench(lambda: fn(**inputs, **case.options), return_mode="median")
        upstream = torch.randn_like(fn(**inputs, **case.options).float())
    if not op.gradients:
        return forward, None
    leaves = {k: v.detach().requires_grad_() if k in op.gradients else v for k, v in inputs.items()}
    both = do_bench(lambda: grad(fn(**leaves, **case.options), leaves, op, upstream), return_mode="median")
    return forward, both


def moved(op: KernelOp, inputs: dict[str, Any], case: Case) -> int:
    """Bytes of the inputs and the output."""
    with torch.no_grad():
        out = op.fn(**inputs, **case.options)
    tensors = [value for value in (*inputs.values(), out) if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def row(op: KernelOp, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    error, own, right = errors(op, case, dtype)
    inputs = op.inputs(case, dtype, DEVICE, 0)
    forward, both = times(op.fn, op, inputs, case)
    plain_forward, plain_both = times(op.reference, op, inputs, case)
    return {
        "op": op.name,
        "case": case.reason,
        "dtype": str(dtype).removeprefix("torch."),
        "forward_ms": round(forward, 4),
        "reference_forward_ms": round(plain_forward, 4),
        "both_ms": "" if both is None else round(both, 4),
        "reference_both_ms": "" if plain_both is None else round(plain_both, 4),
        "gain": round((plain_both or plain_forward) / (both or forward), 2),
        "forward_gb_s": round(moved(op, inputs, case) / forward / 1e6),
        "error": f"{error:.1e}",
        "reference_error": f"{own:.1e}",
        "verdict": "ok" if right else "WRONG",
    }


def commit() -> str:
    """The checkout's commit, with a + if files differ from it; "" outside a checkout."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=RESULTS.parent.parent)
    return done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="", help="names, comma between; all if not given")
    parser.add_argument("--dtypes", default="bfloat16", help="bfloat16, float16, float32, comma between")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV that rows are appended to")
    parser.add_argument("--commit", default="", help="written to the CSV; found from git if not given")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device; the kernels' tests run without one: pytest tests/kernels")
    wanted = set(given.ops.split(",")) - {""}
    unknown = wanted - {op.name for op in all_ops()}
    if unknown:
        parser.error(f"no op is called {', '.join(sorted(unknown))}; there are {', '.join(op.name for op in all_ops())}")
    stamp = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": given.commit or commit(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
    }
    rows = []
    for op in all_ops():
        if wanted and op.name not in wanted:
            continue
        for case in op.benchmark:
            for dtype in (getattr(torch, name) for name in given.dtypes.split(",")):
                rows.append(row(op, case, dtype))
                show(rows[-1], first=len(rows) == 1)
                gc.collect()
                torch.cuda.empty_cache()
    append(given.out, [{**stamp, **one} for one in rows])
    return 1 if any(one["verdict"] != "ok" for one in rows) else 0


COLUMNS = (
    ("op", "op", 21), ("case", "case", 41), ("dtype", "dtype", 9),
    ("forward_ms", "fwd ms", 9), ("reference_forward_ms", "ref", 9), ("both_ms", "f+b ms", 9), ("reference_both_ms", "ref", 9),
    ("gain", "gain", 7), ("forward_gb_s", "GB/s", 7), ("error", "error", 9), ("reference_error", "ref", 9), ("verdict", "", 6),
)  # fmt: skip


def show(one: dict[str, Any], first: bool) -> None:
    """One line of the table, under the titles if it is the first."""
    for titles in (True, False) if first else (False,):
        cells = [(title if titles else str(one[name]))[: width - 1] for name, title, width in COLUMNS]
        aligned = [
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, (_, _, w)) in enumerate(zip(cells, COLUMNS, strict=True))
        ]
        print("".join(aligned), flush=True)


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
