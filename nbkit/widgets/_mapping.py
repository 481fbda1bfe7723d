"""The settings of a `DataRecipe` as form fields: the boxes of columns, the template, further names of speakers, repairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from nbkit.config import DataRecipe
from nbkit.errors import ConfigError
from nbkit.widgets import _fields
from nbkit.widgets._fields import Field
from nbkit.widgets._html import plain

SAMPLE = "sample:ships-log"
HINT = "a file or folder · org/name · org/name:config#train[:1000] · https://… · sample:ships-log"
ROLES = {  # of the columns of each format, as `DataRecipe` names them
    "alpaca": ("instruction", "input", "output", "system"),
    "sharegpt": ("conversations", "system", "tools"),
    "messages": ("messages", "system", "tools"),
    "prompt_completion": ("prompt", "completion", "system", "tools"),
    "preference": ("prompt", "chosen", "rejected", "system", "tools"),
    "kto": ("prompt", "completion", "label", "system", "tools"),
    "text": ("text",),
}
SHARED = ("system", "tools")
OPTIONAL = ("input", *SHARED)  # roles that no format needs
FORMATS = (
    ("detect it", "auto"),
    ("Alpaca", "alpaca"),
    ("ShareGPT", "sharegpt"),
    ("messages", "messages"),
    ("prompt, reply", "prompt_completion"),
    ("preference", "preference"),
    ("KTO", "kto"),
    ("plain text", "text"),
)
TRAIN_ON = (
    ("all replies", "replies"),
    ("the last reply", "last_reply"),
    ("the completion", "completions"),
    ("every token", "all"),
)
FAULTY = (("list and leave out", "refuse"), ("drop", "drop"))
TOO_LONG = (
    ("list and leave out", "refuse"),
    ("drop", "drop"),
    ("cut at a message", "cut"),
    ("split into several", "split"),
)
DUPLICATES = (("keep", "keep"), ("drop", "drop"))
SAME_ROLE = (("keep apart", "keep"), ("join into one", "join"))
FIRST_REPLY = (("list and leave out", "refuse"), ("skip that reply", "skip"))
OWN = "the model's own"
CUSTOM = "a template of yours"
# A line of the recipe → the text of the button that writes it.
REPAIRS = {
    ("faulty", "drop"): "Drop faulty rows",
    ("too_long", "drop"): "Drop long rows",
    ("too_long", "cut"): "Cut long rows",
    ("too_long", "split"): "Split long rows",
    ("duplicates", "drop"): "Drop duplicates",
    ("same_role", "join"): "Join turns",
    ("first_reply", "skip"): "Skip first replies",
    ("roles", "guess"): "Name the role",
}
DATA = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
KAGGLE = Path("/kaggle/input")


def templates() -> list[str]:
    """Names of nbkit's templates, by its files."""
    folder = files("nbkit").joinpath("data", "templates")
    return sorted(entry.name.removesuffix(".jinja") for entry in folder.iterdir() if entry.name.endswith(".jinja"))


def nearby(most: int = 40) -> list[str]:
    """Sources that are offered: the samples, files of data in the current folder, and Kaggle's inputs."""
    here = [path.name for path in sorted(Path.cwd().iterdir()) if path.suffix.lower() in DATA and path.is_file()]
    kaggle = [str(path) for path in sorted(KAGGLE.iterdir())] if KAGGLE.is_dir() else []
    return [name for name in (SAMPLE, f"{SAMPLE}/held_out", *here, *kaggle) if _fields.sendable(name)][:most]


def source() -> Field:
    box = _fields.labelled(
        widgets.Combobox(value=SAMPLE, placeholder=HINT, options=nearby(), continuous_update=False), "Source", wide=True
    )

    def write(new: Any) -> None:
        if not isinstance(new, str):
            raise ConfigError(f"Source takes text, not {_fields.short(new)}; rows in memory go to session.use_data.")
        _fields.keep("Source", box, new)

    return Field("Source", box, (box,), lambda: box.value.strip(), write)


class Columns:
    """One box for each role that a column may have; those of one format are shown."""

    def __init__(self) -> None:
        names = list(dict.fromkeys(role for roles in ROLES.values() for role in roles))
        names.sort(key=lambda role: role in SHARED)  # of many formats, and seldom used: last
        self.boxes = {
            role: _fields.labelled(
                widgets.Combobox(continuous_update=False, placeholder="none" if role in OPTIONAL else ""), f"Column of {role}"
            )
            for role in names
        }
        row = widgets.HBox(list(self.boxes.values()))
        row.add_class("nbk-row")
        self.field = Field("Columns", row, tuple(self.boxes.values()), self._read, self._write)

    def show(self, form: str) -> None:
        for role, box in self.boxes.items():
            box.layout.display = "" if role in ROLES.get(form, ()) else "none"
        self.field.widget.layout.display = "" if form in ROLES else "none"

    def offer(self, names: list[str]) -> None:
        """Columns to choose from."""
        names = [name for name in names if _fields.sendable(name)]
        for role, box in self.boxes.items():
            box.options = names
            box.placeholder = "none" if role in OPTIONAL or not names else plain(", ".join(names), 30)

    def _read(self) -> dict[str, str]:
        return {role: box.value.strip() for role, box in self.boxes.items() if box.value.strip()}

    def _write(self, new: Any) -> None:
        unknown = [role for role in new if role not in self.boxes]
        if unknown:
            raise ConfigError(f"{_fields.short(unknown[0])} is no role of a column; use {', '.join(self.boxes)}.")
        for role, box in self.boxes.items():
            _fields.keep(f"Column of {role}", box, new.get(role, ""))


def template() -> Field:
    """The tokenizer's own, one of nbkit's, or one that code has given."""
    names = templates()
    options = [(OWN, ""), *((name, name) for name in names)]  # a Dropdown shows nothing for None
    box = _fields.labelled(widgets.Dropdown(options=options, value=""), "Chat template")

    def write(new: Any) -> None:
        if new is not None and (not isinstance(new, str) or not new):
            raise ConfigError(f"Chat template takes a name or Jinja text, not {_fields.short(new)}.")
        if new is not None and new not in names:
            if "{" not in new:
                raise ConfigError(f"There is no template {_fields.short(new)}; there are {', '.join(names)}, or give Jinja text.")
            box.options = [*options, (CUSTOM, new)]
        box.value = new or ""

    return Field("Chat template", box, (box,), lambda: box.value or None, write)


def roles() -> Field:
    """Further names of speakers: "npc=assistant, player=user"."""
    takes = "pairs such as npc=assistant, player=user"

    def parse(said: str) -> dict[str, str]:
        pairs = [part.partition("=") for part in said.split(",") if part.strip()]
        if not all(name.strip() and sign for name, sign, _ in pairs):
            raise ValueError(said)
        found = {name.strip(): role.strip() for name, _, role in pairs}
        DataRecipe(roles=found)  # knows which roles there are
        return found

    field = _fields.optional("Further names of roles", parse, takes, "npc=assistant, …")

    def write(new: Any) -> None:
        if not isinstance(new, Mapping):
            raise ConfigError(f"Further names of roles takes {takes}, not {_fields.short(new)}.")
        field.write(", ".join(f"{name}={role}" for name, role in new.items()) or None)

    return Field(field.label, field.widget, field.watched, lambda: field.read() or {}, write)


def share(said: str) -> str | int | float:
    """A number of rows, a share below 1, or else the name of a source."""
    kinds: tuple[Callable[[str], Any], ...] = (int, float)
    for kind in kinds:
        try:
            return kind(said)
        except ValueError:
            continue
    return said
