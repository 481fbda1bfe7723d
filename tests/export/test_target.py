"""Where exports go: refused places, full disks, earlier exports replaced whole, and nothing left behind."""

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from nbkit.errors import ExportError
from nbkit.export import export_adapter, export_gguf, export_merged, target
from nbkit.export.target import Target, write_mark
from tests.export.rig import adapted, files_under
from tests.tiny import tiny_tokenizer

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def model():
    return adapted()


def test_a_folder_with_foreign_files_is_refused(tmp_path, model):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="not empty"):
        export_adapter(model, tiny_tokenizer(), tmp_path)
    assert files_under(tmp_path) == ["thesis.tex"]


def test_an_empty_folder_is_taken(tmp_path, model):
    (tmp_path / "a").mkdir()
    assert export_adapter(model, tiny_tokenizer(), tmp_path / "a").path == tmp_path / "a"


def test_an_earlier_export_of_the_kind_is_replaced_whole(tmp_path, model):
    first = export_adapter(model, tiny_tokenizer(), tmp_path / "a")
    (first.path / "README.md").write_text("changed")
    export_adapter(model, tiny_tokenizer(), tmp_path / "a")
    assert (first.path / "README.md").read_text() != "changed"
    assert [name for name in files_under(tmp_path) if name.startswith(".")] == []


def test_an_export_of_another_kind_is_not(tmp_path, model):
    export_adapter(model, tiny_tokenizer(), tmp_path / "a")
    with pytest.raises(ExportError, match="no earlier merged_16bit export"):
        export_merged(model, tiny_tokenizer(), tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()


def test_an_earlier_export_that_holds_the_users_notes_is_not(tmp_path, model):
    export_adapter(model, tiny_tokenizer(), tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"notes\.txt"):
        export_adapter(model, tiny_tokenizer(), tmp_path / "a")
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_gguf_files_of_others_are_kept_and_own_ones_replaced(tmp_path, model):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 64)
    with pytest.raises(ExportError, match="not written by nbkit"):
        export_gguf(model, tiny_tokenizer(), path)
    path.unlink()
    export_gguf(model, tiny_tokenizer(), path, quantization="f16", progress=False)
    size = path.stat().st_size
    export_gguf(model, tiny_tokenizer(), path, quantization="q8_0", progress=False)
    assert path.stat().st_size < size and files_under(tmp_path) == ["m.gguf"]


def test_a_folder_where_a_file_goes_and_a_file_where_a_folder_goes(tmp_path):
    (tmp_path / "m.gguf").mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        Target(tmp_path / "m.gguf", "gguf", ".gguf")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="is a file"):
        Target(tmp_path / "file", "adapter")
    with pytest.raises(ExportError, match="not a folder"):
        Target(tmp_path / "file" / "below", "adapter")


@pytest.mark.parametrize("path", ["", "   ", "a\0b", "/", "x" * 161])
def test_names_that_cannot_be_used(path):
    with pytest.raises(ExportError):
        Target(path, "adapter")


@pytest.mark.parametrize("name", ["-rf", "$(reboot)", "`id`", "a b", "ünï", "[ab]*?", "…"])
def test_odd_names_are_only_names(name, tmp_path):
    with Target(tmp_path / name, "adapter").staged(1) as folder:
        (folder / "f").write_text("x")
        write_mark(folder, "adapter", {})
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["f", "nbkit_export.json"]
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_home_and_dots_are_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Target("~/x", "adapter").path == tmp_path / "x"
    assert Target("a/../b", "adapter").path == tmp_path / "b"


def test_a_link_stays_and_its_place_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with Target(tmp_path / "link", "adapter").staged(1) as folder:
        (folder / "f").write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "f").exists()


# -- space -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "merged", "gguf"])
def test_a_full_disk_is_seen_before_anything_is_written(kind, tmp_path, model, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**9, 10**9 - 1000, 1000))
    export = {"adapter": export_adapter, "merged": export_merged, "gguf": export_gguf}[kind]
    with pytest.raises(ExportError, match=r"needs \d+\.\d MB, .* has 0\.0 MB free; make room"):
        export(model, tiny_tokenizer(), tmp_path / ("m.gguf" if kind == "gguf" else "m"), progress=False)
    assert files_under(tmp_path) == []


