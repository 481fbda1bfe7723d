"""`nbkit.doctor()`: versions, device, memory, disk, what fits, and one sentence for each problem.

Versions are read off the installed metadata and off modules that are loaded already; nothing heavy is imported.
"""

from __future__ import annotations

import html
import importlib.metadata
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from nbkit.hardware.fit import GIB, CatalogEntry, catalog
from nbkit.hardware.probe import Machine, probe

# Distribution name: the module it is imported as.
LIBRARIES = {
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "peft": "peft",
    "trl": "trl",
    "datasets": "datasets",
    "bitsandbytes": "bitsandbytes",
    "accelerate": "accelerate",
    "numpy": "numpy",
    "pyarrow": "pyarrow",
    "ipywidgets": "ipywidgets",
    "ipykernel": "ipykernel",
    "gguf": "gguf",
}
NEEDED = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "ipywidgets")
OURS = "nbkit-llm"
LEAN_TRITON = ((3, 6), (3, 7))  # as nbkit/kernels/_launch.py has it, which is not imported here for torch's sake
LOW_DISK = 2 * GIB
LOW_MEMORY = int(1.8 * GIB)


@dataclass(frozen=True, kw_only=True)
class Version:
    """`loaded`: in this process, "" if not imported yet. `installed`: on disk, "" if not there."""

    name: str
    installed: str
    loaded: str


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """What `doctor()` found. Show it by `print(report)`, or as the value of a cell."""

    python: str
    platform: str
    versions: tuple[Version, ...]
    machine: Machine
    workspace: Path
    fits: tuple[CatalogEntry, ...]
    does_not_fit: tuple[CatalogEntry, ...]
    problems: tuple[str, ...]

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(what, value) pairs, versions left out."""
        machine = self.machine
        device = f"{machine.name} (CPU, {machine.cores} cores)"
        if machine.device == "cuda" and machine.capability:
            kind = "bfloat16" if machine.bf16 else "float16"
            device = f"{machine.name} (GPU, capability {machine.capability[0]}.{machine.capability[1]}, {kind})"
        rows = [("python", f"{self.python} on {self.platform}"), ("device", device)]
        if machine.device == "cuda":
            rows.append(("VRAM", f"{_gib(machine.vram_free_bytes)} of {_gib(machine.vram_total_bytes)} free"))
        limit = " (the container's limit)" if machine.ram_limited else ""
        rows.append(("memory", f"{_gib(machine.ram_free_bytes)} of {_gib(machine.ram_total_bytes)} free{limit}"))
        rows.append(("disk", f"{_gib(machine.disk_free_bytes)} free at {self.workspace}"))
        largest = [entry.name for entry in self.fits[-3:]][::-1]
        all_of_them = len(self.fits) + len(self.does_not_fit)
        fits = f"{len(self.fits)} of {all_of_them} known checkpoints" + (f", largest {', '.join(largest)}" if largest else "")
        bits = "4-bit" if machine.device == "cuda" else "float32"
        rows.append(("fits", f"{fits} (LoRA, {bits}, batch 1, 1024 tokens)"))
        return rows

    def __str__(self) -> str:
        lines = [f"{name:<13}{value}" for name, value in self.rows]
        lines += ["", f"{'library':<13}{'installed':<14}loaded"]
        lines += [f"{v.name:<13}{v.installed or '-':<14}{v.loaded or '-'}" for v in self.versions]
        lines.append("")
        lines += [f"problem: {sentence}" for sentence in self.problems] or ["No problems found."]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        def cell(text: str) -> str:
            return f"<td style='text-align:left;padding:1px 10px'>{html.escape(text)}</td>"

        facts = "".join(f"<tr>{cell(name)}{cell(value)}</tr>" for name, value in self.rows)
        head = f"<tr>{cell('library')}{cell('installed')}{cell('loaded')}</tr>"
        versions = "".join(f"<tr>{cell(v.name)}{cell(v.installed or '-')}{cell(v.loaded or '-')}</tr>" for v in self.versions)
        problems = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.problems)
        end = f"<ul>{problems}</ul>" if problems else "<p>No problems found.</p>"
        return f"<table>{facts}</table><table>{head}{versions}</table>{end}"


def doctor(workspace: str | Path | None = None) -> DoctorReport:
    """Look at this machine and this environment. Takes well under two seconds and changes nothing.

    Args:
        workspace: the folder whose disk is looked at; None is the current one.
    """
    folder = Path(workspace) if workspace is not None else Path.cwd()
    versions = tuple(Version(name=n, installed=installed(n), loaded=loaded(m)) for n, m in LIBRARIES.items())
    machine = probe(folder)
    entries = catalog(machine=machine)
    fits = tuple(entry for entry in entries if entry.fits)
    return DoctorReport(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        versions=versions,
        machine=machine,
        workspace=folder,
        fits=fits,
        does_not_fit=tuple(entry for entry in entries if not entry.fits),
        problems=tuple(find_problems({v.name: v for v in versions}, machine, shadowing())),
    )


def installed(distribution: str) -> str:
    """The version on disk, "" if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def loaded(module: str) -> str:
    """The version in this process, "" if the module is not imported."""
    return str(getattr(sys.modules.get(module), "__version__", "") or "")


