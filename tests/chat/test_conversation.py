import threading

import pytest

from nbkit.chat.conversation import stream
from nbkit.chat.prompts import render
from nbkit.config import LoraConfig
from nbkit.errors import ModelError

USER = [{"role": "user", "content": "hello there"}]


@pytest.fixture
def tuned(tiny_model):
    """A tiny model whose adapter changes what it says."""
    import torch

    from nbkit.models.adapters import add_lora

    model = add_lora(tiny_model, LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model


def greedy(model, tokenizer, messages, count):
    """An independent loop: the whole text through the model for each token."""
    import torch

    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_a_streamed_reply_is_the_greedy_one_with_and_without_the_adapter(tuned, tiny_tokenizer):
    tuned.train()
    on = stream(tuned, tiny_tokenizer, USER, max_new_tokens=12)
    pieces = list(on)
    off = stream(tuned, tiny_tokenizer, USER, max_new_tokens=12, use_adapter=False).text
    assert tuned.training and all(p.requires_grad for n, p in tuned.named_parameters() if "lora_" in n)
    tuned.eval()
    assert "".join(pieces) == on.text == greedy(tuned, tiny_tokenizer, USER, 12)
    with tuned.disable_adapter():
        assert off == greedy(tuned, tiny_tokenizer, USER, 12)
    assert on.text != off


def test_sampling_follows_the_seed_and_leaves_the_random_state_alone(tuned, tiny_tokenizer):
    import torch

    torch.manual_seed(5)
    state = torch.get_rng_state()
    said = [stream(tuned, tiny_tokenizer, USER, temperature=1.0, seed=seed, max_new_tokens=20).text for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    assert torch.equal(state, torch.get_rng_state())


def test_stop_ends_the_reply_and_so_does_leaving_the_loop(tuned, tiny_tokenizer):
    reply = stream(tuned, tiny_tokenizer, USER, max_new_tokens=400)
    for _ in reply:
        break
    assert len(tiny_tokenizer(reply.text)["input_ids"]) < 390
    asked = stream(tuned, tiny_tokenizer, USER, max_new_tokens=400)
    asked.stop()
    assert len(asked.text) < 20


def test_two_readers_see_the_same_and_two_replies_wait_for_each_other(tuned, tiny_tokenizer):
    one = stream(tuned, tiny_tokenizer, USER, max_new_tokens=15)
    two = stream(tuned, tiny_tokenizer, USER, max_new_tokens=15, use_adapter=False)
    seen = {}
    readers = [threading.Thread(target=lambda k=k, s=s: seen.update({k: s.text})) for k, s in enumerate((one, two, one))]
    [reader.start() for reader in readers]
    [reader.join() for reader in readers]
    alone = [stream(tuned, tiny_tokenizer, USER, max_new_tokens=15, use_adapter=on).text for on in (True, False)]
    assert [seen[0], seen[1], seen[2]] == [alone[0], alone[1], alone[0]]


def test_what_generation_raises_is_raised_to_the_reader_and_the_model_is_put_back(tuned, tiny_tokenizer, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of luck")

    tuned.train()
    monkeypatch.setattr(tuned.get_base_model(), "generate", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        _ = stream(tuned, tiny_tokenizer, USER).text
    assert tuned.training


def test_the_prompt_has_one_bos_and_the_system_message_asked_for(tiny_tokenizer):
    text = render(tiny_tokenizer, USER, system="Be brief.")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tiny_tokenizer.bos_token_id) == 3  # the template's three turns, none added
    own = [{"role": "system", "content": "mine"}, *USER]
    assert render(tiny_tokenizer, own, system="other").count("system") == 1


def test_bad_requests_are_one_sentence(tuned, tiny_tokenizer):
    for messages, settings, words in (
        ([], {}, "nothing to answer"),
        ([{"role": "user", "content": "wind " * 600}], {}, "context"),
        (USER, {"max_new_tokens": 0}, "max_new_tokens"),
        (USER, {"temperature": -1.0}, "temperature"),
    ):
        with pytest.raises(ModelError, match=words):
            stream(tuned, tiny_tokenizer, messages, **settings)
    tiny_tokenizer.chat_template = None
    with pytest.raises(ModelError, match="chat template"):
        stream(tuned, tiny_tokenizer, USER)


def test_a_long_prompt_gets_what_the_context_leaves(tuned, tiny_tokenizer, monkeypatch):
    seen = {}
    generate = tuned.get_base_model().generate

    def watched(*args, **kwargs):
        out = generate(*args, **kwargs)
        seen["tokens"] = out.shape[1]
        return out

    monkeypatch.setattr(tuned.get_base_model(), "generate", watched)
    messages = [{"role": "user", "content": "wind " * 80}]
    _ = stream(tuned, tiny_tokenizer, messages, max_new_tokens=10_000).text
    assert seen["tokens"] <= 512 == tuned.config.max_position_embeddings


def test_the_cell_that_ends_with_a_stream_prints_it(tuned, tiny_tokenizer, capsys):
    reply = stream(tuned, tiny_tokenizer, USER, max_new_tokens=6)
    reply._ipython_display_()
    assert capsys.readouterr().out == reply.text + "\n"
