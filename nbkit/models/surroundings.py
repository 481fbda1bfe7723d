"""Where something was measured: the machine, the versions of the libraries, the commit of nbkit."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate")


def about_machine(device: torch.device) -> dict[str, Any]:
    """The device's name, and what decides which kernels run on it."""
    from nbkit.hardware.probe import cpu_name, ram

    about: dict[str, Any] = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    if device.type != "cuda":
        return about | {"device": cpu_name(), "memory_bytes": ram()[0]}
    properties = torch.cuda.get_device_properties(device)
    return about | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": str(torch.version.cuda),
    }


def versions() -> dict[str, str]:
    """Installed versions by distribution; those that are missing are left out."""
    import nbkit

    found = {"nbkit": nbkit.__version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the checkout that nbkit runs from, read off its .git folder; "" for an installed package."""
    import nbkit

    git = Path(nbkit.__file__).resolve().parent.parent / ".git"
    head = git / "HEAD"
    if not head.is_file():
        return ""
    text = head.read_text(encoding="utf-8").strip()
    if not text.startswith("ref: "):
        return text
    reference = text.removeprefix("ref: ")
    if (git / reference).is_file():
        return (git / reference).read_text(encoding="utf-8").strip()
    packed = git / "packed-refs"
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {reference}")), "")
