"""Layers and parts of them that are not transformers' own, and weights that are replaced or lent for one forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peft import AdaptionPromptConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from nbkit.errors import ModelError
from nbkit.models.layer.bind import Binding
from tests.models.layer.rig import batch, lora, step, worst
from tests.models.layer.test_layer import bound
from tests.tiny import tiny_model


def assert_exact(model: Any, change: Callable[[Any], Any] = lambda model: None, when: str = "before") -> Binding:
    """A step of the bound model equals the stock one's, changed "before" or "after" it is bound and has run."""
    if when == "after":
        binding = bound(model)
        step(model, **batch(), use_cache=False)
        change(model)
    else:
        change(model)
        binding = bound(model)
    loss, grads = step(model, **batch(), use_cache=False)
    reasons = dict(binding.reasons)
    binding.release()
    truth = step(model, **batch(), use_cache=False)
    assert loss == pytest.approx(truth[0], rel=1e-6) and worst(grads, truth[1])[0] < 1e-5
    binding.reasons = reasons
    return binding


def first(model: Any) -> Any:
    return model.get_base_model().model.layers[0]


# -- what is not transformers' own ---------------------------------------------------------------------------------------


class Layer(LlamaDecoderLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) * 1.5


class Mlp(LlamaMLP):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * 1.5


class Norm(LlamaRMSNorm):
    def forward(self, hidden_states: Any) -> Any:
        return super().forward(hidden_states) * 1.5


class Adapted(LoraLinear):
    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x, *args, **kwargs) * 1.5


class Named(LlamaMLP):
    """With a name of its own, and nothing else."""


@pytest.mark.parametrize(
    ("path", "kind"), [("", Layer), ("mlp", Mlp), ("input_layernorm", Norm), ("self_attn.k_proj", Adapted)], ids=lambda x: str(x)
)
def test_ones_own_classes_are_not_passed_over(path: str, kind: type) -> None:
    def change(model: Any) -> None:
        first(model).get_submodule(path).__class__ = kind

    reasons = assert_exact(lora("llama"), change).reasons
    name = path or "it"
    assert reasons == {0: f"{name} is a {kind.__name__} of tests, whose own forward a fused layer does not call"}


def test_a_subclass_without_a_forward_of_its_own_is_fused() -> None:
    def change(model: Any) -> None:
        first(model).mlp.__class__ = Named

    assert not assert_exact(lora("llama"), change).reasons


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_bound_to_the_layer_itself_is_not_passed_over(when: str) -> None:
    """As accelerate's hooks are."""

    def change(model: Any) -> None:
        layer = first(model)
        theirs = layer.forward
        layer.forward = lambda *args, **kwargs: theirs(*args, **kwargs) * 1.5

    model = lora("llama")
    reasons = assert_exact(model, change, when).reasons
    assert reasons == ({0: "another library has bound a forward of its own to the layer"} if when == "before" else {})
    assert "forward" in vars(first(model))


@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_that_are_wrapped_or_replaced_by_something_else(when: str) -> None:
    class Nothing(nn.Module):
        def forward(self, hidden: Any, **kwargs: Any) -> Any:
            return hidden

    def change(model: Any) -> None:
        layers = model.get_base_model().model.layers
        layers[0], layers[1] = checkpoint_wrapper(layers[0]), Nothing()

    reasons = assert_exact(lora("llama", num_hidden_layers=3), change, when).reasons
    assert reasons.keys() == {0, 1} and reasons[0].startswith("it is a CheckpointWrapper of torch")


@pytest.mark.parametrize("when", ["before", "after"])
def test_attention_in_a_wrapper_of_peft(when: str) -> None:
    model = tiny_model()
    binding = None
    if when == "after":
        binding = bound(model)
        step(model, **batch())
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    binding = binding or bound(model)
    loss, grads = step(model, **batch(), use_cache=False)
    assert binding.reasons == {1: "AdaptedAttention of peft has no q_proj"}
    binding.release()
    truth = step(model, **batch(), use_cache=False)
    assert loss == pytest.approx(truth[0], rel=1e-6) and worst(grads, truth[1])[0] < 1e-5 and len(grads) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_all_modules_are_called(when: str) -> None:
    def hook(module: Any, args: Any, out: Any) -> Any:
        return out * 1.1 if type(module) is nn.Linear and module.out_features == 64 else None

    model = lora("llama")
    binding = bound(model) if when == "after" else None
    if binding is not None:
        step(model, **batch())
    handle = register_module_forward_hook(hook)
    try:
        binding = binding or bound(model)
        loss, grads = step(model, **batch())
        assert len(binding.reasons) == 2 and "all modules are hooked" in binding.reasons[0]
        binding.release()
        truth = step(model, **batch())
    finally:
        handle.remove()
    assert loss == pytest.approx(truth[0], rel=1e-6) and worst(grads, truth[1])[0] < 1e-5
    binding = bound(model)
    assert step(model, **batch())[0] != loss and not binding.reasons
    binding.release()


