"""A run that was stopped and resumed equals the run that was not, bit for bit on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nbkit.errors import TrainingError
from nbkit.events import CheckpointEvent, Event, MessageEvent, RunFinished, RunStarted, StepEvent, read_events
from nbkit.training import checkpoints
from nbkit.training.job import Job
from nbkit.training.runner import Run
from tests.tiny import tiny_tokenizer
from tests.training import rig

# Dropout, a schedule with warm-up, accumulation with a short last step, and more than two epochs: 3 steps an epoch.
SETTINGS = {"max_steps": 8, "gradient_accumulation": 2, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1}


def stopped_at(folder: Path, step: int, **train: Any) -> None:
    """Runs the first `step` steps on this thread and stops, as `Run` does on its own."""
    folder.mkdir()
    events: list[Event] = []

    def stop() -> bool:
        return sum(isinstance(event, StepEvent) for event in events) + 1 >= step

    data, config = rig.rows(11), rig.config(folder, **{**SETTINGS, **train})
    result = Job(config, rig.lora_model(dropout=0.1), tiny_tokenizer(), data, folder, None, events.append, stop).run()
    assert result.stopped and result.step == step


def losses(events: list[Event]) -> dict[int, float]:
    return {event.step: event.loss for event in events if isinstance(event, StepEvent)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    model = rig.lora_model(dropout=0.1)
    run = Run(rig.config(tmp_path_factory.mktemp("whole") / "run", **SETTINGS), model, tiny_tokenizer(), rig.rows(11))
    assert run.wait(progress=False).step == 8
    return losses(run.events), rig.adapter(model)


@pytest.mark.parametrize("step", [2, 3, 4, 6, 7])  # inside an epoch, and at the ends of the first and second
def test_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: tuple[dict[int, float], dict[str, torch.Tensor]], step: int
) -> None:
    stopped_at(tmp_path / "run", step)
    torch.manual_seed(99)  # nothing may follow from the state of this process
    model = rig.lora_model(dropout=0.1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)  # nor from the adapter that stands in the model
    run = Run(rig.config(tmp_path / "run", **SETTINGS), model, tiny_tokenizer(), rig.rows(11), resume=True)
    assert run.wait(progress=False).step == 8
    expected_losses, expected = uninterrupted
    assert losses(run.events) == {n: loss for n, loss in expected_losses.items() if n > step}
    found = rig.adapter(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    started = next(event for event in run.events if isinstance(event, RunStarted))
    assert started.resumed_from == step and started.total_steps == 8


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_bnb_8bit", "sgd"])
def test_other_optimizers_go_on_as_well(tmp_path: Path, optimizer: str) -> None:
    settings = {**SETTINGS, "optimizer": optimizer}
    whole = rig.lora_model(dropout=0.1)
    run = Run(rig.config(tmp_path / "whole", **settings), whole, tiny_tokenizer(), rig.rows(11))
    run.wait(progress=False)
    stopped_at(tmp_path / "run", 3, optimizer=optimizer)
    torch.manual_seed(99)
    model = rig.lora_model(dropout=0.1)
    again = Run(rig.config(tmp_path / "run", **settings), model, tiny_tokenizer(), rig.rows(11), resume=True)
    again.wait(progress=False)
    assert losses(again.events) == {n: loss for n, loss in losses(run.events).items() if n > 3}
    expected = rig.adapter(whole)
    assert all(torch.equal(p, expected[name]) for name, p in rig.adapter(model).items())
    assert not all(torch.equal(p, rig.adapter(rig.lora_model())[name]) for name, p in expected.items())


def test_an_optimizer_that_no_checkpoint_can_keep_is_found_at_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dict = torch.optim.SGD.state_dict
    monkeypatch.setattr(torch.optim.SGD, "state_dict", lambda self: {**state_dict(self), "helper": object()})
    run = Run(rig.config(tmp_path / "run", optimizer="sgd"), rig.lora_model(), tiny_tokenizer(), rig.rows())
    with pytest.raises(TrainingError, match=r"optimizer\.helper is a object, which a checkpoint cannot keep; choose another"):
        run.wait(progress=False)
    assert losses(run.events) == {} and not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_checkpoint_of_an_older_nbkit_is_refused_with_its_pickles_unopened(tmp_path: Path) -> None:
    import json

    stopped_at(tmp_path / "run", 3)
    path = tmp_path / "run" / "checkpoint-000003" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "schema": 1}))
    with pytest.raises(TrainingError, match="checkpoint-000003 is of an older nbkit that pickled the optimizer's state"):
        Run(rig.config(tmp_path / "run", **SETTINGS), rig.lora_model(), tiny_tokenizer(), rig.rows(11), resume=True)


def test_a_checkpoint_in_another_precision_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss scale of float16, on a card without bfloat16, is not there when the run goes on on another."""
    from nbkit.training import state

    stopped_at(tmp_path / "run", 3)
    load = state.load
    monkeypatch.setattr(state, "load", lambda folder, part: {"scale": 2.0} if part == "scaler" else load(folder, part))
    run = Run(rig.config(tmp_path / "run", **SETTINGS), rig.lora_model(), tiny_tokenizer(), rig.rows(11), resume=True)
    assert run.wait(progress=False).step == 8
    assert any(
        "was trained in float16, this run goes on in another dtype" in e.text for e in run.events if isinstance(e, MessageEvent)
    )


