"""Labels against an oracle of character spans written by hand, over templates and kinds of tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbkit.config import IGNORE_INDEX
from nbkit.data.findings import RowFault
from nbkit.data.template import Labelled, Renderer, pieces_of
from nbkit.errors import DataError
from tests.data.chats import BOS, BY_HAND, EOT, JINJA, SPECIALS, Messages, tokenizer

KINDS = ("bytes", "trimmed", "metaspace")
RENDERERS = {(template, kind): Renderer(tokenizer(template, kind)) for template in JINJA for kind in KINDS}

WORDS = "Hello|assistant|user|\n|\n\n|  | |[INST]|[/INST]|fine|5|é|e\u0301|日本|😀|🇫🇷|im_end|system\n|\t|\r\n|<think>|ﬁ|\u200f|."
words = st.sampled_from([*WORDS.split("|"), "<|", "|>", "x" * 40])
texts = (
    st.lists(words, min_size=1, max_size=6)
    .map("".join)
    .filter(lambda text: text.strip() != "" and not any(s in text for s in SPECIALS))
)
chats = st.tuples(
    st.none() | texts,
    st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    st.booleans(),  # is the reply a copy of the question?
)


def messages_of(system: str | None, turns: list[tuple[str, str]], copied: bool) -> Messages:
    made = [] if system is None else [{"role": "system", "content": system}]
    for question, reply in turns:
        made += [{"role": "user", "content": question}, {"role": "assistant", "content": question if copied else reply}]
    return made


def oracle(template: str, renderer: Renderer, messages: Messages) -> tuple[str, list[int], list[int]]:
    """(text, ids, labels) without the production code: letter by letter."""
    pieces = BY_HAND[template](messages)
    text = "".join(piece for piece, _ in pieces)
    is_trained = [mine for piece, mine in pieces for _ in piece]
    encoding = renderer.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    labels, reached = [], 0
    for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        letters = range(min(start, reached), end)  # white space trimmed off the offsets is the token's own
        reached = max(reached, end)
        labels.append(token if any(is_trained[i] for i in letters) else IGNORE_INDEX)
    return text, list(encoding.ids), labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", JINJA)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chat=chats)
def test_labels_equal_the_oracle(template: str, kind: str, chat: tuple) -> None:
    renderer = RENDERERS[template, kind]
    messages = messages_of(*chat)
    rendered = renderer.render(messages)
    (found,) = renderer.label([rendered])
    assert isinstance(found, Labelled)
    text, ids, labels = oracle(template, renderer, messages)
    assert rendered.text == text
    assert found.input_ids.tolist() == ids
    assert found.labels.tolist() == labels
    own = renderer.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert list(own["input_ids"]) == ids
    assert ids.count(renderer.tokenizer.bos_token_id) == text.count("<s>")
    pieces = list(pieces_of(text, found))
    assert "".join(piece for piece, _ in pieces) == text
    assert all(a[1] != b[1] for a, b in zip(pieces, pieces[1:], strict=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", JINJA)
def test_the_stop_token_of_every_reply_is_trained_though_it_pads(template: str, kind: str) -> None:
    renderer = RENDERERS[template, kind]
    assert renderer.tokenizer.pad_token_id == renderer.tokenizer.eos_token_id
    messages = messages_of(None, [("Hello", "fine"), ("user", "I am fine"), ("5", "6")], False)
    (found,) = renderer.label([renderer.render(messages)])
    assert isinstance(found, Labelled)
    assert [label for label in found.labels if label != IGNORE_INDEX].count(renderer.tokenizer.eos_token_id) == 3
    trained = [label for label in found.labels if label != IGNORE_INDEX]
    assert trained[-1] == renderer.tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", JINJA)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(before=texts, special=st.sampled_from(SPECIALS), after=texts, who=st.sampled_from((0, 1)))
def test_spelled_control_tokens_stay_text(template: str, kind: str, before: str, special: str, after: str, who: int) -> None:
    renderer = RENDERERS[template, kind]
    clean = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "fine"}]
    clean[who]["content"] = before + "x" * len(special) + after
    dirty = [dict(message) for message in clean]
    dirty[who]["content"] = before + special + after
    rendered = renderer.render(dirty)
    assert [kind for kind, _ in rendered.notes] == ["control_text"]
    assert repr(special) in rendered.notes[0][1]
    (found,) = renderer.label([rendered])
    if isinstance(found, RowFault):  # a tokenizer that joins over the cut says so
        assert found.kind == "control_text"
        assert kind == "metaspace"
        return
    (reference,) = renderer.label([renderer.render(clean)])
    assert isinstance(reference, Labelled)
    controls = set(renderer.tokenizer.convert_tokens_to_ids(SPECIALS)) - {renderer.tokenizer.unk_token_id}
    assert [i for i in found.input_ids if i in controls] == [i for i in reference.input_ids if i in controls]
    assert "".join(piece for piece, mine in pieces_of(rendered.text, found) if mine).count(dirty[1]["content"].strip()) == 1


def test_a_tokenizer_is_left_as_it_was_after_spelled_control_tokens() -> None:
    made = tokenizer("chatml")
    renderer = Renderer(made)
    renderer.label([renderer.render([{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}])])
    assert made("<|im_end|>", add_special_tokens=False)["input_ids"] == [made.eos_token_id]


def test_an_empty_system_message_takes_the_default_one_away() -> None:
    renderer = RENDERERS["chatml", "bytes"]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert "You are helpful" in renderer.render(turns).text
    empty = [{"role": "system", "content": ""}, *turns]
    assert renderer.render(empty).text.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")
    assert RENDERERS["mistral", "bytes"].render(empty).text == "<s>[INST] a [/INST] b</s>"  # this template leaves it out


def test_a_template_may_refuse_a_row() -> None:
    renderer = RENDERERS["mistral", "bytes"]
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(RowFault, match="roles must alternate") as caught:
        renderer.render(twice)
    assert caught.value.kind == "template"


def with_template(text: str) -> Renderer:
    made = tokenizer("chatml")
    made.chat_template = text
    return Renderer(made)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper + eos_token }}{% endfor %}",
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'].split('fin')[-1] + eos_token }}{% endfor %}",
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + m['content'] + eos_token }}{% endfor %}",
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
    ],
)
def test_a_template_that_rewrites_replies_is_refused_not_guessed_at(template: str) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "aha </think> fine"}]
    with pytest.raises(RowFault) as caught:
        with_template(template).render(messages)
    assert caught.value.kind == "template_rewrites"


def test_a_missing_stop_token_is_said() -> None:
    renderer = with_template("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    rendered = renderer.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert [kind for kind, _ in rendered.notes] == ["no_stop"]
    assert [rendered.text[a:b] for a, b in rendered.trained] == ["b"]


def test_a_template_that_writes_the_date_writes_the_same_every_day() -> None:
    renderer = with_template(
        "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    )
    rendered = renderer.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert rendered.text == "26 Jul 2024\nusera<|im_end|>assistantb<|im_end|>"


def test_raw_text_has_bos_and_eos_once_and_all_but_bos_is_trained() -> None:
    from tokenizers.processors import TemplateProcessing

    made = tokenizer("llama-3")
    for adds, start in ((False, ""), (True, BOS)):
        if adds:
            made.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{BOS} $A", special_tokens=[(BOS, made.bos_token_id)]
            )
        renderer = Renderer(made)
        for text in ("Hello there", f"Hello there{EOT}", f"{start}Hello there", f"{start}Hello there{EOT}"):
            rendered = renderer.render_text(text)
            assert rendered.text == f"{start}Hello there{EOT}" and rendered.notes == ()
            (found,) = renderer.label([rendered])
            assert isinstance(found, Labelled)
            ids = found.input_ids.tolist()
            assert ids == [*made("Hello there")["input_ids"], made.eos_token_id]
            assert found.labels.tolist() == [IGNORE_INDEX] * adds + ids[adds:]
            assert "".join(piece for piece, _ in pieces_of(rendered.text, found)) == rendered.text


def test_raw_text_that_was_rendered_before_keeps_its_control_tokens() -> None:
    renderer = RENDERERS["chatml", "bytes"]
    text = renderer.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).text
    (found,) = renderer.label([renderer.render_text(text)])
    assert isinstance(found, Labelled)
    assert found.input_ids.tolist() == renderer.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_no_chat_template_and_slow_tokenizers_are_refused_with_the_remedy() -> None:
    made = tokenizer("chatml")
    made.chat_template = None
    with pytest.raises(DataError, match="no chat template.*instruct checkpoint"):
        Renderer(made)

    class Slow:
        chat_template, is_fast, name_or_path, eos_token = "x", False, "some/model", None

    with pytest.raises(DataError, match="some/model.*tokenizer.json"):
        Renderer(Slow())
