"""A checkpoint is whole or absent, and damage is found before it is trusted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from nbkit.errors import TrainingError
from nbkit.training import checkpoints, state

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


class Killed(BaseException):
    pass


class Death:
    """Ends a save at its `at`-th touch of the disk, half-way through where that writes; nothing is touched afterwards."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.count = at, 0
        for owner, name in ((os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "write_text"), (Path, "write_bytes")):
            patch.setattr(owner, name, self.wrapped(getattr(owner, name), name))
        patch.setattr(safetensors.torch, "save_file", self.wrapped(safetensors.torch.save_file, "save_file"))
        patch.setattr(checkpoints, "_write_durably", self.wrapped(checkpoints._write_durably, "_write_durably"))
        rmtree = shutil.rmtree
        patch.setattr(shutil, "rmtree", lambda *a, **k: None if self.dead else rmtree(*a, **k))

    @property
    def dead(self) -> bool:
        return self.count > self.at

    def wrapped(self, call: Any, name: str) -> Any:
        def touch(*args: Any, **options: Any) -> Any:
            self.count += 1
            if self.dead:
                if name in ("write_text", "_write_durably") and self.count == self.at + 1:
                    with open(args[0], "w") as file:
                        file.write(str(args[1])[: len(args[1]) // 2])
                raise Killed
            return call(*args, **options)

        return touch


def test_a_kill_at_any_touch_of_the_disk_costs_one_save(tmp_path: Path) -> None:
    """Each of them in turn. What is found afterwards is whole, the old or the new one, and a sweep leaves nothing else."""

    def save(folder: Path, step: int) -> None:
        with checkpoints.staged(folder, step, FACTS, 0) as staging:
            state.save(staging, {"optimizer": {"m": torch.full((100,), float(step))}})
            (staging / "trainer_state.json").write_text('{"global_step": 1234567}')
        checkpoints.prune(folder)

    steps = []
    for at in range(200):
        folder = tmp_path / str(at)
        folder.mkdir()
        save(folder, 1)
        save(folder, 2)
        with pytest.MonkeyPatch.context() as patch:
            death = Death(patch, at)
            with contextlib.suppress(Killed):
                save(folder, 3)
        found, passed_over = checkpoints.newest(folder)
        assert found is not None and found.step >= 2 and passed_over == []
        assert state.load(found.path, "optimizer")["m"].tolist() == [float(found.step)] * 100
        checkpoints.sweep(folder)
        assert names(folder)[-1] == checkpoints.name_of(found.step) and len(names(folder)) in (2, 3)
        steps.append(found.step)
        if not death.dead:
            break
    assert steps == sorted(steps) and steps[0] == 2 and steps[-1] == 3 and 10 < len(steps) < 200


@pytest.mark.skipif(os.name != "posix", reason="inodes")
def test_all_files_are_on_the_disk_before_they_get_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power may fail right after the rename: what a checkpoint's folder names has to be there then, names included."""
    synced: set[int] = set()
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.add(os.fstat(handle).st_ino), fsync(handle))[1])
    renamed: list[set[str]] = []

    def look(path: Path, target: Path) -> Path:
        inside = [path, *path.iterdir()]
        renamed.append({one.name for one in inside if one.stat().st_ino not in synced})
        synced.discard(tmp_path.stat().st_ino)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", look)
    publish(tmp_path, 5)
    assert renamed == [set()] and tmp_path.stat().st_ino in synced


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "halve":
        path.write_bytes(content[: len(content) // 2])
    elif how == "nest":
        path.write_bytes(b"[" * 100_000)
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("how", ["delete", "empty", "halve", "nest", "flip"])
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
    assert "newer nbkit" in passed_over[0] and "another program wrote it" in passed_over[1]


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
