"""Training steps of a whole model: nbkit beside transformers + PEFT, Liger and Unsloth; same weights, same batches, interleaved.

usage: python -m benchmarks.bench_training ROW... [--arms stock,liger,unsloth,eager,nbkit] [--out FILE.csv] [--budget SECONDS]
ROW is MODEL:WEIGHTS:BATCHxTOKENS[:OPTION...], for example 8b:nf4:2x2048 or 1b:bf16:2x512:r32:L4. Options:
    r32         LoRA's rank, 16 if not said                  L4       keep level of nbkit; checkpointing for the peers from L1 up
    within6.8   GiB that torch may allocate                   cap16    GB of the whole process (0.9 of them for CUDA itself)
    save        memory is saved as checkpointing asks         once     one optimizer step, nothing before it; for steps of minutes

Weights are random at the true shapes of Llama-3.1-8B and Llama-3.2-1B, made from one seed in every process (Unsloth reads them
from a folder). A timed step has a fresh batch of random tokens, all labelled, and includes clipping and the optimizer, in the
same plain loop for every arm. Before timing, every arm takes the same batch from the same adapter: losses, gradient norms and the
difference of the gradients from the first arm's stand beside the speeds. Each arm is a process of its own (Unsloth changes
transformers for all of its process), waits while another is timed, and keeps nothing but its model then; up to 16,384 tokens a
step the arms take turns in every round, above one after the other, each alone on the GPU. Peers run without checkpointing where
memory allows it and with it where not ("how" names it); Unsloth with its own ("unsloth") and without ("unsloth-free"). Peaks are
torch.cuda.max_memory_allocated of the process, the recording of steps included, "static_gib" what is allocated between steps,
"activations_gib" the difference; "forecast_gib" is what the planner said of the peak before the first step.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._arms import ARMS, Wanted
from benchmarks._models import SHAPES, TARGETS, build, folder_for
from benchmarks._process import Failed, Process
from benchmarks._results import ROOT, append, commit, stamp, versions, write

__all__ = ["SHAPES", "TARGETS", "build", "commit", "versions", "write"]  # what other benchmarks take from here

GIB = 2**30
TURNS = 16384  # tokens a step from which one arm at a time is on the GPU
SHARE = 0.5  # of a row's budget that one arm may take
ROUND = 2.5  # seconds of timed steps of one arm in one round: none is begun later
LONG_ROUND = 8.0  # the same where an arm is alone on the GPU, in its one round
SAME = "nothing is recorded at this size: as nbkit"


def parse(row: str) -> Wanted:
    """What a row asks for.

    Raises:
        SystemExit: for a row that is not MODEL:WEIGHTS:BATCHxTOKENS[:OPTION...].
    """
    name, weights, sizes, *options = (row.lower() + "::").rstrip(":").split(":") if row.count(":") >= 2 else ("", "", "")
    batch, _, tokens = sizes.partition("x")
    made: dict[str, Any] = {"rank": 16}
    for option in options:
        if option in ("save", "once"):
            made[option] = True
        elif option[:1] in ("r", "l") and option[1:].isdigit():
            made["rank" if option[0] == "r" else "level"] = int(option[1:])
        elif option.startswith("within"):
            made["limit"] = int(float(option[6:]) * GIB)
        elif option.startswith("cap"):
            made["limit"] = int((float(option[3:]) - 0.9) * 1e9)
        else:
            raise SystemExit(f"{row!r}: {option!r} is no option; there are rN, LN, withinGIB, capGB, save and once.")
    if name not in SHAPES or weights not in ("nf4", "bf16") or not (batch.isdigit() and tokens.isdigit()):
        raise SystemExit(f"{row!r} is no row; write MODEL:WEIGHTS:BATCHxTOKENS, for example 8b:nf4:2x2048.")
    return Wanted(name, weights, batch=int(batch), tokens=int(tokens), **made)


class Table:
    """The results of one row: an arm a line."""

    def __init__(self, row: str, wanted: Wanted, arms: list[str], optimizer: str) -> None:
        self.wanted = wanted
        self.lines: dict[str, dict[str, Any]] = {arm: {"row": row, "arm": arm, "optimizer": optimizer} for arm in arms}
        self.seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        self.notes: dict[str, list[str]] = {arm: [] for arm in arms}
        self.peaks: dict[str, int] = dict.fromkeys(arms, 0)
        self.static: dict[str, int] = {}

    def note(self, arm: str, text: str) -> None:
        if text and text not in self.notes[arm]:
            self.notes[arm].append(text)

    def begun(self, arm: str, reply: dict[str, Any]) -> None:
        self.lines[arm] |= {"loss": round(reply["loss"], 5), "grad_norm": round(reply["grad_norm"], 6)}
        self.lines[arm]["warmups"] = reply.get("passes", 0)
        self.peaks[arm] = max(self.peaks[arm], reply["peak"])
        self.note(arm, reply.get("note", ""))

    def timed(self, arm: str, reply: dict[str, Any], warm: int) -> None:
        """Takes a round's figures."""
        line = self.lines[arm]
        self.seconds[arm] += reply["seconds"]
        line["warmups"] = line.get("warmups", 0) + warm
        self.peaks[arm] = max(self.peaks[arm], reply["peak"])
        self.static[arm] = reply["static"]
        line["how"] = reply["how"]
        if reply["forecast"] is not None:
            line["forecast_gib"] = round(reply["forecast"] / GIB, 2)

    def result(self) -> list[dict[str, Any]]:
        """The lines with medians and peaks, as far as the arms came."""
        for arm, line in self.lines.items():
            seconds = sorted(self.seconds[arm])
            if seconds:
                middle = statistics.median(seconds)
                line |= {"ms": round(1e3 * middle, 2), "p90_ms": round(1e3 * seconds[int(0.9 * (len(seconds) - 1))], 2)}
                line |= {"tok_s": round(self.wanted.rows / middle), "steps": len(seconds)}
            if self.peaks[arm]:
                line["peak_gib"] = round(self.peaks[arm] / GIB, 2)
                if arm in self.static:
                    line["static_gib"] = round(self.static[arm] / GIB, 2)
                    line["activations_gib"] = round((self.peaks[arm] - self.static[arm]) / GIB, 2)
                if "forecast_gib" in line:
                    line["forecast_ratio"] = round(line["forecast_gib"] * GIB / self.peaks[arm], 3)
            line["note"] = "; ".join(self.notes[arm])
        return list(self.lines.values())


