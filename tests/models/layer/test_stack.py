"""All layers as one node: the same numbers as layer by layer, only where nobody looks at a layer, and nothing kept too long."""

from __future__ import annotations

import gc
import weakref
from threading import get_ident
from types import SimpleNamespace

import pytest
import torch

import nbkit
from nbkit.kernels import _launch, lora_gradients, swiglu_lora
from nbkit.models.layer import ops, room, stack
from tests.models.layer.rig import batch, fill, lora, step, worst
from tests.models.layer.test_layer import FAMILIES, bound

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture
def runs(monkeypatch):
    """How often all layers ran as one."""
    seen = []
    real = stack.forward

    def forward(call, *inputs):
        seen.append((call.batch, call.tokens))
        return real(call, *inputs)

    monkeypatch.setattr(stack, "forward", forward)
    return seen


def layer_by_layer(model, inputs):
    """A step of the fused layers one by one: a hook wants to see them."""
    layer = model.get_base_model().model.layers[1]
    hook = layer.register_forward_hook(lambda *_: None)
    try:
        return step(model, **inputs)
    finally:
        hook.remove()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_stock_and_as_layer_by_layer(family, padded, runs):
    model, inputs = lora(family), batch(padded=padded)
    stock = step(model, **inputs)
    binding = bound(model)
    loss, grads = step(model, **inputs)
    assert runs == [(3, 19)]
    single_loss, single = layer_by_layer(model, inputs)
    assert len(runs) == 1
    for other_loss, other in (stock, (single_loss, single)):
        assert abs(loss - other_loss) <= 1e-5 * loss and worst(grads, other)[0] <= 1e-5
    binding.release()


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["q_proj", "v_proj"]},
        {"targets": ["up_proj"]},
        {"targets": ["o_proj", "down_proj"]},
        {"rank_pattern": {"k_proj": 3, "down_proj": 9}},
        {"rank": 16},
        {"rank": 20, "use_rslora": True},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 5},
    ],
    ids=str,
)
def test_adapters_of_every_form(options, runs):
    model, inputs = lora("qwen2", **options), batch()
    loss, truth = step(model, **inputs)
    binding = bound(model)
    for _ in range(2):
        got, grads = step(model, **inputs)
        assert abs(got - loss) <= 1e-5 * loss and worst(grads, truth)[0] <= 1e-5
    assert len(runs) == 2
    binding.release()


def test_shapes_that_change_from_step_to_step(runs):
    model, twin = lora("llama"), lora("llama")
    binding = bound(model)
    for rows, tokens in ((3, 19), (1, 7), (3, 19), (2, 1), (1, 57), (19, 3), (3, 19), (3, 19)):
        inputs = batch(rows=rows, tokens=tokens)
        if tokens == 1:
            model.get_base_model().model(inputs["input_ids"], use_cache=False).last_hidden_state.sum().backward()
            model.zero_grad()
            continue
        (loss, grads), (want, truth) = step(model, **inputs), step(twin, **inputs)
        assert abs(loss - want) <= 1e-5 * want and worst(grads, truth)[0] <= 1e-5
    assert len(runs) == 8
    binding.release()


def test_two_forwards_before_their_backwards_and_a_retained_graph(runs):
    model = lora("llama")
    one, two = batch(), batch(seed=2)
    truth = [step(model, **one)[1], step(model, **two)[1]]
    binding = bound(model)

    def gradients(loss, **options):
        loss.backward(**options)
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    first, second = model(**one).loss, model(**two).loss
    assert worst(gradients(first, retain_graph=True), truth[0])[0] < 1e-5
    assert worst(gradients(second), truth[1])[0] < 1e-5
    third = model(**two).loss
    assert worst(gradients(first), truth[0])[0] < 1e-5
    assert worst(gradients(third), truth[1])[0] < 1e-5
    for loss in (first, second, third):
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert len(runs) == 3
    binding.release()


def test_gradients_add_up_over_micro_steps_and_follow_the_optimizer(runs):
    losses = []
    for fused in (True, False):
        model = lora("llama")
        binding = bound(model) if fused else None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        seen = []
        for i in range(6):
            for micro in range(2):
                loss = model(**batch(seed=2 * i + micro, tokens=11 + micro)).loss
                loss.backward()
                seen.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        losses.append(seen)
        if binding:
            binding.release()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(runs) == 12


def test_an_input_that_wants_a_gradient_and_parameters_that_want_none(runs):
    model, twin = lora("llama"), lora("llama")
    for m in (model, twin):
        for name, p in m.named_parameters():
            if "layers.0.self_attn.q_proj" in name or "lora_B" in name and "down_proj" in name:
                p.requires_grad_(False)
    binding = bound(model)
    found = []
    for m in (model, twin):
        embedded = m.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
        loss = m(inputs_embeds=embedded, labels=batch()["labels"]).loss
        loss.backward()
        found.append(({n: p.grad for n, p in m.named_parameters() if p.grad is not None}, embedded.grad))
    assert runs and worst(found[0][0], found[1][0])[0] < 1e-5
    (_, mine), (_, theirs) = found
    assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
    binding.release()


