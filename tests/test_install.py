"""What installing nbkit does: nothing to a host's packages, and enough that the wheel alone runs the quickstart."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.lanes import ROOT, borrow, empty_venv, kernel, pip, run, short_quickstart, site_packages

COLAB = ROOT / "constraints" / "colab-2026.08.txt"
# What of Colab's set stands in for the pinned set: the libraries nbkit meets, and what they need that the pinned set has not.
COLAB_LANE = (
    *("accelerate", "datasets", "dill", "fsspec", "huggingface_hub", "multiprocess", "numpy", "pandas", "peft", "pyarrow"),
    *("ipykernel", "ipython", "ipywidgets", "jupyter_client", "tokenizers", "tornado", "traitlets", "transformers"),
    *("aiohappyeyeballs", "aiohttp", "aiosignal", "frozenlist", "multidict", "propcache", "yarl", "pytz"),
    *("backcall", "decorator", "entrypoints", "ipython-genutils", "nest-asyncio", "pickleshare", "pyzmq", "widgetsnbextension"),
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `make wheel` builds it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ".")
    (built,) = folder.glob("nbkit_llm-*.whl")
    return built


# -- what is declared ------------------------------------------------------------------------------


def test_constraints_are_plain_pins() -> None:
    for path in sorted((ROOT / "constraints").glob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.!]+", line), f"{path.name}: {line!r}"
    cpu = pins(ROOT / "constraints" / "cpu.txt")
    assert (cpu["torch"], cpu["triton"]) == ("2.13.0", "3.7.1")


def test_the_tests_run_on_the_pinned_set() -> None:
    from importlib.metadata import distributions

    installed = {normal(d.metadata["Name"]): d.version.split("+")[0] for d in distributions()}
    wrong = {
        n: (v, installed[normal(n)])
        for n, v in pins(ROOT / "constraints" / "cpu.txt").items()
        if normal(n) in installed and installed[normal(n)] != v
    }
    assert wrong == {}, "pinned and installed versions differ; run make setup"


def test_binder_reads_what_it_needs() -> None:
    folder = ROOT / "binder"
    requirements = (folder / "requirements.txt").read_text(encoding="utf-8")
    lines = [line for line in requirements.splitlines() if not line.startswith("#")]
    assert "ipykernel>=7.1" in lines and ".[cpu]" in lines and any(re.fullmatch(r"torch==\S+\+cpu", line) for line in lines)
    assert not any(line.startswith("triton") for line in lines)
    assert (folder / "runtime.txt").read_text(encoding="utf-8").strip() in ("python-3.11", "python-3.12", "python-3.13")
    assert (folder / "start").read_text(encoding="utf-8").rstrip().endswith('exec "$@"')
    assert "\nset -e\n" in (folder / "postBuild").read_text(encoding="utf-8")
    for name in ("postBuild", "start"):
        assert (folder / name).stat().st_mode & 0o111, f"binder/{name} is not executable"
        subprocess.run(["bash", "-n", folder / name], check=True)


# -- a host's packages stay as they are ------------------------------------------------------------


@pytest.fixture(scope="session")
def colab_by_name(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment in which pip sees the packages of Colab: their names and versions, without their files."""
    python = empty_venv(tmp_path_factory.mktemp("colab") / "venv")
    folder = site_packages(python)
    for name, version in pins(COLAB).items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
        (info / "INSTALLER").write_text("pip\n", encoding="utf-8")
        (info / "RECORD").write_text("", encoding="utf-8")
    return python


def changed_on_colab(python: Path, requirement: str, folder: Path) -> dict[str, str]:
    report = folder / "report.json"
    pip(python, "install", "--quiet", "--dry-run", "--report", report, requirement)
    planned = {normal(i["metadata"]["name"]): i["metadata"]["version"] for i in json.loads(report.read_text())["install"]}
    return {name: planned[normal(name)] for name in pins(COLAB) if normal(name) in planned}


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "[colab]", "[gguf]"])
def test_installing_on_colab_changes_nothing(wheel: Path, colab_by_name: Path, tmp_path: Path, extra: str) -> None:
    assert changed_on_colab(colab_by_name, f"{wheel}{extra}", tmp_path) == {}


@pytest.mark.slow
def test_an_unpinned_trl_would_change_packages_on_colab(colab_by_name: Path, tmp_path: Path) -> None:
    """Why trl is pinned in the extra, and proof that the test above can fail."""
    assert {"datasets", "pyarrow"} <= changed_on_colab(colab_by_name, "trl>=1.15", tmp_path).keys()


