"""The inspector as HTML: tokens with their states by colour, by form and by name; problems; what became of the rows."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from itertools import groupby
from typing import TYPE_CHECKING

from nbkit.config import IGNORE_INDEX
from nbkit.data.findings import rows_text
from nbkit.data.histogram import Bars, lengths_of, shares_of
from nbkit.data.tokens import MASKED, PADDING, TRAINED, Line, Token
from nbkit.markup import Markup, fact, join, paragraph, plain, stylesheet, table, tag, text

if TYPE_CHECKING:
    from nbkit.data.inspection import Inspection

TOKENS = 900  # shown of a batch; where it has more, each row shows its beginning and its end
CELL = 400  # characters shown of one token
ALIKE = 12  # padding tokens in a row that are shown one by one
SHOWN = 24  # rows of the table of reasons
LEGEND = (
    (TRAINED, "⟦trained⟧", "the loss is computed on these"),
    (MASKED, "masked", "read, not learned"),
    (PADDING, "░padding░", "fills the batch, is not seen"),
    ("edge", "┃ row 7", "a packed row begins; it sees none of those before it"),
    ("control", "<stop>", "control token"),
)
SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
MINUS = f"\N{MINUS SIGN}{-IGNORE_INDEX}"


@cache
def style() -> Markup:
    """The style sheet. Fixed text of this package, scoped to the class `nbk-inspection`."""
    return stylesheet(files("nbkit.data").joinpath("inspector.css").read_text(encoding="utf-8"))


def whole(shown: Inspection) -> Markup:
    return join((style(), facts(shown), problems(shown), reasons(shown), histograms(shown), batch(shown)))


def _box(*parts: object) -> Markup:
    """`mathjax_ignore`: notebooks typeset what stands between dollar signs, also in tokens."""
    return tag("div", {"class": "nbk-inspection mathjax_ignore tex2jax_ignore"}, *parts)


def _title(said: object) -> Markup:
    return tag("h4", None, said)


# -- the set ---------------------------------------------------------------------------------------


def facts(shown: Inspection) -> Markup:
    return _box(tag("div", {"class": "nbt-facts"}, *(fact(name, value) for name, value in shown.facts())))


def problems(shown: Inspection, told: Collection[str] = ()) -> Markup:
    found = [one for one in shown.problems if one.kind not in told]
    counts = shown.counts
    if not shown.problems:
        rows = f"{len(counts.lengths):,}"
        looked = f"no double BOS, no missing stop token, no duplicates, nothing cut off, every one of the {rows} rows trains"
        return _box(paragraph("nbt-sound", tag("b", None, "✓ No problem found"), f" ({looked})"))
    items: list[Markup] = []
    for one in found:
        mark = "✖ Stops the start. " if one.stops else "⚠ "
        attributes = {"class": "nbt-stops" if one.stops else None, "dir": "auto"}
        items.append(tag("li", attributes, tag("b", None, mark), text(one, 600)))
    hint = ""
    if 0 < counts.texts_read < len(counts.lengths):
        hint = paragraph("nbt-hint", f"Signs of mixed-up roles were looked for in {counts.texts_read:,} rows, evenly spread.")
    return _box(tag("ul", {"class": "nbt-problems", "aria-label": "Problems"}, *items) if items else "", hint)


def reasons(shown: Inspection) -> Markup:
    """What became of rows, and why."""
    found = shown.rows_by_reason()
    if not found:
        return join(())
    rows = [(outcome, f"{len(numbers):,}", reason, rows_text(numbers)) for outcome, reason, numbers in found[:SHOWN]]
    more = paragraph("nbt-hint", f"and {len(found) - SHOWN} more reasons") if len(found) > SHOWN else ""
    return _box(table("Rows with a remark", ("what became of them", "rows", "why", "which"), rows), more)


def histograms(shown: Inspection) -> Markup:
    """Tokens of the rows, and how much of each is trained."""
    pair = (lengths_of(shown.lengths, shown.set.max_length), shares_of(shown.trained, shown.lengths))
    figures = [tag("div", None, tag("b", None, bars.title), drawing(bars)) for bars in pair]
    more = find_spec("plotly") is not None  # asked for, not imported
    hint = paragraph("nbt-hint", tag("b", None, "nbkit.inspect(session).figure()"), " gives these to zoom and to save.")
    return _box(tag("div", {"class": "nbt-figures"}, *figures), hint if more else "")


# -- tokens ----------------------------------------------------------------------------------------


def batch(shown: Inspection) -> Markup:
    found = shown.batch
    width = max((len(line.tokens) for line in found), default=0)
    many = f"{len(found)} row{'s' if len(found) != 1 else ''} × {width:,} tokens"
    title = _title(f"Batch {shown.index + 1:,} of {shown.batches:,}, as training sees it: {many}")
    return join((_box(title), legend(found), rows(found, shown.start)))


def rows(found: Sequence[Line], start: int = 0) -> Markup:
    """The tokens of some lines; at most `TOKENS` of all of them together."""
    most = max(60, TOKENS // max(len(found), 1))
    return _box(*(_line(line, number, most, start) for number, line in enumerate(found, 1)))


def legend(found: Sequence[Line] = ()) -> Markup:
    """What the marks mean: those of the states that every row has, and of those that these lines have."""
    states = {TRAINED, MASKED, "control"} | {token.state for line in found for token in line.tokens}
    states |= {"edge" for line in found for token in line.tokens if token.edge}
    items = []
    for state, sample, meaning in LEGEND:
        if state in states:
            shown = tag("span", {"class": f"nbt-sample nbt-{state}"}, sample)
            items.append(tag("li", None, shown, f" {meaning}"))
    hover = tag("li", None, "Point at a token for its id, label and place.")
    return _box(tag("ul", {"class": "nbt-legend", "aria-label": "Legend"}, *items, hover))


def _line(line: Line, number: int, most: int, start: int) -> Markup:
    count, trained, padding = len(line.tokens), line.count(TRAINED), line.count(PADDING)
    real = count - padding
    share = f"{trained / real:.0%}" if real else "none"
    name = (rows_text(line.rows) if line.rows else f"row {number} of the batch") + (f", {line.part}" if line.part else "")
    told = [f"{real:,} tokens", f"{trained:,} trained ({share})"]
    told += [f"{line.documents} rows in one pack"] if line.documents > 1 else []
    told += [f"{padding:,} padding"] if padding else []
    head = tag(
        "div", {"class": "nbt-head"}, tag("b", None, name[:1].upper() + name[1:]), *(tag("span", None, one) for one in told)
    )
    attributes = {"class": "nbt-tokens", "dir": "ltr", "tabindex": 0, "role": "group"}
    attributes["aria-label"] = f"{name}, token by token: {', '.join(told)}"
    return join((head, tag("pre", attributes, *_shown(line, most, start))))


def _shown(line: Line, most: int, start: int) -> Iterator[Markup]:
    """The tokens from `start` on; where they are more than `most`, their beginning and their end."""
    tokens = line.tokens[max(start, 0) :]
    rows = iter(line.rows[1 + sum(token.edge for token in line.tokens[: max(start, 0)]) :])
    head, tail = tokens, tokens[:0]
    if len(tokens) > most:
        head, tail = tokens[: most * 2 // 3], tokens[len(tokens) - most // 3 :]
    if start > 0:
        yield _gap(line.tokens[:start], "before these")
    yield from _runs(head, rows)
    if tail:
        between = tokens[len(head) : len(tokens) - len(tail)]
        yield _gap(between, "between, not shown")
        for token in between:
            if token.edge:
                next(rows, None)
        yield from _runs(tail, rows)


def _gap(tokens: Sequence[Token], where: str) -> Markup:
    trained = sum(token.state == TRAINED for token in tokens)
    return tag("span", {"class": "nbt-gap"}, f"\n⋯ {len(tokens):,} tokens {where} ({trained:,} trained) ⋯\n")


def _runs(tokens: Sequence[Token], rows: Iterator[int]) -> Iterator[Markup]:
    """Stretches of one state and one document, each named for screen readers."""
    document = 0

    def key(token: Token) -> tuple[int, str]:
        nonlocal document
        document += token.edge
        return document, token.state

    for (_, state), members in groupby(tokens, key):
        run = list(members)
        if run[0].edge:
            row = next(rows, None)
            said = f"row {row}" if row is not None else "next row"
            yield tag("span", {"class": "nbt-edge", "role": "separator", "aria-label": f"pack edge, {said}"}, f"\n┃ {said} ")
        yield _run(state, run)


def _run(state: str, run: list[Token]) -> Markup:
    cells = run if state != PADDING or len(run) <= ALIKE else run[: ALIKE - 2]
    parts = [_cell(token) for token in cells]
    if len(cells) < len(run):
        parts.append(tag("bdi", {"title": f"{len(run):,} tokens of padding in all"}, f" × {len(run):,}"))
    named = {"class": f"nbt-{state}", "role": "group", "aria-label": f"{state}, {len(run):,} tokens"}
    if state == TRAINED:
        return tag("mark", named, "⟦", *parts, "⟧")
    return tag("span", named, "░", *parts, "░") if state == PADDING else tag("span", named, *parts)


def _cell(token: Token) -> Markup:
    said = visible(token.text) if token.text else f"‹{token.note}›"
    end = "\n" * token.text.count("\n") if token.state != PADDING else ""
    look = "nbt nbt-control" if token.control else "nbt"
    return join((tag("bdi", {"class": look, "title": _hover(token)}, said), end))


def _hover(token: Token) -> str:
    """Id, place and label; the text comes last, as it may be written from right to left."""
    label = f"label {MINUS}" if token.label == IGNORE_INDEX else f"label {token.label}"
    place = f", {token.place} in its row" if token.place != token.position else ""
    said = f"“{visible(token.text)}”" if token.text else f"bytes {token.note}, part of a character"
    return f"id {token.id} · position {token.position}{place} · {label} ({token.state}) · {said}"


def visible(said: str) -> str:
    """A token's text with everything in it to be seen: line ends as arrows, what has no width by its number."""
    shown = []
    for letter in said[:CELL]:
        hidden = letter not in SIGNS and letter != "\u00ad" and unicodedata.category(letter) in ("Cf", "Zl", "Zp", "Co", "Cn")
        shown.append(SIGNS.get(letter) or (f"[U+{ord(letter):04X}]" if hidden or letter == "\u00ad" else letter))
    more = f"… ({len(said):,} characters)" if len(said) > CELL else ""
    return plain("".join(shown), 10 * CELL) + more


