"""Malformed sets of every format and kind of source: exact accounting, the fault and the row named, good rows used."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbkit.config import DataRecipe
from nbkit.data.findings import REASONS, REPAIRS, Finding
from nbkit.data.pipeline import prepare
from nbkit.data.report import DataReport
from nbkit.errors import DataError
from tests.data.chats import tokenizer
from tests.data.malformed import CARRIERS, CELLS, FORMS, Fault, faults, good

TOKENIZER = tokenizer("chatml")
# In a column of text these are text; in an arrow table each column has one type, which the first rows may not tell.
OTHERWISE = {"csv": ("list", "number", "truth", "nan"), "dataset": ("number", "truth", "nan", "null role", "broken call")}
QUICK = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


def report(rows: Any, **recipe: Any) -> DataReport:
    return prepare(rows, TOKENIZER, DataRecipe(**recipe), max_seq_length=256)


def accounted(found: DataReport, count: int) -> dict[int, Finding]:
    """What holds of every report; the finding of each row that is left out."""
    assert found.rows_in == count == found.used + found.dropped + found.refused
    left_out = [f for f in found.findings if f.outcome != "used"]
    assert len({f.row for f in left_out}) == len(left_out) == found.dropped + found.refused
    assert sorted([*{int(n) for n in found.row_numbers}, *(f.row for f in left_out)]) == list(range(1, count + 1))
    for finding in found.findings:
        assert finding.kind in REASONS
        assert f"ow {finding.row}: " in str(finding) and finding.sentence in str(finding)
        assert "\n" not in finding.sentence and 10 < len(finding.sentence) < 400
    return {f.row: f for f in left_out}


def check_told(finding: Finding | None, fault: Fault, column: str, what: str) -> None:
    """The finding is of the fault's own kind, names it, and offers a repair."""
    kinds = [kind.format(what=what) for kind in fault.kinds]
    if not kinds:
        assert finding is None, finding
        return
    assert finding is not None, kinds
    assert finding.kind in kinds, (finding, kinds)
    words = [word.format(column=column) for word in fault.words]
    assert any(word in finding.sentence for word in words), (finding.sentence, words)
    assert finding.repair == REPAIRS[finding.kind]