# -- the wheel alone -------------------------------------------------------------------------------


def execute(notebook: Path, kernel_name: str) -> str:
    """Run a notebook in its own folder; returns everything it printed."""
    content = nbformat.read(notebook, as_version=4)
    resources = {"metadata": {"path": str(notebook.parent)}}
    NotebookClient(content, timeout=300, kernel_name=kernel_name, resources=resources).execute()
    return "".join(o.get("text", "") for c in content.cells if c.cell_type == "code" for o in c.outputs)


@pytest.mark.slow
def test_the_wheel_runs_the_quickstart_in_a_clean_environment(
    wheel: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = empty_venv(tmp_path / "venv")
    pip(python, "install", "--quiet", "--no-deps", wheel)
    borrow(python)
    where = run(python, "-c", "import nbkit; print(nbkit.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(tmp_path), "nbkit must come from the wheel"
    assert "run" in run(python.with_name("nbkit"), "--help", cwd=tmp_path)

    for name, value in kernel(python, tmp_path / "jupyter", "from-wheel").items():
        monkeypatch.setenv(name, value)
    execute(short_quickstart(tmp_path / "quickstart.ipynb", str(tiny_model_dir), max_steps=3), "from-wheel")
    summary = json.loads((tmp_path / "nbkit-workspace" / "quickstart.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 3 and summary["rows"] == 30
    for path in (summary["adapter"], summary["merged"], *summary["gguf"]):
        assert Path(path).exists()


@pytest.mark.slow
def test_the_quickstart_runs_on_colabs_versions(
    wheel: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ipykernel 6.17, IPython 7.34, ipywidgets 7.7, transformers 5.15, trl 0.29, datasets 4.0: the oldest promised set."""
    python = empty_venv(tmp_path / "venv")
    versions = pins(COLAB)
    lane = [f"{name}=={versions[name]}" for name in COLAB_LANE]
    pip(python, "install", "--quiet", "--no-deps", *lane, "trl==0.29.1", "jupyter-ui-poll", wheel)
    borrow(python)
    for name, value in kernel(python, tmp_path / "jupyter", "like-colab").items():
        monkeypatch.setenv(name, value)
    loaded = "import IPython, datasets, ipykernel, ipywidgets, transformers, trl\n" + "".join(
        f"assert {module}.__version__ == {version!r}, {module}.__version__\n"
        for module, version in (
            *((name.lower(), versions[name]) for name in ("datasets", "ipykernel", "ipywidgets", "transformers")),
            ("IPython", versions["ipython"]),
            ("trl", "0.29.1"),
        )
    )
    run(python, "-c", loaded, cwd=tmp_path)
    execute(short_quickstart(tmp_path / "quickstart.ipynb", str(tiny_model_dir), max_steps=3), "like-colab")
    summary = json.loads((tmp_path / "nbkit-workspace" / "quickstart.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 3


# -- without triton, and where there is no POSIX ----------------------------------------------------

WITHOUT = """
import builtins, sys

sys.modules["triton"] = None  # as if not installed: not found, and not importable
real_import = builtins.__import__

def windows_like(name, globals=None, locals=None, fromlist=(), level=0):
    asker = (globals or {}).get("__name__", "")  # Python's own library needs these modules here; nbkit must not
    if name.split(".")[0] in ("fcntl", "resource", "pwd", "grp", "termios") and asker.split(".")[0] == "nbkit":
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real_import(name, globals, locals, fromlist, level)

builtins.__import__ = windows_like
"""

TRAIN = """
import importlib, pkgutil
import nbkit
for module in pkgutil.walk_packages(nbkit.__path__, "nbkit."):
    importlib.import_module(module.name)
session = nbkit.Session(sys.argv[2])
session.load(sys.argv[1], max_seq_length=512)
session.add_lora(rank=4)
session.use_data("sample:ships-log", held_out="sample:ships-log/held_out")
result = session.train(nbkit.TrainConfig(max_steps=2, batch_size=2)).wait()
session.export("adapter")
assert sys.modules["triton"] is None
print("steps", result.step, session.chat("All well?", max_new_tokens=4).text is not None)
"""


def test_the_cpu_path_needs_neither_triton_nor_posix(tiny_model_dir: Path, tmp_path: Path) -> None:
    printed = run(sys.executable, "-c", WITHOUT + TRAIN, tiny_model_dir, tmp_path / "workspace")
    assert printed.rstrip().endswith("steps 2 True")