def test_a_torn_checkpoint_costs_one_save_interval(
    tmp_path: Path, uninterrupted: tuple[dict[int, float], dict[str, torch.Tensor]]
) -> None:
    stopped_at(tmp_path / "run", 5, save_steps=2)
    (tmp_path / "run" / "checkpoint-000005" / "training_state.safetensors").unlink()
    model = rig.lora_model(dropout=0.1)
    run = Run(rig.config(tmp_path / "run", save_steps=2, **SETTINGS), model, tiny_tokenizer(), rig.rows(11), resume=True)
    run.wait(progress=False)
    assert losses(run.events) == {n: loss for n, loss in uninterrupted[0].items() if n > 4}
    warned = [event.text for event in run.events if isinstance(event, MessageEvent) and event.level == "warning"]
    assert warned == ["checkpoint-000005 was passed over: training_state.safetensors is missing."]


def test_checkpoints_come_every_save_steps_and_at_the_end_and_two_are_kept(tmp_path: Path) -> None:
    run = Run(rig.config(tmp_path / "run", max_steps=7, save_steps=2), rig.lora_model(), tiny_tokenizer(), rig.rows())
    run.wait(progress=False)
    assert [event.step for event in run.events if isinstance(event, CheckpointEvent)] == [2, 4, 6, 7]
    assert sorted(p.name for p in run.dir.glob("checkpoint-*")) == ["checkpoint-000006", "checkpoint-000007"]


def test_a_finished_run_is_taken_up_without_training(tmp_path: Path) -> None:
    config, data = rig.config(tmp_path / "run"), rig.rows(held_out=3)
    model = rig.lora_model()
    first = Run(config, model, tiny_tokenizer(), data).wait(progress=False)
    again = rig.lora_model()
    run = Run(config, again, tiny_tokenizer(), data, resume=True)
    second = run.wait(progress=False)
    assert (second.step, second.loss, second.held_out_before, second.held_out_after) == (
        first.step,
        first.loss,
        first.held_out_before,
        first.held_out_after,
    )
    assert losses(run.events) == {}
    assert all(torch.equal(p, rig.adapter(model)[name]) for name, p in rig.adapter(again).items())


def test_more_steps_may_be_asked_for(tmp_path: Path) -> None:
    Run(rig.config(tmp_path / "run", schedule="constant"), rig.lora_model(), tiny_tokenizer(), rig.rows()).wait(progress=False)
    config = rig.config(tmp_path / "run", schedule="constant", max_steps=6)
    run = Run(config, rig.lora_model(), tiny_tokenizer(), rig.rows(), resume=True)
    assert run.wait(progress=False).step == 6 and sorted(losses(run.events)) == [5, 6]
    straight = Run(config.replace(run_dir=str(tmp_path / "straight")), rig.lora_model(), tiny_tokenizer(), rig.rows())
    straight.wait(progress=False)
    assert losses(straight.events)[6] == losses(run.events)[6]


def test_without_a_checkpoint_resume_starts_at_step_0_and_says_so(tmp_path: Path) -> None:
    run = Run(rig.config(tmp_path / "run"), rig.lora_model(), tiny_tokenizer(), rig.rows(), resume=True)
    assert run.wait(progress=False).step == 4
    assert any(isinstance(event, MessageEvent) and "starts at step 0" in event.text for event in run.events)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": rig.rows(12)}, "was trained on other rows"),
        ({"fingerprint": "other"}, "was trained on other rows"),
        ({"model": "another"}, r"model\.name = 'tiny', this one has 'another'"),
        ({"learning_rate": 5e-3}, r"train\.learning_rate = 0\.01, this one has 0\.005"),
        ({"seed": 1}, r"train\.seed"),
        ({"rank": 8}, r"lora\.rank = 4, this one has 8"),
    ],
)
def test_another_run_is_not_continued(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    import dataclasses

    stopped_at(tmp_path / "run", 2)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file() and "lock" not in p.name}
    data = change.get("data", rig.rows(11))
    data = dataclasses.replace(data, fingerprint=change.get("fingerprint", data.fingerprint))
    train = {key: value for key, value in change.items() if key in ("learning_rate", "seed")}
    config = rig.config(tmp_path / "run", **{**SETTINGS, **train})
    config = config.replace(
        model=dataclasses.replace(config.model, name=change.get("model", "tiny")),
        lora=dataclasses.replace(config.lora, rank=change.get("rank", 4)),
    )
    with pytest.raises(TrainingError, match=sentence):
        Run(config, rig.lora_model(), tiny_tokenizer(), data, resume=True)
    after = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file() and "lock" not in p.name}
    assert before == after


def test_the_log_of_both_parts_is_one_file(tmp_path: Path) -> None:
    config = rig.config(tmp_path / "run", max_steps=60)
    run = Run(config, rig.lora_model(), tiny_tokenizer(), rig.rows())
    run.stop()
    first = run.wait(progress=False)
    assert first.stopped and run.status == "stopped"
    second = Run(config, rig.lora_model(), tiny_tokenizer(), rig.rows(), resume=True)
    second.wait(progress=False)
    events = read_events(run.dir)
    assert sorted(losses(events)) == list(range(1, 61))
    assert [event.stopped for event in events if isinstance(event, RunFinished)] == [True, False]
    assert checkpoints.newest(run.dir)[0].step == 60  # type: ignore[union-attr]