def test_two_models_with_the_same_layers() -> None:
    """The second one runs them stock; where it calls those of the first, they are brought up to date."""
    one, other = tiny_model(seed=0).train(), tiny_model(seed=1).train()
    other.model.layers = one.model.layers

    def both() -> Any:
        loss = one(**batch(), use_cache=False).loss + other(**batch(seed=4), use_cache=False).loss
        loss.backward()
        grads = {f"{i}.{n}": p.grad.clone() for i, m in enumerate((one, other)) for n, p in m.named_parameters()}
        one.zero_grad()
        other.zero_grad()
        return loss.item(), grads

    truth = both()
    bindings = [bound(one), bound(other)]
    assert not bindings[0].reasons and set(bindings[1].reasons.values()) == {"it is a layer of another patched model"}
    loss, grads = both()
    assert loss == pytest.approx(truth[0], rel=1e-6) and worst(grads, truth[1])[0] < 1e-5
    bindings[0].release()
    loss, grads = both()
    assert loss == pytest.approx(truth[0], rel=1e-6) and worst(grads, truth[1])[0] < 1e-5
    bindings[1].release()
    assert not any("forward" in vars(layer) for layer in one.model.layers)


def test_linears_that_share_one_weight() -> None:
    model = tiny_model().train()
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight = mlp.gate_proj.weight
    assert assert_exact(model).reasons == {1: "two of gate_proj, up_proj share one weight"}
    assert mlp.up_proj.weight is mlp.gate_proj.weight


# -- weights that come and go --------------------------------------------------------------------------------------------


def test_a_trained_norm_whose_parameter_is_replaced() -> None:
    def change(model: Any) -> None:
        norm = model.model.layers[0].input_layernorm
        norm.weight = nn.Parameter(norm.weight.detach() * 1.2)

    assert not assert_exact(tiny_model().train(), change, "after").reasons


@pytest.mark.parametrize("of", ["", "norm", "proj", "lora"])
def test_weights_that_are_lent_for_one_forward(of: str) -> None:
    """`functional_call` takes them back before the backward."""
    model = lora("llama") if of == "lora" else tiny_model().train()
    lent = {n: (p.detach() * 1.1).requires_grad_() for n, p in model.named_parameters() if of in n}

    def lent_step() -> Any:
        loss = functional_call(model, lent, (), {**batch(), "use_cache": False}).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in lent.items()}
        for p in lent.values():
            p.grad = None
        model.zero_grad()
        return loss.item(), grads

    truth, own = lent_step(), step(model, **batch())
    binding = bound(model)
    for _ in range(2):
        loss, grads = lent_step()
        assert loss == pytest.approx(truth[0], rel=1e-6) and worst(grads, truth[1])[0] < 1e-5
        loss, grads = step(model, **batch())
        assert loss == pytest.approx(own[0], rel=1e-6) and worst(grads, own[1])[0] < 1e-5
    assert binding.how and not binding.reasons
    binding.release()


@pytest.mark.parametrize("of", ["base_layer", "norm"])
def test_weights_that_are_lent_for_two_forwards_at_once(of: str) -> None:
    """Norms stay as each forward read them; linears do not, which is said: their gradients would be of other weights."""
    model = lora("llama")
    lent = [{n: (p.detach() * factor) for n, p in model.named_parameters() if of in n} for factor in (1.1, 0.9)]

    def both() -> dict[str, Any]:
        made = [functional_call(model, one, (), {**batch(seed=i), "use_cache": False}).loss for i, one in enumerate(lent)]
        (made[0] * 2 + made[1]).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    truth = both()
    model.zero_grad()
    binding = bound(model)
    if of == "norm":
        assert worst(both(), truth)[0] < 1e-5
    else:
        with pytest.raises(ModelError, match="were replaced, and a forward was made, between another forward and its backward"):
            both()
    model.zero_grad()
    loss, _ = step(model, **batch(), use_cache=False)
    binding.release()
    assert loss == pytest.approx(step(model, **batch(), use_cache=False)[0], rel=1e-6)


def test_the_norms_of_a_bound_layer_may_be_parametrized() -> None:
    def change(model: Any) -> None:
        nn.utils.parametrizations.weight_norm(model.model.layers[0].input_layernorm, dim=None)

    reasons = assert_exact(tiny_model().train(), change, "after").reasons
    assert reasons == {0: "the weight of a norm is made anew in each forward (pruned or parametrized)"}
