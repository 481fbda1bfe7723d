import html
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from nbkit.hardware import doctor as module
from nbkit.hardware.doctor import LIBRARIES, Version, doctor, find_problems, same_version
from nbkit.hardware.fit import GIB
from tests.hardware.test_fit import machine

GOOD = {name: Version(name=name, installed="3.7.1" if name == "triton" else "9.0.0", loaded="") for name in LIBRARIES}


def problems(versions=None, here=None, foreign=""):
    return find_problems({**GOOD, **(versions or {})}, here or machine(16, "cpu"), foreign)


def test_report_of_this_machine(tmp_path):
    began = time.perf_counter()
    report = doctor(tmp_path)
    assert time.perf_counter() - began < 2
    text = str(report)
    for name in LIBRARIES:
        assert name in text
    assert "checkpoints" in text and str(tmp_path) in text
    assert len(report.fits) + len(report.does_not_fit) > 30
    assert "<table>" in report._repr_html_()


def test_doctor_imports_nothing_heavy():
    heavy = "{'transformers', 'peft', 'datasets', 'bitsandbytes'}"
    code = f"import sys, nbkit; nbkit.doctor(); print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def test_a_healthy_machine_without_gpu_has_no_problem():
    assert problems() == []
    assert problems({"triton": Version(name="triton", installed="", loaded="")}) == []


def test_loaded_differs_from_installed():
    found = problems({"torch": Version(name="torch", installed="2.13.0", loaded="2.11.0+cu128")})
    assert len(found) == 1 and "torch 2.11.0+cu128 is loaded but 2.13.0 is installed: restart the kernel" in found[0]
    assert problems({"torch": Version(name="torch", installed="2.13.0+cpu", loaded="2.13.0")}) == []


@pytest.mark.parametrize(
    ("version", "bad"), [("7.0.0", True), ("7.0.1", True), ("7.1.0", False), ("6.17.1", False), ("7.4.0", False)]
)
def test_ipykernel_70_loses_updates(version, bad):
    found = problems({"ipykernel": Version(name="ipykernel", installed=version, loaded="")})
    assert bool(found) == bad
    assert not bad or "ipykernel>=7.1" in found[0]


@pytest.mark.parametrize(("version", "bad"), [("7.7.0", True), ("7.6.5", True), ("7.7.1", False), ("8.1.9", False)])
def test_old_ipywidgets(version, bad):
    assert bool(problems({"ipywidgets": Version(name="ipywidgets", installed=version, loaded="")})) == bad


def test_what_was_loaded_counts_before_what_is_installed():
    """The kernel in use decides, not the one that an install has just put on disk."""
    found = problems({"ipykernel": Version(name="ipykernel", installed="7.1.0", loaded="7.0.1")})
    assert any("loses widget updates" in sentence for sentence in found)


@pytest.mark.parametrize("name", ["torch", "trl", "bitsandbytes", "gguf"])
def test_missing_libraries(name):
    found = problems({name: Version(name=name, installed="", loaded="")})
    assert len(found) == 1 and name in found[0] and "pip install" in found[0]


def test_missing_triton_matters_on_a_gpu():
    assert "triton" in problems({"triton": Version(name="triton", installed="", loaded="")}, machine(16))[0]


def test_foreign_distribution(monkeypatch):
    monkeypatch.setattr(
        module.importlib.metadata, "version", lambda name: {"nbkit": "0.3.1", "nbkit-llm": "0.1.0"}.get(name, "1")
    )
    assert module.shadowing() == "0.3.1"
    found = problems(foreign="0.3.1")
    assert "nbkit 0.3.1" in found[0] and "pip uninstall nbkit" in found[0] and "nbkit-llm" in found[0]


def test_machine_problems():
    low = replace(machine(16, "cpu"), ram_free_bytes=GIB, disk_free_bytes=GIB)
    assert [sentence[:8] for sentence in problems(here=low)] == ["Only 1.0", "Only 1.0"]
    assert "of memory" in problems(here=low)[0] and "of disk" in problems(here=low)[1]
    old = replace(machine(16), capability=(6, 1))
    assert "capability 6.1" in problems(here=old)[0]
    idle = replace(machine(16, "cpu"), gpu_without_torch="RTX 4090")
    assert "RTX 4090" in problems(here=idle)[0] and "CUDA build" in problems(here=idle)[0]


def test_html_is_escaped():
    report = doctor()
    evil = replace(report, problems=("<img src=x onerror=alert(1)>",), machine=replace(report.machine, name="<b>cpu</b>"))
    shown = evil._repr_html_()
    assert "<img" not in shown and "<b>cpu" not in shown
    assert html.escape("<img src=x onerror=alert(1)>") in shown


def test_every_problem_is_one_sentence():
    everything = problems(
        {name: Version(name=name, installed="", loaded="") for name in LIBRARIES},
        replace(machine(16), capability=(6, 0), ram_free_bytes=1, disk_free_bytes=1, gpu_without_torch="X"),
        "1.0",
    )
    assert len(everything) > 10
    for sentence in everything:
        assert sentence.endswith(".") and "\n" not in sentence


def test_same_version():
    assert same_version("2.13.0+cpu", "2.13.0") and not same_version("2.13.0", "2.13.1")


@pytest.mark.parametrize(("version", "bad"), [("3.6.0", False), ("3.7.1", False), ("3.5.1", True), ("4.0.0+git", True)])
def test_triton_that_launches_slowly_is_named_on_a_gpu(version, bad):
    from nbkit.kernels._launch import LEAN_VERSIONS

    assert module.LEAN_TRITON == LEAN_VERSIONS
    for here, is_gpu in ((machine(16), True), (machine(16, "cpu"), False)):
        said = problems({"triton": Version(name="triton", installed=version, loaded="")}, here)
        assert any("launches kernels fast under (3.6 and 3.7)" in one for one in said) is (bad and is_gpu)
