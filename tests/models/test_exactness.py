"""Loss and every gradient of the patched model are the stock one's: over fifty steps, split batches, and inputs out of the way.

Each model is tried twice: with its parts bound one by one, and with whole layers fused, which a CPU runs through the
references. The last tests count launches on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import nbkit
from nbkit.errors import ModelError
from nbkit.families import all_families, find
from nbkit.kernels import all_ops, lora_gradients, swiglu_lora
from nbkit.models.certify_kernels import case_of, compare, launched
from nbkit.models.layer import Keep, bind, binding_of
from tests.closeness import assert_all_like_stock, assert_like_stock, assert_no_drift
from tests.models.layer.rig import TARGETS, batch, fill, lora
from tests.tiny import VOCAB, tiny_model

FAMILIES = [family.name for family in all_families() if family.mlp.activation == "silu"]
WAYS = ["parts", "layers"]


def patched(model: Any, way: str) -> Any:
    nbkit.patch(model)
    if way == "layers":
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        bind(base, find(base.config.model_type))
    return model


def fused(model: Any) -> bool:
    binding = binding_of(model)
    return binding is not None and not binding.reasons


def results(model: Any, run: Callable[[Any], torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What `run` gives under a fixed random state, and every gradient."""
    torch.manual_seed(11)
    value = run(model)
    value.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return value.detach(), grads


def assert_exact(model: Any, way: str, run: Callable[[Any], torch.Tensor]) -> Any:
    """`run(model)` and all gradients of it, stock and then patched, within 1e-5 of the largest element. The patched model."""
    value, grads = results(model, run)
    patched(model, way)
    ours, found = results(model, run)
    assert_like_stock("loss", ours, value)
    nonzero = {n for n, g in grads.items() if g.any()}
    assert nonzero and {n for n, g in found.items() if g.any()} == nonzero
    assert_all_like_stock({n: found[n] for n in nonzero}, {n: grads[n] for n in nonzero})
    return model


def loss_of(**inputs: Any) -> Callable[[Any], torch.Tensor]:
    return lambda model: model(**inputs, use_cache=False).loss


