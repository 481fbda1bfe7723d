"""`nbkit.inspect` of a session and of a trainer: the very batches that they make, and nothing of theirs changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import nbkit
from nbkit.config import IGNORE_INDEX
from nbkit.data.tokens import PADDING
from nbkit.errors import DataError, TrainingError
from nbkit.widgets.studio import Studio
from tests.widgets.hostile import inert

ROWS = [{"instruction": f"Say the number {n}.", "output": f"It is {n}; that is all. " * (1 + n % 3)} for n in range(11)]


@pytest.fixture
def session(tmp_path: Path, tiny_model_dir: Path) -> nbkit.Session:
    session = nbkit.Session(tmp_path / "space")
    session.load(str(tiny_model_dir), max_seq_length=256, progress=False)
    session.add_lora(rank=2)
    session.use_data(ROWS)
    return session


def test_a_session_shows_the_batches_that_it_trains_on(session: nbkit.Session) -> None:
    from torch.utils.data import DataLoader

    from nbkit.data.collate import Collator
    from nbkit.training.loader import batches

    for train in (nbkit.TrainConfig(batch_size=3, seed=5), nbkit.TrainConfig(packing=True, pack_tokens=256)):
        found = session.inspect(train=train)
        members = list(batches(session.run_config(train), session.data.examples))
        assert found.batches == len(members)
        for number, chosen in enumerate(members):
            shown = found.show(batch=number).batch
            if not train.packing:
                (made,) = DataLoader([session.data.examples[n] for n in chosen], batch_size=3, collate_fn=Collator(2))
                assert [[token.id for token in line.tokens] for line in shown] == made["input_ids"].tolist()
                assert [[token.label for token in line.tokens] for line in shown] == made["labels"].tolist()
            assert [row for line in shown for row in line.rows] == [int(session.data.row_numbers[n]) for n in chosen]
    assert any(4 in line.rows for line in session.inspect(row=4).batch)


def test_a_start_is_refused_while_nothing_is_trained_and_everyone_says_so(session: nbkit.Session) -> None:
    shown = Studio(session)
    masked = [{"input_ids": e["input_ids"], "labels": [IGNORE_INDEX] * len(e["input_ids"])} for e in session.data.examples]
    session.data.examples = masked  # type: ignore[assignment,union-attr]
    assert [problem.kind for problem in nbkit.inspect(session).problems if problem.stops] == ["nothing_trained"]
    with pytest.raises(TrainingError, match="every label is masked"):
        session.train(nbkit.TrainConfig(max_steps=1))
    shown.training.set(max_steps=1)
    with pytest.raises(TrainingError, match="every label is masked"):
        shown.click("training.start")
    assert "No token of the 11 rows would be trained" in inert(shown.training.said.value).text
    assert session.run is None


@pytest.fixture
def trainer(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]} for r in ROWS
    ]
    settings = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=3, max_length=200, report_to=[], use_cpu=True, dataset_num_proc=None
    )
    return SFTTrainer(model=tiny_model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer)


def test_a_trainer_shows_its_own_batches_and_is_left_as_it_was(trainer: Any) -> None:
    import torch

    state, loaders = torch.random.get_rng_state(), len(trainer.accelerator._dataloaders)
    found = nbkit.inspect(trainer)
    shown = found.batch
    assert torch.equal(torch.random.get_rng_state(), state) and len(trainer.accelerator._dataloaders) == loaders
    torch.random.set_rng_state(state)
    made = next(iter(trainer.get_train_dataloader()))
    assert [[token.id for token in line.tokens] for line in shown] == made["input_ids"].tolist()
    assert [[token.label for token in line.tokens] for line in shown] == made["labels"].tolist()
    assert [[int(token.state != PADDING) for token in line.tokens] for line in shown] == made["attention_mask"].tolist()
    for line in shown:
        (row,) = line.rows
        ids = trainer.train_dataset[row - 1]["input_ids"]
        assert [token.id for token in line.tokens if token.real] == list(ids)
    assert len(found.lengths) == 11 and found.batches == 4 and found.trained_share > 0.9
    with pytest.raises(DataError, match="Which batch holds row 2"):
        nbkit.inspect(trainer, row=2)


def test_a_trainer_that_trains_on_nothing_is_seen(trainer: Any) -> None:
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": [IGNORE_INDEX] * len(row["input_ids"])})
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {**collate(rows), "labels": collate(rows)["labels"] * 0 + IGNORE_INDEX}
    assert [problem.kind for problem in nbkit.inspect(trainer).problems] == ["nothing_trained"]


def test_replies_alone_are_shown_as_trained(trainer: Any) -> None:
    from nbkit.chat_templates import train_on_responses_only

    one = train_on_responses_only(trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n")
    found = nbkit.inspect(one)
    assert 0.1 < found.trained_share < 0.9
    assert "⟦It is " in str(found) and "Say the number" not in "".join(part.split("⟧")[0] for part in str(found).split("⟦")[2:])
