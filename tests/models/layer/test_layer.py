"""The fused layer against the stock transformers + PEFT model: loss and every LoRA gradient."""

from __future__ import annotations

import copy

import pytest
import torch

from nbkit.families import find
from nbkit.models.layer import Binding, Keep, bind
from nbkit.models.planner import Plan
from tests.models.layer.rig import batch, fill, lora, step, worst
from tests.tiny import tiny_model

FAMILIES = ("llama", "mistral", "qwen2")


def bound(model, keep: Keep | None = None) -> Binding:
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    binding = bind(causal, find(causal.config.model_type))
    binding.keep = keep
    return binding


def assert_same(model, inputs, keep=None, tolerance=1e-5):
    loss, grads = step(model, **inputs)
    binding = bound(model, keep)
    try:
        fused_loss, fused = step(model, **inputs)
        assert binding.reasons == {} and binding.how, "the fused path did not run"
    finally:
        binding.release()
    assert abs(fused_loss - loss) <= tolerance * abs(loss)
    error, name = worst(fused, grads)
    assert error <= tolerance, f"{name} differs by {error:.2e}"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_stock(family, padded):
    assert_same(lora(family), batch(padded=padded))


@pytest.mark.parametrize("level", range(5))
@pytest.mark.parametrize("tile", [None, 16, 1])
def test_every_level_and_tile_gives_the_same(level, tile):
    assert_same(lora("qwen2"), batch(padded=True), Keep(level, tile))


