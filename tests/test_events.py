import json
import math
import threading

import pytest

from nbkit.events import (
    KINDS,
    CheckpointEvent,
    EvalEvent,
    EventLog,
    MemoryEvent,
    MessageEvent,
    RunFailed,
    RunFinished,
    RunStarted,
    StepEvent,
    from_dict,
    read_events,
    to_dict,
)

SAMPLES = [
    RunStarted(total_steps=4, device="cpu", trainable_parameters=10, message="ça va"),
    StepEvent(step=1, loss=2.5, learning_rate=1e-3, grad_norm=None, trained_tokens=3, total_tokens=9, seconds=0.1),
    MemoryEvent(step=1, memory="RSS", used_bytes=5, peak_bytes=6, total_bytes=7),
    EvalEvent(step=0, loss=3.0, rows=30),
    CheckpointEvent(step=2, path="runs/a/checkpoint-2"),
    MessageEvent(step=2, text="two\nlines", level="warning"),
    RunFinished(step=4, loss=1.0, held_out_before=3.0, held_out_after=1.0, seconds=9.0, peak_bytes=1, adapter_path="a"),
    RunFailed(step=3, error="disk full", error_type="OSError"),
]


def test_every_kind_has_a_sample():
    assert {type(event) for event in SAMPLES} == set(KINDS.values())


@pytest.mark.parametrize("event", SAMPLES, ids=lambda e: e.kind)
def test_round_trip_through_one_json_line(event):
    line = json.dumps(to_dict(event))
    assert "\n" not in line
    values = json.loads(line)
    assert {"kind", "step", "time"} <= values.keys()
    assert from_dict(values) == event


def test_a_step_that_is_not_finite_is_still_strict_json():
    event = StepEvent(step=1, loss=math.nan, learning_rate=1.0, grad_norm=math.inf)
    values = json.loads(json.dumps(to_dict(event), allow_nan=False))
    back = from_dict(values)
    assert math.isnan(back.loss) and back.grad_norm == math.inf


def test_a_message_that_reads_like_a_number_stays_text():
    assert from_dict(to_dict(MessageEvent(text="nan"))).text == "nan"


def test_log_keeps_order_and_survives_a_torn_line(tmp_path):
    log = EventLog(tmp_path / "run")
    for event in SAMPLES[:3]:
        log.append(event)
    with log.path.open("ab") as file:
        file.write(b'{"kind": "step", "st')  # what a kill in the middle of a write leaves
    assert read_events(tmp_path / "run") == SAMPLES[:3]
    EventLog(tmp_path / "run").append(SAMPLES[3])
    assert read_events(tmp_path / "run") == SAMPLES[:4]


def test_foreign_lines_and_unknown_fields_are_passed_over(tmp_path):
    log = EventLog(tmp_path)
    log.append(SAMPLES[1])
    later = {**to_dict(SAMPLES[1]), "field_of_a_newer_version": 1}
    with log.path.open("a") as file:
        file.write('{"kind": "of the future", "step": 1}\nnot json\n[]\n' + json.dumps(later) + "\n")
    assert read_events(log.path) == [SAMPLES[1], SAMPLES[1]]


def test_no_log_is_no_events(tmp_path):
    assert read_events(tmp_path) == []
    assert read_events(tmp_path / "absent") == []


def test_threads_do_not_mix_lines(tmp_path):
    log = EventLog(tmp_path)

    def write(thread):
        for i in range(50):
            log.append(MessageEvent(step=i, text=str(thread) * 200))

    threads = [threading.Thread(target=write, args=(t,)) for t in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(read_events(tmp_path)) == 200
