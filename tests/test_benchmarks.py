"""The training benchmark's own Python: rows, budgets, arms that fail or hang, and what is written; workers are stand-ins."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import _process, _results, bench_training, gpu_tests
from benchmarks._arms import ARMS, Wanted
from benchmarks.bench_training import Bench, Table, arms_of, parse

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the benchmarks run on Linux: processes are ended by group")

# A worker that answers at once, or as its script of misdeeds says: {"command": what it does instead}.
WORKER = """
import json, sys, time
misdeeds = json.loads(sys.argv[1])
for line in sys.stdin:
    command = json.loads(line)
    do, arm = command["do"], command.get("arm", "")
    deed = misdeeds.get(f"{arm}:{do}", "")
    if deed == "hang":
        time.sleep(60)
    if deed == "die":
        sys.exit(3)
    reply = {"error": deed} if deed else {"seconds": [0.5, 0.25], "peak": 3 * 2**30, "static": 2**30, "how": do, "forecast": None}
    if do == "begin" and not deed:
        import numpy
        numpy.save(command["grads"], numpy.array([3.0, 4.0 + (arm == "nbkit")]))
        reply |= {"loss": 1.0, "grad_norm": 5.0, "passes": 2, "recorded": misdeeds.get("recorded", False)}
    if do == "round" and arm == "nbkit":
        reply["forecast"] = int(3.3 * 2**30)
    print(json.dumps(reply), flush=True)
