"""The gpu-marked tests, a process a file: a file that breaks its GPU context, or hangs, spoils no other one's results.

usage: python -m benchmarks.gpu_tests [FILE...] [--at-once 4] [--total SECONDS] [--out FOLDER]
Without FILEs: all that name the marker. Writes tests.csv (a file a row: outcomes, seconds, the slowest test) and tests-full.log.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks._results import ROOT, stamp, write

FIRST = ("test_parity", "test_layer_gpu", "test_gpu", "test_certify", "test_raw")  # the long ones
ALONE = ("test_meter", "test_probe")  # they look at the whole card's memory
SPREAD = {"test_parity": 3}  # over so many processes of pytest-xdist: a kernel compiled for every case


@dataclass
class Outcome:
    """What pytest said of a file."""

    file: str
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("passed", "failed", "skipped"), 0))
    seconds: float = 0.0
    slowest: str = ""
    failures: list[str] = field(default_factory=list)
    note: str = ""
    log: str = ""

    def row(self) -> dict[str, Any]:
        return {
            "file": self.file, **self.counts, "seconds": round(self.seconds, 1), "slowest": self.slowest,
            "failures": "; ".join(self.failures), "note": self.note,
        }  # fmt: skip

    @property
    def good(self) -> bool:
        return not self.counts["failed"] and not self.note


def files() -> list[str]:
    """Test files with gpu-marked tests, the long ones first."""
    found = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")]
    found.sort(key=lambda p: next((i for i, name in enumerate(FIRST) if p.stem.startswith(name)), len(FIRST)))
    return [str(p.relative_to(ROOT)) for p in found]


def run(file: str, until: float, options: list[str]) -> Outcome:
    """One file in a process of its own, ended at `until` (time.monotonic)."""
    outcome, start = Outcome(file), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            "--tb=short",
        ]
        many = SPREAD.get(Path(file).stem, 0) if importlib.util.find_spec("xdist") else 0
        command += [f"--junitxml={junit}", *(["-n", str(many)] if many else []), *options, file]
        pipe, to_log = subprocess.PIPE, subprocess.STDOUT
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=pipe, stderr=to_log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            out, _ = process.communicate(timeout=max(1.0, until - start))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, _ = process.communicate()
            outcome.note = f"given up after {time.monotonic() - start:.0f} s"
        outcome.log = out.decode(errors="replace")
        if process.returncode not in (0, 1, 5) and not outcome.note:  # 5: no test of the file was selected
            outcome.note = f"pytest ended with code {process.returncode}"
        outcome.seconds = time.monotonic() - start
        if junit.is_file():
            read(junit, outcome)
    return outcome


def read(junit: Path, outcome: Outcome) -> None:
    """The outcomes of single tests."""
    longest = 0.0
    for case in ElementTree.parse(junit).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        kind = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        outcome.counts[kind] += 1
        name, seconds = case.get("name", "?"), float(case.get("time", 0))
        if bad:
            outcome.failures.append(f"{name}: {(bad[0].get('message') or 'no message').splitlines()[0]}"[:200])
        if seconds > longest:
            longest, outcome.slowest = seconds, f"{name} {seconds:.1f} s"


def show(outcome: Outcome) -> None:
    counts = ", ".join(f"{n} {what}" for what, n in outcome.counts.items() if n)
    print(f"{outcome.file}: {counts or 'no test'} in {outcome.seconds:.0f} s {outcome.note}", flush=True)
    for failure in outcome.failures:
        print(f"    {failure}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--at-once", type=int, default=4, help="files that run at the same time on the one GPU")
    parser.add_argument("--total", type=float, default=380, help="seconds all files may take")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--commit", default="", help="written to the CSV; found from git if not given")
    parser.add_argument("--select", default="", help="as pytest's -k")
    given = parser.parse_args()
    until, outcomes, where = time.monotonic() + given.total, [], stamp(given.commit)
    options = ["-k", given.select] if given.select else []
    given.out.mkdir(parents=True, exist_ok=True)
    wanted = given.files or files()
    alone = [file for file in wanted if Path(file).stem in ALONE]
    with (given.out / "tests-full.log").open("w", encoding="utf-8") as log, ThreadPoolExecutor(given.at_once) as pool:

        def finished() -> Iterator[Outcome]:
            yield from (run(file, until, options) for file in alone)
            waiting = [pool.submit(run, file, until, options) for file in wanted if file not in alone]
            yield from (one.result() for one in as_completed(waiting))

        for outcome in finished():
            outcomes.append(outcome)
            log.write(f"==== {outcome.file}\n{outcome.log}\n")
            log.flush()
            write(given.out / "tests.csv", [one.row() | where for one in outcomes])
            show(outcome)
    total = {what: sum(one.counts[what] for one in outcomes) for what in ("passed", "failed", "skipped")}
    print(f"all: {', '.join(f'{n} {what}' for what, n in total.items())}", flush=True)
    return 0 if all(one.good for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
