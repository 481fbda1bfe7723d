"""The house rules that no single room can hold: layers, lazy imports, sizes, what the tracked files must not contain."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nbkit"
SOURCES = sorted(PACKAGE.rglob("*.py"))
STANDARD_LIBRARY_ONLY = (
    "config.py", "deadline.py", "events.py", "errors.py", "evaluation.py", "markup.py", "workspace.py", "families"
)  # fmt: skip
# Third-party packages a room may name, at the top of a file or inside a function.
ALLOWED = {
    "kernels": {"torch", "triton"},
    "hardware": {"torch", "psutil", "pynvml", "transformers"},
    "widgets": {"ipywidgets", "IPython", "traitlets"},
}
# replace and Panel.set check the names; a forward and a trainer's callback take what transformers passes.
FREE_KEYWORDS = ("replace", "forward", "set", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "triton", "pandas", "pyarrow")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def python(code: str, *arguments: str) -> str:
    """Run `code` in a fresh interpreter at the repository's root and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@cache
def tracked() -> list[Path]:
    """The files git knows (so that build outputs and caches do not count), or all of them where there is no git."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def text_files() -> list[tuple[str, str]]:
    found = []
    for path in tracked():
        try:
            found.append((name_of(path), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue  # a picture or another binary
    return found


# -- layers ----------------------------------------------------------------------------------------


def test_imports_point_down_only() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def third_party(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.split(".")[0])
    return {root for root in roots if root not in sys.stdlib_module_names and root != "nbkit"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_room_names_only_its_own_libraries(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    if room in STANDARD_LIBRARY_ONLY:
        assert third_party(path) == set()
    elif room in ALLOWED:
        assert third_party(path) <= ALLOWED[room]


# -- importing does nothing ------------------------------------------------------------------------

PANELS = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES if path.parent == PACKAGE / "widgets"]


def test_importing_nbkit_and_its_panels_loads_no_heavy_library() -> None:
    modules = ["nbkit", "nbkit.config", "nbkit.engine", "nbkit.__main__", *(m.removesuffix(".__init__") for m in PANELS)]
    code = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""
    loaded = set(json.loads(python(code, *modules)))
    assert loaded.isdisjoint(HEAVY)
    assert "nbkit.widgets.studio" in loaded


def test_importing_any_module_opens_no_connection_and_starts_no_process() -> None:
    code = """
import importlib, sys
def guard(event, details):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
        frame = sys._getframe()
        while frame is not None:  # a library of ours may probe the machine when it loads; nbkit itself may not
            if frame.f_code.co_filename.startswith(sys.argv[1]):
                break
            frame = frame.f_back
        if frame is not None or event.startswith("socket"):
            raise RuntimeError(f"{event} at import: {details}")
for name in ("torch", "transformers", "peft"):  # what they do when loaded is theirs
    importlib.import_module(name)
sys.addaudithook(guard)
for name in sys.argv[2:]:
    importlib.import_module(name)
print("ok")
"""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]
    assert python(code, str(PACKAGE), *modules).strip().endswith("ok")


def test_every_public_name_resolves() -> None:
    names = python("import nbkit\nfor name in nbkit.__all__: print(name, callable(getattr(nbkit, name)))").split("\n")
    assert {"Session True", "TrainConfig True", "studio True", "doctor True", "patch True", "unpatch True"} <= set(names)


# -- sizes and habits ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_short(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    limit = 60 if path.name == "__init__.py" else {"kernels": 500, "families": 80}.get(room, 400)
    if path.name == "_family.py":
        limit = 400  # the contract, not a family
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= limit, f"{name_of(path)} has {lines} lines, at most {limit} are allowed; split it"


FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def is_jit(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Compiled by Triton: under `triton.jit`, or this package's `jit` and `kernel`."""
    names = {ast.unparse(decorator).partition("(")[0].rpartition(".")[2] for decorator in function.decorator_list}
    return bool(names & {"jit", "kernel"})


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_are_short_and_say_what_they_take(path: Path) -> None:
    tree = tree_of(path)
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, FUNCTION) for n in ast.walk(f) if n is not f}
    for node in ast.walk(tree):
        if not isinstance(node, FUNCTION):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        assert lines <= (100 if is_jit(node) else 60), f"{name_of(path)}:{node.lineno} {node.name} has {lines} lines"
        public = not node.name.startswith("_") and id(node) not in inner and "layer" not in path.parts
        if public and node.name not in FREE_KEYWORDS:
            assert node.args.kwarg is None, f"{name_of(path)}:{node.lineno} public {node.name} takes **{node.args.kwarg.arg}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_generated_code_no_swallowed_errors_no_stubs(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        where = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("exec", "eval", "inspect.getsource", "getsource"), f"{where} calls {called}"
        if isinstance(node, ast.Attribute):
            assert node.attr != "getsource", f"{where} names getsource"
        if isinstance(node, ast.ExceptHandler):
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            caught = ast.unparse(node.type) if node.type else "everything"
            assert not (silent and caught in ("everything", "Exception", "BaseException")), f"{where} swallows {caught}"
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "NotImplementedError" not in ast.unparse(node.exc), f"{where} is a stub"


def test_the_environment_is_not_an_interface() -> None:
    for path in SOURCES:
        found = re.search(r"""["']NBKIT_[A-Z_]+["']""", path.read_text(encoding="utf-8"))
        assert found is None, f"{name_of(path)} reads {found.group()}"


# -- what is in git --------------------------------------------------------------------------------


def test_notebooks_carry_no_outputs_and_no_widget_state() -> None:
    notebooks = [path for path in tracked() if path.suffix == ".ipynb"]
    assert notebooks
    for path in notebooks:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert "widgets" not in content["metadata"], f"{name_of(path)} carries widget state"
        for number, cell in enumerate(content["cells"]):
            assert not cell.get("outputs"), f"{name_of(path)} cell {number} carries outputs"
            assert cell.get("execution_count") is None, f"{name_of(path)} cell {number} carries an execution count"


def test_tracked_files_name_no_package_host_and_no_machine_path() -> None:
    # Put together from parts, so that this file does not contain them.
    hosts = ["pypi" + ".org", "python" + "hosted.org", "deb." + "debian.org", "registry." + "npmjs", "npmjs" + ".com"]
    paths = [f"/{first}/" for first in ("wo" + "rk", "ro" + "ot", "far" + "m", "tmp/" + "nb")]
    pattern = re.compile("|".join([*map(re.escape, hosts), *(rf"(?<![\w.~-]){re.escape(path)}" for path in paths)]))
    for name, text in text_files():
        if name == "LICENSE":
            continue
        found = pattern.search(text)
        assert found is None, f"{name} names {found.group()!r}"


def test_no_unfinished_marks() -> None:
    mark = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
    for name, text in text_files():
        if name.endswith((".py", ".md", ".toml", ".ipynb")):
            found = mark.search(text)
            assert found is None, f"{name}: {text[max(0, found.start() - 40) : found.end() + 40]!r}"