"""


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ("8b:nf4:2x2048", Wanted("8b", "nf4", 16, 2, 2048)),
        ("8B:nf4:1x32768:r32", Wanted("8b", "nf4", 32, 1, 32768)),
        ("1b:bf16:2x512:L3:save", Wanted("1b", "bf16", 16, 2, 512, level=3, save=True)),
        ("8b:nf4:1x131072:r32:cap16:once", Wanted("8b", "nf4", 32, 1, 131072, limit=int(15.1e9), once=True)),
        ("8b:nf4:2x2048:within6.8", Wanted("8b", "nf4", 16, 2, 2048, limit=int(6.8 * 2**30))),
    ],
)
def test_rows_are_read(row: str, wanted: Wanted) -> None:
    assert parse(row) == wanted


@pytest.mark.parametrize("row", ["8b", "8b:nf4", "8b:nf4:2048", "9b:nf4:2x2", "8b:int8:2x2", "8b:nf4:2x2:fast", "8b:nf4:2x2:r"])
def test_a_row_that_is_none_is_refused(row: str) -> None:
    with pytest.raises(SystemExit, match="is no"):
        parse(row)


def test_unsloth_runs_without_checkpointing_too_where_memory_is_free() -> None:
    assert arms_of(parse("8b:nf4:2x2048"), ["unsloth", "nbkit"]) == ["unsloth", "unsloth-free", "nbkit"]
    for row in ("8b:nf4:2x2048:within6.8", "8b:nf4:1x32768", "8b:nf4:2x2048:save", "8b:nf4:1x512:once"):
        assert arms_of(parse(row), ["unsloth", "nbkit"]) == ["unsloth", "nbkit"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    given = argparse.Namespace(device="cpu", optimizer="adamw", truth=False, rounds=3, steps=2, profile=False, budget=30.0)
    made = Bench(given, tmp_path)
    monkeypatch.setattr(made, "write_folder", lambda wanted: None)
    monkeypatch.setattr(bench_training.importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else name)
    yield made
    made.stop()


def run(bench: Any, monkeypatch: pytest.MonkeyPatch, row: str, arms: list[str], seconds: float = 20, **misdeeds: Any) -> Table:
    script = [sys.executable, "-c", WORKER, json.dumps({k.replace("_", ":"): v for k, v in misdeeds.items()})]
    monkeypatch.setattr(_process, "COMMAND", script)
    table = Table(row, parse(row), arms, "adamw")
    bench.run(table, arms, seconds)
    return table


def by_arm(table: Table) -> dict[str, dict[str, Any]]:
    return {line["arm"]: line for line in table.result()}


def test_arms_take_turns_and_one_that_is_not_installed_is_said(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_arm(run(bench, monkeypatch, "8b:nf4:2x2048", ["stock", "liger", "unsloth", "eager", "nbkit"]))
    assert found["liger"]["note"] == "liger_kernel is not installed" and "tok_s" not in found["liger"]
    assert found["eager"]["note"] == bench_training.SAME and "tok_s" not in found["eager"]
    for arm in ("stock", "unsloth", "nbkit"):
        line = found[arm]
        assert (line["ms"], line["tok_s"], line["steps"], line["warmups"]) == (375.0, 10923, 6, 2 + 1 + 1 + 1)
        assert (line["peak_gib"], line["static_gib"], line["activations_gib"]) == (3.0, 1.0, 2.0) and line["note"] == ""
    assert found["nbkit"]["forecast_ratio"] == 1.1 and "forecast_ratio" not in found["stock"]
    assert found["stock"]["grad_difference"] == 0 and found["nbkit"]["grad_difference"] == 0.2
    assert found["nbkit"]["grad_from"] == "stock" and not list(bench.scratch.iterdir())
    assert set(bench.processes) == {"stock", "unsloth", "eager", "nbkit"}


def test_eager_runs_where_steps_are_recorded(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_arm(run(bench, monkeypatch, "1b:bf16:2x512", ["eager", "nbkit"], recorded=True))
    assert found["eager"]["steps"] == 6 and found["nbkit"]["steps"] == 6


@pytest.mark.parametrize(("deed", "said", "alive"), [
    ("die", "ended with code 3", False), ("ValueError: no", "ValueError: no", False),
    ("OutOfMemoryError: 1 GiB", "OutOfMemoryError: 1 GiB", True),
])  # fmt: skip
def test_an_arm_that_fails_leaves_the_others(
    bench: Any, monkeypatch: pytest.MonkeyPatch, deed: str, said: str, alive: bool
) -> None:
    found = by_arm(run(bench, monkeypatch, "8b:nf4:2x2048", ["stock", "nbkit"], stock_begin=deed))
    assert said in found["stock"]["note"] and "tok_s" not in found["stock"]
    assert found["nbkit"]["steps"] == 6 and found["nbkit"]["grad_from"] == "nbkit"
    assert bench.processes["stock"].alive == alive


def test_an_arm_that_hangs_is_given_up_with_what_it_has(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    found = by_arm(run(bench, monkeypatch, "8b:nf4:2x2048", ["stock", "nbkit"], seconds=3, nbkit_round="hang"))
    assert time.monotonic() - start < 6
    assert found["nbkit"]["note"].startswith("round: given up after") and found["nbkit"]["loss"] == 1.0
    assert found["stock"]["steps"] >= 2


def test_long_rows_have_the_gpu_alone(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_arm(run(bench, monkeypatch, "8b:nf4:1x32768:r32", ["stock", "unsloth", "eager", "nbkit"]))
    assert found.pop("eager")["note"] == bench_training.SAME
    assert all(line["note"] == "alone on the GPU" and line["steps"] == 2 for line in found.values())


def test_a_first_step_is_its_processs_only_one(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run(bench, monkeypatch, "8b:nf4:2x2048", ["stock"])
    there: list[list[str]] = []
    monkeypatch.setattr(Bench, "alone", lambda self, *_: there.append([p.name for p in self.processes.values() if p.alive]))
    found = by_arm(run(bench, monkeypatch, "8b:nf4:1x512:once", ["stock", "nbkit"]))
    assert there == [["stock"], ["nbkit"]] and not bench.processes
    assert all(line["note"] == "alone on the GPU" for line in found.values())


def test_results_are_appended_with_new_columns(tmp_path: Path) -> None:
    out = tmp_path / "made" / "out.csv"
    _results.append(out, [{"a": 1}])
    _results.append(out, [{"a": 2, "b": "x, y"}])
    assert list(csv.DictReader(out.open(encoding="utf-8"))) == [{"a": "1", "b": ""}, {"a": "2", "b": "x, y"}]
    assert [p.name for p in out.parent.iterdir()] == ["out.csv"]


def test_what_is_measured_before_the_run_is_ended_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ended(self: Any, table: Table, arms: list[str], seconds: float) -> None:
        table.seconds["nbkit"] = [0.5]
        raise SystemExit(143)

    monkeypatch.setattr(Bench, "run", ended)
    out = tmp_path / "out.csv"
    argv = ["bench_training.py", "toy:nf4:1x8", "--arms", "nbkit", "--device", "cpu", "--out", str(out), "--commit", "abc"]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(bench_training.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        bench_training.main()
    (row,) = csv.DictReader(out.open(encoding="utf-8"))
    assert (row["arm"], row["tok_s"], row["commit"]) == ("nbkit", "16", "abc")


def test_outcomes_of_test_files_are_read(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase name="a" time="2.5"/><testcase name="b" time="0.1"><failure message="1 != 2&#10;more"/>'
        '</testcase><testcase name="c" time="0"><skipped/></testcase></testsuite></testsuites>'
    )
    outcome = gpu_tests.Outcome("tests/test_x.py")
    gpu_tests.read(junit, outcome)
    assert outcome.counts == {"passed": 1, "failed": 1, "skipped": 1} and outcome.slowest == "a 2.5 s"
    assert outcome.failures == ["b: 1 != 2"] and not outcome.good


def test_every_arm_has_a_process_that_can_be_named() -> None:
    assert {arm.process for arm in ARMS.values()} == {"stock", "liger", "unsloth", "nbkit", "eager"}


def test_gradient_files_are_plain_vectors(tmp_path: Path) -> None:
    import torch

    from benchmarks import _worker

    _worker.save(torch.arange(3.0), str(tmp_path / "g.npy"))
    assert np.load(tmp_path / "g.npy").tolist() == [0, 1, 2]


def test_a_process_ends_with_all_that_it_started_and_takes_no_more_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import psutil

    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "print(json.dumps({'pid': child.pid}), flush=True)\n"
        "sys.stdin.read()\n"
    )
    monkeypatch.setattr(_process, "COMMAND", [sys.executable, str(worker)])
    process = _process.Process("base", "cpu")
    pid = process.reply(60)["pid"]
    process.stop()
    until = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    with pytest.raises(_process.Failed, match="ended with code"):
        process.send("round")
