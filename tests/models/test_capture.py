"""What a recording leaves behind where it fails. torch's part is played by what torch does: it ends a recording in part only."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from nbkit.models import capture as room
from nbkit.models.capture import capture, forget, reason_of

DEVICE = torch.device("cuda", 0)
REFUSED = "CUDA error: operation failed due to a previous error during capture\nSearch for more."


class Driver:
    """The state that torch and the driver have. `refuses`: to begin or to end a recording."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses, self.stream, self.pools, self.underway, self.ended, self.graphs = refuses, "own", 0, False, False, 0

    def begin(self) -> None:
        self.stream = "recording"
        if self.refuses == "begin":
            raise RuntimeError("CUDA error: it is recorded already")
        self.underway, self.pools = True, self.pools + 1

    def end(self) -> None:
        if self.refuses == "end":
            raise RuntimeError(REFUSED)
        self.underway, self.ended, self.stream = False, True, "own"

    def end_for_allocator(self, index: int, pool: Any) -> None:
        assert (index, pool) == (0, "pool")
        if not self.underway:
            raise RuntimeError("not currently recording")
        self.underway = False

    def release(self, index: int, pool: Any) -> None:
        self.pools -= 1


@pytest.fixture
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver(getattr(request, "param", ""))

    class Graph:
        def __init__(self) -> None:
            made.graphs += 1

        def pool(self) -> str:
            if not made.ended:
                raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
            return "pool"

        def reset(self) -> None:
            made.graphs -= 1
            if made.ended:
                made.pools -= 1

    class Recording:
        def __init__(self, graph: Graph, pool: str, capture_error_mode: str) -> None:
            assert capture_error_mode == "thread_local" and pool == "pool"

        def __enter__(self) -> None:
            made.begin()

        def __exit__(self, *_: Any) -> None:
            made.end()

    for name, instead in {
        "CUDAGraph": Graph,
        "graph": Recording,
        "graph_pool_handle": lambda: "pool",
        "current_stream": lambda: made.stream,
        "set_stream": lambda stream: setattr(made, "stream", stream),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: 50 + 100 * made.pools,
    }.items():
        monkeypatch.setattr(torch.cuda, name, instead)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", made.end_for_allocator, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", made.release, raising=False)
    return made


def test_a_recording_that_succeeds(driver: Driver) -> None:
    graph, made, taken = capture(lambda: 7, None, DEVICE)
    assert (made, taken) == (7, 100) and graph.pool() == "pool"
    assert (driver.stream, driver.pools, driver.graphs, driver.underway) == ("own", 1, 1, False)


@pytest.mark.parametrize("driver", ["", "end"], indirect=True)
def test_what_failed_first_is_said_and_nothing_is_left(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[weakref.ref[Any]] = []
    gone: list[bool] = []
    monkeypatch.setattr(room, "give_back", lambda: gone.append(all(x() is None for x in inside)))

    def run() -> None:
        held = torch.ones(3)
        inside.append(weakref.ref(held))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has little.\nMore.")

    with pytest.raises(RuntimeError, match=r"^CUDA out of memory; tried to allocate 20\.00 MiB$"):
        capture(run, None, DEVICE)
    assert (driver.stream, driver.pools, driver.graphs, driver.underway) == ("own", 0, 0, False)
    assert gone == [True], "memory is given back when nothing holds it any more"


@pytest.mark.parametrize("driver", ["end"], indirect=True)
def test_an_end_that_is_refused(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[bool] = []
    inside: list[weakref.ref[Any]] = []
    monkeypatch.setattr(room, "give_back", lambda: gone.append(all(x() is None for x in inside)))

    def run() -> torch.Tensor:
        result = torch.ones(3)
        inside.append(weakref.ref(result))
        return result

    with pytest.raises(RuntimeError, match="^CUDA error: operation failed due to a previous error during capture$"):
        capture(run, "pool", DEVICE)
    assert (driver.stream, driver.pools, driver.graphs, driver.underway) == ("own", 0, 0, False) and gone == [True]


@pytest.mark.parametrize("driver", ["begin"], indirect=True)
def test_a_recording_that_never_began(driver: Driver) -> None:
    with pytest.raises(RuntimeError, match="^CUDA error: it is recorded already$"):
        capture(lambda: 7, "pool", DEVICE)
    assert (driver.stream, driver.pools, driver.graphs) == ("own", 0, 0)


def test_an_interruption_ends_it_too(driver: Driver) -> None:
    def run() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(run, None, DEVICE)
    assert (driver.stream, driver.pools, driver.graphs, driver.underway) == ("own", 0, 0, False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has", "CUDA out of memory; tried to allocate 2.50 GiB"),
        ("it waits.\nSecond line. And more.", "it waits"),
        ("of torch 2.13.0 and no more", "of torch 2.13.0 and no more"),
        ("", "RuntimeError"),
    ],
)
def test_reasons_are_one_clause(text: str, reason: str) -> None:
    assert reason_of(RuntimeError(text)) == reason


def test_an_error_that_somebody_keeps_holds_nothing_of_the_functions_it_came_through() -> None:
    inside: list[weakref.ref[Any]] = []

    def fail(first: bool) -> None:
        held = torch.ones(3)
        inside.append(weakref.ref(held))
        try:
            if first:
                fail(False)
        finally:
            raise RuntimeError(str(first))

    kept = []
    try:
        fail(True)
    except RuntimeError as error:
        kept.append(error)
        forget(error)
    assert len(inside) == 2 and all(x() is None for x in inside) and kept[0].__context__ is not None