def test_what_autograd_has_handed_out_stays_as_it_was(runs):
    """The gradient of the last layer's output, which a hook keeps, and p.grad, over the next steps of the same shape."""
    model, inputs, kept = lora("llama"), batch(), []
    nbkit.patch(model)  # with the last norm, which begins the gradient in the rows that the layers take
    binding = bound(model)
    decoder = model.get_base_model().model

    def watch(norm, given):
        given[0].register_hook(lambda g: kept.append((g, g.clone())))

    decoder.norm.register_forward_pre_hook(watch)
    for _ in range(2):
        hidden = decoder(inputs["input_ids"], use_cache=False).last_hidden_state
        hidden.square().sum().backward()
        kept += [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
        for p in model.parameters():
            p.grad = None
    assert len(runs) == 2 and len(kept) == 2 * (1 + 2 * 7 * 2)
    assert all(torch.equal(now, then) for now, then in kept)
    binding.release()


def test_whoever_looks_at_a_layer_sees_it(runs):
    model, inputs = lora("llama"), batch()
    with torch.no_grad():
        truth = model(**inputs, output_hidden_states=True).hidden_states
    binding = bound(model)
    found = model(**inputs, output_hidden_states=True).hidden_states
    assert runs == [] and len(found) == 3
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, truth, strict=True))
    twin = lora("llama")
    other = bound(twin)
    layer = twin.get_base_model().model.layers[1]
    own, seen = layer.forward, []
    layer.forward = lambda *args, **kwargs: seen.append(1) or own(*args, **kwargs)  # another library's
    step(twin, **inputs)
    assert runs == [] and seen == [1]
    layer.forward = own
    step(twin, **inputs)
    assert len(runs) == 1
    binding.release()
    other.release()


def test_who_begins_to_look_after_some_steps_is_seen(runs):
    from nbkit.models.layer import Keep

    model, inputs = lora("llama"), batch()
    binding, layer = bound(model), model.get_base_model().model.layers[1]
    for _ in range(3):
        step(model, **inputs)
    assert len(runs) == 3
    seen = []
    hook = layer.register_forward_hook(lambda *_: seen.append("hook"))
    step(model, **inputs)
    hook.remove()
    step(model, **inputs)
    own = layer.forward
    layer.forward = lambda *args, **kwargs: seen.append("forward") or own(*args, **kwargs)
    step(model, **inputs)
    layer.forward = own
    step(model, **inputs)
    keep, binding.keep = binding.keep, Keep(1)
    step(model, **inputs)
    binding.keep = keep
    step(model, **inputs)
    assert seen == ["hook", "forward"] and len(runs) == 6
    binding.release()


@pytest.mark.parametrize("change", ["a norm", "a layer without an adapter", "a shorter decoder", "many tokens", "less is kept"])
def test_layers_that_differ_go_one_by_one(change, runs, monkeypatch):
    from nbkit.models.layer import Keep

    model, inputs = lora("llama", num_hidden_layers=3), batch()
    if change == "a norm":
        model.get_base_model().model.layers[2].input_layernorm.weight.requires_grad_(True)
    elif change == "a layer without an adapter":
        layer = model.get_base_model().model.layers[1]
        layer.mlp.up_proj = layer.mlp.up_proj.base_layer
    elif change == "a shorter decoder":
        model.config.num_hidden_layers = 2
    elif change == "many tokens":
        monkeypatch.setattr(stack, "PACE", 57.0)
    stock = step(model, **inputs)
    binding = bound(model, Keep(1) if change == "less is kept" else None)
    loss, grads = step(model, **inputs)
    assert runs == [] and abs(loss - stock[0]) <= 1e-5 * loss and worst(grads, stock[1])[0] <= 1e-5
    binding.release()


