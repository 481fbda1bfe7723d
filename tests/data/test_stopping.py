"""A real small model learns to stop: 30 steps on short answers, and greedy decoding ends with the stop token. `make slow`."""

from __future__ import annotations

from typing import Any

import pytest

from nbkit.config import LoraConfig, ModelConfig
from nbkit.data.template import Labelled, Renderer, Row

MOST = 16  # tokens of a reply that may be written
THINGS = (
    *("wind", "rain", "snow", "fog", "ice", "sun", "moon", "tide", "wave", "storm"),
    *("cloud", "hail", "frost", "dew", "gale", "calm", "swell", "mist", "thunder", "dusk"),
)
COLOURS = ("blue", "grey", "white", "black", "red")


def question(thing: str) -> dict[str, str]:
    return {"role": "user", "content": f"Tell me a long story about the {thing}, and its colour."}


def answer(number: int) -> dict[str, str]:
    return {"role": "assistant", "content": f"The {THINGS[number]} is {COLOURS[number % 5]}."}


def train(model: Any, renderer: Renderer, steps: int = 30) -> None:
    import torch

    rows = [Row([question(thing), answer(number)]) for number, thing in enumerate(THINGS[:16])]
    examples = [one for one in renderer.label([renderer.render(row.messages) for row in rows]) if isinstance(one, Labelled)]
    assert len(examples) == 16
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model.train()
    for step in range(steps):
        for one in (examples[2 * step % 16], examples[(2 * step + 1) % 16]):
            ids, labels = torch.tensor(one.input_ids[None]).long(), torch.tensor(one.labels[None]).long()
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def replies(model: Any, renderer: Renderer) -> list[list[int]]:
    import torch

    made = []
    for ids in renderer.prompt_ids([Row([question(thing)]) for thing in THINGS[16:]]):
        assert isinstance(ids, list)
        asked = torch.tensor([ids])
        stop = renderer.tokenizer.convert_tokens_to_ids(renderer.stop_token())
        written = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            do_sample=False,
            max_new_tokens=MOST,
            eos_token_id=stop,
            pad_token_id=stop,
        )
        made.append(written[0, len(ids) :].tolist())
    return made


@pytest.mark.slow
@pytest.mark.parametrize("template", [None, "alpaca", "llama-3"])
def test_thirty_steps_teach_a_model_to_stop(template: str | None) -> None:
    import torch

    from nbkit.models.adapters import add_lora
    from nbkit.models.load import load

    torch.manual_seed(0)
    loaded = load(ModelConfig(name="smollm2-135m-instruct", dtype="float32"), progress=False)
    renderer = Renderer(loaded.tokenizer, template)
    stop = loaded.tokenizer.convert_tokens_to_ids(renderer.stop_token())
    model = add_lora(loaded.model, LoraConfig(rank=8)).eval()
    before = replies(model, renderer)
    assert not any(reply[-1] == stop for reply in before), "the model stops by itself, so that this shows nothing"
    train(model, renderer)
    after = replies(model, renderer)
    assert all(reply[-1] == stop and reply.count(stop) == 1 for reply in after), after
