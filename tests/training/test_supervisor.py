"""Awaiting a run: under asyncio, and in a real kernel."""

from __future__ import annotations

import asyncio
import functools
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from nbkit.errors import TrainingError
from nbkit.events import Event, StepEvent
from nbkit.training import checkpoints, supervisor
from nbkit.training.runner import Run
from tests.tiny import tiny_tokenizer
from tests.training import rig

ROOT = Path(__file__).parents[2]


def start(folder: Path, **train: Any) -> Run:
    return Run(rig.config(folder, **train), rig.lora_model(), tiny_tokenizer(), rig.rows())


def test_a_run_is_awaited_and_delivers_on_the_loops_thread(tmp_path: Path) -> None:
    seen: list[Event] = []

    async def cell() -> Any:
        run = start(tmp_path / "run")
        run.subscribe(seen.extend)
        return await run, run

    result, run = asyncio.run(cell())
    assert result.step == 4 and seen == run.events


def test_deliveries_come_at_most_five_times_a_second(tmp_path: Path) -> None:
    deliveries: list[int] = []

    async def cell() -> Any:
        run = start(tmp_path / "run", max_steps=100)
        run.subscribe(lambda events: deliveries.append(len(events)))
        return await run

    result = asyncio.run(cell())
    assert len(deliveries) <= result.seconds / supervisor.PERIOD + 2
    assert sum(deliveries) > 100


def test_a_cancelled_cell_stops_the_run_and_has_its_partial_result(tmp_path: Path) -> None:
    async def cell() -> Any:
        run = start(tmp_path / "run", max_steps=10_000)
        task = asyncio.ensure_future(supervisor.supervise(run))
        while not any(isinstance(event, StepEvent) for event in run.events):
            await asyncio.sleep(0.01)
        task.cancel()
        return await task, run

    result, run = asyncio.run(cell())
    assert result.stopped and result.step > 0 and run.status == "stopped"
    assert checkpoints.newest(run.dir)[0].step == result.step  # type: ignore[union-attr]


def test_a_second_cancel_is_obeyed_and_the_run_still_stops(tmp_path: Path) -> None:
    async def cell() -> Run:
        run = start(tmp_path / "run", max_steps=10_000)
        task = asyncio.ensure_future(supervisor.supervise(run))
        await asyncio.sleep(0.05)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        return run

    run = asyncio.run(cell())
    assert run.wait(progress=False).stopped


def test_the_workers_exception_is_raised_in_the_cell(tmp_path: Path) -> None:
    async def cell() -> None:
        model = rig.failing(rig.lora_model(), 2, MemoryError())
        await Run(rig.config(tmp_path / "run"), model, tiny_tokenizer(), rig.rows())

    with pytest.raises(TrainingError, match="Out of memory in step 2"):
        asyncio.run(cell())


@pytest.mark.parametrize(
    ("version", "polls"), [((6, 17, 1), True), ((7, 3, 0), True), ((7, 4, 0), False), (None, False)], ids=str
)
def test_the_ui_is_polled_only_on_kernels_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...] | None, polls: bool
) -> None:
    polled: list[int] = []

    class Events:
        async def __aenter__(self) -> Any:
            async def poll(count: int) -> None:
                polled.append(count)

            return poll

        async def __aexit__(self, *_: Any) -> None:
            return None

    module = types.ModuleType("jupyter_ui_poll")
    module.ui_events = Events  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace(name="jupyter_ui_poll")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "jupyter_ui_poll", module)
    monkeypatch.setattr(supervisor, "_kernel_version", lambda: version)

    async def cell() -> Any:
        return await start(tmp_path / "run")

    assert asyncio.run(cell()).step == 4
    assert bool(polled) is polls


def test_ipykernel_7_0_is_warned_of_and_gets_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "_kernel_version", lambda: (7, 0, 1))

    async def cell() -> Any:
        return await start(tmp_path / "run")

    with pytest.warns(UserWarning, match=r"ipykernel 7\.0 loses button clicks.*ipykernel>=7\.1"):
        asyncio.run(cell())
    assert "step 1  loss" in capsys.readouterr().out


SET_UP = f"""
import sys, asyncio, tempfile
sys.path.insert(0, {str(ROOT)!r})
import ipywidgets, torch; torch.set_num_threads(1)
from tests.training import rig
from tests.tiny import tiny_tokenizer
from nbkit.training import Run
folder = tempfile.mkdtemp()
def start(name, model=None, **train):
    return Run(rig.config(folder + "/" + name, **train), model or rig.lora_model(), tiny_tokenizer(), rig.rows())
def tell(events):
    print("steps up to", events[-1].step, flush=True)
"""
STOPPED_BY_THE_LOOP = """
run = start("one", max_steps=10_000)
run.subscribe(lambda events: any(e.kind == "step" for e in events) and asyncio.get_running_loop().call_later(0.1, run.stop))
result = await run
print("ended", result.stopped, run.status, result.step > 0)
"""
STOPPED_BY_A_BUTTON = """
run = start("two", max_steps=10_000)
button = ipywidgets.Button(description="Stop")
button.on_click(lambda _: run.stop())
print("button", button.model_id, flush=True)
run.subscribe(tell)
result = await run
print("ended", result.stopped, run.status, result.step > 0)
"""
INTERRUPTED = """
run = start("three", max_steps=10_000)
run.subscribe(tell)
result = await run
print("ended", result.stopped, run.status, result.step > 0)
"""
FAILING = """
await start("four", rig.failing(rig.lora_model(), 3, RuntimeError("the worker broke")))
"""


async def in_a_kernel(client: Any) -> None:
    async def until(cell: Any, pattern: str) -> str:
        while not (found := re.search(pattern, printed(cell))):
            await asyncio.sleep(0.05)
        return found[1]

    async with client.async_setup_kernel():
        run = [functools.partial(client.async_execute_cell, cell, index) for index, cell in enumerate(client.nb.cells)]
        await run[0]()
        await run[1]()
        clicked = asyncio.ensure_future(run[2]())
        comm = await until(client.nb.cells[2], r"button (\w+)")
        await until(client.nb.cells[2], r"steps up to ([1-9])")
        data = {"method": "custom", "content": {"event": "click"}}  # as a front end sends it
        client.kc.shell_channel.send(client.kc.session.msg("comm_msg", {"comm_id": comm, "data": data}))
        await clicked
        interrupted = asyncio.ensure_future(run[3]())
        await until(client.nb.cells[3], r"steps up to ([1-9])")
        await client.km.interrupt_kernel()
        await interrupted
        await run[4]()


def printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_in_a_real_kernel_stops_work_while_the_cell_awaits_and_a_failing_worker_fails_the_cell() -> None:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    sources = (SET_UP, STOPPED_BY_THE_LOOP, STOPPED_BY_A_BUTTON, INTERRUPTED, FAILING)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = NotebookClient(notebook, timeout=120, kernel_name="python3")
    with pytest.raises(CellExecutionError, match="the worker broke"):
        asyncio.run(asyncio.wait_for(in_a_kernel(client), 180))
    for cell in notebook.cells[1:4]:
        assert "ended True stopped True" in printed(cell), cell.source
    assert notebook.cells[4].outputs[-1]["ename"] == "RuntimeError"
