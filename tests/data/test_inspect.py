"""`nbkit.inspect`: the states of every token, counts that are right, and each fault seen where it is and nowhere else."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nbkit
from nbkit.config import IGNORE_INDEX, DataRecipe, TrainConfig
from nbkit.data import checks
from nbkit.data.collate import Collator, PackCollator
from nbkit.data.inspection import Inspection
from nbkit.data.inspection_html import visible
from nbkit.data.pipeline import prepare
from nbkit.data.tokens import MASKED, PADDING, TRAINED, Reader, lines
from nbkit.errors import ConfigError, DataError
from tests.tiny import tiny_tokenizer
from tests.widgets.hostile import CORPUS, inert

WORDS = ["the", "wind", "is", "west", "five", "it", "rains", "the", "cook", "cut", "his", "thumb", "write", "log", "line"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def rows_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)

    def said(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    return [{"instruction": f"{n} {said(draw.randint(1, 30))}", "output": said(draw.randint(1, 20))} for n in range(count)]


@pytest.fixture(scope="module")
def report(tokenizer: Any) -> Any:
    return prepare(rows_of(23), tokenizer, DataRecipe(), max_seq_length=256)


def examples_of(report: Any) -> list[dict[str, Any]]:
    return [dict(report.examples[n]) for n in range(len(report.examples))]


def kinds(found: Inspection) -> dict[str, tuple[int, ...]]:
    return {problem.kind: problem.rows for problem in found.problems}


# -- the batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [TrainConfig(batch_size=3), TrainConfig(packing=True, batch_size=1)], ids=["padded", "packed"])
def test_every_token_of_every_batch_is_what_training_gets(report: Any, tokenizer: Any, train: TrainConfig) -> None:
    """Each example is met once an epoch, its ids, labels and states unchanged; all else is padding without a label."""
    found = nbkit.inspect(report, train=train)
    met: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for batch in range(found.batches):
        for line in found.show(batch=batch).batch:
            starts = [token.position for token in line.tokens if token.edge or token.position == 0]
            ends = [*starts[1:], len(line.tokens)]
            assert len(starts) == line.documents == len(line.rows)
            for start, end in zip(starts, ends, strict=True):
                real = [token for token in line.tokens[start:end] if token.state != PADDING]
                met.append((tuple(token.id for token in real), tuple(token.label for token in real)))
                assert [token.place for token in line.tokens[start:end]] == list(range(end - start))
            for token in line.tokens:
                assert token.state == (PADDING if not token.real else TRAINED if token.label != IGNORE_INDEX else MASKED)
                assert token.label in (token.id, IGNORE_INDEX)
                assert token.control == (token.id in (0, 1, 2))
    assert sorted(met) == sorted((tuple(e["input_ids"]), tuple(e["labels"])) for e in examples_of(report))
    assert not found.problems


def test_the_order_is_that_of_the_trainer(report: Any) -> None:
    one, same, other = (nbkit.inspect(report, train=TrainConfig(seed=seed)) for seed in (1, 1, 2))
    rows = [[line.rows for line in found.show(batch=n).batch] for found in (one, same, other) for n in range(one.batches)]
    third = len(rows) // 3
    assert rows[:third] == rows[third : 2 * third] != rows[2 * third :]
    assert sorted(row for batch in rows[:third] for line in batch for row in line) == list(range(1, 24))


def test_a_row_is_found_by_its_number(tokenizer: Any) -> None:
    rows: list[Any] = rows_of(9)
    rows[4] = {"instruction": "Hello", "output": None}
    report = prepare(rows, tokenizer, DataRecipe(), max_seq_length=256)
    for row in (1, 4, 6, 9):
        for train in (TrainConfig(), TrainConfig(packing=True)):
            assert any(row in line.rows for line in nbkit.inspect(report, row=row, train=train).batch)
    with pytest.raises(DataError, match="Row 5 is not among .* null"):
        nbkit.inspect(report, row=5)
    with pytest.raises(DataError, match="Row 10 is not among"):
        nbkit.inspect(report, row=10)
    for batch in (-1, 4, 10**9):
        with pytest.raises(DataError, match=f"There is no batch {batch}"):
            nbkit.inspect(report, batch=batch)


def test_texts_of_tokens_make_the_text(report: Any, tokenizer: Any) -> None:
    for line in nbkit.inspect(report).batch:
        real = [token for token in line.tokens if token.real]
        assert "".join(token.text for token in real) == tokenizer.decode([token.id for token in real])


@pytest.mark.parametrize("said", ["naïve – 日本語 🙂", "שלום", "a\u202eb\x1b[31m", "\n\t x  ", "e\u0301" * 3])
def test_characters_of_several_tokens_stand_once(tokenizer: Any, said: str) -> None:
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    pieces = Reader(tokenizer).texts(ids)
    assert "".join(text for text, _ in pieces) == said
    assert all(bool(text) != bool(note) for text, note in pieces)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_back_from_its_tokens(tokenizer: Any, said: str) -> None:
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    assert Reader(tokenizer).text(ids) == said
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]", visible(said))


def test_sentencepiece_spaces_and_bytes_are_read() -> None:
    pieces = ["<s>", "\u2581the", "\u2581", "<0xE2>", "<0x86>", "<0x92>", "<0xFF>", "x"]
    fake = SimpleNamespace(
        all_special_ids=[0],
        added_tokens_decoder={},
        convert_ids_to_tokens=lambda index: pieces[index],
        decode=lambda ids, **_: pieces[ids[0]],
    )
    found = Reader(fake).texts(range(8))
    assert [text for text, _ in found] == ["<s>", " the", " ", "", "", "→", "\ufffd", "x"]
    assert [note for _, note in found[3:7]] == ["E2", "86", "", ""]
    assert Reader(fake).texts([-100])[0][0] == "<no token -100>"


def test_a_collated_batch_is_shown_as_it_is(report: Any, tokenizer: Any) -> None:
    examples = examples_of(report)[:3]
    padded = nbkit.inspect((Collator(2)(examples), tokenizer))
    assert [line.count(PADDING) for line in padded.batch] == [
        max(len(e["input_ids"]) for e in examples) - len(e["input_ids"]) for e in examples
    ]
    packed = lines(PackCollator(2, 512)(examples), Reader(tokenizer))[0]
    assert packed.documents == 3 and packed.count(PADDING) == 512 - sum(len(e["input_ids"]) for e in examples)
    without_bounds = {k: v for k, v in PackCollator(2, 512)(examples).items() if k in ("input_ids", "labels", "position_ids")}
    assert lines(without_bounds, Reader(tokenizer))[0] == packed


# -- counts ----------------------------------------------------------------------------------------


def test_counts_are_those_of_the_arrays(report: Any) -> None:
    found, examples = nbkit.inspect(report), examples_of(report)
    assert found.lengths.tolist() == [len(e["input_ids"]) for e in examples]
    assert found.trained.tolist() == [sum(label != IGNORE_INDEX for label in e["labels"]) for e in examples]
    assert found.trained_share == pytest.approx(report.trained_tokens / report.total_tokens)
    assert dict(found.facts())["Rows in"] == "23"


@pytest.mark.parametrize("lengths", [[1], [7] * 5, [1, 2, 3, 4000], list(range(1, 3000, 7)), [4096] * 3])
def test_histograms_hold_every_row_once(lengths: list[int]) -> None:
    from nbkit.data.histogram import BARS, lengths_of, shares_of

    array = np.asarray(lengths)
    bars = lengths_of(array, 4096)
    assert sum(bars.counts) == len(lengths) and len(bars.counts) <= BARS + 1
    for number, count in enumerate(bars.counts):
        assert count == sum(bars.edges[number] <= length < bars.edges[number + 1] for length in lengths)
        assert f"{count:,} row" in bars.name(number)
    shares = shares_of(array, array)
    assert sum(shares.counts) == len(lengths) and shares.counts[-1] == len(lengths)
    assert all(0 <= place <= 1 for place, _ in (*bars.ticks(), *shares.ticks()))


# -- problems --------------------------------------------------------------------------------------


def text_row(tokenizer: Any, *turns: tuple[str, str]) -> dict[str, list[int]]:
    """A row as ChatML would have it, its replies and their stop tokens trained."""
    ids: list[int] = []
    labels: list[int] = []
    for role, said in turns:
        head = [1, *tokenizer(f"{role}\n", add_special_tokens=False)["input_ids"]]
        body = [*tokenizer(said, add_special_tokens=False)["input_ids"], 2]
        ids += head + body
        labels += [IGNORE_INDEX] * len(head) + (body if role == "assistant" else [IGNORE_INDEX] * len(body))
    return {"input_ids": ids, "labels": labels}


def masked(row: dict[str, list[int]]) -> None:
    row["labels"] = [IGNORE_INDEX] * len(row["input_ids"])


def last_trained(row: dict[str, list[int]]) -> int:
    return max(place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX)


def only_the_first(row: dict[str, list[int]]) -> None:
    masked(row)
    row["labels"][0] = row["input_ids"][0]  # nothing stands before it that could predict it


def unstopped(row: dict[str, list[int]]) -> None:
    row["labels"][last_trained(row)] = IGNORE_INDEX


def unstopped_in_text(row: dict[str, list[int]]) -> None:
    del row["input_ids"][last_trained(row) :]
    del row["labels"][last_trained(row) :]


def double_bos(row: dict[str, list[int]]) -> None:
    row["input_ids"].insert(0, 1)
    row["labels"].insert(0, IGNORE_INDEX)


FAULTS: dict[str, list[Callable[[dict[str, list[int]]], None]]] = {
    "masked_row": [masked, only_the_first],
    "no_stop": [unstopped, unstopped_in_text],
    "double_bos": [double_bos],
}


@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind, seeds in FAULTS.items() for seed in seeds])
def test_a_seeded_fault_is_told_with_its_rows_and_nothing_else(report: Any, tokenizer: Any, kind: str, seed: Any) -> None:
    for chosen in ([0], [22], [3, 4, 17]):
        examples = examples_of(report)
        for place in chosen:
            seed(examples[place])
        found = nbkit.inspect((examples, tokenizer))
        assert kinds(found) == {kind: tuple(place + 1 for place in chosen)}
        (problem,) = found.problems
        assert str(problem).startswith("Row") and not problem.stops and str(chosen[0] + 1) in str(problem)


def test_a_clean_set_has_no_problem(tokenizer: Any) -> None:
    for seed in range(5):
        report = prepare(rows_of(40, seed), tokenizer, DataRecipe(), max_seq_length=256)
        for train in (TrainConfig(), TrainConfig(packing=True)):
            assert not nbkit.inspect(report, train=train).problems
    assert not nbkit.inspect(prepare("sample:ships-log", tokenizer, DataRecipe(), max_seq_length=512)).problems


def test_a_set_without_a_trained_token_stops_the_start(report: Any, tokenizer: Any) -> None:
    examples = examples_of(report)
    for example in examples:
        masked(example)
    found = nbkit.inspect((examples, tokenizer))
    (problem,) = found.problems
    assert problem.kind == "nothing_trained" and problem.stops and not problem.rows
    assert "Stops the start" in inert(found._repr_html_()).text and "✖ No token of any row is trained" in str(found)


def test_duplicates_name_the_later_rows(report: Any, tokenizer: Any) -> None:
    examples = examples_of(report)
    examples[5], examples[9] = dict(examples[2]), dict(examples[2])
    found = nbkit.inspect((examples, tokenizer))
    assert kinds(found) == {"duplicate": (6, 10)} and found.problems[0].setting == ("duplicates", "drop")
    assert 'DataRecipe(duplicates="drop")' in str(found.problems[0])


def test_a_row_that_was_cut_off_is_told_from_one_that_only_lacks_its_stop(report: Any, tokenizer: Any) -> None:
    examples = examples_of(report)
    limit = min(len(example["input_ids"]) for example in examples) - 1
    for example in examples:
        example["input_ids"], example["labels"] = example["input_ids"][:limit], example["labels"][:limit]
    found = nbkit.inspect((examples, tokenizer), max_seq_length=limit)
    with_text = {n + 1 for n, example in enumerate(examples) if example["labels"][-1] not in (IGNORE_INDEX, 2)}
    assert with_text
    assert set(kinds(found).get("cut_off", ())) == with_text and "no_stop" not in kinds(found)
    again = nbkit.inspect((examples, tokenizer), max_seq_length=limit + 50)
    assert set(kinds(again).get("no_stop", ())) == with_text and "cut_off" not in kinds(again)


MIXED = {
    "reply_as_prompt": [("user", "hi"), ("assistant", "User: what is the wind?")],
    "marker_in_reply": [("user", "hi"), ("assistant", "West five.\nHuman: and the rain?\nAssistant: it rains")],
    "prompt_as_reply": [("user", "Assistant: I can help."), ("assistant", "thanks")],
}
PLAIN = [
    [("user", "hi"), ("assistant", "The user: a sailor. Ask a human about it.")],
    [("user", "what says the assistant?"), ("assistant", "assistants are many")],
    [
        ("system", "You are an AI."),
        ("user", "who are you"),
        ("assistant", "An AI, not a human."),
        ("user", "ok"),
        ("assistant", "yes"),
    ],
]


@pytest.mark.parametrize("kind", MIXED)
def test_roles_that_are_mixed_up_are_seen(tokenizer: Any, kind: str) -> None:
    rows = [text_row(tokenizer, *turns) for turns in PLAIN * 2]
    for n, row in enumerate(rows):  # so that no two are equal
        row["input_ids"].insert(2, 40 + n)
        row["labels"].insert(2, IGNORE_INDEX)
    assert not nbkit.inspect((rows, tokenizer)).problems
    found = kinds(nbkit.inspect(([*rows, text_row(tokenizer, *MIXED[kind])], tokenizer)))
    assert found == {kind: (7,)}


def test_what_the_template_itself_writes_is_no_sign() -> None:
    tokenizer = tiny_tokenizer()
    rows = []
    for n in range(6):
        prompt = tokenizer(f"A chat.\nUSER: say {n}\nASSISTANT: ", add_special_tokens=False)["input_ids"]
        reply = [*tokenizer(f"it is {n}", add_special_tokens=False)["input_ids"], 2]
        rows.append({"input_ids": prompt + reply, "labels": [IGNORE_INDEX] * len(prompt) + reply})
    assert not nbkit.inspect((rows, tokenizer)).problems  # it stands in every row
    tokenizer.chat_template = "{{ 'ASSISTANT: ' }}"
    assert not nbkit.inspect((rows[:1], tokenizer)).problems  # or in the template


@pytest.mark.parametrize("train_on", ["replies", "all"])
def test_markers_of_the_template_in_use_are_no_sign_and_those_of_another_are(train_on: str) -> None:
    from nbkit.data.templates import catalog

    rows = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(3)]
    bad = {"instruction": "say more", "output": "yes.\nHuman: and then?"}
    for name in (named.name for named in catalog.NAMED):
        recipe = DataRecipe(template=name, train_on=train_on)
        report = prepare(rows, tiny_tokenizer(), recipe, max_seq_length=256)
        assert "marker_in_reply" not in kinds(nbkit.inspect(report)), name
        report = prepare([*rows, bad], tiny_tokenizer(), recipe, max_seq_length=256)
        assert kinds(nbkit.inspect(report))["marker_in_reply"] == (4,), name


def test_faults_of_a_collator_are_seen(report: Any, tokenizer: Any) -> None:
    batch = Collator(2)(examples_of(report)[:2])
    batch["labels"] = batch["input_ids"].clone()  # the padding too: what a collator for language modelling may do
    found = kinds(nbkit.inspect((batch, tokenizer)))
    assert "padding_trained" in found
    pack = PackCollator(2, 512)(examples_of(report)[:3])
    start = int(pack["cu_seq_lens_q"][1])
    pack["labels"][0, start] = pack["input_ids"][0, start]
    assert "edge_trained" in kinds(nbkit.inspect((pack, tokenizer)))
    assert all(kind in checks.KINDS for kind in found)


# -- how it is shown -------------------------------------------------------------------------------


def test_every_state_has_a_form_and_a_name_beside_its_colour(report: Any, tokenizer: Any) -> None:
    found = nbkit.inspect((PackCollator(2, 512)(examples_of(report)[:3]), tokenizer))
    reader = inert(found._repr_html_())
    labels = [value for name, value in reader.attributes if name == "aria-label"]
    for state in ("trained", "masked", "padding"):
        assert any(str(label).startswith(f"{state}, ") for label in labels), state
    assert any("pack edge" in str(label) for label in labels) and "Legend" in labels
    assert "⟦" in reader.text and "░" in reader.text and "┃" in reader.text and "trained" in reader.text
    style = found.style()
    for form in ("underline;", "dotted", "repeating-linear-gradient", "border: 1px solid", "font-weight: 700"):
        assert form in style
    assert "url(" not in style and "@import" not in style


def test_pointing_at_a_token_gives_its_id_label_and_place(report: Any) -> None:
    found = nbkit.inspect(report)
    titles = [value for name, value in inert(found.batch_html()).attributes if name == "title"]
    for line in found.batch:
        for token in line.tokens:
            label = token.label if token.label != IGNORE_INDEX else "\N{MINUS SIGN}100"
            wanted = f"id {token.id} · position {token.position} · label {label} ({token.state}) · "
            assert token.state == PADDING or any(str(title).startswith(wanted) for title in titles)


@pytest.mark.parametrize("first", range(5))
def test_whatever_a_cell_says_is_shown_as_text(tokenizer: Any, first: int) -> None:
    chosen = [said[:3000].encode("utf-8", "replace").decode() for said in (CORPUS[::16] + CORPUS[-26:])[first::5]]
    rows = [{"instruction": said, "output": said} for said in chosen if said.strip()]
    report = prepare(rows, tokenizer, DataRecipe(), max_seq_length=16_000)
    for train in (TrainConfig(batch_size=3), TrainConfig(packing=True)):
        found = nbkit.inspect(report, train=train)
        inert(found._repr_html_())
        for batch in range(found.batches):
            other = found.show(batch=batch)
            inert(other.batch_html())
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", str(other))
    for place in range(len(report.examples)):
        inert(found.row_html(place))


def test_what_cannot_be_seen_is_spelled_out() -> None:
    assert visible("a\u200bb\u202ec\u00ad\ufeff") == "a[U+200B]b[U+202E]c[U+00AD][U+FEFF]"
    assert visible("x\n\t\r\x1b[0m") == "x↵⇥␍␛[0m"
    assert visible("x" * 1000).endswith("(1,000 characters)")


def test_long_rows_show_their_beginning_and_their_end(tokenizer: Any) -> None:
    row = {"instruction": "first " + "the wind " * 900, "output": "it rains last"}
    report = prepare([row], tokenizer, DataRecipe(), max_seq_length=8000)
    found = nbkit.inspect(report)
    said = inert(found.batch_html()).text
    assert "first" in said and "rains last" in said and "tokens between, not shown (0 trained)" in said
    assert len(found.batch_html()) < 160_000
    later = inert(nbkit.inspect(report, start=1000).batch_html()).text
    assert "1,000 tokens before these" in later and "first" not in later


def test_str_and_repr_are_for_terminals(report: Any) -> None:
    found = nbkit.inspect(report)
    assert str(found).count("⟦") >= 2 and "✓ No problem found" in str(found) and "Batch 1 of 12" in str(found)
    assert repr(found) == "<nbkit inspection of the list of rows: batch 0 of 12>"


def test_the_figure_is_plotly_or_a_sentence(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = nbkit.inspect(report)
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    with pytest.raises(ConfigError, match=r"plotly is not installed; pip install \"nbkit-llm\[report\]\""):
        found.figure()
    monkeypatch.undo()
    pytest.importorskip("plotly")
    bars = found.figure().data
    assert [sum(bar.y) for bar in bars] == [23, 23]


# -- what can be inspected -------------------------------------------------------------------------


def test_a_session_without_data_and_other_things_are_sentences(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="There is no data yet"):
        nbkit.inspect(nbkit.Session())
    for thing in (3, "rows.jsonl", [], (1, 2), ([1], None)):
        with pytest.raises(DataError, match="cannot be inspected; give a Session"):
            nbkit.inspect(thing)


def test_rows_that_are_not_rendered_yet_are(tokenizer: Any) -> None:
    found = nbkit.inspect((rows_of(4), tokenizer), max_seq_length=200)
    assert found.set.report is not None and found.set.max_length == 200 and len(found.lengths) == 4


def test_examples_without_labels_are_trained_whole(tokenizer: Any) -> None:
    found = nbkit.inspect(([{"input_ids": [5, 6, 2]}, {"input_ids": [7, 2]}], tokenizer))
    assert found.trained_share == 1.0 and not found.problems


def test_preference_rows_stand_with_both_replies(tokenizer: Any) -> None:
    good, bad = (text_row(tokenizer, ("user", "hi"), ("assistant", said)) for said in ("yes", "no no"))
    rows = [{**good, "rejected_input_ids": bad["input_ids"], "rejected_labels": bad["labels"]}]
    found = nbkit.inspect((rows, tokenizer))
    assert found.lengths.tolist() == [len(good["input_ids"]) + len(bad["input_ids"])]
    assert [line.part for line in found.one_row(0)] == ["chosen", "rejected"]
    said = inert(found.row_html(0)).text
    assert "Row 1, chosen" in said and "Row 1, rejected" in said
    assert [line.rows for line in found.batch] == [(1,)]  # supervised training takes the better reply alone
