"""Line charts as SVG: small, readable as text, drawn in the notebook's own colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nbkit.widgets._html import Markup, join, tag

WIDTH, HEIGHT = 560, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 30
POINTS = 240  # drawn of a line at most; more do not show at this width
MARKS = 24  # crosses and diamonds drawn at most

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One line. `look` is its class in the style sheet; `colour` shows where style sheets do not reach."""

    name: str
    points: Points
    look: str
    colour: str
    width: float = 2.0
    dashes: str | None = None
    marks: bool = False  # diamonds at the points


@dataclass(frozen=True)
class Frame:
    """Data coordinates to pixels."""

    x_max: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(max(step / self.x_max, 0.0), 1.0)

    def y(self, value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - self.low) / (self.high - self.low))


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) from low to high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(points: Points, most: int = POINTS) -> Points:
    """At most about `most` points: the lowest and the highest of each bucket, in order; one without a number stays a gap."""
    if len(points) <= most:
        return points
    width = math.ceil(2 * len(points) / most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), width):
        bucket = points[start : start + width]
        finite = [point for point in bucket if drawable(point[1])]
        chosen = {min(finite, key=_value), max(finite, key=_value)} if finite else {bucket[0]}
        kept.extend(sorted(chosen))
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def drawable(value: float) -> bool:
    """Whether a value has a place on an axis; what is larger than any loss or memory has none."""
    return math.isfinite(value) and abs(value) < 1e30


def _value(point: tuple[float, float]) -> float:
    return point[1]


def _range(lines: Sequence[Line], from_zero: bool) -> tuple[float, float]:
    values = [value for line in lines for _, value in line.points if drawable(value)]
    if not values:
        return 0.0, 1.0
    low, high = (0.0 if from_zero else min(values)), max(values)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    # A loss is never drawn below zero, where there is nothing.
    return (low if from_zero else max(low - room, 0.0) if low >= 0 else low - room), high + room


def _runs(points: Points) -> Iterator[Points]:
    """Stretches between values that are not finite."""
    run: list[tuple[float, float]] = []
    for point in points:
        if drawable(point[1]):
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _line(line: Line, frame: Frame) -> Iterator[Markup]:
    paint = {"class": f"nbk-line nbk-{line.look}", "fill": "none", "stroke": line.colour, "stroke-width": line.width}
    paint |= {"stroke-linejoin": "round", "stroke-linecap": "round", "stroke-dasharray": line.dashes}
    for run in _runs(thin(line.points)):
        if len(run) == 1:
            dot = {"class": f"nbk-dot nbk-{line.look}", "fill": line.colour, "r": max(line.width, 1.5)}
            yield tag("circle", dot | {"cx": f"{frame.x(run[0][0]):.1f}", "cy": f"{frame.y(run[0][1]):.1f}"})
        else:
            places = " ".join(f"{frame.x(step):.1f},{frame.y(value):.1f}" for step, value in run)
            yield tag("polyline", paint | {"points": places})
    if line.marks:
        for step, value in [point for point in line.points if drawable(point[1])][-MARKS:]:
            x, y = frame.x(step), frame.y(value)
            shape = f"M{x:.1f},{y - 5:.1f} l5,5 l-5,5 l-5,-5 z"
            yield tag("path", {"class": f"nbk-dot nbk-{line.look}", "d": shape, "fill": line.colour})


def _axes(frame: Frame, x_label: str) -> Iterator[Markup]:
    grey = {"class": "nbk-axis", "stroke": "#888888", "stroke-width": 1}
    label = {"class": "nbk-tick", "font-size": 11, "fill": "#888888"}
    bottom = HEIGHT - BOTTOM
    for value in ticks(frame.low, frame.high):
        y = f"{frame.y(value):.1f}"
        yield tag("line", grey | {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": y, "y2": y, "opacity": 0.25})
        yield tag("text", label | {"x": LEFT - 6, "y": f"{frame.y(value) + 4:.1f}", "text-anchor": "end"}, f"{value:g}")
    yield tag("line", grey | {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": bottom, "y2": bottom})
    for step in ticks(0, frame.x_max, 6):
        if step == int(step):
            x = f"{frame.x(step):.1f}"
            yield tag("line", grey | {"x1": x, "x2": x, "y1": bottom, "y2": bottom + 4})
            yield tag("text", label | {"x": x, "y": bottom + 15, "text-anchor": "middle"}, f"{step:g}")
    yield tag("text", label | {"x": WIDTH - RIGHT, "y": HEIGHT - 3, "text-anchor": "end"}, x_label)


def _crosses(lines: Sequence[Line], frame: Frame) -> Iterator[Markup]:
    """A cross at the foot of the chart for each value that is not a number, so that it is not overlooked."""
    steps = sorted({step for line in lines for step, value in line.points if not drawable(value)})
    for step in steps[-MARKS:]:
        shape = f"M{frame.x(step) - 4:.1f},{HEIGHT - BOTTOM - 10} l8,8 m0,-8 l-8,8"
        yield tag("path", {"class": "nbk-line nbk-bad", "d": shape, "fill": "none", "stroke": "#c62828", "stroke-width": 2})


def chart(
    title: str,
    description: str,
    lines: Sequence[Line],
    x_max: float = 0,
    x_label: str = "step",
    from_zero: bool = False,
) -> Markup:
    """A chart of any number of lines, also of none. `description` says it in words."""
    last = max((step for line in lines for step, _ in line.points), default=0)
    frame = Frame(max(x_max, last, 1), *_range(lines, from_zero))
    attributes = {
        "class": "nbk-chart",
        "viewBox": f"0 0 {WIDTH} {HEIGHT}",
        "role": "img",
        "aria-label": f"{title}. {description}",
        "xmlns": "http://www.w3.org/2000/svg",
    }
    drawn = [part for line in lines for part in _line(line, frame)]
    return tag(
        "svg",
        attributes,
        tag("title", None, title),
        tag("desc", None, description),
        join(_axes(frame, x_label)),
        join(drawn),
        join(_crosses(lines, frame)),
    )


def key(lines: Sequence[Line]) -> Markup:
    """The legend: a stroke of each line as it is drawn, and its name."""
    items = []
    for line in lines:
        paint = {"class": f"nbk-line nbk-{line.look}", "stroke": line.colour, "stroke-width": line.width}
        paint |= {"stroke-dasharray": line.dashes, "x1": 1, "x2": 21, "y1": 6, "y2": 6}
        dot = {"class": f"nbk-dot nbk-{line.look}", "fill": line.colour, "d": "M11,1 l5,5 l-5,5 l-5,-5 z"}
        sign = tag("path", dot) if line.marks else tag("line", paint)
        box = {"viewBox": "0 0 22 12", "width": 22, "height": 12, "aria-hidden": "true", "xmlns": "http://www.w3.org/2000/svg"}
        items.append(tag("span", {"class": "nbk-key"}, tag("svg", box, sign), " ", line.name))
    return tag("div", {"class": "nbk-keys"}, *items)
