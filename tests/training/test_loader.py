"""Which rows come when: every row once an epoch, one order for one seed, and the same tokens whatever the switches."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import pytest
import torch

import nbkit
from nbkit.config import IGNORE_INDEX
from nbkit.data.collate import PackCollator
from nbkit.errors import ConfigError, TrainingError
from nbkit.events import StepEvent
from nbkit.training import loader
from nbkit.training.loader import BucketedBatches, PackedBatches
from nbkit.training.runner import Run
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training import rig

SWITCHES: list[dict[str, Any]] = [
    {"batch_size": 8},
    {"batch_size": 4, "gradient_accumulation": 2},
    {"batch_size": 1, "gradient_accumulation": 8},
    {"batch_size": 3},
    {"packing": True, "pack_tokens": 100},
    {"packing": True, "pack_tokens": 64, "gradient_accumulation": 3},
    {"packing": True, "batch_size": 2},
]


def lengths(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def epoch(batches: Any, number: int = 0) -> list[list[int]]:
    batches.set_epoch(number)
    return list(batches)


def documents(batch: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(ids, labels) of each row of a batch, the padding taken off."""
    if "attention_mask" in batch:
        real = batch["attention_mask"].sum(1).tolist()
        return [
            (tuple(ids[:n].tolist()), tuple(labels[:n].tolist()))
            for ids, labels, n in zip(batch["input_ids"], batch["labels"], real, strict=True)
        ]
    edges = batch["cu_seq_lens_q"].tolist()
    found = []
    for start, end in zip(edges, edges[1:], strict=False):
        assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
        found.append((tuple(batch["input_ids"][0, start:end].tolist()), tuple(batch["labels"][0, start:end].tolist())))
    return found[:-1] if all(label == IGNORE_INDEX for label in found[-1][1]) else found


def test_every_row_once_in_an_order_of_seed_and_epoch_alone() -> None:
    sizes = lengths(101)
    for make in (lambda seed: BucketedBatches(sizes, 4, 2, seed), lambda seed: PackedBatches(sizes, 600, seed)):
        torch.manual_seed(1)
        first = epoch(make(3))
        torch.manual_seed(2)
        assert first == epoch(make(3))
        assert sorted(row for batch in first for row in batch) == list(range(101))
        orders = [first, epoch(make(3), 1), epoch(make(4)), sorted(first)]
        assert len({str(order) for order in orders}) == 4
        again = make(3)
        assert [epoch(again, 1), epoch(again, 0)] == [epoch(make(3), 1), first]
        assert {len(make(3)), *(len(epoch(again, n)) for n in range(5))} == {len(first)}


@pytest.mark.parametrize(("count", "batch", "accumulation"), [(101, 4, 2), (7, 4, 2), (8, 4, 2), (1, 3, 5), (300, 1, 1)])
def test_batches_are_full_but_the_last(count: int, batch: int, accumulation: int) -> None:
    made = epoch(BucketedBatches(lengths(count), batch, accumulation, 0))
    assert len(made) == -(-count // batch) and all(len(rows) == batch for rows in made[:-1])
    assert len(made[-1]) == (count - 1) % batch + 1


def test_the_rows_of_a_step_hang_on_the_rows_of_a_step_alone() -> None:
    sizes = lengths(67)
    steps = [
        [
            sorted(row for rows in made[at : at + accumulation] for row in rows)
            for made in [epoch(BucketedBatches(sizes, batch, accumulation, 5), 2)]
            for at in range(0, len(made), accumulation)
        ]
        for batch, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8))
    ]
    assert steps[0] == steps[1] == steps[2] == steps[3]


def test_bucketing_leaves_little_padding() -> None:
    sizes = lengths(2000)
    plain = torch.randperm(2000, generator=torch.Generator().manual_seed(0)).tolist()

    def padding(made: list[list[int]]) -> float:
        wide = sum(max(sizes[row] for row in rows) * len(rows) for rows in made)
        return 1 - sum(sizes) / wide

    bucketed = padding(epoch(BucketedBatches(sizes, 8, 1, 0)))
    assert bucketed < 0.1 < 0.3 < padding([plain[at : at + 8] for at in range(0, 2000, 8)])


