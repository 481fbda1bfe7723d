"""`Session` from load to export on a tiny model: the whole slice in seconds."""

import asyncio
import json
import signal
import subprocess
import sys
import time

import pytest

from nbkit import DataRecipe, RunConfig, Session, TrainConfig, read_events
from nbkit.errors import ConfigError, DataError, ExportError, ModelError, NbkitError, TrainingError
from nbkit.events import LOG_NAME

ROWS = [{"instruction": f"Write the log line for {hour} o'clock, wind west {hour % 9}.", "output": f"{hour:02d}00; W{hour % 9}"}
        for hour in range(24)]  # fmt: skip
QUICK = TrainConfig(max_steps=4, batch_size=2, learning_rate=1e-3)


@pytest.fixture
def session(tmp_path, tiny_model_dir) -> Session:
    session = Session(tmp_path / "space")
    session.load(str(tiny_model_dir), max_seq_length=256, progress=False)
    return session


@pytest.fixture
def ready(session) -> Session:
    session.add_lora(rank=4)
    session.use_data(ROWS, held_out=4)
    return session


def test_from_rows_to_exports(ready, tmp_path):
    topics = []
    ready.subscribe(topics.append)
    before = ready.evaluate(adapter=False, max_new_tokens=4)
    run = ready.train(QUICK)
    result = run.wait(progress=False)
    assert topics == ["run"]
    assert run.status == "finished" and result.step == 4 and not result.stopped
    events = [json.loads(line) for line in (run.dir / LOG_NAME).read_text().splitlines()]
    assert all({"kind", "step", "time"} <= event.keys() for event in events)
    assert [e["step"] for e in events if e["kind"] == "step"] == [1, 2, 3, 4]
    assert all(isinstance(e["loss"], float) for e in events if e["kind"] == "step")
    assert result.held_out_before == pytest.approx(before.loss, rel=1e-4)
    after = ready.evaluate(max_new_tokens=4)
    assert after.loss == pytest.approx(result.held_out_after, rel=1e-4)
    assert after.loss < before.loss and after.fields == 8  # two fields in each of four replies
    reports = [ready.export("adapter"), ready.export("merged_16bit"), ready.export("gguf", quantization="f16")]
    assert all(str(run.dir) in str(report.path) and report.bytes > 0 for report in reports)
    assert ready.chat("Nine o'clock.", max_new_tokens=4).text == ready.chat("Nine o'clock.", max_new_tokens=4).text
    assert ready.export("gguf", tmp_path / "here.gguf").path == tmp_path / "here.gguf"


def test_a_run_can_be_awaited(ready):
    result = asyncio.run(_await(ready.train(QUICK)))
    assert result.step == 4 and result is ready.run.result


async def _await(run):
    return await run


def test_the_run_file_alone_runs_again_and_trains_the_same(ready, tmp_path):
    ready.train(QUICK).wait(progress=False)
    losses = [e.loss for e in read_events(ready.run.dir) if e.kind == "step"]
    config = RunConfig.from_json(ready.run.dir / "run.json")
    assert config.data.fingerprint == ready.data.fingerprint
    again = Session(tmp_path / "other").execute(config.replace(run_dir=str(tmp_path / "again")))
    again.wait(progress=False)
    assert [e.loss for e in read_events(again.dir) if e.kind == "step"] == losses