def shadowing() -> str:
    """The version of another project's distribution called `nbkit`, which installs a package of the same name; else ""."""
    return installed("nbkit")


def find_problems(versions: dict[str, Version], machine: Machine, foreign: str = "") -> list[str]:
    """One sentence for each, the gravest first."""
    return [
        *_library_problems(versions, machine, foreign),
        *_notebook_problems(versions),
        *_machine_problems(machine),
    ]


def _library_problems(versions: dict[str, Version], machine: Machine, foreign: str) -> list[str]:
    found = []
    if foreign:
        found.append(
            f"Another project's package nbkit {foreign} is installed and takes the same import name: run "
            f"pip uninstall nbkit, then pip install --force-reinstall --no-deps {OURS}."
        )
    for version in versions.values():
        if version.loaded and version.installed and not same_version(version.loaded, version.installed):
            found.append(
                f"{version.name} {version.loaded} is loaded but {version.installed} is installed: restart the kernel, "
                "so that what runs is what is installed."
            )
    for name in NEEDED:
        if not versions[name].installed and not versions[name].loaded:
            found.append(f"{name} is not installed: pip install '{OURS}[{'gpu' if machine.device == 'cuda' else 'cpu'}]'.")
    if not versions["bitsandbytes"].installed:
        found.append(f"bitsandbytes is not installed, so load_in_4bit is not available: pip install '{OURS}[gpu]'.")
    if not versions["gguf"].installed:
        found.append(
            f"gguf is not installed, so the embedded model and GGUF export are not available: pip install '{OURS}[gguf]'."
        )
    if machine.device == "cuda" and not versions["triton"].installed:
        found.append(f"triton is not installed, so nbkit's kernels fall back to plain torch: pip install '{OURS}[gpu]'.")
    triton = versions["triton"].loaded or versions["triton"].installed
    if machine.device == "cuda" and triton and _numbers(triton)[:2] not in LEAN_TRITON:
        known = " and ".join(".".join(map(str, one)) for one in LEAN_TRITON)
        found.append(
            f"triton {triton} is not among those that nbkit launches kernels fast under ({known}): each launch takes some 15 "
            "microseconds longer, which small models feel; install a torch that brings one of them."
        )
    return found


def _notebook_problems(versions: dict[str, Version]) -> list[str]:
    found = []
    kernel = versions["ipykernel"].loaded or versions["ipykernel"].installed
    if kernel and _numbers(kernel)[:2] == (7, 0):
        found.append(
            f"ipykernel {kernel} loses widget updates that come from threads, so plots stand still while a run trains: "
            "pip install -U 'ipykernel>=7.1', then restart the kernel."
        )
    widgets = versions["ipywidgets"].loaded or versions["ipywidgets"].installed
    if widgets and _numbers(widgets) < (7, 7, 1):
        found.append(f"ipywidgets {widgets} is too old for the panels: pip install -U 'ipywidgets>=7.7.1', then reload the page.")
    return found


def _machine_problems(machine: Machine) -> list[str]:
    found = []
    if machine.gpu_without_torch:
        found.append(
            f"There is a GPU ({machine.gpu_without_torch}) but the installed torch is a CPU build or cannot reach the driver, "
            "so training runs on the CPU: install a CUDA build of torch."
        )
    if machine.capability is not None and machine.capability < (7, 0):
        found.append(
            f"{machine.name} has capability {machine.capability[0]}.{machine.capability[1]}; Triton needs 7.0, so nbkit's "
            "kernels are not used there and training is slow."
        )
    if machine.ram_free_bytes < LOW_MEMORY:
        found.append(
            f"Only {_gib(machine.ram_free_bytes)} of memory are free; the quickstart needs about 1.8 GiB: close other notebooks."
        )
    if machine.disk_free_bytes < LOW_DISK:
        found.append(
            f"Only {_gib(machine.disk_free_bytes)} of disk are free; a model, a run and its exports need about 2 GiB: free some."
        )
    return found


def same_version(one: str, other: str) -> bool:
    """Equal but for a local part such as +cpu or +cu128, which module and metadata do not always both carry."""
    return one.partition("+")[0] == other.partition("+")[0]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