@pytest.mark.parametrize(
    "keep",
    [
        Keep(0, normed=True),
        Keep(2, 16, True, 2),
        Keep(3, 16, True, 1),
        Keep(4, None, True, 2),
        Keep(4, 5, False, 1),
        Keep(3, None, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_normed_rows_host_memory_head_groups_and_gradients_in_place(family, keep):
    assert_same(lora(family), batch(padded=True), keep)


@pytest.mark.parametrize("keep", [Keep(2), Keep(4, 16, True, 1), Keep(4, None, False, 2)], ids=str)
@pytest.mark.parametrize("richer", [Keep(0), Keep(0, 16), Keep(1), Keep(2, 16, False, 1), Keep(3, 16, True, 1)], ids=str)
def test_last_layers_that_keep_more_change_nothing(keep, richer):
    model, inputs = lora("llama"), batch(padded=True)
    loss, grads = step(model, **inputs)
    binding = bound(model)
    rows = inputs["input_ids"].numel()
    binding.planner.plan = Plan(keep, False, rows, 0, 0, "", richer=richer, count=1)
    assert [binding.keep_of(i) for i in range(len(binding.bound))] == [keep] * (len(binding.bound) - 1) + [richer]
    fused_loss, fused = step(model, **inputs)
    assert binding.reasons == {} and len(binding.bound) > 1
    assert float(abs(fused_loss - loss) / loss) <= 1e-5
    assert worst(fused, grads)[0] <= 1e-5


def test_host_memory_is_used_again_and_two_forwards_keep_apart():
    model = lora("llama")
    inputs, other = batch(), batch(seed=2)
    truth = [step(model, **inputs), step(model, **other)]
    binding = bound(model, Keep(4, 16, True, 1))
    first, second = model(**inputs).loss, model(**other).loss
    held = binding.host.held
    first.backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    second.backward()
    others = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert worst(mine, truth[0][1])[0] < 1e-5 and worst(others, truth[1][1])[0] < 1e-5
    del first, second
    for _ in range(3):
        step(model, **inputs)
    assert binding.host.held == held and len(binding.host.free) * binding.host.size == held
    longer = batch(rows=4, tokens=40)
    step(model, **longer)
    step(model, **inputs)
    assert binding.host.size >= 4 * 40 * model.config.hidden_size * 4
    binding.release()


def test_a_retained_graph_repeats_with_host_memory():
    model = lora("llama")
    truth = step(model, **batch())[1]
    binding = bound(model, Keep(3, None, True))
    loss = model(**batch()).loss
    for _ in range(2):
        loss.backward(retain_graph=True)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        assert worst(grads, truth)[0] < 1e-5
    binding.release()


def test_low_levels_refuse_host_memory():
    with pytest.raises(ValueError, match="levels 2 to 4"):
        Keep(1, offload=True)
    for wrong in (dict(level=1, normed=True), dict(level=0, tile=8, normed=True)):
        with pytest.raises(ValueError, match="normalised rows are kept at level 0"):
            Keep(**wrong)


@pytest.mark.parametrize(
    "case",
    [
        {"tokens": 1, "rows": 2},
        {"tokens": 1, "rows": 1},
        {"tokens": 33, "rows": 1},
    ],
)
def test_awkward_sizes(case):
    inputs = batch(**case)
    if case["tokens"] == 1:  # no label survives the shift: compare hidden states with a gradient of our own
        model = lora("llama")
        upstream = torch.randn(case["rows"], 1, 32)
        results = []
        for fused in (False, True):
            binding = bound(model) if fused else None
            out = model.get_base_model().model(inputs["input_ids"], use_cache=False).last_hidden_state
            out.backward(upstream)
            results.append((out.detach().clone(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
            model.zero_grad()
            if binding:
                binding.release()
        assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
        nonzero = {n for n, g in results[0][1].items() if g.norm() > 1e-12}
        error, name = worst({n: results[1][1][n] for n in nonzero}, {n: results[0][1][n] for n in nonzero})
        assert error < 1e-5, name
        return
    assert_same(lora("llama"), inputs)


def test_random_upstream_gradient_and_strided_input():
    model = lora("llama")
    layer = model.get_base_model().model.layers[0]
    rotary = model.get_base_model().model.rotary_emb
    wide = torch.randn(2, 7, 64)
    upstream = torch.randn(2, 7, 32).transpose(0, 1).contiguous().transpose(0, 1)
    results = []
    for fused in (False, True):
        binding = bound(model) if fused else None
        if binding:
            binding.before({"input_ids": torch.ones(1, 1, dtype=torch.int64)})
        x = wide[..., ::2].detach().requires_grad_()
        places = rotary(x, torch.arange(7)[None])
        y = (
            layer(x, position_embeddings=places, attention_mask=None)
            if fused
            else layer(x, position_embeddings=places, attention_mask=causal(7))
        )
        y.backward(upstream)
        results.append((y.detach(), x.grad))
        if binding:
            binding.release()
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)


def causal(t: int) -> torch.Tensor:
    return torch.ones(t, t, dtype=torch.bool).tril()[None, None]


def test_gradcheck_in_float64():
    """Numerical derivatives of the whole node, by input, by every LoRA matrix, and by weights that are trained beside them."""
    from nbkit.models import attention
    from nbkit.models.layer.forward import Call
    from nbkit.models.layer.function import GradientRows, LayerFunction

    model = lora(
        "qwen2", rank=2, hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1, head_dim=4
    ).double()
    layer = model.get_base_model().model.layers[0]
    for trained in (
        layer.self_attn.k_proj.base_layer.weight,
        layer.mlp.down_proj.base_layer.weight,
        layer.input_layernorm.weight,
    ):
        trained.requires_grad_(True)
    binding = bound(model)
    binding.before({"input_ids": torch.ones(1, 1, dtype=torch.int64)})
    parts = binding.bound[0].parts
    how = attention.Attend("plain", parts.scale)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = model.get_base_model().model.rotary_emb(x, torch.arange(3)[None])
    for level in (0, 4):

        def f(x, *params, level=level):
            parts.refresh()
            for group in parts.groups:  # gradcheck changes the parameters in place
                group.use(group.used._replace(terms=list(group.terms)))
            return LayerFunction.apply(x, cos, sin, None, Call(parts, Keep(level), how, 2, 3, []), GradientRows(), *params)

        assert torch.autograd.gradcheck(f, (x, *parts.parameters()), atol=1e-6, fast_mode=True)


def test_left_padding_and_given_masks_are_exact_for_real_tokens():
    inputs = batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :5] = 0
    inputs["attention_mask"] = mask
    inputs["labels"][mask == 0] = -100
    inputs["labels"][0, 5] = -100  # its prediction comes from a padded position
    assert_same(lora("llama"), inputs)


def test_packed_rows_do_not_leak():
    """Two documents in a row by position_ids: perturbing the first leaves the second's hidden states bit-identical."""
    model = lora("llama")
    binding = bound(model)
    ids = batch(rows=1, tokens=20)["input_ids"]
    places = torch.cat([torch.arange(8), torch.arange(12)])[None]
    decoder = model.get_base_model().model
    one = decoder(ids, position_ids=places, use_cache=False).last_hidden_state
    other = ids.clone()
    other[0, :8] = (ids[0, :8] + 7) % 300
    two = decoder(other, position_ids=places, use_cache=False).last_hidden_state
    assert binding.how and torch.equal(one[0, 8:], two[0, 8:]) and not torch.equal(one[0, :8], two[0, :8])
    binding.release()
    stock = decoder(ids, position_ids=places, use_cache=False).last_hidden_state
    assert torch.allclose(stock, one, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [None, Keep(4, 7, True, 1)], ids=str)
def test_packed_documents_train_as_in_stock(family, keep):
    """By positions that restart, by `cu_seq_lens_q`, and with empty documents at the end, as recorded steps have them."""
    model = lora(family)
    inputs = batch(rows=1, tokens=24)
    inputs["position_ids"] = torch.cat([torch.arange(3), torch.arange(14), torch.arange(7)])[None]
    inputs["labels"][0, [0, 3, 17]] = -100
    loss, truth = step(model, **inputs, use_cache=False)  # with a cache the stock decoder takes a pack for one document
    binding = bound(model, keep)
    starts = torch.tensor([0, 3, 17, 24], dtype=torch.int32)
    for more in ({}, {"cu_seq_lens_q": starts}, {"cu_seq_lens_q": torch.cat([starts, starts[-1:], starts[-1:]])}):
        extra = {**more, "cu_seq_lens_k": starts, "max_length_q": 14, "max_length_k": 14} if more else {}
        got, grads = step(model, **inputs, **extra)
        assert abs(got - loss) <= 1e-5 * loss and worst(grads, truth)[0] <= 2e-5
        assert any("packed documents" in how for how in binding.how)
    binding.release()


def test_positions_that_only_count_up_are_no_pack():
    model = lora("llama")
    inputs = batch()
    loss, truth = step(model, **inputs)
    binding = bound(model)
    got, grads = step(model, **inputs, position_ids=torch.arange(19)[None])
    assert abs(got - loss) <= 1e-5 * loss and worst(grads, truth)[0] <= 2e-5
    assert not any("documents" in how for how in binding.how)
    binding.release()


def test_adapters_of_mixed_rank_and_a_subset_of_the_linears():
    assert_same(lora("llama", rank_pattern={"k_proj": 3, "down_proj": 9}), batch())
    assert_same(lora("llama", targets=["q_proj", "v_proj"]), batch())
    assert_same(lora("llama", use_rslora=True), batch())


def test_switching_disabling_merging_and_adding_adapters():
    from peft import LoraConfig

    model = lora("llama")
    model.add_adapter("second", LoraConfig(r=7, lora_alpha=3, target_modules=["q_proj", "o_proj", "up_proj"]))
    fill(model, 5)
    inputs = batch()
    for name in ("second", "default"):
        model.set_adapter(name)
        stock = step(model, **inputs)
        binding = bound(model)
        assert worst(step(model, **inputs)[1], stock[1])[0] < 1e-5
        binding.release()
    binding = bound(model)
    first = step(model, **inputs)
    with model.disable_adapter():
        off = model(**inputs).loss.item()
    model.set_adapter("second")
    second = step(model, **inputs)
    model.set_adapter("default")
    again = step(model, **inputs)
    assert again[0] == first[0] and worst(again[1], first[1])[0] == 0
    model.merge_adapter()
    merged = model(**inputs).loss.item()
    model.unmerge_adapter()
    binding.release()
    with model.disable_adapter():
        assert off == pytest.approx(model(**inputs).loss.item(), rel=1e-6)
    assert merged == pytest.approx(first[0], rel=1e-5)
    model.set_adapter("second")
    assert second[0] == pytest.approx(step(model, **inputs)[0], rel=1e-6)


def test_adapter_switched_between_forward_and_backward():
    model = lora("llama")
    inputs = batch()
    binding = bound(model)
    truth = step(model, **inputs)[1]
    loss = model(**inputs).loss
    with torch.no_grad(), model.disable_adapter():
        model.get_base_model().model(inputs["input_ids"], use_cache=False)
    loss.backward()
    error, name = worst({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, truth)
    assert error == 0, name
    binding.release()


def test_a_step_of_the_optimizer_is_seen_by_the_next_forward():
    model, stock = lora("llama"), lora("llama")
    binding = bound(model)
    inputs = batch()
    losses = []
    for m in (model, stock):
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
        seen = []
        for _ in range(5):
            loss = m(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        losses.append(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0] - 0.01
    binding.release()


def test_gradients_accumulate():
    model = lora("llama")
    inputs = batch(rows=4)
    binding = bound(model)
    parts = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(4)]
    for part in parts:
        (model(**part).loss / 4).backward()
    summed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    whole = step(model, **inputs)[1]
    assert worst(summed, whole)[0] < 1e-5
    binding.release()


def test_gradient_checkpointing_becomes_level_four():
    model = lora("llama")
    inputs = batch()
    truth = step(model, **inputs)
    binding = bound(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    loss, grads = step(model, **inputs)
    assert binding.checkpointed and binding.planner.checkpointed and binding.planner.keep.level == 4
    assert not any(layer.parts.layer.gradient_checkpointing for layer in binding.bound)  # or it would repeat a layer whole
    model.gradient_checkpointing_disable()
    step(model, **inputs)
    assert not binding.checkpointed and binding.planner.keep.level == 0
    assert worst(grads, truth[1])[0] < 1e-5
    binding.release()


def test_second_backward_is_refused_and_retained_graph_repeats():
    model = lora("llama")
    binding = bound(model)
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss.backward()
    assert worst({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, first)[0] == 0
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    binding.release()


def test_release_restores_the_stock_model():
    model = lora("llama")
    before = {n: (p.clone(), p.is_contiguous()) for n, p in model.state_dict().items()}
    binding = bound(model)
    step(model, **batch())
    layer = model.get_base_model().model.layers[0]
    assert "forward" in layer.__dict__
    during = model.state_dict()
    assert all(torch.equal(during[n], p) for n, (p, _) in before.items())
    binding.release()
    assert "forward" not in layer.__dict__ and not model.get_base_model().model._forward_pre_hooks
    after = model.state_dict()
    assert all(torch.equal(after[n], p) and after[n].is_contiguous() == c for n, (p, c) in before.items())


def test_eval_and_generate_run_stock():
    model = lora("llama").eval()
    ids = batch(rows=1, tokens=6)["input_ids"]
    truth = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    binding = bound(model)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), truth)
    binding.release()


def test_a_copied_model_trains_by_itself():
    model = lora("llama")
    binding = bound(model)
    inputs = batch()
    truth = step(model, **inputs)
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data.zero_()
    assert worst(step(model, **inputs)[1], truth[1])[0] == 0
    binding.release()


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_does_not_fit_runs_stock_and_says_so(options):
    model = lora("llama", **options)
    torch.manual_seed(0)
    truth = step(model, **batch())
    binding = bound(model)
    torch.manual_seed(0)
    loss, grads = step(model, **batch())
    assert set(binding.reasons) == {0, 1} and all(binding.reasons.values())
    assert loss == truth[0] and worst(grads, truth[1])[0] == 0
    binding.release()


@pytest.mark.parametrize("keep", [None, Keep(4, 7, True, 1)], ids=str)
def test_a_trained_base_weight_beside_an_adapter(keep):
    model = lora("llama")
    model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.requires_grad_(True)
    model.get_base_model().model.layers[0].self_attn.v_proj.base_layer.weight.requires_grad_(True)
    assert_same(model, batch(), keep)


@pytest.mark.parametrize("keep", [None, Keep(0, 16), Keep(4, 16, True, 1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning(family, keep):
    """Every weight, bias and norm is trained: dW, db and the norms' own gradients, and steps that change them in place."""
    model = tiny_model(family).train()
    model.requires_grad_(True)
    inputs = batch(padded=True)
    twin = copy.deepcopy(model)
    binding = bound(model, keep)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, twin)]
    for _ in range(3):
        found = []
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            loss = m(**inputs).loss
            loss.backward()
            found.append((loss.item(), {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}))
            optimizer.step()
            optimizer.zero_grad()
        assert binding.reasons == {} and binding.how
        assert abs(found[0][0] - found[1][0]) < 1e-5 and worst(found[0][1], found[1][1])[0] < 2e-4
    binding.release()
    assert all(p.is_contiguous() for p in model.parameters())


def test_trained_biases_beside_adapters():
    model = lora("qwen2")
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.requires_grad_(True)
    assert_same(model, batch(padded=True))
    assert_same(model, batch(padded=True), Keep(3, 16))


def test_a_base_weight_unfrozen_later_gets_its_gradient():
    model = lora("llama")
    binding = bound(model)
    step(model, **batch())
    weight = model.get_base_model().model.layers[0].self_attn.k_proj.base_layer.weight
    weight.requires_grad_(True)
    grads = step(model, **batch())[1]
    assert binding.reasons == {}
    binding.release()
    assert worst(grads, step(model, **batch())[1])[0] < 1e-5 and any("k_proj.base_layer" in n for n in grads)
    weight.requires_grad_(False)
    bound(model)
    assert not any("base_layer" in n for n in step(model, **batch())[1])
    bound(model).release()


def test_the_report_tells_what_was_chosen_once_steps_ran():
    import nbkit
    from nbkit.models.layer import bind as bind_whole

    model = lora("llama")
    report = nbkit.patch(model)
    assert "attention  " not in str(report)
    bind_whole(model.get_base_model(), find("llama"))  # as `patch` does on a GPU
    step(model, **batch())
    assert "attention     plain: cpu float32" in str(report) and "memory        keep level 0" in str(report)
    nbkit.unpatch(model)
    assert "attention  " not in str(report)
