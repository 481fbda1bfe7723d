import json
from pathlib import Path

import pytest

from nbkit import workspace
from nbkit.workspace import default_workspace, keep_rows, new_run_dir


def test_run_folders_are_new_and_named_by_the_model(tmp_path):
    first = new_run_dir(tmp_path, "meta-llama/Llama 3.1:8B")
    second = new_run_dir(tmp_path, "meta-llama/Llama 3.1:8B")
    assert first != second and first.is_dir() and second.is_dir()
    assert first.parent == tmp_path / "runs"
    assert first.name.endswith("-Llama-3.1-8B")


@pytest.mark.parametrize("name", ["..", "/", "../../etc", "a" * 500, "名前", "-rf"])
def test_a_hostile_model_name_stays_inside_the_workspace(tmp_path, name):
    folder = new_run_dir(tmp_path, name)
    assert folder.resolve().parent == (tmp_path / "runs").resolve()
    assert len(folder.name) < 120


def test_rows_from_memory_are_kept_once_and_whole(tmp_path):
    rows = [{"instruction": "a\nb", "output": "ü"}, {"instruction": "x\ud800", "output": None}]
    kept = keep_rows(rows, tmp_path)
    assert keep_rows(iter(rows), tmp_path) == kept
    assert [json.loads(line) for line in Path(kept).read_text(encoding="utf-8").splitlines()] == rows
    assert [p.name for p in (tmp_path / "data").iterdir()] == [kept.rsplit("/", 1)[-1]]
    assert keep_rows(rows[:1], tmp_path) != kept


def test_names_stay_names_and_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert keep_rows("sample:ships-log", tmp_path) == "sample:ships-log"
    assert keep_rows("owner/name", tmp_path) == "owner/name"
    assert keep_rows("rows.jsonl", tmp_path) == str(tmp_path / "rows.jsonl")
    assert keep_rows(tmp_path / "absent.csv", tmp_path) == str(tmp_path / "absent.csv")


def test_the_default_is_where_the_session_keeps_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_workspace() == tmp_path / "nbkit-workspace"
    monkeypatch.setattr(workspace, "KAGGLE", tmp_path)
    assert default_workspace() == tmp_path / "nbkit"
    (tmp_path / "drive").mkdir()
    monkeypatch.setattr(workspace, "DRIVE", tmp_path / "drive")
    assert default_workspace() == tmp_path / "drive" / "nbkit"
