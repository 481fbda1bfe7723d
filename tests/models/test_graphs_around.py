"""What lies around the layers of a recorded step: hooks and forwards of other libraries, which a replay would pass over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

from nbkit.models.embedding import Embedding
from tests.closeness import assert_all_like_stock
from tests.models.layer.rig import batch, fill, lora, step
from tests.models.test_graphs import EAGER, Tape, patched
from tests.models.test_graphs import recorded_on_a_cpu as recorded_on_a_cpu

FORWARD, BACKWARD = "register_forward_hook", "register_full_backward_hook"
HOOKS = [(path, FORWARD) for path in ("model", "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")]


@pytest.mark.parametrize(("path", "kind"), [*HOOKS, *((p, BACKWARD) for p in ("model.layers.1", "model.norm", "lm_head"))])
def test_hooks_are_called_also_those_registered_between_replays(path: str, kind: str) -> None:
    model, graphs = patched()
    for _ in range(EAGER + 1):
        step(model, **batch())
    assert Tape.made == 1 and graphs.recorded
    calls: list[int] = []
    handle = getattr(model.get_base_model().get_submodule(path), kind)(lambda *args: calls.append(1) and None)
    for count in range(1, 4):
        step(model, **batch())
        assert len(calls) == count
    assert "is hooked, and a replay does not call it" in graphs.note or "another library has hooked it" in graphs.note
    handle.remove()
    for _ in range(EAGER):
        step(model, **batch())
    assert len(calls) == 3 and "CUDA graphs, the last of shape" in graphs.note


def test_hooks_that_only_ask_embeddings_for_a_gradient_change_nothing() -> None:
    model, graphs = patched()
    model.enable_input_require_grads()
    for _ in range(EAGER + 1):
        step(model, **batch())
    assert Tape.made == 1 and graphs.note.startswith("1 CUDA graphs")


def test_an_embedding_that_nbkit_itself_has_parked_is_nobody_elses() -> None:
    model, graphs = patched()
    embedding = Embedding(graphs.binding.decoder)
    embedding.park(True)
    assert graphs.passed_over() == ""
    embedding.park(False)
    scaled("model.embed_tokens")(model)
    assert "embed_tokens" in graphs.passed_over()


@pytest.mark.parametrize("path", ["model.embed_tokens", "model.norm"])
def test_a_forward_bound_between_replays_is_called(path: str) -> None:
    model, graphs = patched()
    truth = lora("llama")
    for _ in range(EAGER + 1):
        step(model, **batch())
    for one in (model, truth):
        scaled(path)(one)
    want, _ = step(truth, **batch())
    loss, _ = step(model, **batch())
    assert Tape.made == 1 and loss == pytest.approx(want, abs=1e-5)
    assert "a forward of its own" in graphs.note and path.split(".")[-1] in graphs.note


def scaled(path: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = model.get_base_model().get_submodule(path)
        theirs = module.forward
        module.forward = lambda *args, **kwargs: theirs(*args, **kwargs) * 1.5

    return change


def frozen_adapter_on_the_head(model: Any) -> None:
    model.add_adapter("head", LoraConfig(r=4, target_modules=["lm_head"]))
    fill(model)
    model.base_model.set_adapter(["default", "head"])
    for name, p in model.named_parameters():
        if "lm_head" in name:
            p.requires_grad_(False)


@pytest.mark.parametrize("change", [scaled("lm_head"), frozen_adapter_on_the_head], ids=["forward", "adapter"])
def test_a_head_that_changes_between_replays(change: Callable[[Any], None]) -> None:
    model, graphs = patched()
    truth = lora("llama")
    for _ in range(EAGER + 1):
        step(model, **batch())
    for one in (model, truth):
        change(one)
    for seed in range(EAGER + 2):
        (loss, grads), (wanted, want) = step(model, **batch(seed=seed)), step(truth, **batch(seed=seed))
        assert loss == pytest.approx(wanted, abs=1e-5)
        assert_all_like_stock(grads, want)
    assert Tape.made == 1 and "lm_head: " in graphs.note


class LayersLeftOut:
    """A decoder that runs every layer but one, another in each step."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.theirs, self.steps = decoder, type(decoder).forward, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.steps += 1
        layers = self.decoder.layers
        whole, gone = list(layers), self.steps % len(layers)
        layer = whole[gone]
        theirs, vars(layer)["forward"] = vars(layer).get("forward"), lambda hidden, **kwargs: hidden
        try:
            return self.theirs(self.decoder, *args, **kwargs)
        finally:
            del vars(layer)["forward"]
            if theirs is not None:
                vars(layer)["forward"] = theirs


def test_a_decoder_with_a_forward_of_its_own_is_neither_recorded_nor_taken_at_once() -> None:
    model, graphs = patched(num_hidden_layers=3)
    truth = lora("llama", num_hidden_layers=3)
    for one in (model, truth):
        decoder = one.get_base_model().model
        decoder.forward = LayersLeftOut(decoder)
    for seed in range(EAGER + 3):
        (loss, grads), (wanted, want) = step(model, **batch(seed=seed)), step(truth, **batch(seed=seed))
        assert loss == pytest.approx(wanted, abs=1e-5)
        assert_all_like_stock(grads, want)
    assert Tape.made == 0 and "another library has bound a forward of its own to LlamaModel" in graphs.note


def test_the_head_is_asked_for_its_hooks_in_an_eager_step_too() -> None:
    model, _ = patched()
    seen: list[torch.Tensor] = []
    model.get_base_model().lm_head.register_full_backward_hook(lambda module, given, got: seen.append(given[0]))
    step(model, **batch())
    assert len(seen) == 1 and seen[0].shape[-1] == 32
