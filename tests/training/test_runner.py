"""A run from outside: its folder, its log, stopping it, and what it says when it fails."""

from __future__ import annotations

import errno
import gc
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import nbkit
from nbkit.config import RunConfig
from nbkit.errors import ModelError, TrainingError
from nbkit.events import EvalEvent, Event, MemoryEvent, MessageEvent, RunFailed, RunFinished, RunStarted, StepEvent, read_events
from nbkit.training import checkpoints
from nbkit.training.runner import Run
from tests.tiny import tiny_tokenizer
from tests.training import rig


def start(folder: Path | None, model: Any = None, data: rig.Rows | None = None, resume: bool = False, **train: Any) -> Run:
    model = model if model is not None else rig.lora_model()
    return Run(rig.config(folder, **train), model, tiny_tokenizer(), data if data is not None else rig.rows(), resume=resume)


def until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


# -- a run that goes well ----------------------------------------------------------------------------


def test_a_run_trains_and_leaves_adapter_checkpoint_and_log(tmp_path: Path) -> None:
    data, model = rig.rows(2, held_out=5), rig.lora_model()
    run = start(tmp_path / "run", model, data, max_steps=30, learning_rate=3e-2)
    result = run.wait(progress=False)
    assert run.status == "finished" and run.result is result and not result.stopped and result.step == 30
    steps = [event for event in run.events if isinstance(event, StepEvent)]
    assert steps[-1].loss < steps[0].loss - 1.0 and result.loss == steps[-1].loss
    evals = [event for event in run.events if isinstance(event, EvalEvent)]
    assert [(event.step, event.rows) for event in evals] == [(0, 5), (30, 5)]
    assert (result.held_out_before, result.held_out_after) == (evals[0].loss, evals[1].loss)
    peaks = [event.peak_bytes for event in run.events if isinstance(event, MemoryEvent)]
    assert result.seconds > 0 and result.peak_bytes == max(peaks) > 1e7
    assert RunConfig.from_json(run.dir / "run.json") == run.config
    assert isinstance(run.events[0], RunStarted) and run.events[0].trainable_parameters == 4096
    assert read_events(run.dir) == run.events


def test_the_log_has_one_json_object_a_line_with_the_keys_that_stay(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    run.wait(progress=False)
    lines = [json.loads(line) for line in (run.dir / "events.jsonl").read_text().splitlines()]
    assert all({"kind", "step", "time"} <= line.keys() for line in lines)
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4]
    assert all(isinstance(line["loss"], float) for line in lines if line["kind"] == "step")
    assert lines[0]["kind"] == "started" and lines[-1]["kind"] == "finished"


def test_the_saved_adapter_is_the_trained_one(tmp_path: Path) -> None:
    from peft import PeftModel

    from tests.tiny import tiny_model

    model = rig.lora_model()
    result = start(tmp_path / "run", model).wait(progress=False)
    again = PeftModel.from_pretrained(tiny_model(), result.adapter_path)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
        assert not torch.equal(model(ids).logits, tiny_model()(ids).logits)


def test_training_is_on_a_worker_thread_and_subscribers_on_the_waiting_one(tmp_path: Path) -> None:
    threads: dict[str, set[int]] = {"forward": set(), "subscriber": set()}
    model = rig.lora_model()
    model.get_base_model().register_forward_pre_hook(lambda *_: threads["forward"].add(threading.get_ident()))
    seen: list[Event] = []
    run = start(tmp_path / "run", model)
    run.subscribe(lambda events: (seen.extend(events), threads["subscriber"].add(threading.get_ident())))
    run.wait(progress=False)
    assert seen == run.events
    assert threads["subscriber"] == {threading.get_ident()} and threading.get_ident() not in threads["forward"]


def test_a_subscriber_that_raises_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    run, seen = start(tmp_path / "run"), []

    def broken(events: list[Event]) -> None:
        raise ValueError("a panel is broken")

    run.subscribe(broken)
    run.subscribe(seen.extend)
    with pytest.warns(UserWarning, match="a panel is broken"):
        assert run.wait(progress=False).step == 4
    assert seen == run.events


# -- stopping ----------------------------------------------------------------------------------------


def test_stop_ends_at_a_step_boundary_with_a_checkpoint_and_the_adapter(tmp_path: Path) -> None:
    model = rig.lora_model()
    run = start(tmp_path / "run", model, rig.rows(held_out=3), max_steps=10_000, gradient_accumulation=2)
    until(lambda: any(isinstance(event, StepEvent) for event in run.events))
    assert run.status == "running"
    run.stop()
    run.stop()
    assert run.status in ("stopping", "stopped")
    result = run.wait(progress=False)
    assert run.status == "stopped" and result.stopped and 0 < result.step < 10_000
    checkpoint, _ = checkpoints.newest(run.dir)
    assert checkpoint is not None and checkpoint.step == result.step
    assert result.held_out_before is not None and result.held_out_after is None
    assert Path(result.adapter_path, "adapter_model.safetensors").stat().st_size > 1000
    run.stop()
    assert run.status == "stopped"