class Bench:
    """The processes of all arms, and the rows they run."""

    def __init__(self, given: argparse.Namespace, scratch: Path) -> None:
        self.given, self.scratch = given, scratch
        self.processes: dict[str, Process] = {}
        self.writing: subprocess.Popen[bytes] | None = None

    def start(self, arm: str) -> Process:
        """The arm's process, a new one if there is none (any more)."""
        name = ARMS[arm].process
        if name not in self.processes or not self.processes[name].alive:
            self.processes[name] = Process(name, self.given.device)
        return self.processes[name]

    def stop(self, *names: str) -> None:
        """End the named processes, all if none is named."""
        for name in names or tuple(self.processes):
            if name in self.processes:
                self.processes.pop(name).stop()
        if not names and self.writing is not None:
            self.writing.kill()
            self.writing.wait()

    def send(self, arm: str, table: Table, do: str, /, **arguments: Any) -> bool:
        """Give a command; False, with a note, if the arm's process has ended."""
        try:
            self.processes[ARMS[arm].process].send(do, **arguments)
        except Failed as failure:
            table.note(arm, f"{do}: {failure}")
            return False
        return True

    def answer(self, arm: str, table: Table, limit: float, do: str) -> dict[str, Any] | None:
        """The reply to a command; None, with a note in the table, where it failed or was not there at `limit`."""
        try:
            return self.processes[ARMS[arm].process].reply(limit - time.monotonic())
        except Failed as failure:
            table.note(arm, f"{do}: {failure}")
            return None

    def ask(self, arm: str, table: Table, limit: float, do: str, /, **arguments: Any) -> dict[str, Any] | None:
        return self.answer(arm, table, limit, do) if self.send(arm, table, do, **arguments) else None

    # -- one row -----------------------------------------------------------------------------------

    def run(self, table: Table, arms: list[str], seconds: float) -> None:
        """All arms of a row, within so many seconds."""
        deadline = time.monotonic() + seconds
        missing = [arm for arm in arms if importlib.util.find_spec(ARMS[arm].needs) is None]
        for arm in missing:
            table.note(arm, f"{ARMS[arm].needs} is not installed")
            print(f"{arm}: {ARMS[arm].needs} is not installed, its arm is left out", flush=True)
        going = [arm for arm in arms if arm not in missing]
        if table.wanted.once or table.wanted.rows > TURNS:
            self.in_turn(table, going, deadline)
        else:
            self.interleaved(table, going, deadline, SHARE * seconds)
        self.differences(table, going)

    def load(self, arm: str, table: Table) -> bool:
        """Start the loading of the row's model; `answer` says when it is done."""
        self.start(arm)
        return self.send(arm, table, "load", wanted=vars(table.wanted), arm=arm, optimizer=self.given.optimizer)

    def begin(self, arm: str, table: Table, limit: float) -> dict[str, Any] | None:
        if self.given.truth and not Path(self.file("truth")).exists():
            self.ask(arm, table, limit, "truth", grads=self.file("truth"))
        reply = self.ask(arm, table, limit, "begin", arm=arm, grads=self.file(arm))
        if reply is not None:
            table.begun(arm, reply)
        return reply

    def round(self, arm: str, table: Table, limit: float, number: int, warm: int, seconds: float) -> bool:
        steps = {"warm": warm, "steps": self.given.steps, "seconds": seconds}
        reply = self.ask(arm, table, limit, "round", arm=arm, number=number, **steps)
        if reply is not None:
            table.timed(arm, reply, warm)
        return reply is not None

    def write_folder(self, wanted: Wanted) -> None:
        """Begin to write what Unsloth reads, beside what else starts."""
        folder = folder_for(wanted.name, wanted.weights)
        if not (folder / "config.json").is_file():
            command = [sys.executable, "-m", "benchmarks._models", wanted.name, wanted.weights, str(folder)]
            self.writing = subprocess.Popen([*command, "--device", self.given.device], cwd=ROOT, stdin=subprocess.DEVNULL)

    def interleaved(self, table: Table, arms: list[str], deadline: float, most: float) -> None:
        """All models at once on the GPU: each arm's first batch, then rounds in which each has its turn."""
        foreign = [arm for arm in arms if ARMS[arm].process == "unsloth"]
        near = sorted((arm for arm in arms if arm not in foreign), key=("nbkit", "stock", "liger", "eager").index)
        for name in {ARMS[arm].process for arm in ARMS} - {ARMS[arm].process for arm in arms if arm != "eager"}:
            self.dropped(name)
        for arm in arms:
            self.start(arm)  # all import at the same time
        if foreign:
            self.write_folder(table.wanted)
        ready = {arm: self.load(arm, table) for arm in near if arm != "eager"}
        ready = {arm: sent and self.answer(arm, table, deadline, "load") is not None for arm, sent in ready.items()}
        going, recorded = [], True
        for arm in near:  # nbkit first: its plan is made while nothing else is in use
            if arm == "eager" and not recorded:
                table.note(arm, SAME)
                continue
            limit = min(deadline, time.monotonic() + most)
            if arm == "eager":
                ready[arm] = self.load(arm, table) and self.answer(arm, table, limit, "load") is not None
            reply = self.begin(arm, table, limit) if ready[arm] else None
            going += [arm] if reply is not None else []
            recorded = reply["recorded"] if arm == "nbkit" and reply is not None else recorded
            if arm == near[0] and foreign:
                ready[foreign[0]] = self.load_foreign(foreign[0], table, deadline)
        if foreign and not near:
            ready[foreign[0]] = self.load_foreign(foreign[0], table, deadline)
        limit = min(deadline, time.monotonic() + most)
        if foreign and ready[foreign[0]] and self.answer(foreign[0], table, limit, "load") is not None:
            going += [arm for arm in foreign if self.begin(arm, table, min(deadline, time.monotonic() + most)) is not None]
        self.rounds(table, sorted(going, key=arms.index), deadline, most)

    def load_foreign(self, arm: str, table: Table, deadline: float) -> bool:
        """Start Unsloth's loading as soon as its folder is written."""
        if self.writing is not None:
            try:
                self.writing.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.writing.kill()
            self.writing = None
        return self.load(arm, table)

    def rounds(self, table: Table, going: list[str], deadline: float, most: float) -> None:
        """Rounds of the arms in turn; `most`: seconds that one may take in all of them."""
        last, used = dict.fromkeys(going, 0.0), dict.fromkeys(going, 0.0)
        for number in range(self.given.rounds):
            for arm in list(going):
                start = time.monotonic()
                if start + last[arm] > deadline or used[arm] + last[arm] > most:
                    table.note(arm, f"{number} of {self.given.rounds} rounds in the row's budget")
                    going.remove(arm)
                    continue
                limit = min(deadline, start + most - used[arm])
                if not self.round(arm, table, limit, number, 1, ROUND):
                    going.remove(arm)
                last[arm] = time.monotonic() - start
                used[arm] += last[arm]
        for arm in going if self.given.profile else ():
            self.ask(arm, table, deadline, "profile", arm=arm, title=f"{table.lines[arm]['row']} {arm}")

    def in_turn(self, table: Table, arms: list[str], deadline: float) -> None:
        """One model at a time on the GPU."""
        if table.wanted.once:
            self.stop()
        for name in list(self.processes):
            self.dropped(name)
        for place, arm in enumerate(arms):
            if arm == "eager" and "nbkit" in arms and not table.wanted.once:
                table.note(arm, SAME)
                continue
            left = deadline - time.monotonic()
            limit = time.monotonic() + max(left / (len(arms) - place), min(left, SHARE * self.given.budget))
            if self.load(arm, table) and self.answer(arm, table, limit, "load") is not None:
                self.alone(arm, table, limit)
            table.note(arm, "alone on the GPU")
            if table.wanted.once:
                self.stop()
            else:
                self.dropped(ARMS[arm].process)

    def alone(self, arm: str, table: Table, limit: float) -> None:
        if table.wanted.once:
            reply = self.ask(arm, table, limit, "once", arm=arm)
            if reply is not None:
                table.begun(arm, reply)
                table.timed(arm, reply, 0)
                table.lines[arm] |= {"prepared_s": round(reply["prepared"], 1), "process_gb": round(reply["in_use"] / 1e9, 2)}
        elif self.begin(arm, table, limit) is not None:
            self.round(arm, table, limit, 0, 0, LONG_ROUND)

    def dropped(self, name: str) -> None:
        """Make a process give its model's memory back, or end it."""
        if name not in self.processes:
            return
        try:
            self.processes[name].send("drop")
            self.processes[name].reply(60)
        except Failed:
            self.stop(name)

    # -- gradients ---------------------------------------------------------------------------------

    def file(self, arm: str) -> str:
        return str(self.scratch / f"{arm}.npy")

    def differences(self, table: Table, arms: list[str]) -> None:
        """|g - truth| / |truth| of each arm, the truth being the float32 copy's where one was asked for, else the first arm's."""
        there = [arm for arm in ("truth", *arms) if Path(self.file(arm)).exists()]
        truth = np.load(self.file(there[0]), mmap_mode="r") if there else None
        for arm in there:
            mine = np.load(self.file(arm), mmap_mode="r")
            if truth is not None and arm in table.lines and mine.shape == truth.shape:
                table.lines[arm]["grad_difference"] = round(float(np.linalg.norm(mine - truth) / np.linalg.norm(truth)), 5)
                table.lines[arm]["grad_from"] = there[0]
        for arm in there:
            Path(self.file(arm)).unlink()


