"""Runs a notebook from top to bottom with visible progress, and checks that it did what it says.

    python notebooks/run.py notebooks/quickstart.ipynb [--out build]

Writes `<out>/<name>.ipynb` and `<out>/<name>.html`, then reads the figures that the notebook left in
`<out>/nbkit-workspace/<name>.json`, checks each against the disk and prints them. Exit code 0 only if every cell ran,
every file is there, and the fine-tuning worked.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter

from nbkit.events import EvalEvent, RunStarted, StepEvent, read_events

CELL_TIMEOUT = 900  # seconds; the whole quickstart is to take five minutes
LOSS_LEFT = 0.4  # of the held-out loss before training: it is to fall by 60 % at least
FIELDS_RIGHT = 2 / 3  # of the fields of the greedy replies to held-out prompts


def say(text: str) -> None:
    print(text, flush=True)


class Runner(NotebookClient):
    """Executes the cells, says which one runs, passes on what they print, and measures the kernel's peak memory."""

    def begin(self) -> None:
        self.started = time.monotonic()
        self.peak_bytes = 0
        self.on_cell_start = self._announce
        self.on_cell_executed = self._measure

    def _announce(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        lines = [line for line in cell.source.splitlines() if line.strip()] or [""]
        seconds = time.monotonic() - self.started
        mark = lines[0].lstrip("# ") if cell.cell_type == "markdown" else "▶ " + lines[0]
        say(f"[{cell_index + 1:2d}/{len(self.nb.cells)} {seconds:4.0f} s] {mark[:110]}")

    def _measure(self, cell: nbformat.NotebookNode, cell_index: int, execute_reply: dict[str, Any]) -> None:
        process = psutil.Process(self.km.provisioner.pid)
        used = process.memory_info().rss
        status = Path(f"/proc/{process.pid}/status")
        if status.exists():  # Linux keeps the high-water mark; elsewhere the largest value seen after a cell has to do
            used = next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        self.peak_bytes = max(self.peak_bytes, used)

    def output(self, outs: list, msg: dict, display_id: str, cell_index: int) -> Any:
        if msg["msg_type"] == "stream":
            text = msg["content"]["text"].split("\r")[-1].rstrip()
            if text:
                say("      " + text.replace("\n", "\n      "))
        return super().output(outs, msg, display_id, cell_index)


def follow_runs(workspace: Path, done: threading.Event) -> None:
    """Print a line for every fifth step of each run that begins from now on, read from its event log, until `done`."""
    old = set(workspace.glob("runs/*/events.jsonl"))
    told: dict[Path, int] = {}
    while not done.wait(2):
        for log in set(workspace.glob("runs/*/events.jsonl")) - old:
            events = read_events(log)
            total = next((e.total_steps for e in events if isinstance(e, RunStarted)), 0)
            for event in events[told.get(log, 0) :]:
                if isinstance(event, StepEvent) and event.step % 5 == 0:
                    say(f"      step {event.step}/{total}  loss {event.loss:.3f}")
                elif isinstance(event, EvalEvent):
                    say(f"      held-out loss {event.loss:.3f} at step {event.step}")
            told[log] = len(events)


def write(runner: Runner, path: Path) -> None:
    """The executed notebook, without widget state, and its HTML, in which every panel stands in its static form."""
    runner.nb.metadata.pop("widgets", None)
    nbformat.write(runner.nb, path)
    exporter = HTMLExporter(embed_images=True)
    exporter.display_data_priority = ["text/html", "text/markdown", "image/svg+xml", "image/png", "text/plain"]
    html, _ = exporter.from_notebook_node(runner.nb)
    path.with_suffix(".html").write_text(html, encoding="utf-8")


def faults(summary: dict[str, Any]) -> list[str]:
    """What of the summary did not happen, one sentence each; empty if all did."""
    found = []
    for name, file in (("adapter", "adapter_model.safetensors"), ("merged", "model.safetensors")):
        if not (Path(summary[name]) / file).is_file():
            found.append(f"The {name} has no {file} in {summary[name]}.")
    for path in summary["gguf"]:
        if not Path(path).is_file() or Path(path).read_bytes()[:4] != b"GGUF":
            found.append(f"{path} is not a GGUF file.")
    if not summary["loss_after"] <= LOSS_LEFT * summary["loss_before"]:
        found.append(f"The held-out loss fell only from {summary['loss_before']:.3f} to {summary['loss_after']:.3f}.")
    if not summary["fields_right_after"] >= FIELDS_RIGHT * summary["fields"]:
        found.append(f"Only {summary['fields_right_after']} of {summary['fields']} fields of the held-out replies are right.")
    if len(summary["answers"]) != 3 or any(a["before"] == a["after"] for a in summary["answers"]):
        found.append("The three answers did not change.")
    return found


def report(summary: dict[str, Any], minutes: float, peak_bytes: int) -> str:
    """The closing lines: what a newcomer wants to know of the run."""
    before, after, fields = summary["loss_before"], summary["loss_after"], summary["fields"]
    change = f"({after / before - 1:+.0%}) on {summary['rows']} rows never trained on"
    lines = [
        "",
        f"held-out loss   {before:.3f} -> {after:.3f} {change}",
        f"fields right    {summary['fields_right_before']} -> {summary['fields_right_after']} of {fields}",
    ]
    for answer in summary["answers"]:
        lines += ["", f"prompt          {answer['prompt']}"]
        lines += [f"  {when:<14}{answer[when]}" for when in ("before", "after")]
    lines += ["", f"adapter         {summary['adapter']}", f"merged model    {summary['merged']}"]
    lines += [f"GGUF            {path}" for path in summary["gguf"]]
    lines += [
        "",
        f"took            {minutes:.1f} minutes, of which training {summary['train_seconds'] / 60:.1f}; "
        f"peak memory {peak_bytes / 1e9:.2f} GB",
    ]
    return "\n".join(line.replace("\n", "\n                ") for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a notebook with progress and check what it did.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build"))
    options = parser.parse_args()
    out = options.out.resolve()
    workspace, name = out / "nbkit-workspace", options.notebook.stem
    summary_path = workspace / f"{name}.json"
    summary_path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)

    runner = Runner(
        nbformat.read(options.notebook, as_version=4),
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(out)}},
        store_widget_state=False,
    )
    runner.begin()
    done = threading.Event()
    follower = threading.Thread(target=follow_runs, args=(workspace, done), daemon=True)
    follower.start()
    try:
        runner.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        say(f"\nThe notebook stopped at a cell that failed; see {out / name}.html.\n{error}")
        return 1
    finally:
        done.set()
        follower.join()
        write(runner, out / f"{name}.ipynb")
    minutes = (time.monotonic() - runner.started) / 60
    if not summary_path.is_file():
        say(f"The notebook ran but left no figures in {summary_path}.")
        return 1
    summary = json.loads(summary_path.read_text(encoding="utf-8"))
    say(report(summary, minutes, runner.peak_bytes))
    say(f"executed        {out / name}.ipynb, {name}.html")
    found = faults(summary)
    for sentence in found:
        say(f"FAILED          {sentence}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
