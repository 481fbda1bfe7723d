"""Strings that try to act, and what is said of a widget tree or of HTML: the elements, the text, whatever could act."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import ipywidgets as widgets

EVENTS = ("onerror", "onload", "onclick", "onmouseover", "onfocus", "onanimationstart", "ontoggle", "onpointerenter")
ELEMENTS = (
    "object",
    "embed src=x",
    "math",
    "select autofocus",
    "keygen",
    "template",
    "portal",
    "img src=x",
    "svg",
    "body",
    "input autofocus",
    "details open",
    "video",
    "audio src",
    "iframe",
    "marquee",
    "a href=x",
)
SCHEMES = ("javascript:alert(1)", "data:text/html,<script>alert(1)</script>", "https://evil.example/b.png", "file:///etc/passwd")
WRAPPERS = ("{}", '">{}', "'>{}", "</pre>{}", "</title>{}", "</svg>{}", "--><!-- {}", "]]>{}", "</style>{}", "</textarea>{}")
CORPUS: list[str] = [
    *(f"<{element} {event}=alert(1)>" for element in ELEMENTS for event in EVENTS),
    *(wrapper.format("<script>alert(1)</script>") for wrapper in WRAPPERS),
    *(wrapper.format("<img src=https://evil.example/x onerror=alert(1)>") for wrapper in WRAPPERS),
    *(f'<a href="{scheme}">x</a>' for scheme in SCHEMES),
    *(f"<iframe srcdoc='{scheme}'></iframe>" for scheme in SCHEMES),
    *(f"![beacon]({scheme})" for scheme in SCHEMES),
    "<style>*{background:url(https://evil.example)}</style>",
    "<base href=https://evil.example>",
    "<meta http-equiv=refresh content=0;url=https://evil.example>",
    "<link rel=stylesheet href=https://evil.example>",
    "<form action=https://evil.example><button>go</button></form>",
    '<button data-commandlinker-command="terminal:create-new">run</button>',
    "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
    "<svg><animate onbegin=alert(1) attributeName=x></svg>",
    "<svg><use href=data:image/svg+xml,x></svg>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;",
    "\\u003cscript\\u003e",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "' onmouseover='alert(1)",
    '" onfocus="alert(1)" autofocus="',
    "$\\href{javascript:alert(1)}{x}$ \\(x\\) $$\\frac{1}{0}$$",
    "\x1b[31mred\x1b[0m \x1b]8;;https://evil.example\x07link\x1b]8;;\x07",
    "\x00\x01\x07\x08\x0b\x0c\x0e\x7f\x85\x9b31m",
    "abc\u202egnp.exe\u202c \u2066x\u2069 \u200f",
    "\ud800 lone \udfff surrogate \udcff",
    "\ufffe\uffff\ufeff",
    "שלום עולם مرحبا بالعالم",
    "ａｄｍｉｎ раураl 𝒶𝒹𝓂𝒾𝓃",
    "{0.__class__.__mro__} %s %n {self} ${x} #{x} {{7*7}} <%= 7*7 %>",
    "'; DROP TABLE rows; --",
    "$(rm -rf /) `reboot` | cat && ls; ../../etc/passwd",
    "-rf --help",
    "\r\nSet-Cookie: x\r\n\r\n<script>",
    "e\u0301" * 500 + "\u0489" * 500,
    "x" * 1_048_576,
    "<b>" * 20_000,
    "\n" * 5_000,
    "",
    " ",
]
ALLOWED = frozenset(
    (
        *(
            "div",
            "span",
            "p",
            "b",
            "bdi",
            "pre",
            "mark",
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
        ),
        *("svg", "title", "desc", "path", "line", "circle", "polyline", "rect", "text", "style"),
    )
)


class Reader(HTMLParser):
    """Elements, attributes and text of a piece of HTML."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.said: list[str] = []
        self._in_style = False
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.said.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:80]!r}")

    @property
    def text(self) -> str:
        return "".join(self.said)


def inert(markup: str) -> Reader:
    """Assert that nothing in the markup can act; returns what it says."""
    reader = Reader(markup)
    assert set(reader.tags) <= ALLOWED, set(reader.tags) - ALLOWED
    for name, value in reader.attributes:
        assert not name.startswith(("on", "data-")), name
        assert name not in ("href", "src", "srcdoc", "action", "xlink:href", "formaction", "background"), name
        assert name != "style" or (value or "").startswith("width:"), value
    markup.encode("utf-8")  # a lone surrogate cannot be sent to the front end
    return reader


def tree(widget: Any) -> Iterator[Any]:
    """All widgets under a root."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from tree(child)


def inert_tree(root: Any) -> str:
    """Assert that no widget under `root` can act; returns all text shown as HTML."""
    said = []
    for widget in tree(root):
        if isinstance(widget, widgets.HTML):
            said.append(inert(widget.value).text)
        assert not isinstance(widget, widgets.HTMLMath)
        json.dumps(widget.get_state(), ensure_ascii=False, default=str).encode("utf-8")  # as it is sent
    return "".join(said)


def fixed_words(root: Any) -> set[str]:
    """Everything ipywidgets 7 would show as HTML without being asked: descriptions and tooltips."""
    names = ("description", "tooltip") if widgets.__version__ > "8" else ("description", "tooltip", "description_tooltip")
    return {str(getattr(widget, name)) for widget in tree(root) for name in names if getattr(widget, name, None)}