# -- histograms ------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 130, 40, 30, 8


def drawing(bars: Bars) -> Markup:
    """A histogram as SVG; each bar names its rows."""
    high = max(bars.counts, default=0) or 1
    inner, floor = WIDTH - LEFT - 10, HEIGHT - BOTTOM
    step = inner / max(len(bars.counts), 1)
    drawn = []
    for number, count in enumerate(bars.counts):
        tall = (floor - TOP) * count / high
        place = {"x": f"{LEFT + number * step + 0.5:.1f}", "y": f"{floor - tall:.1f}"}
        size = {"width": f"{max(step - 1, 0.5):.1f}", "height": f"{tall:.1f}"}
        drawn.append(tag("rect", {"class": "nbt-bar", "fill": "#1565c0"} | place | size, tag("title", None, bars.name(number))))
    grey, small = {"class": "nbt-axis", "stroke": "#888888"}, {"font-size": 11, "fill": "#888888"}
    drawn.append(tag("line", grey | {"x1": LEFT, "x2": WIDTH - 10, "y1": floor, "y2": floor}))
    drawn.append(tag("text", small | {"x": LEFT - 6, "y": TOP + 8, "text-anchor": "end"}, f"{high:,}"))
    drawn.append(tag("text", small | {"x": LEFT - 6, "y": floor + 3, "text-anchor": "end"}, "0"))
    for value, said in bars.ticks():
        drawn.append(tag("text", small | {"x": f"{LEFT + inner * value:.1f}", "y": floor + 14, "text-anchor": "middle"}, said))
    if (limit := bars.limit_place()) is not None:
        x = f"{LEFT + inner * limit:.1f}"
        drawn.append(
            tag(
                "line",
                {"class": "nbt-limit", "stroke": "#c62828", "stroke-dasharray": "3 3", "x1": x, "x2": x, "y1": TOP, "y2": floor},
            )
        )
    drawn.append(tag("text", small | {"x": WIDTH - 10, "y": HEIGHT - 3, "text-anchor": "end"}, bars.axis))
    attributes = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": f"{bars.title}. {bars.said}"}
    attributes["xmlns"] = "http://www.w3.org/2000/svg"
    return tag("svg", attributes, tag("title", None, bars.title), tag("desc", None, bars.said), *drawn)