def test_adapters_switched_between_forward_and_backward(runs):
    from peft import LoraConfig

    model = lora("llama")
    model.add_adapter("second", LoraConfig(r=7, lora_alpha=3, target_modules=["q_proj", "o_proj", "up_proj"]))
    fill(model, 5)
    model.set_adapter("default")
    inputs = batch()
    truth = step(model, **inputs)[1]
    binding = bound(model)
    loss = model(**inputs).loss
    model.set_adapter("second")
    model(**inputs).loss.item()
    for p in model.parameters():
        p.grad = None
    model.set_adapter("default")
    loss.backward()
    assert worst({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, truth)[0] < 1e-5
    assert len(runs) == 2
    binding.release()


def test_weights_changed_between_forward_and_backward_are_said(runs):
    model, inputs = lora("llama"), batch()
    binding = bound(model)
    weight = next(p for p in model.parameters() if p.requires_grad)
    loss = model(**inputs).loss
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()
    model(**inputs).loss.backward()
    assert len(runs) == 2 and weight.grad is not None
    binding.release()


def test_what_is_kept_is_used_again_by_the_next_step_and_given_back(runs, monkeypatch):
    """While the loss lives on, as it does in a training loop; not before its backward is through, and not under no_grad."""
    model, inputs = lora("llama"), batch()
    made = []
    real = stack.Slabs.__init__

    def init(self, *args):
        real(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(room.Slabs, "__init__", init)
    binding = bound(model)
    for _ in range(4):
        loss = model(**inputs).loss
        loss.backward()
    assert len(made) == 1 and loss.grad_fn is not None
    first = model(**inputs).loss
    second = model(**inputs).loss
    assert len(made) == 2
    second.backward()
    assert made[1]() is None and made[0]() is not None
    first.backward(retain_graph=True)
    model(**inputs).loss.backward()
    assert len(made) == 3, "the graph of the first is still there"
    first.backward()
    with torch.no_grad():
        model(**inputs)
    assert not any(one() for one in made)
    loss = model(**inputs).loss
    loss.backward()
    del loss, first, second
    binding.release()
    gc.collect()
    assert len(runs) == 8 and not any(one() for one in made) and binding.stacks.room is None


@pytest.mark.skipif(not _launch.LEAN or _launch.INTERPRETED, reason="launches are Triton's own here")
def test_prepared_launches_are_those_that_the_functions_would_make(monkeypatch):
    """Every address and number, layer by layer, for shapes that return: nothing is launched, all tensors hold what they held."""
    hooks = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    monkeypatch.setattr(_launch, "_driver", lambda: (lambda: -1, lambda device: 0, hooks))
    monkeypatch.setattr(_launch, "runs_on", lambda device: True)
    monkeypatch.setattr(ops, "fits", lambda *_: True)
    monkeypatch.setattr(swiglu_lora, "fits", lambda *_: True)
    monkeypatch.setattr(lora_gradients, "fits", lambda *_: True)

    def make(self, key, grid, args, constants):
        fixed = self.jit.arg_names[len(args) :]
        self.made[key] = _launch.Found(lambda *_: None, key, tuple(constants[n] for n in fixed))

    monkeypatch.setattr(_launch.Launcher, "_make", make)
    real, checked = _launch.Layered.__call__, []

    def call(placed, layer, *given):
        self = placed.prepared
        if self.found is None:
            return real(placed, layer, *given)
        seen = _launch._SEEN[get_ident()] = []
        try:
            self.fn(*placed.all_of(layer, given))
        finally:
            del _launch._SEEN[get_ident()]
        real(placed, layer, *given)
        for (found, grid, args, _), ready in zip(seen, self.found, strict=True):
            last = len(ready.held) - len(found.fixed)
            ours = [
                (a.data_ptr() if isinstance(a, torch.Tensor) else a, ready.held[k])
                for k, a in enumerate(args, last - len(args))
                if not any(a is one for one in ready.kept)
                and (not isinstance(a, torch.Tensor) or a.numel() and k in {place for place, _, _ in ready.slots})
            ]
            assert found.launch is ready.launch and [*grid, 1, 1][:3] == ready.arguments[:3] and all(a == b for a, b in ours)
            assert (*ready.arguments[4:], *ready.held)[: len(found.before)] == found.before and len(ours) > 3
            assert (*ready.held[last:],) == found.fixed
            checked.append((self, bool(placed.launches)))
        return None

    monkeypatch.setattr(_launch.Layered, "__call__", call)
    model = lora("llama", rank=16, num_hidden_layers=4, **SIZES)
    binding = bound(model)
    for tokens in (8, 11):
        checked.clear()
        for seed in range(5):
            loss = model(**batch(rows=2, tokens=tokens, seed=seed)).loss
            loss.backward()
        made = binding.stacks.room
        rest = (made.first_back, made.last_back)
        sites = [one for one in vars(made).values() if isinstance(one, _launch.Prepared) and one not in rest]
        assert len(sites) == 10 and {(site, True) for site in sites} <= set(checked) and made.first_back.found is not None
    binding.release()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_all_layers(reentrant, runs):
    """torch's own: what the layers save is made again when the backward asks for it, in the midst of that backward."""
    from torch.utils.checkpoint import checkpoint

    model, inputs = lora("llama"), batch()
    decoder = model.get_base_model().model
    embedded = decoder.embed_tokens(inputs["input_ids"]).detach()
    upstream = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(1))

    def grads():
        x = embedded.clone().requires_grad_()
        for _ in range(2):
            hidden = checkpoint(lambda x: decoder(inputs_embeds=x, use_cache=False).last_hidden_state, x, use_reentrant=reentrant)
            (hidden * upstream).sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}
        model.zero_grad(set_to_none=True)
        return found

    stock = grads()
    binding = bound(model)
    assert worst(grads(), stock)[0] < 1e-5 and binding.how
    binding.release()


def test_saved_tensors_are_handed_to_whoever_wants_to_keep_them(runs):
    """As `torch.autograd.graph.save_on_cpu` does: nothing of them may be held beside."""
    model, inputs = lora("llama"), batch()
    stock = step(model, **inputs)
    binding = bound(model)
    step(model, **inputs)
    held = []

    def pack(t):
        held.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**inputs).loss
    assert len(runs) == 1, "only the step before"
    assert len(held) > 20
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert worst(grads, stock[1])[0] < 1e-5
    binding.release()