def test_a_model_in_training_is_not_certified_and_is_free_again_after(tmp_path: Path) -> None:
    model = rig.lora_model()
    run = start(tmp_path / "run", model, max_steps=5000, learning_rate=1e-3)
    until(lambda: any(isinstance(event, StepEvent) for event in run.events))
    with pytest.raises(ModelError, match="is being trained at the moment, and certify would reach into that"):
        nbkit.certify(model)
    run.stop()
    assert run.wait(progress=False).stopped
    assert nbkit.certify(model).passed


def test_stop_before_the_first_step_saves_nothing(tmp_path: Path) -> None:
    model = rig.lora_model()
    before = rig.adapter(model)
    run = start(tmp_path / "run", model, rig.rows(held_out=50))
    run.stop()
    result = run.wait(progress=False)
    if result.step == 0:  # the usual order: the stop comes before TRL is imported and step 1 is made
        assert result.stopped and result.adapter_path == "" and result.loss is None
        assert not (run.dir / "adapter").exists()
        assert all(torch.equal(p, before[name]) for name, p in rig.adapter(model).items())
    else:
        assert result.step == 1


def test_an_interrupt_while_waiting_stops_and_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path / "run", max_steps=10_000)
    until(lambda: any(isinstance(event, StepEvent) for event in run.events))
    join, presses = run.join, iter([KeyboardInterrupt])

    def interrupted(seconds: float) -> bool:
        for press in presses:
            raise press
        return join(seconds)

    monkeypatch.setattr(run, "join", interrupted)
    result = run.wait(progress=True)
    assert result.stopped and result.step > 0 and checkpoints.newest(run.dir)[0] is not None


# -- the folder --------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_refused_unless_resumed(tmp_path: Path) -> None:
    start(tmp_path / "run").wait(progress=False)
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    with pytest.raises(TrainingError, match=r"already holds a run, finished at step 4; choose another run_dir"):
        start(tmp_path / "run")
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before


def test_a_folder_with_only_its_run_json_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    rig.config(tmp_path / "run").to_json(tmp_path / "run" / "run.json")
    assert start(tmp_path / "run").wait(progress=False).step == 4


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_on_one_folder_is_refused(tmp_path: Path, resume: bool) -> None:
    run = start(tmp_path / "run", max_steps=10_000)
    with pytest.raises(TrainingError, match=r"is in use by another run \(process \d+ on .*, since 20"):
        start(tmp_path / "run", resume=resume)
    run.stop()
    run.wait(progress=False)
    assert start(tmp_path / "run", resume=True, max_steps=10_000).dir == run.dir


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import sys, time; from nbkit.training.folder import RunFolder; from tests.training import rig\n"
        "folder = RunFolder(rig.config(sys.argv[1]), resume=False); print('held', flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match=f"process {other.pid}"):
            start(tmp_path / "run")
    finally:
        other.kill()
        other.wait()
    assert start(tmp_path / "run").wait(progress=False).step == 4


def test_a_run_without_a_folder_or_with_a_file_for_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="has no folder"):
        start(None)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="is a file"):
        start(tmp_path / "file")


# -- refused before step 0 ---------------------------------------------------------------------------


def masked(first_only: bool) -> rig.Rows:
    made = rig.examples(4)
    for row in made:
        row["labels"] = [-100] * len(row["labels"])
        if first_only:
            row["labels"][0] = row["input_ids"][0]  # nothing predicts the first token
    return rig.Rows(made)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (masked(False), "No token of the 4 rows would be trained"),
        (masked(True), "No token of the 4 rows would be trained"),
        (rig.Rows([]), "None of the 0 rows can be trained on"),
    ],
)
def test_data_without_a_trained_token_is_refused_and_nothing_is_written(tmp_path: Path, data: rig.Rows, sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        start(tmp_path / "run", data=data)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_adapters_is_refused(tmp_path: Path, tiny_model: Any) -> None:
    with pytest.raises(TrainingError, match=r"nothing to train; call session\.add_lora"):
        start(tmp_path / "run", tiny_model.requires_grad_(False))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_optimizer_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"optimizer 'adamw_8bits' is not known.*Did you mean adamw_8bit"):
        start(tmp_path / "run", optimizer="adamw_8bits")
    assert list(tmp_path.iterdir()) == []


def test_without_trl_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        TrainingError,
        match=r"Training by sft needs the package trl; install 'nbkit-llm\[colab\]' on Colab or Kaggle, .*\[cpu\]' elsewhere",
    ):
        start(tmp_path / "run")


def test_a_disk_without_room_is_refused_before_step_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    with pytest.raises(TrainingError, match=r"Disk full: The run needs 4\.1 MB, .* has 0\.0 MB free;"):
        start(tmp_path / "not" / "yet" / "there")
    assert list(tmp_path.iterdir()) == []


# -- failing -----------------------------------------------------------------------------------------


