"""Labels of sequences that are tokens already, against the masks of the renderer."""

from __future__ import annotations

import random

import pytest

from nbkit.config import IGNORE_INDEX
from nbkit.data.responses import answered, labels_of, markers, spans_of
from nbkit.data.template import Labelled, Renderer
from nbkit.data.templates import NAMED
from nbkit.errors import DataError
from tests.data.oracle import chat
from tests.data.vocab import KINDS, tokenizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["chatml", "llama-3", "gemma-3", "phi-3", "mistral-v7", "alpaca"])
def test_every_reply_is_trained_as_the_renderer_trains_it(name: str, kind: str) -> None:
    made, random_ = tokenizer(kind), random.Random(name)
    made.chat_template = next(named.text for named in NAMED if named.name == name)
    renderer, (instruction, response) = Renderer(made), markers(made)
    for _ in range(20):
        messages = [m for m in chat(random_, system=name != "gemma") if "### " not in m["content"]]
        if [m["role"] for m in messages][-2:] != ["user", "assistant"] or len(messages) % 2 or messages[0]["role"] != "user":
            continue
        (true,) = renderer.label([renderer.render(messages)])
        assert isinstance(true, Labelled)
        (found,) = labels_of(made, [true.input_ids.tolist()], instruction, response)
        wanted = true.labels.tolist()
        pairs = [(a, b) for a, b in zip(wanted, found, strict=True) if a != b]
        # what stands between a reply's stop token and the next question is trained too, by the rule of the two markers
        assert all(a == IGNORE_INDEX for a, _ in pairs)
        assert len(pairs) <= 4 * sum(m["role"] == "assistant" for m in messages)


def test_spans_cover_the_text_also_where_the_text_would_give_other_tokens() -> None:
    for kind in KINDS:
        made = tokenizer(kind)
        letters = [made.convert_tokens_to_ids(letter) for letter in "Hello"]  # as the text, these are fewer tokens
        emoji = made("😀", add_special_tokens=False)["input_ids"]
        ((text, spans),) = spans_of(made, [[*letters, *emoji, made.eos_token_id]])
        assert text.replace(" ", "").startswith("Hello😀") and text.endswith("</s>")
        assert spans[4].tolist()[1] - spans[0].tolist()[0] == 5
        assert (
            len({tuple(span) for span in spans[5 : 5 + len([i for i in emoji if made.convert_ids_to_tokens(i) != "▁"])].tolist()})
            <= 2
        )
        assert spans[-1].tolist() == [len(text) - 4, len(text)]


def test_packed_documents_do_not_run_into_each_other() -> None:
    made = tokenizer()
    first = made("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n", add_special_tokens=False)["input_ids"]
    second = made("<|im_start|>system\nHello there", add_special_tokens=False)["input_ids"]
    parts = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    (apart,) = labels_of(made, [first + second], *parts, lengths=[[len(first), len(second)]])
    assert apart[len(first) :] == [IGNORE_INDEX] * len(second)
    assert made.decode([one for one in apart if one != IGNORE_INDEX]) == "b<|im_end|>\n"
    (joined,) = labels_of(made, [first + second], *parts)
    assert joined[-1] != IGNORE_INDEX


def test_characters_between_the_markers() -> None:
    assert answered("Q:a A:b Q:c A:d", "Q:", "A:") == [(6, 8), (14, 15)]
    assert answered("Q:a", "Q:", "A:") == []
    assert answered("A:", "Q:", "A:") == []
    assert answered("A:x A:y", "Q:", "A:") == [(2, 7)]


def test_markers_of_a_template_nobody_knows() -> None:
    made = tokenizer()
    made.chat_template = (
        "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    )
    assert markers(made) == ("[user] ", "[assistant] ")
    made.chat_template = "{{ 'always the same' }}"
    with pytest.raises(DataError, match="give instruction_part and response_part"):
        markers(made)
