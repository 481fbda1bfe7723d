"""The plot: events folded, curves smoothed, SVG that is well-formed for any points, and small."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbkit.errors import TrainingError
from nbkit.events import (
    EvalEvent,
    Event,
    EventLog,
    MemoryEvent,
    MessageEvent,
    RunFailed,
    RunFinished,
    RunStarted,
    StepEvent,
)
from nbkit.widgets import _svg, live_plot
from nbkit.widgets._html import Markup
from nbkit.widgets._progress import Progress, smooth
from nbkit.widgets._svg import Line, chart, key, thin, ticks
from nbkit.widgets.live_plot import LivePlot
from tests.widgets.fake import FakeSession
from tests.widgets.hostile import CORPUS, inert

SVG = "{http://www.w3.org/2000/svg}"
GIB = 2**30
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


def step(number: int, loss: float, seconds: float = 0.5) -> StepEvent:
    return StepEvent(step=number, loss=loss, learning_rate=1e-3, total_tokens=100, seconds=seconds)


def history(steps: int, total: int | None = None) -> list[Event]:
    events: list[Event] = [
        RunStarted(total_steps=total or steps, device="cpu", trainable_parameters=7),
        EvalEvent(loss=3.5, rows=4),
    ]
    for number in range(1, steps + 1):
        events.append(step(number, 3 / number + 0.3 * math.sin(number)))
        memory = {"used_bytes": GIB + number, "peak_bytes": 2 * GIB, "total_bytes": 8 * GIB}
        events.append(MemoryEvent(step=number, memory="RSS", **memory))
    return events


def drawn(points: list[tuple[float, float]]) -> ElementTree.Element:
    return ElementTree.fromstring(chart("Loss", "said", [Line("one", points, "raw", "#123456")]))


# -- the chart -------------------------------------------------------------------------------------


def test_an_empty_chart_has_axes_and_says_what_it_is() -> None:
    root = drawn([])
    assert root.get("role") == "img" and root.get("aria-label") == "Loss. said"
    assert root.find(f"{SVG}title").text == "Loss" and root.find(f"{SVG}desc").text == "said"
    assert root.findall(f"{SVG}line") and not root.findall(f"{SVG}polyline")


def test_one_point_is_a_dot_and_two_are_a_line() -> None:
    assert len(drawn([(1, 2.0)]).findall(f"{SVG}circle")) == 1
    (line,) = drawn([(0, 1.0), (10, 2.0)]).findall(f"{SVG}polyline")
    (x0, y0), (x1, y1) = [tuple(map(float, place.split(","))) for place in line.get("points").split()]
    assert x0 == _svg.LEFT and x1 == _svg.WIDTH - _svg.RIGHT and y0 > y1  # a larger value is drawn higher


def test_values_that_are_no_numbers_break_the_line_and_are_crossed() -> None:
    root = drawn([(1, 1.0), (2, 2.0), (3, math.nan), (4, 1.5), (5, 1.0), (6, math.inf), (7, 2.0)])
    assert len(root.findall(f"{SVG}polyline")) == 2 and len(root.findall(f"{SVG}circle")) == 1
    assert len(root.findall(f"{SVG}path")) == 2
    assert "nan" not in ElementTree.tostring(root, "unicode") and "inf" not in ElementTree.tostring(root, "unicode")


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 10**6), NUMBERS), max_size=30), st.booleans())
def test_any_points_make_a_well_formed_picture(points: list[tuple[int, float]], marks: bool) -> None:
    lines = [Line("a", sorted(points, key=lambda p: p[0]), "raw", "#123456", marks=marks)]
    root = ElementTree.fromstring(chart("t", "d", lines, x_max=10))
    for line in root.findall(f"{SVG}polyline"):
        for place in line.get("points").split():
            x, y = map(float, place.split(","))
            assert 0 <= x <= _svg.WIDTH and -1 <= y <= _svg.HEIGHT
    inert(chart("t", "d", lines))
    assert isinstance(key(lines), Markup)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1e-9), (2.3, 2.4), (-5, 7), (0, 405_000_000_000), (1e29, 2e29)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8 and all(low - 1e-9 * abs(high) <= tick <= high + 1e-9 * abs(high) for tick in found)
    assert len({f"{tick:g}" for tick in found}) == len(found)


def test_thinning_keeps_ends_and_extremes() -> None:
    points = [(i, math.sin(i / 50)) for i in range(10_000)]
    points[1234] = (1234, 50.0)
    points[4321] = (4321, -50.0)
    kept = thin(points)
    assert len(kept) <= _svg.POINTS + 2 and kept[-1] == points[-1]
    assert {(1234, 50.0), (4321, -50.0)} <= set(kept) and kept == sorted(kept)


# -- smoothing and progress ------------------------------------------------------------------------


def test_smoothing_starts_at_the_first_value_and_averages() -> None:
    assert smooth([(1, 4.0)], 0.9) == [(1, pytest.approx(4.0))]
    assert smooth([(1, 4.0), (2, 2.0)], 0.5)[1][1] == pytest.approx((0.25 * 4 + 0.5 * 2) / 0.75)
    assert smooth([(1, 3.0), (2, 5.0)], 0.0) == [(1, 3.0), (2, 5.0)]
    assert smooth([(1, 1.0), (2, math.nan), (3, math.inf), (4, 1.0)], 0.9) == [(1, pytest.approx(1)), (4, pytest.approx(1))]


def test_progress_tells_speed_and_time_left() -> None:
    progress = Progress()
    progress.add(history(10, total=40))
    assert progress.tokens_per_second == pytest.approx(200) and progress.seconds_left == pytest.approx(15)
    facts = dict(progress.facts())
    assert facts["Held-out loss"] == "3.5" and facts["RSS"] == "1.0 GiB (peak 2.0 GiB)"
    assert facts["Speed"] == "200 tok/s" and facts["Time left"] == "0:15"
    assert progress.headline() == "Step 10 of 40"


def test_a_resumed_run_takes_the_place_of_what_was_lost() -> None:
    progress = Progress()
    progress.add(history(10, total=20))
    progress.add([RunStarted(total_steps=20, device="cpu", trainable_parameters=7, resumed_from=6, step=6), step(7, 0.5)])
    assert [number for number, _ in progress.losses] == [1, 2, 3, 4, 5, 6, 7]
    assert progress.losses[-1] == (7, 0.5) and progress.step == 7


def test_the_end_is_told() -> None:
    progress = Progress()
    progress.add([*history(2), RunFinished(step=2, seconds=65.2)])
    assert progress.headline() == "Finished, step 2 of 2 in 1:05"
    progress.add([RunFinished(step=2, stopped=True, seconds=1)])
    assert progress.headline().startswith("Stopped")
    progress.add([RunFailed(step=2, error="No space left.")])
    assert progress.headline() == "Failed, step 2 of 2: No space left."


# -- the panel -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 500, 20_000])
def test_the_saved_picture_is_small(tmp_path: Path, steps: int) -> None:
    plot = LivePlot()
    plot.feed(history(steps))
    plot.draw()
    assert len(plot.drawing().encode()) < 20_000
    inert(plot.static_html())


def test_it_draws_at_most_five_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(live_plot.time, "monotonic", lambda: now[0])
    plot = LivePlot()
    plot.feed(history(1, total=2000))
    sent = []
    plot._picture.observe(sent.append, "value")
    for number in range(2, 1002):  # ten seconds, a hundred steps each
        now[0] += 0.01
        plot.feed([step(number, 1 / number)])
    assert 40 <= len(sent) <= 50


def test_what_was_held_back_is_drawn_when_nothing_follows() -> None:
    async def main() -> LivePlot:
        plot = LivePlot()
        plot.feed(history(3, total=9))
        plot.feed([step(4, 0.25)])
        assert "Step 4" not in plot._picture.value
        await asyncio.sleep(0.3)
        return plot

    assert "Step 4 of 9" in asyncio.run(main())._picture.value


def test_a_run_is_shown_from_its_folder(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for event in [*history(12), MessageEvent(text="Slow <disk>.", level="warning"), RunFinished(step=12, seconds=6)]:
        log.append(event)
    plot = LivePlot.from_run_dir(tmp_path)
    said = inert(plot._picture.value).text
    assert "Finished, step 12 of 12" in said and "Slow <disk>." in said
    assert plot._picture.value.count("<svg") >= 2
    assert repr(str(tmp_path))[1:-1] in plot.code()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(TrainingError, match=r"holds no run; give the folder"):
            LivePlot.from_run_dir(path)


def test_a_loss_that_is_no_number_is_said() -> None:
    plot = LivePlot()
    plot.feed([*history(3), step(4, math.nan), step(5, math.inf), RunFinished(step=5)])
    said = inert(plot._picture.value).text
    assert "not a number at step 4, 5; lower learning_rate" in said


def test_it_can_be_read_without_seeing_it() -> None:
    plot = LivePlot()
    plot.feed([*history(5, total=10)])
    plot.draw()
    reader = inert(plot._picture.value)
    attributes = dict(reader.attributes)
    assert ("role", "progressbar") in reader.attributes and ("aria-valuenow", "5") in reader.attributes
    assert reader.tags.count("title") == reader.tags.count("desc") == 2
    assert "Loss" in reader.text and "loss of each step" in reader.text and attributes
    assert plot._fields["smoothing"].widget.description == "Smoothing"


def test_smoothing_is_a_setting() -> None:
    plot = LivePlot()
    plot.feed(history(30))
    plot.draw()
    before = plot._picture.value
    plot.set(smoothing=0.0)
    assert plot._picture.value != before


@pytest.mark.parametrize("said", CORPUS[::12], ids=lambda said: ascii(said[:20]))
def test_whatever_a_run_says_is_text(tmp_path: Path, said: str) -> None:
    plot = LivePlot()
    plot.feed([RunStarted(total_steps=3, device=said, trainable_parameters=1, message=said), *history(2, total=3)])
    memory = MemoryEvent(step=3, memory=said, used_bytes=1, peak_bytes=1, total_bytes=1)
    plot.feed([MessageEvent(text=said, level="warning"), memory, RunFailed(step=3, error=said)])
    plot.draw()
    inert(plot.static_html())
    inert(plot._heading.value)
    for svg in plot._picture.value.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")


def test_it_follows_the_newest_run_of_a_session(tmp_path: Path) -> None:
    async def main() -> LivePlot:
        session = FakeSession(tmp_path, steps=2)
        plot = LivePlot(session)
        assert plot.progress.state == "waiting"
        session.load("a"), session.add_lora(), session.use_data("x")
        await session.train()
        first = plot.progress
        assert first.state == "finished" and first.step == 2
        session.steps = 3
        await session.train()
        assert plot.progress is not first and plot.progress.step == 3
        late = LivePlot(session)  # after the run
        assert late.progress.step == 3
        return plot

    asyncio.run(main())