# -- many steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_steps_do_not_drift(family: str, way: str) -> None:
    losses = []
    for model in (lora(family), patched(lora(family), way)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
        seen = []
        for number in range(50):
            loss = model(**batch(rows=2, tokens=17, seed=number, padded=True), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        losses.append(seen)
    assert_no_drift(losses[1], losses[0])
    assert fused(model) is (way == "layers")


@pytest.mark.parametrize("way", WAYS)
def test_a_step_split_into_micro_batches_has_one_loss(way: str) -> None:
    """8 x 1, 4 x 2, 2 x 4 and 1 x 8 rows with unequal label counts."""
    model = patched(lora("llama"), way)
    inputs = batch(rows=8, tokens=21)
    for row in range(8):
        inputs["labels"][row, : 2 * row + 1] = -100
    items = int((inputs["labels"][:, 1:] != -100).sum())

    def in_parts(size: int) -> Callable[[Any], torch.Tensor]:
        parts = [{k: v[at : at + size] for k, v in inputs.items()} for at in range(0, 8, size)]
        return lambda model: sum(model(**part, num_items_in_batch=items, use_cache=False).loss for part in parts)  # type: ignore[return-value]

    loss, grads = results(model, in_parts(8))
    for size in (1, 2, 4):
        split, found = results(model, in_parts(size))
        assert_like_stock("loss", split, loss)
        assert_all_like_stock(found, grads)
    stock = lora("llama")
    assert_like_stock("stock", loss, results(stock, loss_of(**inputs))[0])


# -- inputs out of the way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_odd_sizes_and_whole_rows_ignored(family: str, way: str) -> None:
    inputs = batch(rows=3, tokens=23, padded=True)
    inputs["labels"][1] = -100
    inputs["labels"][2, :9] = -100
    assert fused(assert_exact(lora(family, rank=5), way, loss_of(**inputs))) is (way == "layers")


@pytest.mark.parametrize("way", WAYS)
def test_random_upstream_gradients_through_logits_and_hidden_states(way: str) -> None:
    ids = batch(rows=2, tokens=13)["input_ids"]
    upstream = torch.randn(2, 13, VOCAB, generator=torch.Generator().manual_seed(3))

    def through_logits(model: Any) -> torch.Tensor:
        return (model(input_ids=ids, use_cache=False).logits * upstream).sum()

    def through_lazy_logits(model: Any) -> torch.Tensor:
        outputs = model(input_ids=ids, labels=ids, use_cache=False)
        with torch.no_grad():
            assert outputs.logits.shape == upstream.shape  # as a metric reads them: the next reading still has a gradient
        return outputs.loss + (outputs.logits * upstream).sum()

    def through_hidden_states(model: Any) -> torch.Tensor:
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        return sum((state * upstream[..., :32]).sum() for state in states)  # type: ignore[return-value]

    for run in (through_logits, through_lazy_logits, through_hidden_states):
        assert_exact(lora("qwen2"), way, run)


@pytest.mark.parametrize("way", WAYS)
def test_tensors_that_are_not_contiguous(way: str) -> None:
    wide = batch(rows=6, tokens=30)
    inputs = {"input_ids": wide["input_ids"].t()[::2][:11].t(), "labels": wide["labels"].t()[::2][:11].t()}
    assert not inputs["input_ids"].is_contiguous()
    assert_exact(lora("llama"), way, loss_of(**inputs))
    embedded = torch.randn(2, 64, 9, generator=torch.Generator().manual_seed(1)).transpose(1, 2)[..., ::2]
    labels = batch(rows=2, tokens=9)["labels"]
    assert_exact(lora("llama"), way, loss_of(inputs_embeds=embedded, labels=labels))


@pytest.mark.parametrize("way", WAYS)
def test_one_token(way: str) -> None:
    """No label survives the shift, so the gradient comes from the logits."""
    ids = batch(rows=2, tokens=1)["input_ids"]
    upstream = torch.randn(2, 1, VOCAB, generator=torch.Generator().manual_seed(3))
    assert_exact(lora("llama"), way, lambda model: (model(input_ids=ids, use_cache=False).logits * upstream).sum())
    assert patched(lora("llama"), way)(input_ids=ids, labels=ids).loss == 0


@pytest.mark.parametrize("way", WAYS)
def test_left_padding(way: str) -> None:
    inputs = batch(rows=3, tokens=18)
    mask = torch.ones_like(inputs["input_ids"])
    for row in range(3):
        mask[row, : 3 * row] = 0
    inputs["labels"][mask == 0] = -100
    assert_exact(lora("mistral"), way, loss_of(**inputs, attention_mask=mask))


# -- adapters of every form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.3}, {"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"k_proj": 1, "down_proj": 9}}],
    ids=lambda options: next(iter(options)),
)
def test_forms_of_lora(options: dict[str, Any], way: str) -> None:
    """Dropout draws the same masks, since the random state is the same."""
    assert_exact(lora("llama", **options), way, loss_of(**batch(padded=True)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(bias: str, way: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("qwen2"), LoraConfig(r=4, target_modules=TARGETS, bias=bias))  # type: ignore[arg-type]
    fill(model)
    model = assert_exact(model.train(), way, loss_of(**batch()))
    assert any(n.endswith("q_proj.base_layer.bias") and p.requires_grad for n, p in model.named_parameters())


@pytest.mark.parametrize("way", WAYS)
def test_several_adapters_and_none(way: str) -> None:
    from peft import LoraConfig

    def made() -> Any:
        model = lora("llama")
        model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj", "down_proj"]))
        fill(model, 5)
        return model

    stock, model, run = made(), patched(made(), way), loss_of(**batch(padded=True))
    for name in ("default", "second", "default"):
        for one in (stock, model):
            one.set_adapter(name)
        (wanted, grads), (ours, found) = results(stock, run), results(model, run)
        assert_like_stock(name, ours, wanted)
        assert_all_like_stock(found, grads)
    with stock.disable_adapter(), model.disable_adapter(), torch.no_grad():
        assert_like_stock("without adapters", run(model), run(stock))
    for one in (stock, model):
        one.base_model.set_adapter(["default", "second"])
    (wanted, grads), (ours, found) = results(stock, run), results(model, run)
    assert_like_stock("both at once", ours, wanted)
    assert_all_like_stock(found, grads)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning(family: str, way: str) -> None:
    model = assert_exact(tiny_model(family, tie_word_embeddings=True).train(), way, loss_of(**batch(padded=True)))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert results(model, loss_of(**batch(padded=True)))[1].keys() == trained


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_and_generation_after_training(way: str) -> None:
    stock, model = lora("llama").eval(), patched(lora("llama"), way).eval()
    inputs = batch(rows=2, tokens=8)
    wanted = stock.generate(input_ids=inputs["input_ids"], max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(input_ids=inputs["input_ids"], max_new_tokens=6, do_sample=False), wanted)
    with torch.no_grad():
        assert_like_stock("loss", model(**inputs).loss, stock(**inputs).loss)
        assert_like_stock("logits", model(**inputs).logits, stock(**inputs).logits)


# -- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_an_empty_batch_is_refused(way: str, shape: tuple[int, int]) -> None:
    ids = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ModelError, match=rf"The batch is empty \(input_ids of shape \({shape[0]}, {shape[1]}\)\); give at least"):
        patched(lora("llama"), way)(input_ids=ids, labels=ids)


def test_rows_longer_than_the_positions_are_warned_of() -> None:
    model = tiny_model(max_position_embeddings=16)
    nbkit.patch(model)
    ids = batch(rows=1, tokens=20)["input_ids"]
    with pytest.warns(UserWarning, match="Rows of 20 tokens are longer than the 16 positions of this model"):
        model(input_ids=ids, labels=ids)
    places = torch.cat([torch.arange(8), torch.arange(12)])[None]
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, labels=ids, position_ids=places)  # a pack of shorter rows
        model(input_ids=ids[:, :16], labels=ids[:, :16])


# -- on a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("four_bit", [False, True], ids=["bf16", "nf4"])
def test_every_op_that_a_certificate_names_is_launched_in_a_real_step(four_bit: bool) -> None:
    """Counted by the profiler in an eager step and in a recorded one, which replays the very same kernels."""
    from torch.profiler import ProfilerActivity, profile

    from tests.models.layer.test_layer_gpu import lora_on_gpu

    model = lora_on_gpu(dtype=torch.bfloat16, four_bit=four_bit)
    base = model.get_base_model()
    report = nbkit.patch(model)
    binding_of(base).keep = Keep(0)  # type: ignore[union-attr]  # and no 16-bit copy of NF4 weights
    inputs = {k: v.cuda() for k, v in batch(tokens=64).items()}
    claimed = {op.name for op in all_ops() if launched(op.name, base, {one.op for one in report.bound})}
    both = {"swiglu_lora", "lora_gradients"} if torch.cuda.get_device_capability() >= (8, 0) else {"swiglu"}
    assert {"rms_norm", "rope", "linear_cross_entropy", "rope_pack", "nf4" if four_bit else "lora_border"} | both <= claimed
    assert ("nf4" in claimed) is four_bit
    counted = profiled(model, inputs)
    for name in sorted(claimed):
        kernels = kernels_of(name)
        for way, counts in zip(("eager", "recorded"), counted, strict=True):
            assert any(kernel in counts for kernel in kernels), f"{name}: none of {sorted(kernels)} in the {way} step"
    assert any("graph" in key.lower() for key in counted[1]) or sum(counted[1].values()) > 20
    nbkit.unpatch(model)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        model(**inputs).loss.backward()
    ours = set().union(*(kernels_of(name) for name in claimed))
    assert not ours & {event.key for event in seen.key_averages()}


def profiled(model: Any, inputs: dict[str, torch.Tensor]) -> list[dict[str, int]]:
    """Launches by the name of the kernel, in an eager step and in a recorded one."""
    from torch.profiler import ProfilerActivity, profile

    counted = []
    for number in range(6):
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            model(**inputs).loss.backward()
            torch.cuda.synchronize()
        model.zero_grad()
        if number in (1, 5):
            counted.append({event.key: event.count for event in seen.key_averages()})
    return counted


ATTENTION, MLP = TARGETS[:4], TARGETS[4:]
SEVERAL = ("swiglu", "swiglu_lora", "lora_gradients")  # of which a step takes one or more, by what LoRA is on
# LoRA's targets and rank, and what of SEVERAL a fused layer launches then, in 16 bits on a GPU with tensor cores for them.
ADAPTED = {
    "everything": (TARGETS, 8, {"swiglu_lora", "lora_gradients"}),
    "attention alone": (ATTENTION, 8, {"swiglu", "lora_gradients"}),
    "the MLP alone": (MLP, 16, {"swiglu_lora", "lora_gradients"}),
    "gate and up": (MLP[:2], 8, {"swiglu", "swiglu_lora", "lora_gradients"}),
    "down": (MLP[2:], 64, {"swiglu_lora", "lora_gradients"}),
    "a rank too high for one": (TARGETS, 80, {"swiglu", "lora_gradients"}),
    "a rank too high for both": (MLP, 264, {"swiglu"}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "one by one"])
@pytest.mark.parametrize("case", ADAPTED)
def test_what_makes_the_activation_is_named_as_it_is_launched(case: str, stacked: bool) -> None:
    targets, rank, wanted = ADAPTED[case]
    model = lora("llama", rank=rank, targets=targets, hidden_size=256, intermediate_size=512, head_dim=64)
    model.get_base_model().bfloat16()
    model = model.cuda()
    base = model.get_base_model()
    report = nbkit.patch(model)
    binding = binding_of(base)
    assert binding is not None
    binding.keep = Keep(0, normed=stacked)
    if not stacked:
        base.model.layers[0].register_forward_hook(lambda *_: None)  # somebody looks at a layer
    for counts in profiled(model, {k: v.cuda() for k, v in batch(tokens=64).items()}):
        assert {name for name in SEVERAL if kernels_of(name) & counts.keys()} == wanted
    claimed = {name for name in SEVERAL if launched(name, base, {one.op for one in report.bound})}
    assert claimed == wanted


@pytest.mark.parametrize("case", ADAPTED)
def test_the_cases_of_a_certificate_are_those_of_the_model(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and cases as on a GPU; the cases themselves are then compared through what a CPU takes in place of the kernels."""
    targets, rank, wanted = ADAPTED[case]
    base = lora("llama", rank=rank, targets=targets, hidden_size=256, intermediate_size=512, head_dim=64).get_base_model()
    base.bfloat16()
    bound = {one.op for one in nbkit.patch(base).bound}
    assert {name for name in SEVERAL if launched(name, base, bound)} == {"swiglu"}  # part by part
    bind(base, find("llama")).refresh()
    assert {name for name in SEVERAL if launched(name, base, bound)} == {"swiglu"}  # a CPU launches nothing
    with monkeypatch.context() as gpu:
        for op in (swiglu_lora, lora_gradients):
            gpu.setattr(op, "use_triton", lambda x: x.dtype == torch.bfloat16)
        assert {name for name in SEVERAL if launched(name, base, bound)} == wanted
        cases = [(op, case_of(op, base, find("llama"), torch.Size((2, 9)))) for op in all_ops() if op.name in wanted]
    for op, one in cases:
        rows = compare(op, one, torch.bfloat16, torch.device("cpu"), True)
        assert one.sizes["N"] == 18 and rows and all(row.ok for row in rows), op.name
        if op.name == "swiglu_lora":
            assert one.sizes["R"] == one.options["gate_rank"] == rank
            assert one.options["scales"] == ((1.0, 1.0) if case == "down" else (6 / rank, 6 / rank))
        if op.name == "lora_gradients":
            ends = [(thin[1], wide[1]) for thin, wide, _ in one.options["spans"]]
            assert ends[-1] == (one.sizes["R"], one.sizes["C"]) and one.options["scale"] == 6 / rank
            assert sum(turned for _, _, turned in one.options["spans"]) == len([t for t in targets if t in ATTENTION] or targets)


def test_layers_that_run_part_by_part_launch_swiglu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of two has an adapter that does not fit; then all stand aside."""
    base = lora("llama").get_base_model()
    base.bfloat16()
    bound = {one.op for one in nbkit.patch(base).bound}
    binding = bind(base, find("llama"))
    base.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    binding.refresh()
    assert list(binding.reasons) == [1]
    for op in (swiglu_lora, lora_gradients):
        monkeypatch.setattr(op, "use_triton", lambda x: True)
    assert {name for name in SEVERAL if launched(name, base, bound)} == set(SEVERAL)
    binding.stands_aside = True
    assert {name for name in (*SEVERAL, "rope_pack", "rope") if launched(name, base, bound)} == {"swiglu", "rope"}


def kernels_of(op: str) -> set[str]:
    """The names of the Triton functions in an op's file."""
    import ast
    import importlib
    import inspect
    from pathlib import Path

    module = importlib.import_module(f"nbkit.kernels.{op}")
    tree = ast.parse(Path(inspect.getfile(module)).read_text(encoding="utf-8"))
    marks = ("kernel", "jit")
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any(isinstance(d, ast.Name) and d.id in marks for d in node.decorator_list)
    }


def test_the_kernels_of_an_op_are_found_in_its_file() -> None:
    assert {"_rms_norm_forward_kernel", "_rms_norm_backward_kernel"} <= kernels_of("rms_norm")
    assert "_dequantize_rows" in kernels_of("nf4")


def test_a_copy_of_a_patched_model_is_no_part_of_it() -> None:
    model = patched(lora("llama"), "layers")
    twin = copy.deepcopy(model)
    wanted = results(model, loss_of(**batch()))
    for p in twin.parameters():
        p.data.zero_()
    again = results(model, loss_of(**batch()))
    assert torch.equal(again[0], wanted[0]) and all(torch.equal(again[1][n], wanted[1][n]) for n in wanted[1])
