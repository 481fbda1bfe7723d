"""A checkpoint is whole or absent, and damage is found before it is trusted."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from nbkit.errors import TrainingError
from nbkit.training import checkpoints

FACTS = {"data": {"fingerprint": "f"}, "config": {}}


def publish(folder: Path, step: int, content: bytes = b"weights") -> Path:
    with checkpoints.staged(folder, step, FACTS, 0) as staging:
        (staging / "adapter_model.safetensors").write_bytes(content)
        (staging / "training_state.safetensors").write_bytes(bytes(1000))
    return folder / checkpoints.name_of(step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_names_are_those_that_transformers_resumes_from(tmp_path: Path) -> None:
    from transformers.trainer_utils import get_last_checkpoint

    publish(tmp_path, 8)
    publish(tmp_path, 40)
    assert names(tmp_path) == ["checkpoint-000008", "checkpoint-000040"]
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-000040")


def test_the_manifest_says_what_is_in_the_checkpoint(tmp_path: Path) -> None:
    path = publish(tmp_path, 40)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 40 and manifest["data"] == {"fingerprint": "f"}
    assert manifest["versions"]["torch"] and manifest["versions"]["transformers"]
    assert set(manifest["files"]) == {"adapter_model.safetensors", "training_state.safetensors"}
    assert manifest["files"]["training_state.safetensors"]["bytes"] == 1000


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    with pytest.raises(OSError, match="pulled out"), checkpoints.staged(tmp_path, 2, FACTS, 0) as staging:
        (staging / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError("the disk was pulled out")
    assert names(tmp_path) == ["checkpoint-000001"]


def test_a_checkpoint_of_the_same_step_is_replaced_whole(tmp_path: Path) -> None:
    publish(tmp_path, 3, b"old")
    path = publish(tmp_path, 3, b"new")
    assert (path / "adapter_model.safetensors").read_bytes() == b"new"
    assert names(tmp_path) == ["checkpoint-000003"]


def test_a_kill_before_the_rename_leaves_only_what_sweep_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, 1)

    class Killed(BaseException):
        pass

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "replace_folder", kill)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(Killed):
            publish(tmp_path, 2)
    assert len(names(tmp_path)) == 2
    found, passed_over = checkpoints.newest(tmp_path)
    assert found is not None and found.step == 1 and passed_over == []
    checkpoints.sweep(tmp_path)
    assert names(tmp_path) == ["checkpoint-000001"]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "halve":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("how", ["delete", "empty", "halve", "flip"])
@pytest.mark.parametrize("name", ["manifest.json", "adapter_model.safetensors", "training_state.safetensors"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, name: str, how: str) -> None:
    publish(tmp_path, 1)
    damage(publish(tmp_path, 2) / name, how)
    found, passed_over = checkpoints.newest(tmp_path)
    assert found is not None and found.step == 1
    assert len(passed_over) == 1 and passed_over[0].startswith("checkpoint-000002 was passed over: ")


def test_foreign_and_newer_checkpoints_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()  # transformers' own, without a manifest
    path = publish(tmp_path, 6)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    found, passed_over = checkpoints.newest(tmp_path)
    assert found is None and len(passed_over) == 2
    assert "newer nbkit" in passed_over[0] and "cut off" in passed_over[1]


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        publish(tmp_path, step)
    checkpoints.prune(tmp_path)
    assert names(tmp_path) == ["checkpoint-000100", "checkpoint-001000"]


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 5_000_000, 5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    sentence = r"Disk full: The checkpoint of step 7 needs 20\.0 MB, .* has 5\.0 MB free;"
    with pytest.raises(TrainingError, match=sentence), checkpoints.staged(tmp_path, 7, FACTS, 20_000_000):
        pytest.fail("the body must not run")
    assert names(tmp_path) == []


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tests.training import rig

    model = rig.lora_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / checkpoints.ADAPTER_WEIGHTS)
    weights.pop(next(iter(weights)))
    save_file(weights, tmp_path / checkpoints.ADAPTER_WEIGHTS)
    with pytest.raises(TrainingError, match="1 adapter tensors are missing"):
        checkpoints.load_adapter(model, tmp_path)