def test_packs_lie_within_their_budget_and_keep_their_number_and_width() -> None:
    made = PackedBatches(lengths(500), 512, 1)
    sizes = lengths(500)
    for number in range(4):
        packs = epoch(made, number)
        assert max(sum(sizes[row] for row in rows) for rows in packs) <= made.width <= 512
        assert len(packs) == len(made)
    assert made.first.fill > 0.98
    with pytest.raises(ConfigError, match="of 500 documents are longer than a pack of 200 tokens; the longest has 299"):
        PackedBatches(sizes, 200, 1)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_no_switch_changes_what_is_trained(switches: dict[str, Any]) -> None:
    rows = rig.examples(41)
    config = rig.config(None, **{"max_steps": None, **switches})
    collate = loader.collator(config, rows, 2)
    made = loader.train_loader(config, rows, collate, pin_memory=False)
    for number in range(2):
        made.batch_sampler.set_epoch(number)  # type: ignore[union-attr]
        seen: Counter[str] = Counter()
        counts, widths = [0, 0], set()
        for batch in made:
            trained, total = batch.pop(loader.COUNTS)
            counts = [counts[0] + trained, counts[1] + total]
            widths.add(batch["input_ids"].shape)
            seen.update(_digest(*document) for document in documents(batch))
        assert seen == Counter(_digest(row["input_ids"], [IGNORE_INDEX, *row["labels"][1:]]) for row in rows)
        assert counts == [rig.Rows(rows).trained_tokens, sum(len(row["input_ids"]) for row in rows)]
        assert not config.train.packing or len(widths) == 1


def test_a_first_token_is_not_counted_as_trained() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, -100]}]
    for switches in ({"batch_size": 2}, {"packing": True, "pack_tokens": 8}):
        config = rig.config(None, **switches)
        (batch,) = loader.train_loader(config, rows, loader.collator(config, rows, 2), pin_memory=False)
        assert batch[loader.COUNTS] == (2, 5)


def test_padding_free_batches_hold_the_same_rows() -> None:
    rows = rig.examples(41)
    made = loader.train_loader(rig.config(None, batch_size=4), rows, PackCollator(2), pin_memory=False)
    batches = list(made)
    assert all(batch["input_ids"].shape == (1, batch["cu_seq_lens_q"][-1]) for batch in batches)
    seen = Counter(_digest(*document) for batch in batches for document in documents(batch))
    assert seen == Counter(_digest(row["input_ids"], row["labels"]) for row in rows)


def _digest(ids: Any, labels: Any) -> str:
    return hashlib.sha256(repr((list(ids), [IGNORE_INDEX, *labels[1:]])).encode()).hexdigest()


# -- packed documents do not see each other --------------------------------------------------------


def packed(first: list[int], second: list[int], width: int = 40) -> dict[str, Any]:
    return PackCollator(2, width)([{"input_ids": ids, "labels": ids} for ids in (first, second)])


