"""Runs the parity tests in processes in which Triton interprets kernels on the CPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbkit.kernels import all_ops

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton, in a process that compiles",
)


def parity(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest over the parity tests under `root`, interpreted."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    names = ("parity", "raw", "raw_norms", "adamw8bit", "swiglu_lora", "lora_gradients", "nf4_gemv")
    files = [f"tests/kernels/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files, *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=400)


def test_parity_under_the_interpreter() -> None:
    done = parity(ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    count = re.search(r"(\d+) passed", done.stdout)
    assert count and int(count[1]) >= 2 * sum(len(op.cases) for op in all_ops()), done.stdout[-500:]


MUTANTS = [
    ("rms_norm", "dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=0) / D))", "dx = rstd * g"),
    ("rms_norm", "share += dy * xhat", "share += dy"),
    ("rope", "        s = -s", "        s = s"),
    ("swiglu", "(s + act * (1.0 - s))", "(s + act)"),
    ("linear_cross_entropy", "dx *= 1.0 - (z / softcap) * (z / softcap)", "dx *= 1.0"),
    ("linear_cross_entropy", "tl.where(col == label, 1.0, 0.0)", "tl.where(col == label, 0.99, 0.0)"),
    ("add_rms_norm", "x = (x + residual).to(SUM.dtype.element_ty)", "x = (x - residual).to(SUM.dtype.element_ty)"),
    ("layer_norm", "dbias += dy", "dbias += g"),
    ("layer_norm", "(g - tl.sum(g, axis=0) / D - xhat", "(g - xhat"),
    ("geglu", "(1.0 + 0.134145 * square)", "(1.0 + 0.044715 * square)"),
    ("geglu", "tl.exp(-0.5 * gate * gate)", "tl.exp(-gate * gate)"),
    ("rope", "one, two = 2 * k, 2 * k + 1", "one, two = k, k + HALF"),
    ("qk_norm_rope", "na, nb = da * c + db * s, db * c - da * s", "na, nb = da * c - db * s, db * c + da * s"),
    ("qk_norm_rope", "total += tl.sum(r * r, axis=1)", "total += 0.0"),
    ("nf4_gemv", "acc0 += s * absmax", "acc0 += s"),
    ("nf4_gemv", "tl.minimum(row0 + r, n - 1)", "tl.minimum(r, n - 1)"),
    ("nf4_gemv", "(0, 5, 6, 2, 4, 3, 1)", "(0, 5, 6, 2, 3, 4, 1)"),
    ("_nf4_pairs", "_pair(word >> 16, T + 8), _pair(word >> 24, T + 8)", "_pair(word >> 24, T + 8), _pair(word >> 16, T + 8)"),
    ("lora_products", 'tl.dot(xa, b, input_precision="ieee") * scale', 'tl.dot(xa, b, input_precision="ieee")'),
    ("swiglu_lora", "last = (tl.program_id(1) + 1) * blocks // tl.num_programs(1)\n    begin", "last = blocks\n    begin"),
    ("swiglu_lora", "(part * ranks + first + r)", "(part * ranks + r)"),
    ("swiglu_lora", "        XA_UP += BLOCK_N * stride_xa\n", ""),
    ("swiglu_lora", "h = (gate * _sigmoid", "h = (_sigmoid"),
    ("lora_gradients", "r = own % chunks * BLOCK_R", "r = 0"),
    (
        "lora_gradients",
        "        one = tl.where(pid >= CUTS[4][0], five, one)",
        "        one = tl.where(pid >= CUTS[4][0], four, one)",
    ),
    ("lora_gradients", "        WIDE += BLOCK_N * stride_wide\n", ""),
    ("lora_gradients", "        total += tl.load(place,", "        total -= tl.load(place,"),
    ("adamw8bit", "p * (1.0 - rate * decay)", "p * (1.0 - decay)"),
    ("adamw8bit", "probe = code + (128 >> k)", "probe = code + (64 >> k)"),
    ("adamw8bit", "block = first + block", "block = first + 0 * block"),
    ("adamw8bit", "tl.load(STEPS + k)", "tl.load(STEPS)"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "right", "wrong"), MUTANTS, ids=lambda value: None)
def test_a_broken_kernel_is_found(name: str, right: str, wrong: str, tmp_path: Path) -> None:
    """The same tests, over a copy of the repository in which one line of a kernel is wrong."""
    for part in ("nbkit", "tests"):
        (tmp_path / part).mkdir()
    for path in [*(ROOT / "nbkit").rglob("*.py"), *(ROOT / "tests").glob("*.py"), *(ROOT / "tests/kernels").glob("*.py")]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    file = tmp_path / "nbkit" / "kernels" / f"{name}.py"
    text = file.read_text(encoding="utf-8")
    assert text.count(right) == 1, "the line to break is not there"
    file.write_text(text.replace(right, wrong), encoding="utf-8")
    done = parity(tmp_path, "-x", "-k", "nf4_gemv" if name == "_nf4_pairs" else name)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(r"^E +(AssertionError|assert)", done.stdout, re.MULTILINE), "numbers differ, rather than something raises"