def arms_of(wanted: Wanted, names: list[str]) -> list[str]:
    """The arms of a row: Unsloth also without its checkpointing where memory is free."""
    both = "unsloth" in names and "unsloth-free" not in names and not wanted.lean and not wanted.once
    return [one for name in names for one in ((name, "unsloth-free") if both and name == "unsloth" else (name,))]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="ROW")
    parser.add_argument("--arms", default="stock,liger,unsloth,eager,nbkit", help=f"comma between, of {', '.join(ARMS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of an arm in a round")
    parser.add_argument("--budget", type=float, default=120, help="seconds a row may take, the loading of its models included")
    parser.add_argument("--total", type=float, default=540, help="seconds all rows may take")
    parser.add_argument("--out", type=Path, help="the CSV that rows are appended to, each as soon as it is measured")
    parser.add_argument("--commit", default="", help="written to the CSV; found from git if not given")
    parser.add_argument("--profile", action="store_true", help="device time by kernel, and host time by function")
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit", "bnb8bit"), default="adamw",
                        help="torch's fused, nbkit's in 8 bits, bitsandbytes' in 8 bits; the same in every arm")  # fmt: skip
    parser.add_argument("--truth", action="store_true", help="gradient errors against a float32 copy of the model")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a look at the toy model")
    given = parser.parse_args()
    given.arms = given.arms.split(",")
    for arm in given.arms:
        if arm not in ARMS:
            parser.error(f"there is no arm {arm!r}; there are {', '.join(ARMS)}")
    return given


def report(table: Table, out: Path | None, where: dict[str, str]) -> bool:
    """Show a row's results and add them to the CSV; whether an arm has none."""
    found = table.result()
    for result in found:
        print("RESULT", {k: v for k, v in result.items() if v != ""}, flush=True)
    if out:
        append(out, [result | where for result in found])
    return any("tok_s" not in result and result["note"] != SAME for result in found)


def main() -> int:
    given = arguments()
    wanted = {row: parse(row) for row in given.rows}
    where = stamp(given.commit, ("liger_kernel", "unsloth"))
    print(", ".join(f"{k} {v}" for k, v in where.items() if v), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are ended below
    failed, begun = False, time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(given, Path(scratch))
        try:
            for row, one in wanted.items():
                start, arms = time.monotonic(), arms_of(one, given.arms)
                table = Table(row, one, arms, given.optimizer)
                try:
                    bench.run(table, arms, min(given.budget, begun + given.total - start))
                finally:  # also where the run is ended from outside
                    failed |= report(table, given.out, where)
                    print(f"({row}: {time.monotonic() - start:.0f} s)", flush=True)
        finally:
            bench.stop()
            for name, weights in {(one.name, one.weights) for one in wanted.values()}:
                shutil.rmtree(folder_for(name, weights), ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