@pytest.mark.parametrize("bound", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_documents_do_not_leak(implementation: str, bound: bool) -> None:
    base = tiny_model()
    base.set_attn_implementation(implementation)
    model = rig.lora_model(base=base).train()
    if bound:
        assert nbkit.patch(model).bound
    second = list(range(50, 65))
    outputs, gradients = [], []
    for first in (list(range(10, 30)), list(range(100, 120))):
        batch = packed(first, second)
        embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
        del batch["labels"]
        logits = model(inputs_embeds=embedded, **batch, use_cache=False).logits[0, 20:35]
        logits.square().sum().backward()
        outputs.append(logits.detach())
        gradients.append(embedded.grad[0, :20])
    assert torch.equal(outputs[0], outputs[1])
    assert not gradients[0].any() and not gradients[1].any()
    alone = model(input_ids=torch.tensor([second]), use_cache=False).logits[0]
    assert torch.allclose(alone, outputs[0], atol=1e-5)


def test_a_model_that_lets_documents_see_each_other_is_refused(tmp_path: Any) -> None:
    model = rig.lora_model()
    base = model.get_base_model()

    def leaking(*args: Any, **kwargs: Any) -> Any:
        return type(base).forward(base, *args, **{**kwargs, "position_ids": None})

    base.forward = leaking
    run = Run(rig.config(tmp_path / "run", packing=True, pack_tokens=100), model, tiny_tokenizer(), rig.rows())
    with pytest.raises(TrainingError, match="packed documents would see each other; train with packing=False"):
        run.wait(progress=False)


# -- through the trainer ---------------------------------------------------------------------------


def steps(run: Run) -> list[StepEvent]:
    return [event for event in run.events if isinstance(event, StepEvent)]


@pytest.mark.parametrize("bound", [False, True], ids=["stock", "patched"])
def test_the_loss_of_a_packed_step_is_that_of_its_rows_unpacked(tmp_path: Any, bound: bool) -> None:
    data, found = rig.rows(9), []
    for number, train in enumerate(
        (
            {"packing": True, "pack_tokens": 400},
            {"batch_size": 9},
            {"packing": True, "pack_tokens": 90, "gradient_accumulation": 9},
        )
    ):
        model = rig.lora_model()
        if bound:
            nbkit.patch(model)
        config = rig.config(tmp_path / str(number), **{"max_steps": None, "epochs": 3, "learning_rate": 1e-3, **train})
        run = Run(config, model, tiny_tokenizer(), data)
        run.wait(progress=False)
        assert run.total_steps == len(steps(run)) == 3
        found.append((run, rig.adapter(model)))
    (one, weights), *others = found
    for other, theirs in others:
        for mine, its in zip(steps(one), steps(other), strict=True):
            assert (mine.trained_tokens, mine.total_tokens) == (its.trained_tokens, its.total_tokens)
            assert mine.loss == pytest.approx(its.loss, abs=1e-6)
        assert all(torch.allclose(weights[name], theirs[name], atol=1e-5) for name in weights)
    assert steps(one)[0].trained_tokens == data.trained_tokens
    assert steps(one)[0].total_tokens == sum(len(row["input_ids"]) for row in data.examples)


@pytest.mark.parametrize(
    "train", [{"packing": True, "pack_tokens": 80, "gradient_accumulation": 2}, {"gradient_accumulation": 2}]
)
def test_a_resumed_run_sees_the_same_batches(tmp_path: Any, train: dict[str, Any]) -> None:
    data = rig.rows(13)
    settings = {"max_steps": None, "epochs": 3, **train}
    whole = rig.lora_model()
    run = Run(rig.config(tmp_path / "whole", **settings), whole, tiny_tokenizer(), data)
    run.wait(progress=False)
    total = run.total_steps
    made = loader.batches(run.config, data.examples)
    per_epoch = -(-len(made) // 2)
    assert total == 3 * per_epoch and per_epoch > 1
    assert [loader.position(made, step, 2) for step in (0, 1, per_epoch, per_epoch + 1)] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    for stop in (1, per_epoch, per_epoch + 1):
        model = rig.lora_model()
        folder = tmp_path / f"stopped-{stop}"
        Run(rig.config(folder, **{**settings, "max_steps": stop}), model, tiny_tokenizer(), data).wait(progress=False)
        again = rig.lora_model()
        resumed = Run(rig.config(folder, **settings), again, tiny_tokenizer(), data, resume=True)
        resumed.wait(progress=False)
        expected = [(e.trained_tokens, e.total_tokens) for e in steps(run)[stop:]]
        assert [(e.trained_tokens, e.total_tokens) for e in steps(resumed)] == expected
