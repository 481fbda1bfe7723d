"""Streaming: pieces as they come, equal to generate's tokens, stoppable, one at a time, nothing changed afterwards."""

import gc
import threading
import time
import weakref

import pytest
import torch

from nbkit.chat import conversation, decode
from nbkit.chat.conversation import TextStream, is_answering, stream, text_pieces
from nbkit.chat.prompt import encode
from nbkit.errors import ConfigError, DataError, ModelError
from tests.export.rig import adapted, assert_same, snapshot
from tests.tiny import tiny_model, tiny_tokenizer

ASK = [{"role": "user", "content": "The wind is west?"}]


def reference(model, tokenizer, count=12, **options):
    """transformers' own greedy reply."""
    ids = torch.tensor(encode(tokenizer, [ASK]))
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("use_adapter", [True, False])
def test_greedy_is_what_generate_gives(family, use_adapter):
    model, tokenizer = adapted(family), tiny_tokenizer()
    before = snapshot(model)
    text = stream(model, tokenizer, ASK, max_new_tokens=24, use_adapter=use_adapter).text
    assert_same(model, before)
    if use_adapter:
        assert text == reference(model, tokenizer, 24)
    else:
        assert text == reference(tiny_model(family) if family != "qwen2" else unbiased(model), tokenizer, 24)


