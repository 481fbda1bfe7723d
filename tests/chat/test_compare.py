import pytest

from nbkit.chat.compare import Comparison, answer_all, compare, field_accuracy
from nbkit.chat.conversation import stream
from nbkit.config import LoraConfig

PROMPTS = ["hello there", "a", "what is the wind, sir? tell me all about it", "wind", "it rains on the log line 12"]


@pytest.fixture(params=["llama", "mistral", "qwen2"])
def model(request):
    from nbkit.models.adapters import add_lora
    from tests.tiny import tiny_model

    return add_lora(tiny_model(request.param), LoraConfig(rank=2))


def test_replies_in_batches_equal_single_ones_and_keep_their_order(model, tiny_tokenizer):
    tiny_tokenizer.padding_side = "right"
    alone = [stream(model, tiny_tokenizer, [{"role": "user", "content": p}], max_new_tokens=10).text.strip() for p in PROMPTS]
    for batch_size in (1, 2, 16):
        assert answer_all(model, tiny_tokenizer, PROMPTS, max_new_tokens=10, batch_size=batch_size) == alone
    assert tiny_tokenizer.padding_side == "right"
    assert answer_all(model, tiny_tokenizer, []) == []


@pytest.mark.parametrize(
    "reply, expected, right",
    [
        ("0630; W 5; rain", "0630; W 5; rain", (3, 3)),
        (" 0630 ;w 5\nRAIN;", "0630; W 5; rain", (3, 3)),
        ("0630; rain; W 5", "0630; W 5; rain", (1, 3)),
        ("0630; W 5; rain; fog; snow", "0630; W 5; rain", (3, 3)),
        ("0630", "0630; W 5; rain", (1, 3)),
        ("", "0630; W 5", (0, 2)),
        ("It is half past six, and the wind is west.", "0630; W 5", (0, 2)),
        ("anything", "", (0, 0)),
    ],
)
def test_fields_are_compared_by_place(reply, expected, right):
    assert field_accuracy(reply, expected) == right


def test_before_and_after_are_shown_as_text(model, tiny_tokenizer):
    both = compare(model, tiny_tokenizer, PROMPTS[:2], max_new_tokens=3)
    assert both.before == both.after and len(both.after) == 2  # a fresh adapter changes nothing
    hostile = Comparison(("<script>alert(1)</script>",), ("<img src=x onerror=alert(1)>",), ("a & b",))
    html = hostile._repr_html_()
    assert "<script" not in html and "<img" not in html and "a &amp; b" in html
    assert "before: <img" in str(hostile)
