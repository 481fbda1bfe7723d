"""Batched replies equal single ones; fields are counted by position; what is shown is escaped."""

import pytest
import torch

from nbkit.chat.compare import Comparison, answer_all, compare, field_accuracy
from nbkit.chat.conversation import stream
from nbkit.errors import ConfigError, DataError
from tests.export.rig import adapted, assert_same, snapshot
from tests.tiny import tiny_tokenizer

PROMPTS = ["Hi", "The wind is west five, it rains, the cook cut his thumb.", "Log?", "x " * 40, "0630, 41 nm. W 5", "a b c"]
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>&\"'"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("use_adapter", [True, False])
def test_batched_replies_are_the_single_ones(family, use_adapter):
    model, tokenizer = adapted(family), tiny_tokenizer()
    state, side = snapshot(model), (tokenizer.padding_side, tokenizer.pad_token)
    single = [stream(model, tokenizer, p, max_new_tokens=20, use_adapter=use_adapter).text for p in PROMPTS]
    for batch_size in (1, 2, 4, 30):
        batched = answer_all(model, tokenizer, PROMPTS, max_new_tokens=20, use_adapter=use_adapter, batch_size=batch_size)
        assert batched == single
    assert_same(model, state)
    assert (tokenizer.padding_side, tokenizer.pad_token) == side
    assert len(set(single)) > 3


def test_a_reply_that_ends_early_does_not_end_the_others():
    model, tokenizer = adapted(), tiny_tokenizer()
    rows = []

    def hook(module, inputs, output):
        # The first row of the batch is told to stop at its second token.
        rows.append(output.shape[0])
        if len(rows) == 2:
            output[0, -1, tokenizer.eos_token_id] = 1e4

    handle = model.get_base_model().lm_head.register_forward_hook(hook)
    short, *others = answer_all(model, tokenizer, PROMPTS[:1] + PROMPTS[4:5], max_new_tokens=10)
    handle.remove()
    full = answer_all(model, tokenizer, PROMPTS[:1] + PROMPTS[4:5], max_new_tokens=10)
    assert others == full[1:] and full[0].startswith(short) and len(short) < len(full[0])
    assert len(rows) == 10


def test_it_ends_as_soon_as_all_have_ended():
    model, tokenizer = adapted(), tiny_tokenizer()
    steps = []

    def hook(module, inputs, output):
        steps.append(output.shape)
        output[..., tokenizer.eos_token_id] = 1e4 if len(steps) >= 3 else 0

    model.get_base_model().lm_head.register_forward_hook(hook)
    answer_all(model, tokenizer, PROMPTS[:3], max_new_tokens=50)
    assert len(steps) == 3
    assert all(shape[1] == 1 for shape in steps)  # the head is asked for the last position only


def test_conversations_with_history_and_system():
    model, tokenizer = adapted(), tiny_tokenizer()
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Wind?"}]
    with_system = answer_all(model, tokenizer, [talk, "Wind?"], max_new_tokens=12, system="Be brief.")
    assert with_system != answer_all(model, tokenizer, [talk, "Wind?"], max_new_tokens=12)
    assert with_system[0] == stream(model, tokenizer, talk, max_new_tokens=12, system="Be brief.").text


def test_each_reply_ends_at_the_context_by_itself():
    model, tokenizer = adapted(max_position_embeddings=96), tiny_tokenizer()
    prompts = ["x " * 25, "Hi"]
    single = [answer_all(model, tokenizer, [p], max_new_tokens=500)[0] for p in prompts]
    assert answer_all(model, tokenizer, prompts, max_new_tokens=500) == single


def test_nothing_asked_and_settings_refused():
    model, tokenizer = adapted(), tiny_tokenizer()
    assert answer_all(model, tokenizer, []) == []
    with pytest.raises(ConfigError):
        answer_all(model, tokenizer, ["Hi"], batch_size=0)
    with pytest.raises(ConfigError):
        answer_all(model, tokenizer, ["Hi"], max_new_tokens=0)
    with pytest.raises(DataError):
        answer_all(model, tokenizer, ["Hi", ""])


@pytest.mark.parametrize(
    ("reply", "expected", "right"),
    [
        ("a; b; c", "a; b; c", (3, 3)),
        ("A ;  B\n c ", "a; b; c", (3, 3)),
        ("b; a; c", "a; b; c", (1, 3)),
        ("a; b; c; a; b; c", "a; b; c", (3, 3)),
        ("x; a; b; c", "a; b; c", (0, 3)),
        ("a", "a; b; c", (1, 3)),
        ("", "a; b", (0, 2)),
        ("a; b;", "a; b", (2, 2)),
        ("wind  west   5", "Wind West 5", (1, 1)),
        ("STRASSE", "straße", (1, 1)),
        ("a;;c", "a; b; c", (2, 3)),
        ("anything", "", (0, 0)),
        ("", " ;\n", (0, 0)),
        ("I am sorry, I cannot do that; please ask again.", "06:30; wind west 5", (0, 2)),
    ],
)
def test_fields(reply, expected, right):
    assert field_accuracy(reply, expected) == right


def test_compare_shows_both_sides():
    model, tokenizer = adapted(), tiny_tokenizer()
    found = compare(model, tokenizer, PROMPTS[:2], expected=["one", "two"], max_new_tokens=8)
    assert found.before != found.after
    assert found.after == tuple(answer_all(model, tokenizer, PROMPTS[:2], max_new_tokens=8))
    assert found.prompts == tuple(PROMPTS[:2])
    text = str(found)
    assert text.index("before") < text.index("after") < text.index("expected  one") and "cook cut his thumb" in text
    assert found._repr_html_().count("<tr>") == 3
    with pytest.raises(ConfigError, match="2 prompts and 1 expected"):
        compare(model, tokenizer, PROMPTS[:2], expected=["one"])


def test_hostile_text_is_escaped_everywhere():
    html = Comparison((HOSTILE,), (HOSTILE,), (HOSTILE,), (HOSTILE,))._repr_html_()
    assert "<script" not in html and "<img" not in html and html.count("&lt;script&gt;") == 4
    long = Comparison(("p",), ("x" * 5000,), ("<" * 5000,))
    assert len(str(long)) < 1500 and long._repr_html_().count("&lt;") == 600


def test_replies_need_no_gradients():
    model, tokenizer = adapted(), tiny_tokenizer()
    assert torch.is_grad_enabled()
    answer_all(model, tokenizer, PROMPTS[:1], max_new_tokens=2)
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())