def unbiased(model):
    """The base of an adapted model whose biases the rig has changed."""
    base = tiny_model("qwen2")
    base.load_state_dict({k: v for k, v in model.state_dict().items() if k.endswith("bias")}, strict=False)
    state = {k.removeprefix("base_model.model.").replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    base.load_state_dict({k: v for k, v in state.items() if "lora_" not in k})
    return base


def test_pieces_joined_are_the_text_and_can_be_read_again():
    model, tokenizer = adapted(), tiny_tokenizer()
    made = stream(model, tokenizer, "Hi", max_new_tokens=16)
    pieces = list(made)
    assert len(pieces) > 1 and "".join(pieces) == made.text == "".join(made)
    assert made.done and "done" in repr(made)


def test_the_reply_ends_at_the_stop_token():
    model, tokenizer = adapted(), tiny_tokenizer()
    whole = stream(model, tokenizer, ASK, max_new_tokens=6)
    steps = []

    def hook(module, inputs, output):
        steps.append(1)
        if len(steps) == 4:
            output[..., tokenizer.eos_token_id] = 1e4

    assert whole.text
    model.get_base_model().lm_head.register_forward_hook(hook)
    ended = stream(model, tokenizer, ASK, max_new_tokens=40).text
    assert len(steps) == 4 and ended and whole.text.startswith(ended) and ended != whole.text


def test_training_mode_and_flags_come_back_even_after_an_error(monkeypatch):
    model, tokenizer = adapted(), tiny_tokenizer()
    model.train()
    model.get_base_model().model.layers[0].eval()
    model.config.use_cache = False
    before = snapshot(model)
    stream(model, tokenizer, ASK, max_new_tokens=3).stop()
    assert_same(model, before)

    def broken(*arguments, **options):
        raise RuntimeError("the model broke")

    monkeypatch.setattr(model.get_base_model(), "forward", broken)
    for use_adapter in (True, False):
        failing = stream(model, tokenizer, ASK, max_new_tokens=3, use_adapter=use_adapter)
        with pytest.raises(RuntimeError, match="the model broke"):
            list(failing)
        with pytest.raises(RuntimeError, match="the model broke"):
            failing.text  # noqa: B018
        assert_same(model, before)
        assert not is_answering(model)


def test_out_of_memory_is_a_sentence(monkeypatch):
    model, tokenizer = adapted(), tiny_tokenizer()

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(model.get_base_model(), "forward", full)
    with pytest.raises(ModelError, match="lower max_new_tokens"):
        stream(model, tokenizer, ASK).text  # noqa: B018


# -- sampling --------------------------------------------------------------------------------------


def test_a_seed_gives_one_reply_and_leaves_the_global_random_state_alone():
    model, tokenizer = adapted(), tiny_tokenizer()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    texts = [stream(model, tokenizer, ASK, temperature=1.0, seed=s, max_new_tokens=16).text for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_samples_follow_the_probabilities_and_top_p_cuts_the_tail():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    counts = torch.bincount(decode.sampler(1.0, 1.0, 0)(logits), minlength=4) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)
    cut = torch.bincount(decode.sampler(1.0, 0.75, 0)(logits), minlength=4) / 4000
    torch.testing.assert_close(cut, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03, rtol=0)
    assert decode.sampler(1.0, 1e-6, 0)(logits).unique().tolist() == [0]
    cold = torch.bincount(decode.sampler(0.25, 1.0, 0)(logits), minlength=4) / 4000
    assert cold[0] > 0.85


@pytest.mark.parametrize(
    "options",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.1},
     {"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"max_new_tokens": True}],
)  # fmt: skip
def test_settings_out_of_range_are_refused_at_once(options):
    with pytest.raises(ConfigError):
        stream(adapted(), tiny_tokenizer(), ASK, **options)


def test_a_prompt_beyond_the_context_is_refused_and_a_reply_ends_with_it():
    model, tokenizer = adapted(max_position_embeddings=512), tiny_tokenizer()
    with pytest.raises(DataError, match="context is 512"):
        stream(model, tokenizer, "x " * 600)
    long = "x " * 240
    ids = len(encode(tokenizer, [[{"role": "user", "content": long}]])[0])
    steps = []
    model.get_base_model().lm_head.register_forward_hook(lambda *_: steps.append(1))
    assert ids < 512 and stream(model, tokenizer, long, max_new_tokens=100_000).text
    assert len(steps) == 512 - ids


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["naïve 数字 🙂🙂 end", "  two  spaces\n\n", "\u200d👩\u200d🚀", "a"])
def test_characters_are_never_cut(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(text_pieces(tokenizer, iter(ids)))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_become_no_character_come_out_at_the_end():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("ok 🙂", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(text_pieces(tokenizer, iter(ids))) == "ok \ufffd"


def test_special_tokens_are_not_shown():
    tokenizer = tiny_tokenizer()
    ids = [1, *tokenizer("the wind", add_special_tokens=False)["input_ids"], 0, 1]
    assert "".join(text_pieces(tokenizer, iter(ids))) == "the wind"


def test_a_tokenizer_that_strips_the_first_space_keeps_those_between():
    from tests.export.test_gguf_vocab import sentencepiece_like

    tokenizer, pieces = sentencepiece_like()
    from tokenizers import decoders

    replace = decoders.Replace("▁", " ")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ids = [pieces.index(p) for p in ("▁ab", "▁a", "c", "▁ab")]
    assert "".join(text_pieces(tokenizer, iter(ids))) == "ab ac ab"


def test_display_writes_pieces_and_shows_control_characters_as_pictures(capsys):
    TextStream(lambda should_stop: iter_of("ab", "\x1b[31mred", "\n<b>\r"))._ipython_display_()
    assert capsys.readouterr().out == "ab␛[31mred\n<b>␍\n"


def iter_of(*pieces):
    yield from pieces


# -- threads ---------------------------------------------------------------------------------------


class Slow:
    """A forward that waits for a signal before each step."""

    def __init__(self, model, monkeypatch):
        self.go = threading.Semaphore(0)
        self.steps = 0
        self.running = self.most = 0
        honest = model.get_base_model().forward

        def forward(*arguments, **options):
            self.running += 1
            self.most = max(self.most, self.running)
            assert self.go.acquire(timeout=30)
            self.steps += 1
            try:
                return honest(*arguments, **options)
            finally:
                self.running -= 1

        monkeypatch.setattr(model.get_base_model(), "forward", forward)


@pytest.fixture
def slow(monkeypatch):
    model = adapted()
    return model, tiny_tokenizer(), Slow(model, monkeypatch)


def test_pieces_come_before_the_reply_is_done(slow):
    model, tokenizer, gate = slow
    made = stream(model, tokenizer, ASK, max_new_tokens=20)
    gate.go.release(8)
    first = next(iter(made))
    assert first and not made.done and is_answering(model)
    gate.go.release(50)
    assert len(made.text) > len(first) and not is_answering(model)


def test_stop_ends_it_and_keeps_what_has_come(slow):
    model, tokenizer, gate = slow
    before = snapshot(model)
    made = stream(model, tokenizer, ASK, max_new_tokens=200)
    gate.go.release(6)
    next(iter(made))
    threading.Timer(0.1, gate.go.release, args=(1,)).start()  # the step that is under way
    made.stop()
    assert made.done and made.text and gate.steps <= 7
    assert_same(model, before)


def test_a_stream_that_nobody_holds_stops(slow):
    model, tokenizer, gate = slow
    made = stream(model, tokenizer, ASK, max_new_tokens=400)
    worker = made._worker
    there = weakref.ref(made)
    del made
    gc.collect()
    assert there() is None
    gate.go.release(3)
    worker.join(timeout=30)
    assert not worker.is_alive() and gate.steps <= 3


def test_two_replies_are_written_one_after_the_other(slow):
    model, tokenizer, gate = slow
    before = snapshot(model)
    both = [stream(model, tokenizer, ASK, max_new_tokens=6, use_adapter=on) for on in (False, True)]
    gate.go.release(100)
    texts = [one.text for one in both]
    assert gate.most == 1 and texts[0] != texts[1]
    assert_same(model, before)


def test_a_waiting_reply_can_be_stopped_without_the_one_before_it(slow):
    model, tokenizer, gate = slow
    first = stream(model, tokenizer, ASK, max_new_tokens=6)
    waiting = stream(model, tokenizer, ASK, max_new_tokens=6)
    started = time.monotonic()
    waiting.stop()
    assert waiting.text == "" and not first.done and time.monotonic() - started < 20
    gate.go.release(100)
    assert first.text


def test_an_interrupt_of_the_reader_stops_the_writer(slow, monkeypatch):
    model, tokenizer, gate = slow
    made = stream(model, tokenizer, ASK, max_new_tokens=200)

    def interrupted(self, at):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation._Page, "piece", interrupted)
    threading.Timer(0.1, gate.go.release, args=(1,)).start()
    with pytest.raises(KeyboardInterrupt):
        list(made)
    assert made.done and not is_answering(model)


def test_nothing_made_while_answering_keeps_training_from_working():
    model, tokenizer = adapted(), tiny_tokenizer()
    stream(model, tokenizer, ASK, max_new_tokens=4).text  # noqa: B018
    ids = torch.tensor(encode(tokenizer, [ASK]))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
