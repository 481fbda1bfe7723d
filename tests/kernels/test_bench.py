"""The benchmark's own Python, run on the CPU over small sizes with the clock replaced: every op has a row, failures are said."""

from __future__ import annotations

import csv
import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks._peers import Peer

LIMITS = {"B": 1, "T": 4, "N": 4, "P": 3000, "V": 500, "D": 64, "F": 64, "I": 128, "O": 96, "tensors": 3}


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)


def raising(**inputs: Any) -> None:
    raise ValueError("not on this device")


BROKEN = Peer("torch", "torch", raising)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/bench_kernels.py on the CPU: sizes at most LIMITS, one call a time."""
    testing = pytest.importorskip("triton.testing")
    module = importlib.import_module("benchmarks.bench_kernels")

    def once(call: Any, warmup: int, rep: int, return_mode: str) -> float:
        call()
        return 0.5

    def smaller(op: Any) -> Any:
        cases = [replace(c, sizes={k: min(v, LIMITS.get(k, v)) for k, v in c.sizes.items()}) for c in op.benchmark]
        return replace(op, benchmark=tuple(cases))

    ops = tuple(smaller(op) for op in module.all_ops())
    monkeypatch.setattr(testing, "do_bench", once)
    monkeypatch.setattr(module, "all_ops", lambda: ops)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "LIMITS", (8, 1))
    monkeypatch.setattr(module, "launches", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "PEERS", {"rms_norm": Peer("torch", "torch", torch_rms_norm), "rope": BROKEN})
    return module


def test_every_op_has_its_rows(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "made" / "kernels.csv"
    monkeypatch.setattr("sys.argv", ["bench_kernels.py", "--out", str(out), "--compile", ""])
    assert bench.main() == 0
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    assert {row["op"] for row in rows} == {op.name for op in bench.all_ops()}
    assert all(row["verdict"] == "ok" and row["gpu"] and row["forward_ms"] == "0.5000" for row in rows)
    both = {op.name for op in bench.all_ops() if op.gradients}
    assert {row["op"] for row in rows if row["both_ms"]} == both
    assert all(float(row["of_limit"]) >= 0 and row["rate"] for row in rows)
    beside = {row["op"]: (row["peer"], row["peer_both_ms"], row["gain_over_peer"]) for row in rows if row["peer"]}
    assert beside == {"rms_norm": ("torch", "0.5000", "1.00"), "rope": ("torch: ValueError: not on this device", "", "")}


def test_rows_are_written_one_by_one_and_none_is_begun_late(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "kernels.csv"

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    real, seen = bench.row, []

    def row(op: Any, *rest: Any) -> dict[str, Any]:
        seen.append(op.name)
        return real(op, *rest) if len(seen) < 3 else stopped()

    monkeypatch.setattr(bench, "row", row)
    monkeypatch.setattr("sys.argv", ["bench_kernels.py", "--ops", "rms_norm", "--out", str(out), "--compile", ""])
    with pytest.raises(KeyboardInterrupt):
        bench.main()
    assert [row["verdict"] for row in csv.DictReader(out.open(encoding="utf-8"))] == ["ok", "ok"]
    monkeypatch.setattr("sys.argv", ["bench_kernels.py", "--ops", "rms_norm", "--out", str(out), "--budget", "-1"])
    assert bench.main() == 0
    assert [row["verdict"] for row in csv.DictReader(out.open(encoding="utf-8"))][2:] == ["no time"] * 3


def test_an_op_that_raises_or_is_wrong_is_said(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ops = [op for op in bench.all_ops() if op.name in ("rms_norm", "swiglu")]
    broken = replace(ops[0], fn=lambda x, weight: 1.1 * ops[0].fn(x, weight))

    def raises(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bench, "all_ops", lambda: (broken, replace(ops[1], fn=raises)))
    out = tmp_path / "kernels.csv"
    monkeypatch.setattr("sys.argv", ["bench_kernels.py", "--out", str(out), "--compile", ""])
    assert bench.main() == 1
    verdicts = [(row["op"], row["verdict"]) for row in csv.DictReader(out.open(encoding="utf-8"))]
    assert set(verdicts) == {("rms_norm", "WRONG"), ("swiglu", "FAILED")}
    assert "no such kernel" in capsys.readouterr().err


def test_an_unknown_op_is_refused(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench_kernels.py", "--ops", "rms_norm,warp"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "no op is called warp; there are adamw" in capsys.readouterr().err
