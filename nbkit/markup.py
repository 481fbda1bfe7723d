"""The one place where HTML and SVG are made from strings. Standard library only.

A notebook shows HTML as it stands, without a sanitiser. So whatever a user, a data set, a model or an error message says
goes through `text`, and only `Markup`, which nothing but this module makes, is ever shown.
"""

from __future__ import annotations

import html as _escape
import math
from collections.abc import Iterable, Mapping

TEXT_LIMIT = 4000  # characters of one piece of untrusted text that are shown

TAGS = frozenset(
    (
        "div",
        "span",
        "p",
        "b",
        "u",
        "pre",
        "code",
        "mark",
        "bdi",
        "br",
        "ul",
        "li",
        "h3",
        "h4",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "dl",
        "dt",
        "dd",
        "svg",
        "title",
        "desc",
        "g",
        "path",
        "line",
        "circle",
        "rect",
        "polyline",
        "text",
    )
)
ATTRIBUTES = frozenset(
    (
        "class",
        "role",
        "dir",
        "lang",
        "style",
        "tabindex",
        "colspan",
        "scope",
        "title",
        "viewBox",
        "width",
        "height",
        "x",
        "y",
        "x1",
        "x2",
        "y1",
        "y2",
        "cx",
        "cy",
        "r",
        "d",
        "points",
        "fill",
        "stroke",
        "stroke-width",
        "stroke-dasharray",
        "stroke-linejoin",
        "stroke-linecap",
        "opacity",
        "text-anchor",
        "font-size",
        "preserveAspectRatio",
        "xmlns",
    )
)
EMPTY = frozenset(("br",))  # written without an end tag

# Control characters are shown as pictures, so that an ANSI sequence is seen and not obeyed; overrides of the writing
# direction are spelled out, so that they cannot turn the text around them; what JSON or XML cannot carry is replaced.
_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
_VISIBLE |= {0x7F: "\u2421", 0xFFFE: "\ufffd", 0xFFFF: "\ufffd"}
_VISIBLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], "\ufffd")
_VISIBLE |= {code: f"[U+{code:04X}]" for code in (0x061C, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


class Markup(str):
    """HTML that may be shown as it stands."""

    __slots__ = ()


def plain(value: object, limit: int = TEXT_LIMIT) -> str:
    """`value` as harmless plain text of at most `limit` characters; what is left out is counted."""
    said = str(value)
    cut = said[:limit].translate(_VISIBLE)
    return cut if len(said) <= limit else f"{cut}… ({len(said):,} characters in all)"


def text(value: object, limit: int = TEXT_LIMIT) -> Markup:
    """`value` as text: escaped, control characters visible, at most `limit` characters."""
    if isinstance(value, Markup):
        return value
    return Markup(_escape.escape(plain(value, limit), quote=True))


def join(parts: Iterable[object]) -> Markup:
    """Parts put together; those that are not `Markup` are escaped."""
    return Markup("".join(text(part) for part in parts))


def tag(name: str, attributes: Mapping[str, object] | None = None, *children: object) -> Markup:
    """One element. Children that are not `Markup` are escaped; attributes with the value None are left out.

    Raises: ValueError for an element or attribute that could act (scripts, links, images, event handlers).
    """
    if name not in TAGS:
        raise ValueError(f"element {name!r} is not one that panels show")
    opened = [name]
    for key, value in (attributes or {}).items():
        if key not in ATTRIBUTES and not key.startswith("aria-"):
            raise ValueError(f"attribute {key!r} is not one that panels use")
        if value is not None:
            opened.append(f'{key}="{text(value)}"')
    if name in EMPTY:
        return Markup(f"<{' '.join(opened)}>")
    return Markup(f"<{' '.join(opened)}>{join(children)}</{name}>")


def stylesheet(css: str) -> Markup:
    """A style element. `css` must be fixed text of this package.

    Raises: ValueError if it could end the element or fetch something.
    """
    if "<" in css or "url(" in css or "@import" in css:
        raise ValueError("the style sheet of a panel ends no element and fetches nothing")
    return Markup(f"<style>{css}</style>")


# -- small pieces that several panels use ----------------------------------------------------------


def paragraph(css_class: str, *children: object) -> Markup:
    return tag("p", {"class": css_class, "dir": "auto"}, *children)


def block(value: object, limit: int = TEXT_LIMIT, label: str | None = None) -> Markup:
    """Preformatted text that can be focused and scrolled by keyboard."""
    attributes = {"class": "nbk-block", "dir": "auto", "tabindex": "0"}
    return tag("pre", attributes | ({"role": "group", "aria-label": label} if label else {}), text(value, limit))


def pairs(items: Iterable[tuple[object, object]]) -> Markup:
    """A table of names and values."""
    rows = (tag("tr", None, tag("th", {"scope": "row"}, name), tag("td", {"dir": "auto"}, value)) for name, value in items)
    return tag("table", {"class": "nbk-table"}, tag("tbody", None, *rows))


def table(caption: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Markup:
    """A table with a caption for screen readers and a header cell over each column."""
    head = tag("tr", None, *(tag("th", {"scope": "col"}, column) for column in columns))
    body = (tag("tr", None, *(tag("td", {"dir": "auto"}, cell) for cell in row)) for row in rows)
    return tag(
        "table", {"class": "nbk-table"}, tag("caption", None, caption), tag("thead", None, head), tag("tbody", None, *body)
    )


def fact(name: str, value: object) -> Markup:
    """A figure with its name above it."""
    return tag("div", {"class": "nbk-fact"}, tag("span", {"class": "nbk-fact-name"}, name, " "), tag("b", {"dir": "auto"}, value))


def size(count: float) -> str:
    """Bytes for people: 1.4 GiB, 83.0 MiB, 512 bytes."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            value = count / 2**power
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{count:.0f} bytes"


def amount(count: float) -> str:
    """A number of parameters for people: 8.03 B, 135 M, 320 k."""
    for unit, power in (("B", 9), ("M", 6), ("k", 3)):
        if count >= 10**power:
            value = count / 10**power
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f}"


def number(value: float | None, digits: int = 4) -> str:
    """A number for people, also where it is not finite."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if math.isfinite(value) else "not a number" if math.isnan(value) else f"{value}"


def duration(seconds: float) -> str:
    """Minutes and seconds: 2:05; with hours from one on: 1:02:05."""
    if not math.isfinite(seconds):
        return "–"
    minutes, left = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