def test_another_place_with_room_is_named(tmp_path, monkeypatch):
    import tempfile

    there = tempfile.gettempdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda p: Usage(1, 1, 10**12 if str(p) == there else 5))
    with pytest.raises(ExportError, match=rf"export to {there} \(1000\.0 GB free\)"):
        Target(tmp_path / "x", "merged_16bit").require_space(10**9)


def test_the_estimate_covers_what_is_written_and_not_much_more(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Target, "require_space", lambda self, needed: asked.append(needed))
    monkeypatch.setattr("nbkit.export.merge.SMALL_FILES", 40_000)
    model = adapted(vocab_size=16384)
    merged = export_merged(model, tiny_tokenizer(), tmp_path / "m", progress=False)
    gguf = export_gguf(model, tiny_tokenizer(), tmp_path / "m.gguf", quantization="f16", progress=False)
    for needed, report in zip(asked, (merged, gguf), strict=True):
        assert report.bytes <= needed <= report.bytes * 1.1 + 2**21


FULL = [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left on device (os error 28)")]


@pytest.mark.parametrize("error", FULL)
def test_a_disk_that_becomes_full_leaves_nothing(tmp_path, model, monkeypatch, error):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr("nbkit.export.safetensors_file._write_file", full)
    with pytest.raises(ExportError, match="became full"):
        export_merged(model, tiny_tokenizer(), tmp_path / "m", progress=False)
    assert files_under(tmp_path) == []


def test_a_really_full_disk():
    place = Path("/dev/full")
    if not place.exists():
        pytest.skip("needs /dev/full")
    import torch

    from nbkit.export.safetensors_file import _write_file

    zeros = torch.zeros(4_000_000, dtype=torch.bfloat16)
    with pytest.raises(OSError) as caught:
        _write_file(place, ["a"], {"a": (4_000_000,)}, torch.bfloat16, lambda name: zeros)
    assert caught.value.errno == errno.ENOSPC


def test_a_place_that_cannot_be_written(tmp_path, model, monkeypatch):
    def denied(self, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(ExportError, match="Permission denied"):
        export_adapter(model, tiny_tokenizer(), tmp_path / "a" / "b")


# -- what interrupts -------------------------------------------------------------------------------


def test_an_interrupt_leaves_nothing_and_the_earlier_export(tmp_path, model, monkeypatch):
    export_adapter(model, tiny_tokenizer(), tmp_path / "a")
    before = files_under(tmp_path)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("nbkit.export.adapter._compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_adapter(model, tiny_tokenizer(), tmp_path / "a")
    assert files_under(tmp_path) == before


def test_an_earlier_export_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, model, monkeypatch):
    export_adapter(model, tiny_tokenizer(), tmp_path / "a")
    before = files_under(tmp_path)
    honest = Path.rename

    def rename(self, other):
        if self.name.endswith(".tmp") and not self.name.endswith("-old.tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return honest(self, other)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ExportError, match="Input/output error"):
        export_adapter(model, tiny_tokenizer(), tmp_path / "a")
    assert files_under(tmp_path) == before


def test_what_a_killed_process_left_is_swept_and_a_living_ones_is_not(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True).stdout.strip()
    host = socket.gethostname()
    for owner in (gone, os.getppid()):
        (tmp_path / f".a.{host}-{owner}-ab12cd.tmp").mkdir()
    (tmp_path / f".other.{host}-{gone}-ab12cd.tmp").mkdir()
    with Target(tmp_path / "a", "adapter").staged(1) as folder:
        (folder / "f").write_text("x")
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [f".a.{host}-{os.getppid()}-ab12cd.tmp", f".other.{host}-{gone}-ab12cd.tmp", "a"]


def test_a_mark_that_is_damaged_counts_as_none(tmp_path, model):
    export_adapter(model, tiny_tokenizer(), tmp_path / "a")
    for text in ("", "{", "[]", '{"kind": "adapter"}', '{"kind": "adapter", "files": 3}'):
        (tmp_path / "a" / target.MARK).write_text(text)
        with pytest.raises(ExportError, match="not empty"):
            Target(tmp_path / "a", "adapter")
