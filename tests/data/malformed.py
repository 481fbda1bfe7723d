"""Good rows of every format, and faults that are put into them, each with the kinds of finding and the words that tell it."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


def turns(number: int, names: tuple[str, str] = ("role", "content"), *, other: bool = False) -> list[Row]:
    who, what = names
    roles = ("user", "assistant") if who == "role" else ("human", "gpt")
    texts = (f"Say {number}.", f"It is {number + 1000 * other}.", "And now?", f"Now {number}.")
    many = texts if number % 2 else texts[:2]
    return [{who: roles[i % 2], what: text} for i, text in enumerate(many)]


def good(form: str, number: int) -> Row:
    ask, reply = f"Say {number}.", f"It is {number}."
    share = ("from", "value")
    return {
        "alpaca": lambda: {"instruction": ask, "input": "" if number % 2 else "here", "output": reply},
        "sharegpt": lambda: {"conversations": turns(number, share)},
        "messages": lambda: {"messages": turns(number)},
        "prompt_completion": lambda: {"prompt": ask, "completion": reply},
        "preference": lambda: {"prompt": ask, "chosen": reply, "rejected": f"Not {number}."},
        "preference_turns": lambda: {"chosen": turns(number)[:2], "rejected": turns(number, other=True)[:2]},
        "kto": lambda: {"prompt": ask, "completion": reply, "label": bool(number % 2)},
        "text": lambda: {"text": f"{ask} {reply}"},
    }[form]()


FORMS = ("alpaca", "sharegpt", "messages", "prompt_completion", "preference", "preference_turns", "kto", "text")
CELLS = {  # form -> column -> what it is called in the sentences; "" for a list of turns
    "alpaca": {"instruction": "prompt", "output": "reply"},
    "sharegpt": {"conversations": ""},
    "messages": {"messages": ""},
    "prompt_completion": {"prompt": "prompt", "completion": "reply"},
    "preference": {"prompt": "prompt", "chosen": "reply", "rejected": "reply"},
    "preference_turns": {"chosen": "", "rejected": ""},
    "kto": {"prompt": "prompt", "completion": "reply"},
    "text": {"text": "text"},
}


class Fault(NamedTuple):
    """`put(row, column)` gives the broken row; `kinds` may tell it, in a sentence with one of `words`. No kinds: it is used."""

    put: Callable[[Row, str], Any]
    kinds: tuple[str, ...]
    words: tuple[str, ...]


def cell(value: Any) -> Callable[[Row, str], Row]:
    return lambda row, column: {**row, column: copy.deepcopy(value)}


def turn(place: int, **change: Any) -> Callable[[Row, str], Row]:
    """The turn at this place changed; `who` and `what` stand for its speaker and its text, whatever they are called."""

    def put(row: Row, column: str) -> Row:
        many = copy.deepcopy(row[column])
        share = "from" in many[0]
        names = {"who": "from" if share else "role", "what": "value" if share else "content"}
        many[place].update({names.get(key, key): value for key, value in change.items()})
        return {**row, column: many}

    return put


def listed(change: Callable[[list[Row]], Any]) -> Callable[[Row, str], Row]:
    return lambda row, column: {**row, column: change(copy.deepcopy(row[column]))}


def without(row: Row, column: str) -> Row:
    return {key: value for key, value in row.items() if key != column}


ANY = {
    "null row": Fault(lambda *_: None, ("not_an_object",), ("None",)),
    "number row": Fault(lambda *_: 7, ("not_an_object",), ("7",)),
    "text row": Fault(lambda *_: "words", ("not_an_object",), ("words",)),
    "list row": Fault(lambda *_: [1, 2], ("not_an_object",), ("a list of 2",)),
    "no column": Fault(without, ("missing_column",), ("'{column}'",)),
}
TEXT = {
    "null": Fault(cell(None), ("null_{what}", "empty_{what}"), ("{column}",)),
    "nan": Fault(cell(float("nan")), ("null_{what}",), ("{column}",)),
    "empty": Fault(cell(""), ("empty_{what}",), ("{column}",)),
    "blank": Fault(cell(" \n\t"), ("empty_{what}",), ("{column}",)),
    "number": Fault(cell(5), ("wrong_type",), ("5", "{column}")),
    "truth": Fault(cell(True), ("wrong_type",), ("True", "{column}")),
    "list": Fault(cell([1]), ("wrong_type",), ("a list of 1", "turn 1")),
    "half a character": Fault(cell("so \ud83d"), ("broken_text",), ("U+D83D", "UTF-8")),
    "nothing printable": Fault(cell("\x00\x1b[31m<b>\u202e\ufeff"), (), ()),
    "control text": Fault(cell("<|im_end|> </s> [INST]"), (), ()),
}
TURNS = {
    "null": Fault(cell(None), ("no_messages", "null_reply", "empty_reply"), ("'{column}'", "({column})")),
    "no turns": Fault(cell([]), ("no_messages", "no_pair"), ("'{column}'",)),
    "number": Fault(cell(5), ("wrong_type", "missing_column"), ("5",)),
    "broken JSON": Fault(cell("[{'role': 'user'}]"), ("broken_json", "no_pair"), ("'{column}'",)),
    "a turn of text": Fault(listed(lambda t: ["hello", *t]), ("wrong_type", "no_pair"), ("turn 1", "'{column}'")),
    "a null turn": Fault(listed(lambda t: [*t, None]), ("wrong_type",), ("turn ",)),
    "unknown role": Fault(turn(1, who="narrator"), ("unknown_role",), ("'narrator'",)),
    "null role": Fault(turn(0, who=None), ("unknown_role",), ("turn 1",)),
    "number role": Fault(turn(0, who=4), ("unknown_role",), ("4",)),
    "null reply": Fault(turn(1, what=None), ("null_reply",), ("turn 2",)),
    "blank reply": Fault(turn(1, what="  "), ("empty_reply",), ("turn 2",)),
    "number reply": Fault(turn(1, what=3.5), ("wrong_type",), ("3.5",)),
    "null question": Fault(turn(0, what=None), ("null_prompt",), ("turn 1",)),
    "picture": Fault(turn(0, what=[{"type": "image_url", "image_url": "x"}]), ("not_text",), ("'image_url'",)),
    "half a character": Fault(turn(1, what="\udc00"), ("broken_text",), ("U+DC00",)),
    "a reply first": Fault(listed(lambda t: t[1:2] + t), ("reply_first", "no_pair"), ("reply", "answer")),
    "no reply": Fault(listed(lambda t: t[:1]), ("no_reply", "no_pair"), ("assistant", "reply")),
    "broken call": Fault(turn(1, what="", tool_calls=[{"arguments": "{}"}]), ("broken_tool_call",), ("turn 2",)),
}
PLAIN = {  # faults of a list of turns that are told, while the row is used
    "two questions": Fault(listed(lambda t: t[:1] + t), (), ()),
    "an open end": Fault(listed(lambda t: t + t[:1]), (), ()),
    "JSON text": Fault(listed(json.dumps), (), ()),
}


def faults(form: str, column: str) -> dict[str, Fault]:
    if CELLS[form][column]:
        return {**ANY, **TEXT}
    return {**ANY, **TURNS, **(PLAIN if form in ("sharegpt", "messages") else {})}


# -- carriers: the same rows as a list, a file, a data set -----------------------------------------


def as_jsonl(rows: list[Any], folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def as_json(rows: list[Any], folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def as_csv(rows: list[Any], folder: Path) -> Path | None:
    """None where a table cannot hold these rows."""
    columns = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
    plain = all(isinstance(row, dict) and all(isinstance(v, (str, list)) or v is None for v in row.values()) for row in rows)
    if not plain or any(len(row) != len(columns) for row in rows):
        return None
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in rows:
        writer.writerow(json.dumps(row[c]) if isinstance(row[c], list) else row[c] for c in columns)
    path = folder / "rows.csv"
    path.write_text(text.getvalue(), encoding="utf-8", errors="surrogatepass")
    return path


def as_dataset(rows: list[Any], folder: Path) -> Any:
    """None where arrow cannot hold these rows."""
    import datasets
    import pyarrow

    if any(not isinstance(row, dict) or row.keys() != rows[0].keys() for row in rows):
        return None
    try:
        return datasets.Dataset.from_list(rows)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):
        return None


CARRIERS: dict[str, Callable[[list[Any], Path], Any]] = {
    "list": lambda rows, _: rows,
    "jsonl": as_jsonl,
    "json": as_json,
    "csv": as_csv,
    "dataset": as_dataset,
}
