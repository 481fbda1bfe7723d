"""Where kernels run; that the folder is the list of ops; that all of it works where there is no triton."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nbkit import kernels
from nbkit.kernels import _launch, all_ops

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as on native Windows: importing it raises ImportError
import torch
from nbkit.kernels import _launch, all_ops
assert _launch.triton is None and not _launch.runs_on(torch.device("cpu")) and not _launch.runs_on(torch.device("cuda"))
for op in all_ops():
    case = op.cases[0]
    inputs = op.inputs(case, torch.float32, "cpu", 0)
    leaves = {k: v.detach().requires_grad_() if k in op.gradients else v for k, v in inputs.items()}
    out = op.fn(**leaves, **case.options)
    if op.gradients:
        out.sum().backward()
        assert all(leaves[name].grad is not None for name in op.gradients)
    assert torch.allclose(out, op.reference(**inputs, **case.options), atol=1e-5)
    print(op.name)
"""


def test_every_op_works_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [op.name for op in all_ops()]


def test_the_folder_is_the_list() -> None:
    files = sorted(m.name for m in pkgutil.iter_modules(kernels.__path__) if not m.name.startswith("_"))
    assert [op.name for op in all_ops()] == files
    for op in all_ops():
        assert op.fn.__module__ == f"nbkit.kernels.{op.name}" and callable(
            importlib.import_module(op.fn.__module__).OP.fn
        )
        assert op.cases and op.benchmark
        assert len({case.reason for case in op.cases}) == len(op.cases), f"{op.name}: two cases give the same reason"
        inputs = op.inputs(op.cases[0], torch.float32, "cpu", 0)
        assert set(op.gradients) <= set(inputs)


@pytest.mark.skipif(_launch.INTERPRETED, reason="CPU tensors take the kernels here")
def test_the_cpu_and_float64_take_the_plain_path() -> None:
    assert not _launch.use_triton(torch.ones(2))
    assert not _launch.use_triton(torch.ones(2, dtype=torch.float64))


def test_old_gpus_take_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for capability, runs in (((6, 1), False), ((7, 0), True), ((7, 5), True), ((12, 0), True)):
        monkeypatch.setattr(_launch, "_capability", lambda index, c=capability: c)
        assert _launch.runs_on(torch.device("cuda", 0)) is runs


def test_rows_are_views_where_they_can_be() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert _launch.as_rows(x).data_ptr() == x.data_ptr()
    part = x[..., :2]
    assert _launch.as_rows(part).shape == (6, 2) and _launch.as_rows(part).data_ptr() == x.data_ptr()
    turned = x.transpose(1, 2)
    assert torch.equal(_launch.as_rows(turned), turned.reshape(-1, 3)) and _launch.as_rows(turned).stride(1) == 1
    assert _launch.as_rows(torch.ones(3, 1).expand(3, 5)).stride(1) == 1
    assert [_launch.power_of_two(n) for n in (1, 2, 3, 576, 1024)] == [1, 2, 4, 1024, 1024]