def test_headless_from_the_command_line(ready, tmp_path):
    config = ready.run_config(TrainConfig(max_steps=6, batch_size=2, save_steps=2)).replace(run_dir=str(tmp_path / "run"))
    done = headless(config, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout and "finished at step 6" in done.stdout
    assert "Traceback" not in done.stderr and "6/6" in done.stderr  # tqdm's bar
    again = headless(config, tmp_path)
    assert again.returncode == 1 and str(tmp_path / "run") in again.stderr and "Traceback" not in again.stderr


def test_a_killed_run_is_resumed_from_the_command_line_as_if_nothing_had_happened(ready, tmp_path):
    train = TrainConfig(max_steps=12, batch_size=1, save_steps=5)
    whole = ready.train(train)
    whole.wait(progress=False)
    config = ready.run_config(train).replace(run_dir=str(tmp_path / "run"))
    config.to_json(tmp_path / "run.json")
    # Dies by SIGKILL right after the first checkpoint is published, in the middle of the run.
    program = (
        "import os, signal, sys, nbkit.__main__, nbkit.training.checkpoints as c\n"
        "c.prune = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        "nbkit.__main__.main(['run', sys.argv[1]])"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run.json")], cwd=tmp_path, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = subprocess.run([*command(tmp_path), "--resume"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    events = read_events(tmp_path / "run")
    steps = {e.step: e.loss for e in events if e.kind == "step"}
    assert steps == {e.step: e.loss for e in read_events(whole.dir) if e.kind == "step"}
    assert [e.resumed_from for e in events if e.kind == "started"] == [0, 5]


def command(folder):
    return [sys.executable, "-m", "nbkit", "run", str(folder / "run.json")]


def headless(config, folder):
    config.to_json(folder / "run.json")
    return subprocess.run(command(folder), capture_output=True, text=True, cwd=folder)


def test_other_rows_than_the_run_was_made_with_are_refused(ready, tmp_path):
    config = ready.run_config(QUICK)
    with open(config.data.source, "a") as file:
        file.write(json.dumps(ROWS[0] | {"output": "changed"}) + "\n")
    with pytest.raises(DataError, match="fingerprint"):
        Session(tmp_path / "other").execute(config)


def test_everything_in_the_wrong_order_is_one_sentence(tmp_path, tiny_model_dir):
    session = Session(tmp_path)
    for act, error in (
        (lambda: session.add_lora(rank=4), ModelError),
        (lambda: session.use_data(ROWS), ModelError),
        (lambda: session.chat("hi"), ModelError),
        (lambda: session.evaluate(), DataError),
        (lambda: session.train(QUICK), ModelError),
        (lambda: session.export("adapter"), ExportError),
        (lambda: session.export("onnx"), ConfigError),
        (lambda: session.add_lora(rank=0), ConfigError),
        (lambda: session.load(""), ConfigError),
    ):
        with pytest.raises(error) as caught:
            act()
        assert "\n" not in str(caught.value) and len(str(caught.value)) > 20
    session.load(str(tiny_model_dir), progress=False)
    with pytest.raises(ConfigError, match="add_lora"):
        session.train(QUICK)
    session.add_lora(rank=2)
    with pytest.raises(DataError, match="use_data"):
        session.train(QUICK)
    assert not (tmp_path / "runs").exists()


def test_while_a_run_trains_other_work_is_refused_and_stop_keeps_a_checkpoint(ready):
    run = ready.train(TrainConfig(max_steps=5000, batch_size=1))
    try:
        while run.status == "running" and not any(event.kind == "step" for event in run.events):
            time.sleep(0.01)
        for act in (
            lambda: ready.load("other"),
            lambda: ready.add_lora(rank=2),
            lambda: ready.use_data(ROWS),
            lambda: ready.train(QUICK),
            lambda: ready.chat("hi"),
            lambda: ready.evaluate(),
            lambda: ready.export("adapter"),
        ):
            with pytest.raises(TrainingError, match="wait for it or stop it"):
                act()
    finally:
        run.stop()
        result = run.wait(progress=False)
    assert result.stopped and run.status == "stopped" and 0 < result.step < 5000
    assert list(run.dir.glob("checkpoint-*"))
    assert ready.evaluate(max_new_tokens=2, limit=1).answers


def test_a_new_model_forgets_what_hung_on_the_old_one(ready, tiny_model_dir):
    ready.load(str(tiny_model_dir), progress=False)
    assert (ready.lora, ready.data, ready.run) == (None, None, None)


def test_a_recipe_names_the_columns_and_is_kept_in_the_config(session):
    session.add_lora(rank=2)
    rows = [{"q": row["instruction"], "a": row["output"], "noise": 1} for row in ROWS]
    report = session.use_data(rows, DataRecipe(format="alpaca", columns={"instruction": "q", "output": "a"}))
    assert report.rows_in == report.used == 24 and report.dropped == report.refused == 0
    assert session.run_config().data.recipe.columns["instruction"] == "q"


def test_sizes_and_catalog_without_loading(tmp_path):
    session = Session(tmp_path)
    parameters, total, size = session.lora_size("meta-llama/Llama-3.1-8B-Instruct", rank=16)
    assert parameters == 41_943_040 and total == 8_030_261_248 and size > 4 * parameters * 0.4
    entries = session.catalog()
    assert len(entries) > 10 and all(entry.reason for entry in entries)
    with pytest.raises(NbkitError):
        session.lora_size("no/such-checkpoint")


def test_nothing_changes_the_model_while_a_reply_is_written(ready):
    from nbkit.chat.decode import lock_of

    with lock_of(ready.model):
        for action in (
            lambda: ready.train(QUICK),
            lambda: ready.export("adapter"),
            lambda: ready.add_lora(rank=2),
            lambda: ready.unload(),
        ):
            with pytest.raises(ModelError, match=r"The model is writing a reply; let it finish, or stop it, before you \w+"):
                action()
    assert ready.train(QUICK).wait(progress=False).step == 4


def test_unloading_is_announced(session):
    topics = []
    session.subscribe(topics.append)
    session.unload()
    session.unload()
    assert topics == ["model"] and session.model is None