def test_the_workers_exception_is_raised_where_the_run_is_waited_for(tmp_path: Path) -> None:
    run = start(tmp_path / "run", rig.failing(rig.lora_model(), 3, ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run.wait(progress=False)
    assert run.status == "failed" and run.result is None
    last = read_events(run.dir)[-1]
    assert isinstance(last, RunFailed) and (last.error, last.error_type, last.step) == ("a bug", "ZeroDivisionError", 2)
    assert not (run.dir / "adapter").exists()


@pytest.mark.parametrize(
    ("error", "train", "sentence"),
    [
        (MemoryError(), {}, "Out of memory in step 2; try batch_size=1 with gradient_accumulation=2,"),
        (torch.OutOfMemoryError("CUDA out of memory."), {"batch_size": 1}, "try gradient_checkpointing=True"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
            {"batch_size": 1, "gradient_checkpointing": True},
            "try load_in_4bit=True, or rows shorter than max_seq_length=1024",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), {}, r"Disk full: writing in .* failed with [\d.]+ GB free"),
    ],
)
def test_known_causes_are_one_sentence_with_the_original_chained(
    tmp_path: Path, error: Exception, train: dict[str, Any], sentence: str
) -> None:
    run = start(tmp_path / "run", rig.failing(rig.lora_model(), 2, error), **train)
    with pytest.raises(TrainingError, match=sentence) as caught:
        run.wait(progress=False)
    assert caught.value.__cause__ is error
    assert isinstance(read_events(run.dir)[-1], RunFailed)


def test_a_disk_without_room_for_a_checkpoint_ends_the_run_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, model = shutil.disk_usage, rig.lora_model()

    def fill(*_: Any) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))

    model.get_base_model().lm_head.register_forward_hook(fill)
    run = start(tmp_path / "run", model)
    with pytest.raises(TrainingError, match=r"Disk full: The checkpoint of step 4 needs 2\.\d MB"):
        run.wait(progress=False)
    assert not list(run.dir.glob("*checkpoint*"))


def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model = rig.lora_model()
    weight = next(p for n, p in model.named_parameters() if "layers.0.self_attn.q_proj.lora_A" in n)
    calls = []

    def spoil(_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:  # in the last backward, when neither loss nor gradient can show it any more
            weight.data[0, 0] = float("inf")

    weight.register_post_accumulate_grad_hook(spoil)
    run = start(tmp_path / "run", model, save_steps=3)
    with pytest.raises(TrainingError, match="After step 4 the adapter is not finite and was not saved"):
        run.wait(progress=False)
    assert not (run.dir / "adapter").exists()
    assert checkpoints.newest(run.dir)[0].step == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [MemoryError(), None], ids=["failed", "finished"])
def test_nothing_of_a_run_keeps_the_model_alive(tmp_path: Path, error: Exception | None) -> None:
    model = rig.lora_model()
    batches: list[weakref.ref[Any]] = []
    model.get_base_model().get_input_embeddings().register_forward_hook(lambda m, i, o: batches.append(weakref.ref(o)))
    if error is not None:
        rig.failing(model, 2, error)
    run = start(tmp_path / "run", model)
    try:
        run.wait(progress=False)
    except TrainingError as told:
        assert error is not None and run.error is told
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert batches and all(batch() is None for batch in batches)


def test_messages_reach_the_text_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(tmp_path / "run", data=rig.rows(held_out=2), gradient_checkpointing="unsloth")
    run.wait(progress=True)
    shown = capsys.readouterr().err
    assert "4/4" in shown and "held-out loss" in shown and "transformers' own checkpointing" in shown
    assert any(isinstance(event, MessageEvent) for event in run.events)
    assert isinstance(run.events[-1], RunFinished)


def test_rows_of_kto_that_are_not_wanted_are_not_trained_by_sft_and_the_run_says_so(tmp_path: Path) -> None:
    from nbkit.config import DataRecipe
    from nbkit.data.pipeline import prepare
    from nbkit.training.job import facts

    tokenizer = tiny_tokenizer()
    rows = [{"prompt": f"q{n}", "completion": f"a{n}", "label": n % 3 == 0} for n in range(6)]
    data: Any = prepare(rows, tokenizer, DataRecipe(), max_seq_length=256)
    run = start(tmp_path / "run", None, data, max_steps=2)
    run.wait(progress=False)
    said = [event.text for event in run.events if isinstance(event, MessageEvent)]
    assert "The method sft trains on the 2 of 6 examples whose label is true, never on the others." in said
    manifest = json.loads(next(run.dir.glob("checkpoint-*/*manifest*.json")).read_text())
    assert manifest["data"]["rows"] == 2 and facts(run.config, data)["data"]["rows"] == 6
    resumed = start(tmp_path / "run", None, data, resume=True, max_steps=3)
    assert resumed.wait(progress=False).step == 3
    none: Any = prepare([{**row, "label": False} for row in rows], tokenizer, DataRecipe(), max_seq_length=256)
    with pytest.raises(TrainingError, match="nothing to train on: the method sft trains on the 0 of 6 examples .* true label"):
        start(tmp_path / "other", None, none, max_steps=1)
    assert not (tmp_path / "other").exists()
