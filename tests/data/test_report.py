"""`prepare` from end to end: exact accounting of every row, whatever the rows are, and what the user reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbkit.config import IGNORE_INDEX, DataRecipe
from nbkit.data.findings import REASONS, rows_text
from nbkit.data.pipeline import prepare
from nbkit.data.report import DataReport
from nbkit.errors import DataError
from tests.data.chats import tokenizer

TOKENIZER = tokenizer("chatml")
GOOD = {"instruction": "Add.", "input": "1+1", "output": "2"}


def report(rows: Any, max_seq_length: int = 512, held_out: Any = None, seed: int = 3407, **recipe: Any) -> DataReport:
    return prepare(rows, TOKENIZER, DataRecipe(**recipe), max_seq_length=max_seq_length, held_out=held_out, seed=seed)


def rows(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(count)]


def check(found: DataReport, rows_in: int) -> None:
    """What holds of every report."""
    assert found.rows_in == rows_in == found.used + found.dropped + found.refused
    assert len(found.examples) == len(found.row_numbers) and found.used == len(set(found.row_numbers.tolist()))
    assert found.lengths.tolist() == [len(example["input_ids"]) for example in found.examples]
    assert found.trained_counts.sum() == found.trained_tokens
    labels = [label for example in found.examples for label in example["labels"]]
    assert found.total_tokens == len(labels)
    assert found.trained_tokens == sum(label != IGNORE_INDEX for label in labels) > 0
    for example in found.examples:
        pairs = list(zip(example["labels"], example["input_ids"], strict=True))
        assert all(label in (token, IGNORE_INDEX) for label, token in pairs)
        assert any(label != IGNORE_INDEX for label, _ in pairs)
    left_out = {f.row: f.outcome for f in found.findings if f.part == "train" and f.outcome != "used"}
    assert sorted([*found.row_numbers, *left_out]) == sorted({*found.row_numbers, *left_out})
    assert sum(outcome == "refused" for outcome in left_out.values()) == found.refused
    assert sum(outcome == "dropped" for outcome in left_out.values()) == found.dropped
    assert all(f.kind in REASONS and f.sentence and f"ow {f.row}: " in str(f) for f in found.findings)


def test_the_sentence() -> None:
    many = rows(160)
    many[6]["output"] = ""
    many[30]["output"] = "  "
    found = report(many)
    check(found, 160)
    share = 100 * found.trained_tokens / found.total_tokens
    tokens = f"{found.trained_tokens:,} of {found.total_tokens:,} tokens ({share:.1f} %)"
    first, second, third = str(found).splitlines()
    assert repr(found) == str(found)
    assert first == f"160 rows in: 158 used, 2 refused (rows 7, 31: the reply is empty); trains on {tokens}"
    assert second.startswith("the list of rows is read as alpaca, because there are columns 'instruction', 'output'")
    assert third == "offered: Leave out rows 7, 31 as not to be trained on (faulty='drop')."
    assert str(found.findings[0]) == "Row 7: the reply is empty (output) (refused)."


def test_rows_that_are_too_long_are_refused_or_dropped_and_never_cut() -> None:
    many = rows(5)
    many[3]["output"] = "long " * 200
    found = report(many, max_seq_length=100)
    check(found, 5)
    assert (found.used, found.dropped, found.refused) == (4, 0, 1)
    (finding,) = found.findings
    assert re.search(r"the row has [\d,]+ tokens, max_seq_length is 100; raise max_seq_length", finding.sentence)
    assert f"row 4: longer than max_seq_length 100; the longest has {found.longest:,} tokens" in str(found)
    found = report(rows(2), max_seq_length=100, held_out=many[2:])
    *_, told, offered = str(found).splitlines()
    assert told == "held-out row 2: longer than max_seq_length 100 (refused)"
    assert "Split held-out row 2 into conversations that fit (too_long='split')." in offered
    found = report(many, max_seq_length=100, too_long="drop")
    check(found, 5)
    assert (found.used, found.dropped, found.refused) == (4, 1, 0)
    exact = report(rows(1)).longest
    assert report(rows(1), max_seq_length=exact).used == 1
    with pytest.raises(DataError, match=f"The one row .* has {exact} tokens, max_seq_length is {exact - 1}"):
        report(rows(1), max_seq_length=exact - 1)


def test_faulty_rows_are_dropped_where_the_recipe_says_so() -> None:
    many = rows(5)
    many[1]["output"] = ""
    many[3]["output"] = "long " * 200
    found = report(many, max_seq_length=100, faulty="drop")
    check(found, 5)
    assert (found.used, found.dropped, found.refused) == (3, 1, 1)
    assert [repair.setting for repair in found.repairs] == [("too_long", "cut"), ("too_long", "split"), ("too_long", "drop")]
    found = report(many, max_seq_length=100, faulty="drop", too_long="drop")
    check(found, 5)
    assert (found.dropped, found.refused, found.repairs) == (2, 0, [])


def test_rows_that_are_the_same_are_told_and_dropped_where_the_recipe_says_so() -> None:
    many = rows(6)
    many[3], many[5] = dict(many[1]), dict(many[1])
    found = report(many)
    check(found, 6)
    assert found.duplicates == [4, 6] and found.used == 6
    assert [str(f) for f in found.findings] == ["Row 4: the row equals row 2 (used).", "Row 6: the row equals row 2 (used)."]
    (repair,) = found.repairs
    assert repair.sentence == "Leave out rows 4, 6 as equal to an earlier row (duplicates='drop')." and repair.rows == (4, 6)
    mended = prepare(many, TOKENIZER, repair.recipe, max_seq_length=512)
    check(mended, 6)
    assert (mended.used, mended.dropped, mended.repairs) == (4, 2, [])
    assert mended.row_numbers.tolist() == [1, 2, 3, 5] and mended.duplicates == [4, 6]
    assert mended.preview(3).raw == many[4]
    apart = report(many, duplicates="drop", held_out=2)
    check(apart, 4)
    assert not [f for f in apart.findings if f.kind == "overlap"]


def test_rows_are_the_same_by_their_tokens_and_not_by_a_digest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbkit.data import collect

    class One:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def update(self, _: bytes) -> None: ...
        def digest(self) -> bytes:
            return bytes(8)

    monkeypatch.setattr(collect.hashlib, "blake2b", One)
    found = report(rows(6), duplicates="drop", held_out=rows(8)[6:])
    check(found, 6)
    assert found.findings == () and found.used == 6
    found = report([*rows(1), *rows(1)], duplicates="drop")
    assert found.duplicates == [2] and found.used == 1


def test_every_repair_that_is_offered_can_be_carried_out() -> None:
    def turns(*roles: str) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": f"{role} {n} {'wind ' * 9}"} for n, role in enumerate(roles)]}

    many = [
        turns("user", "assistant"),
        turns("user", "assistant"),
        turns("assistant", "user", "assistant"),
        turns("user", "user", "assistant"),
        turns(*["user", "assistant"] * 9),
        {"messages": None},
        {"messages": [{"role": "narrator", "content": "x"}]},
    ]
    done, recipe = set(), DataRecipe()
    found = report(many, max_seq_length=120)
    while found.repairs:
        check(found, len(many))
        repair = found.repairs[0]
        assert (
            repair.setting not in done and repair.rows and repair.sentence.endswith(f"({'='.join(map(_shown, repair.setting))}).")
        )
        done.add(repair.setting)
        recipe = repair.recipe
        found = prepare(many, TOKENIZER, recipe, max_seq_length=120)
    assert {name for name, _ in done} == {"too_long", "duplicates", "first_reply", "same_role", "faulty"}
    check(found, len(many))
    assert found.refused == 0 and (recipe.too_long, recipe.faulty) == ("cut", "drop")


def _shown(part: str) -> str:
    return part if "_" in part or part in ("faulty", "duplicates") else repr(part)


def test_nothing_to_train_on_is_refused_with_the_first_reason() -> None:
    with pytest.raises(DataError) as caught:
        report([{"instruction": "a", "output": None}, {"instruction": "a", "output": ""}, 3])
    message = str(caught.value)
    assert message.startswith("None of the 3 rows of the list of rows can be trained on")
    assert (
        "Row 1: the reply is null (output) (and 2 more: the reply is null; the reply is empty; the row is not an object"
        in message
    )


def test_a_reply_without_tokens_trains_nothing() -> None:
    from tokenizers import normalizers

    silent = tokenizer("chatml")
    silent.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    silent.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    with pytest.raises(DataError, match="no token of the reply, so nothing would be trained"):
        prepare([{"instruction": "a", "output": "~~"}], silent, DataRecipe(), max_seq_length=64)


def test_held_out_by_number_share_and_source() -> None:
    for held_out, count in ((5, 5), (0.25, 5), (0.01, 1)):
        found = report(rows(20), held_out=held_out)
        check(found, 20 - count)
        assert len(found.held_out_examples) == len(found.held_out_rows) == count
        assert f"{count} rows are held out" in str(found)
        kept = {tuple(e["input_ids"]) for e in found.examples}
        assert kept.isdisjoint(tuple(e["input_ids"]) for e in found.held_out_examples)
        assert all(row[-1]["role"] == "assistant" and row[-2]["role"] == "user" for row in found.held_out_rows)
    same, other = report(rows(20), held_out=5), report(rows(20), held_out=5, seed=1)
    assert same.fingerprint == report(rows(20), held_out=5).fingerprint != other.fingerprint
    found = report(rows(4), held_out=[{"instruction": "q", "output": "a"}, {"instruction": "q", "output": None}], system="S")
    check(found, 4)
    assert found.held_out_rows == [
        [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    ]
    assert "held-out row 2: the reply is null (refused)" in str(found)


def test_bad_rows_are_not_held_out() -> None:
    many = rows(10)
    for i in (0, 4, 9):
        many[i]["output"] = ""
    found = report(many, held_out=3)
    check(found, 7)
    assert (found.used, found.refused, len(found.held_out_rows)) == (4, 3, 3)


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (20, "takes 20 of the 20 good rows .* leaves none"),
        (0.99, "leaves none"),
        (True, "held_out is True"),
        (0, "held_out is 0"),
        (-3, "held_out is -3"),
        (1.5, "held_out is 1.5"),
        (float("nan"), "held_out is nan"),
        ([], "no rows"),
        ([{"instruction": "a", "output": ""}], "The one row"),
        ("nowhere.jsonl", "no file nowhere.jsonl"),
    ],
)
def test_held_out_that_cannot_be(held_out: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        report(rows(20), held_out=held_out)


def test_rows_in_both_sets_are_said() -> None:
    found = report(rows(10), held_out=[*rows(3)[1:2], {"instruction": "x", "output": "y"}])
    assert [(f.row, f.kind, f.sentence, f.part) for f in found.findings] == [
        (1, "overlap", "the row equals training row 2", "held_out")
    ]
    assert "held-out row 1: the row is among the training rows too" in str(found)
    check(found, 10)


def test_the_fingerprint_hangs_on_every_id_label_and_edge() -> None:
    from nbkit.data.store import fingerprint

    base = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    seen = {
        fingerprint(base, []),
        fingerprint([], base),
        fingerprint(base[:1], base[1:]),
        fingerprint(base[::-1], []),
        fingerprint([{**base[0], "labels": [-100, -100, 3]}, base[1]], []),
        fingerprint([{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3, 4], "labels": [3, 4]}], []),
        fingerprint([], []),
    }
    assert len(seen) == 7
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in seen)


def test_a_preview_shows_the_raw_row_and_what_is_trained() -> None:
    many = [{"instruction": "bad", "output": None}, GOOD]
    raw, pieces = report(many).preview(0)
    assert raw is GOOD
    assert [piece for piece, mine in pieces if mine] == ["2<|im_end|>"]
    assert "".join(piece for piece, _ in pieces).count("Add.\n\n1+1") == 1
    with pytest.raises(DataError, match="no example 1; there are 1"):
        report(many).preview(1)


def test_html_in_any_cell_column_or_name_is_shown_as_text(tmp_path: Path) -> None:
    nasty = "<img src=x onerror=alert(1)>"
    bad = [{"messages": [{"role": nasty, "content": nasty}]}, {"messages": nasty}, {nasty: nasty}]
    good = {"messages": [{"role": "user", "content": nasty}, {"role": "assistant", "content": f"</div>{nasty}"}], nasty: nasty}
    path = tmp_path / f"{nasty}.jsonl".replace("/", "")
    path.write_text("\n".join(map(json.dumps, [*bad, good])), encoding="utf-8")
    found = report(str(path))
    check(found, 4)
    shown = found._repr_html_()
    assert nasty not in shown
    assert "&lt;img" in shown
    assert re.sub(r"</?(div|b|ul|li)( class=\"[a-z-]+\")?>", "", shown).count("<") == 0


def test_a_file_gives_what_its_rows_give(tmp_path: Path) -> None:
    many = [GOOD, *rows(3)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, many)), encoding="utf-8")
    assert report(path).fingerprint == report(many).fingerprint
    text = "instruction,output\n" + "".join(f"{r['instruction']},{r['output']}\n" for r in rows(3))
    table = tmp_path / "a.csv"
    table.write_text(text, encoding="utf-8")
    assert report(table).fingerprint == report(rows(3)).fingerprint


def test_rows_kept_as_a_file_give_the_same_report(tmp_path: Path) -> None:
    from datetime import date

    from nbkit.workspace import keep_rows

    many = [GOOD, None, 3, {**GOOD, "output": date.today()}, {**GOOD, "output": "half \ud800"}, {1: 2, (1, 2): 3}, float("nan")]
    first, again = report(many), report(keep_rows(many, tmp_path))
    assert again.fingerprint == first.fingerprint
    assert [(f.row, f.kind) for f in again.findings] == [(f.row, f.kind) for f in first.findings]
    check(again, len(many))


def test_tables_and_splits_kept_as_a_file_give_the_same_report(tmp_path: Path) -> None:
    import datasets
    import pandas

    from nbkit.workspace import keep_rows

    frame = pandas.DataFrame([{**row, "number": n, "share": n / 2} for n, row in enumerate(rows(4))])
    frame.loc[1, "output"] = None
    table = datasets.Dataset.from_list(rows(5))
    for source, count in ((frame, 4), (table, 5), (datasets.DatasetDict(train=table), 5)):
        first, again = report(source), report(keep_rows(source, tmp_path))
        assert again.fingerprint == first.fingerprint
        assert [(f.row, f.kind) for f in again.findings] == [(f.row, f.kind) for f in first.findings]
        check(again, count)


def test_row_numbers_in_words() -> None:
    assert rows_text([7]) == "row 7"
    assert rows_text([7, 31]) == "rows 7, 31"
    assert rows_text(range(1, 2001)) == "rows 1, 2, 3, 4, 5, 6, 7, 8 and 1,992 more"


# -- malformed rows --------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=12)
odd_texts = st.sampled_from(
    ["", " ", "ok", "\ud800", "\x00", "<|im_end|>", "</s>", "\u202e", "{", "[]", '[{"from"', "\ufeff", "é" * 50]
)
junk = st.recursive(
    scalars | odd_texts,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner)
    ),
    max_leaves=6,
)
turns = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "gpt", "??", ""]) | junk,
        "content": odd_texts | junk,
    },
)
bad_rows = {
    "messages": st.fixed_dictionaries({}, optional={"messages": st.lists(turns | junk, max_size=4) | junk, "id": junk}) | junk,
    "alpaca": st.fixed_dictionaries(
        {}, optional={"instruction": odd_texts | junk, "input": odd_texts | junk, "output": odd_texts | junk}
    )
    | junk,
}
good_rows = {
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "alpaca": GOOD,
}


@pytest.mark.parametrize("form", bad_rows)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_malformed_rows_are_accounted_for_beside_good_ones(form: str, data: st.DataObject) -> None:
    many = data.draw(st.lists(bad_rows[form], max_size=6))
    places = data.draw(st.sets(st.integers(0, len(many)), max_size=2))
    for place in sorted(places, reverse=True):
        many.insert(place, good_rows[form])
    told = data.draw(st.sampled_from(["auto", form]))
    try:
        found = report(many, max_seq_length=data.draw(st.sampled_from([48, 512])), format=told)
    except DataError as error:
        # Found by itself, the format is that of most rows, which may be the bad ones.
        assert not places or (told == "auto" and 2 * len(places) <= len(many)), f"good rows were not used: {error}"
        assert "\n" not in str(error).replace("\\n", "")
        return
    check(found, len(many))
    if found.recipe.format != form:
        return  # most rows look like another format
    good = [number for number, row in enumerate(many, 1) if row is good_rows[form]]
    assert set(good) <= set(found.row_numbers)
    assert str(found) and found._repr_html_()
    for index in range(found.used):
        assert any(mine for _, mine in found.preview(index).pieces)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=0, max_size=3)), min_size=1, max_size=8),
    suffix=st.sampled_from([".jsonl", ".json", ".csv"]),
)
def test_damaged_files_never_end_in_a_traceback(tmp_path: Path, damage: list[tuple[int, bytes]], suffix: str) -> None:
    many = [GOOD, *({**row, "input": ""} for row in rows(4))]
    if suffix == ".csv":
        text = "instruction,input,output\n" + "".join(f'"{r["instruction"]}","{r["input"]}","{r["output"]}"\n' for r in many)
    else:
        text = json.dumps(many) if suffix == ".json" else "\n".join(map(json.dumps, many))
    content = bytearray(text.encode("utf-8"))
    for at, put in damage:
        at %= len(content) + 1
        content[at : at + len(put)] = put
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(bytes(content))
    try:
        found = report(path)
    except DataError as error:
        assert len(str(error)) > 20
        return
    check(found, found.rows_in)
    if suffix == ".jsonl":
        assert found.rows_in == sum(bool(line.strip()) for line in bytes(content).removeprefix(b"\xef\xbb\xbf").split(b"\n"))
