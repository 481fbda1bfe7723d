"""What a patched model is given and what it gives: labels on padding, refusals in one sentence, outputs by any key."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from nbkit.errors import ModelError
from nbkit.families import all_families
from nbkit.models.forwards import require_same_gpu
from nbkit.models.layer import binding_of
from tests.closeness import assert_like_stock
from tests.models.layer.rig import batch, lora
from tests.models.test_exactness import WAYS, assert_exact, fused, loss_of, patched

FAMILIES = [family.name for family in all_families() if family.mlp.activation == "silu"]


# -- labels and masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_on_padding_are_as_in_stock(family: str) -> None:
    """labels = input_ids, as many a loop has it: padded tokens are queries whose loss counts, and stock masks their keys."""
    inputs = batch(padded=True)
    inputs["labels"] = inputs["input_ids"].clone()
    assert fused(assert_exact(lora(family), "layers", loss_of(**inputs)))


@pytest.mark.parametrize("mask", [torch.ones(3, 17), torch.zeros(3, 19, dtype=torch.long)], ids=["short", "zeros"])
def test_masks_that_are_odd_are_read_as_in_stock(mask: torch.Tensor) -> None:
    assert_exact(lora("llama"), "layers", loss_of(**batch(), attention_mask=mask))


def test_right_padding_without_labels_still_needs_no_mask() -> None:
    model = patched(lora("llama"), "layers")
    model(**batch(padded=True)).loss.backward()
    binding = binding_of(model)
    assert binding is not None and not any("mask" in how for how in binding.how)


# -- refusals ------------------------------------------------------------------------------------------------------------

IDS = batch(2, 11)["input_ids"]
ODD = [
    ({"labels": IDS.float()}, "labels are torch.float32; give whole numbers (int64), -100 where no loss is wanted."),
    ({"labels": IDS.bool()}, "labels are torch.bool; give whole numbers (int64), -100 where no loss is wanted."),
    ({"labels": IDS.tolist()}, "labels are a list; give a tensor of shape (rows, tokens)."),
    (
        {"labels": IDS[:, :-1]},
        "labels are of shape (2, 10) and the batch of (2, 11); give one label for each token, -100 for none",
    ),
    ({"labels": IDS[0]}, "labels are of shape (11,) and the batch of (2, 11); give one label for each token, -100 for none"),
    (
        {"labels": IDS.clone().index_fill_(1, torch.tensor([4]), 320)},
        "The label 320 in row 0, token 4 is none of the 320 known tokens",
    ),
    (
        {"labels": IDS.clone().index_fill_(1, torch.tensor([7]), -5)},
        "The label -5 in row 0, token 7 is none of the 320 known tokens",
    ),
    (
        {"input_ids": IDS[0], "labels": IDS[0]},
        "input_ids are of shape (11,); give (rows, tokens), input_ids[None] for a single row.",
    ),
    ({"input_ids": None}, "The batch has no tokens; give input_ids or inputs_embeds."),
    (
        {"input_ids": None, "inputs_embeds": torch.zeros(0, 4, 32), "labels": IDS[:0, :4]},
        "The batch is empty (inputs_embeds of shape (0, 4, 32)); give at least one row of one token.",
    ),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("given", "sentence"), ODD, ids=range(len(ODD)))
def test_batches_that_are_refused(given: dict[str, Any], sentence: str, way: str) -> None:
    with pytest.raises(ModelError) as caught:
        patched(lora("llama"), way)(**{"input_ids": IDS, "labels": IDS} | given)
    assert str(caught.value).startswith(sentence) and str(caught.value).count(". ") == 0


@pytest.mark.parametrize("ids", [IDS[:0], IDS[0]], ids=["empty", "one axis"])
def test_batches_without_labels_that_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="The batch is empty|input_ids are of shape"):
        patched(lora("llama"), "layers")(input_ids=ids)


def test_tokens_on_another_gpu() -> None:
    """As the replicas of nn.DataParallel have them, all of which run the forward of the one model that was patched."""
    one, other = torch.device("cuda", 0), torch.device("cuda", 1)
    for tokens, embedding in ((one, one), (torch.device("cpu"), one), (one, torch.device("cpu"))):
        require_same_gpu(tokens, embedding)  # the last: an embedding that is parked in host RAM
    with pytest.raises(ModelError, match="The tokens are on cuda:1 and the model is on cuda:0; .*nn.DataParallel"):
        require_same_gpu(other, one)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_labels_of_other_whole_numbers(dtype: torch.dtype) -> None:
    model = patched(lora("llama"), "layers")
    assert model(input_ids=IDS, labels=IDS.to(dtype)).loss == model(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize("way", WAYS)
def test_an_activation_that_is_replaced_later(way: str) -> None:
    stock, model = lora("llama"), patched(lora("llama"), way)
    for one in (stock, model):
        for layer in one.get_base_model().model.layers:
            layer.mlp.act_fn = torch.nn.ReLU()
    assert_like_stock("loss", model(**batch()).loss, stock(**batch()).loss)


# -- outputs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_logits_by_any_key(training: bool) -> None:
    stock, model = lora("llama").train(training), patched(lora("llama"), "layers").train(training)
    wanted, outputs = stock(**batch(), use_cache=False), model(**batch(), use_cache=False)
    for key in ("logits", 1, slice(1, 2)):
        got, truth = (one[key] for one in (outputs, wanted))
        for a, b in zip(got, truth, strict=True) if isinstance(key, slice) else [(got, truth)]:
            assert_like_stock("logits", a, b)
    assert_like_stock("logits", outputs.get("logits"), wanted.logits)
    assert_like_stock("loss", outputs[0], wanted[0])
    with pytest.raises(KeyError):
        outputs["attentions"]


@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_copied_and_pickled_as_transformers_own(training: bool) -> None:
    stock, model = lora("llama").train(training), patched(lora("llama"), "layers").train(training)
    wanted, outputs = stock(**batch(), use_cache=False), model(**batch(), use_cache=False)
    for one in (copy.copy(outputs), pickle.loads(pickle.dumps(outputs))):
        assert type(one) is type(wanted) and one.loss.requires_grad
        assert_like_stock("loss", one.loss, wanted.loss)
        assert_like_stock("logits", one.logits, wanted.logits)
    copy.copy(outputs).loss.backward()
    wanted.loss.backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        if theirs.grad is not None:
            assert_like_stock(name, ours.grad, theirs.grad)


# -- torch.func ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_transforms_of_functions_are_refused_in_a_sentence(way: str) -> None:
    model = patched(lora("llama"), way)
    lent = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    inputs = batch()
    with pytest.raises(ModelError, match=r"torch.func.*nbkit.unpatch\(model\)"):
        torch.func.grad(lambda given: torch.func.functional_call(model, given, (), inputs).loss)(lent)
    with pytest.raises(ModelError, match=r"torch.func.*nbkit.unpatch\(model\)"):
        torch.func.vmap(lambda ids: model(input_ids=ids[None]).logits)(inputs["input_ids"])
    model(**inputs).loss.backward()  # and nothing is left of it


@pytest.mark.parametrize("way", WAYS)
def test_a_patched_model_that_is_compiled_runs_as_it_is(way: str) -> None:
    stock, model = lora("llama"), patched(lora("llama"), way)
    wanted = stock(**batch(padded=True), use_cache=False)
    wanted.loss.backward()
    compiled = torch.compile(model, backend="eager")
    outputs = compiled(**batch(padded=True), use_cache=False)
    outputs.loss.backward()
    assert_like_stock("loss", outputs.loss, wanted.loss)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        if theirs.grad is not None:
            assert_like_stock(name, ours.grad, theirs.grad)
    compiled.get_base_model().model(batch()["input_ids"])[0].sum().backward()