@pytest.mark.parametrize("carrier", CARRIERS)
@settings(max_examples=80, deadline=None, suppress_health_check=QUICK)
@given(data=st.data())
def test_known_faults_are_told_with_their_rows_and_the_others_are_used(tmp_path: Path, carrier: str, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(FORMS))
    rows: list[Any] = [good(form, number) for number in range(1, data.draw(st.integers(2, 5)) + 1)]
    bad: dict[int, tuple[Fault, str]] = {}
    for number in data.draw(st.sets(st.integers(1, len(rows)), max_size=len(rows) - 1)):
        column = data.draw(st.sampled_from(list(CELLS[form])))
        name, fault = data.draw(st.sampled_from(list(faults(form, column).items())))
        broken = fault.put(rows[number - 1], column)
        if CARRIERS[carrier]([broken], tmp_path) is None:
            continue  # a table cannot hold it
        if name in OTHERWISE.get(carrier, ()):
            continue
        rows[number - 1], bad[number] = broken, (fault, column)
    source = CARRIERS[carrier](rows, tmp_path)
    if source is None:
        return  # they cannot stand in one table together
    told = form.removesuffix("_turns") if data.draw(st.booleans()) else "auto"
    found = report(source, format=told)
    assert found.recipe.format == form.removesuffix("_turns")
    left_out = accounted(found, len(rows))
    for number in range(1, len(rows) + 1):
        if number in bad:
            fault, column = bad[number]
            check_told(left_out.get(number), fault, column, CELLS[form][column])
        else:
            assert number in found.row_numbers
    assert str(found) and "<script" not in found._repr_html_()


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
odd = st.sampled_from(["", " ", "ok", "\ud800", "\x00", "<|im_end|>", "\u202e", "[]", "[{", '[{"role": "user"}]', "{}"])
junk = st.recursive(
    scalars | odd,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls"]), inner)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=QUICK)
@given(data=st.data())
def test_any_values_at_all_beside_good_rows(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(FORMS))
    columns = [*good(form, 1), "system", "tools"]
    junk_rows = st.dictionaries(st.sampled_from(columns), junk | odd) | junk
    rows: list[Any] = data.draw(st.lists(junk_rows, max_size=4))
    places = data.draw(st.sets(st.integers(0, len(rows)), min_size=1, max_size=2))
    kept = []
    for place in sorted(places, reverse=True):
        kept.append(good(form, place + 1))
        rows.insert(place, kept[-1])
    repairs = {
        "same_role": data.draw(st.sampled_from(["keep", "join"])),
        "first_reply": data.draw(st.sampled_from(["refuse", "skip"])),
    }
    found = report(rows, format=form.removesuffix("_turns"), faulty=data.draw(st.sampled_from(["refuse", "drop"])), **repairs)
    accounted(found, len(rows))
    places_now = [number for number, row in enumerate(rows, 1) if any(row is one for one in kept)]
    assert set(places_now) <= {int(number) for number in found.row_numbers}


def file_of(kind: str, rows: list[Any]) -> bytes:
    lines = "\n".join(map(json.dumps, rows)).encode()
    if kind == ".jsonl.gz":
        return gzip.compress(lines, mtime=0)
    if kind == ".zip":
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(zipfile.ZipInfo("rows.jsonl"), lines)
        return packed.getvalue()
    if kind in (".parquet", ".arrow"):
        import pyarrow
        import pyarrow.parquet

        table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
        if kind == ".parquet":
            pyarrow.parquet.write_table(table, sink, row_group_size=4)
        else:
            with pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=4)
        return sink.getvalue()
    if kind == ".csv":
        body = "".join(f'"{row["instruction"]}","{row["output"]}"\n' for row in rows)
        return ("instruction,output\n" + body).encode()
    return json.dumps(rows).encode() if kind == ".json" else lines


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".jsonl.gz", ".zip", ".parquet", ".arrow"])
@settings(max_examples=25, deadline=None, suppress_health_check=QUICK)
@given(
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3)), max_size=5),
    cut=st.none() | st.integers(0, 10**6),
)
def test_damaged_files_end_in_rows_or_in_a_sentence(
    tmp_path: Path, kind: str, damage: list[tuple[int, bytes]], cut: int | None
) -> None:
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(12)]
    content = bytearray(file_of(kind, rows))
    for at, put in damage:
        at %= len(content) + 1
        content[at : at + len(put)] = put
    path = tmp_path / f"rows{kind}"
    path.write_bytes(bytes(content[: cut % len(content) if cut is not None else None]))
    try:
        found = report(path)
    except DataError as error:
        assert len(str(error)) > 20 and "\n" not in str(error)
        return
    numbers = {int(number) for number in found.row_numbers} | {f.row for f in found.findings if f.outcome != "used"}
    assert found.rows_in == found.used + found.refused + found.dropped == len(numbers)


def test_a_huge_cell_is_told_and_the_rest_is_used(tmp_path: Path) -> None:
    huge = {**good("alpaca", 2), "output": "word " * 200_000}  # that 10 MB are read is held by the tests of the files
    found = report(CARRIERS["jsonl"]([good("alpaca", 1), huge, good("alpaca", 3)], tmp_path))
    assert {row: finding.kind for row, finding in accounted(found, 3).items()} == {2: "too_long"}


def test_a_set_without_a_good_row_names_the_first_bad_one() -> None:
    for form in FORMS:
        for column in CELLS[form]:
            for name, fault in faults(form, column).items():
                if not fault.kinds:
                    continue
                broken = [fault.put(good(form, number), column) for number in (1, 2)]
                try:
                    report(broken, format=form.removesuffix("_turns"))
                except DataError as error:
                    said = str(error)
                else:
                    raise AssertionError(f"{form}, {column}, {name}: nothing was refused")
                words = [word.format(column=column) for word in fault.words]
                assert any(word in said for word in words) or "column" in said, (form, name, said)
                assert "ow 1: " in said or "no column" in said, (form, name, said)
