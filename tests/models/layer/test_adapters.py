"""What PEFT and others do to the parts of a fused layer: copies that are trained in place of a part, adapters switched between a
forward and its backward, forwards and hooks of other libraries. The fused layer follows, or stands back and says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nbkit.models.layer import binding_of
from nbkit.models.patch import patch, unpatch
from tests.models.layer.rig import TARGETS, batch, fill, lora, step, worst
from tests.models.layer.test_layer import bound
from tests.tiny import tiny_model

COPIES = {
    "norm": ["post_attention_layernorm"],
    "linear of a group": ["v_proj"],
    "first linear of a group": ["gate_proj"],
    "linear alone": ["down_proj"],
    "o_proj and all norms": ["o_proj", "norm"],
}


def with_copies(names: list[str], patched_first: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    if patched_first:
        bound(model)
    targets = [name for name in TARGETS if name not in names]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, modules_to_save=names))
    fill(model)
    for name, p in model.named_parameters():  # a copy that has been trained differs from its original
        if "modules_to_save" in name:
            p.data.mul_(1.25)
    return model.train()


@pytest.mark.parametrize("patched_first", [False, True])
@pytest.mark.parametrize("names", COPIES.values(), ids=COPIES)
def test_copies_that_peft_trains_are_fused(names: list[str], patched_first: bool) -> None:
    loss, truth = step(with_copies(names), **batch(padded=True))
    model = with_copies(names, patched_first)
    binding = bound(model)
    for _ in range(2):
        got, grads = step(model, **batch(padded=True))
        assert binding.reasons == {} and binding.how and abs(got - loss) < 1e-5
        assert worst(grads, truth)[0] < 1e-5 and any("modules_to_save" in name for name in grads)
    with model.disable_adapter(), torch.no_grad():
        without = model(**batch(padded=True)).loss.item()
    assert step(model, **batch(padded=True))[0] == pytest.approx(loss, abs=1e-6)
    binding.release()
    with model.disable_adapter(), torch.no_grad():
        assert model(**batch(padded=True)).loss.item() == pytest.approx(without, abs=1e-6) != pytest.approx(loss, abs=1e-3)
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("names", COPIES.values(), ids=COPIES)
def test_adapters_and_copies_disabled_between_forward_and_backward(names: list[str]) -> None:
    """As preference methods do: the reference's forward runs without adapters before the policy's backward."""
    results = []
    for fused in (False, True):
        model = with_copies(names)
        binding = bound(model) if fused else None
        loss = model(**batch()).loss
        with model.disable_adapter():
            reference = model(**batch()).loss.detach() if fused else model(**batch()).loss.detach()
        (loss * (1 + reference)).backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
        if binding is not None:
            assert binding.reasons == {}
            again = step(model, **batch())
            binding.release()
            assert worst(again[1], step(model, **batch())[1])[0] < 1e-5
    assert worst(results[1], results[0])[0] < 1e-5


def test_a_second_adapter_brings_its_own_copy() -> None:
    from peft import LoraConfig

    model = with_copies(["up_proj"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"]))
    fill(model, 3)
    binding = bound(model)
    found = []
    for name in ("second", "default", "second"):
        model.set_adapter(name)
        found.append(step(model, **batch()))
        assert binding.reasons == {}
        copies = model.get_base_model().model.layers[0].mlp.up_proj
        idle = copies.modules_to_save["default" if name == "second" else "second"].weight
        assert idle.untyped_storage().nbytes() == idle.nbytes  # it holds no buffer of a group that it has left
    binding.release()
    for name, (loss, grads) in zip(("second", "default", "second"), found, strict=True):
        model.set_adapter(name)
        wanted, truth = step(model, **batch())
        assert loss == pytest.approx(wanted, abs=1e-5) and worst(grads, truth)[0] < 1e-5


def test_steps_of_an_optimizer_over_copies() -> None:
    losses = []
    for fused in (False, True):
        model = with_copies(["o_proj", "input_layernorm"])
        binding = bound(model) if fused else None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        seen = []
        for seed in range(4):
            loss = model(**batch(seed=seed)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        losses.append(seen)
        if binding is not None:
            binding.release()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# -- what is not as its class has it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["mlp", "self_attn", "input_layernorm"])
@pytest.mark.parametrize("when", ["before", "later"])
def test_a_forward_of_another_library_is_not_passed_over(part: str, when: str) -> None:
    model = lora("llama")
    module = model.get_base_model().model.layers[1].get_submodule(part)
    binding = bound(model) if when == "later" else None
    if binding is not None:
        step(model, **batch())
    theirs = module.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        out = theirs(*args, **kwargs)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    module.forward = twice
    binding = binding or bound(model)
    loss, grads = step(model, **batch())
    assert binding.reasons.keys() == {1} and binding.reasons[1] == f"another library has bound a forward of its own to {part}"
    binding.release()
    wanted, truth = step(model, **batch())
    assert abs(loss - wanted) < 1e-5 and worst(grads, truth)[0] < 1e-5
    del module.forward
    assert abs(step(model, **batch())[0] - wanted) > 1e-4  # it makes a difference


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("path", ["mlp", "self_attn.q_proj", "self_attn.o_proj.base_layer", "mlp.up_proj.lora_A.default"])
def test_hooks_are_called_also_those_registered_between_steps(kind: str, path: str) -> None:
    model, calls = lora("llama"), []
    binding = bound(model)
    step(model, **batch())
    assert binding.everything is not None and binding.everything.fresh()
    module = model.get_base_model().model.layers[0].get_submodule(path)
    handle = getattr(module, kind)(lambda *args: calls.append(1) and None)
    step(model, **batch())
    assert calls and binding.reasons == {0: f"{path} is hooked, and a fused layer does not call it"}
    handle.remove()
    calls.clear()
    step(model, **batch())
    assert not calls and binding.reasons == {}
    binding.release()


def test_hooks_elsewhere_cost_no_second_look() -> None:
    model = lora("llama")
    binding = bound(model)
    step(model, **batch())
    torch.ones(1, requires_grad=True).register_hook(lambda gradient: None)
    nn.Linear(1, 1).register_forward_hook(lambda *args: None)
    model.get_base_model().lm_head.register_forward_hook(lambda *args: None)
    assert binding.everything is not None and binding.everything.fresh()
    binding.release()


def test_hidden_states_leave_hooks_that_do_nothing() -> None:
    """transformers leaves its capturing hooks on layers and attention for good."""
    model = lora("llama")
    binding = bound(model)
    states = model(**batch(), output_hidden_states=True).hidden_states
    step(model, **batch())
    assert len(states) == 3 and binding.reasons == {}
    binding.release()


class Packed(torch.Tensor):
    """A weight in a format of its own, as quantising libraries make them by subclassing."""


def test_weights_of_an_unknown_kind() -> None:
    model = tiny_model("llama").requires_grad_(False)
    q = model.model.layers[0].self_attn.q_proj
    q.weight = nn.Parameter(q.weight.detach().as_subclass(Packed), requires_grad=False)
    model.model.layers[1].mlp.down_proj = nn.Sequential(model.model.layers[1].mlp.down_proj)
    binding = bound(model)
    assert binding.reasons == {
        0: "a weight of q_proj, k_proj, v_proj is a Packed of tests, a format that no kernel here knows",
        1: "one of down_proj is a Sequential of torch, not a plain or NF4 linear",
    }
    binding.release()


@pytest.mark.parametrize("first", ["adapter", "patch"])
@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        (
            "AdaLora",
            {"target_modules": ["q_proj"], "total_step": 100},
            "q_proj carries an adapter of peft.tuners.adalora, which is",
        ),
        (
            "LNTuning",
            {"target_modules": ["input_layernorm"]},
            "input_layernorm carries an adapter of peft.tuners.ln_tuning, which",
        ),
    ],
)
def test_adapters_of_other_methods_that_look_like_lora_or_sit_on_norms(
    method: str, options: dict[str, Any], reason: str, first: str
) -> None:
    import peft

    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        return peft.get_peft_model(model, getattr(peft, f"{method}Config")(**options)).train()

    wanted = step(adapted(tiny_model("llama")), **batch())
    model = tiny_model("llama")
    model = adapted(model) if first == "adapter" else model
    binding = bound(model)
    model = adapted(model) if first == "patch" else model
    loss, grads = step(model, **batch())
    assert loss == wanted[0] and worst(grads, wanted[1])[0] < 1e-6
    assert [why.startswith(reason) for why in binding.reasons.values()] == [True, True]
    binding.release()


def test_a_first_forward_under_hooks_loses_no_gradient() -> None:
    """As `find_overflow` and profilers do before the first step."""
    model = lora("llama")
    wanted = step(model, **batch())
    binding = bound(model)
    handles = [m.register_forward_hook(lambda *args: None) for m in model.modules()]
    with torch.no_grad():
        model(**batch())
    assert not binding.reasons, "a forward without gradients changes nothing"
    model(**batch())
    assert set(binding.reasons) == {0, 1}
    for handle in handles:
        handle.remove()
    loss, grads = step(model, **batch())
    assert binding.how and loss == pytest.approx(wanted[0], rel=1e-5) and worst(grads, wanted[1])[0] < 1e-5
    binding.release()


def test_adapters_are_read_once_a_step_and_again_after_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded path reads them before it hands a step on; a forward that never came to the layers leaves nothing behind."""
    monkeypatch.setattr("nbkit.models.patch._fuses", lambda device: True)
    model = lora("llama")
    patch(model, graphs=True)
    model.add_adapter("other", model.peft_config["default"])
    fill(model, seed=5)
    binding = binding_of(model)
    assert binding is not None
    reads: list[int] = []
    refresh = binding.refresh
    monkeypatch.setattr(binding, "refresh", lambda: (reads.append(1), refresh())[1])
    step(model, **batch())  # a plan for more tokens than before reads them once more
    reads.clear()
    step(model, **batch())
    assert len(reads) == 1
    with torch.no_grad():
        model(**batch())
    assert len(reads) == 1, "evaluation reads none"

    def fail(*_: Any) -> None:
        raise KeyError("before the layers")

    hook = model.get_base_model().model.register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(KeyError):
        model(**batch())
    hook.remove()
    assert not binding.looked
    model.set_adapter("other")
    model.eval()  # which no recorded step reads them for
    ours = step(model, **batch())
    unpatch(model)
    loss, truth = step(model, **batch())
    assert abs(ours[0] - loss) < 1e-5 and worst(ours[1], truth)[0] < 1e-5
