"""What this machine is: device, memory, cores, disk, within the limits of the container it runs in.

It answers without torch wherever torch is not loaded yet: a GPU is then asked through NVML.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

BF16_CAPABILITY = (8, 0)
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU. `capability`: (major, minor); memory in bytes."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`device`: "cuda" where torch can use a GPU, else "cpu". Bytes; RAM figures obey the container's limit.

    `bf16` is by capability (8.0 and up): torch says yes for a T4 (7.5) too, which only emulates it.
    """

    device: str
    name: str
    capability: tuple[int, int] | None
    bf16: bool
    vram_total_bytes: int
    vram_free_bytes: int
    ram_total_bytes: int
    ram_free_bytes: int
    ram_limited: bool  # by a container
    cores: int
    disk_free_bytes: int
    gpu_without_torch: str = ""  # the name of a GPU that the installed torch cannot use

    @property
    def total_bytes(self) -> int:
        """Of the memory that models live in: VRAM on a GPU, else RAM."""
        return self.vram_total_bytes if self.device == "cuda" else self.ram_total_bytes

    @property
    def free_bytes(self) -> int:
        return self.vram_free_bytes if self.device == "cuda" else self.ram_free_bytes

    @property
    def memory(self) -> str:
        return "VRAM" if self.device == "cuda" else "RAM"


def probe(path: str | Path | None = None) -> Machine:
    """Look at the machine. `path`: whose disk is asked for free space; None is the current folder."""
    gpu = visible_gpu()
    usable = gpu is not None and torch_has_cuda()
    total, free, limited = ram()
    name = gpu.name if usable and gpu else cpu_name()
    return Machine(
        device="cuda" if usable else "cpu",
        name=name,
        capability=gpu.capability if usable and gpu else None,
        bf16=bool(usable and gpu and gpu.capability >= BF16_CAPABILITY),
        vram_total_bytes=gpu.total_bytes if usable and gpu else 0,
        vram_free_bytes=gpu.free_bytes if usable and gpu else 0,
        ram_total_bytes=total,
        ram_free_bytes=free,
        ram_limited=limited,
        cores=cores(),
        disk_free_bytes=disk_free(Path(path) if path is not None else Path.cwd()),
        gpu_without_torch=gpu.name if gpu is not None and not usable else "",
    )


def visible_gpu() -> Gpu | None:
    """The first GPU this process may use, or None."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        capability = (properties.major, properties.minor)
        return Gpu(name=properties.name, capability=capability, total_bytes=total, free_bytes=free)
    return _nvml_gpu(os.environ.get("CUDA_VISIBLE_DEVICES"))


def _nvml_gpu(visible: str | None) -> Gpu | None:
    import pynvml

    first = visible.split(",")[0].strip() if visible is not None else "0"
    if first in ("", "-1"):
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver: no GPU
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(first)) if first.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(first)
        name = pynvml.nvmlDeviceGetName(handle)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:  # not allowed to see it
        return None
    finally:
        pynvml.nvmlShutdown()
    text = name.decode() if isinstance(name, bytes) else name
    return Gpu(name=text, capability=(major, minor), total_bytes=int(memory.total), free_bytes=int(memory.free))


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, read off its files: importing torch would cost seconds."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda"):
        return bool(torch.cuda.is_available())
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return False
    version = Path(spec.origin).parent / "version.py"
    if not version.is_file():
        return False
    return re.search(r"^cuda\b[^=]*=\s*['\"]", version.read_text(encoding="utf-8"), re.MULTILINE) is not None


def ram() -> tuple[int, int, bool]:
    """(total, free, limited by a container) in bytes; free is what can be had without swapping."""
    memory = psutil.virtual_memory()
    total, free, limited = memory.total, memory.available, False
    for limit, used in cgroup_limits():
        if limit < total:
            total, limited = limit, True
        free = min(free, max(limit - used, 0))
    return total, free, limited


def cgroup_limits(root: Path = CGROUP, membership: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """(limit, used) of every memory control group above this process that has a limit; files' page cache is not used."""
    found = []
    for folder, limit_name, used_name, cache_name in _cgroup_folders(root, membership):
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is None or used is None or limit >= 2**60:  # v1 writes a huge number for "none"
            continue
        cache = 0
        stat = folder / "memory.stat"
        if stat.is_file():
            match = re.search(rf"^{cache_name} (\d+)$", stat.read_text(), re.MULTILINE)
            cache = int(match.group(1)) if match else 0
        found.append((limit, max(used - cache, 0)))
    return found


def _cgroup_folders(root: Path, membership: Path) -> list[tuple[Path, str, str, str]]:
    v2 = ("memory.max", "memory.current", "inactive_file")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folders = [(root, v2), (root / "memory", v1)]
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            base, names = (root, v2) if number == "0" else (root / "memory", v1)
            parts = [part for part in path.split("/") if part not in ("", "..")]
            folders += [(base.joinpath(*parts[: i + 1]), names) for i in range(len(parts))]
    places = [(folder, limit, used, cache) for folder, (limit, used, cache) in folders]
    return [place for place in places if (place[0] / place[1]).is_file()]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text().strip())
    except (OSError, ValueError):  # "max", or not readable
        return None


def cores() -> int:
    """Cores this process may use: its affinity, and the container's share."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = CGROUP / "cpu.max"
    if quota.is_file():
        parts = quota.read_text().split()
        if len(parts) == 2 and parts[0].isdigit():
            count = min(count, max(1, round(int(parts[0]) / int(parts[1]))))
    return count


def disk_free(path: Path) -> int:
    """Free bytes on the disk of `path`, or of its nearest folder that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine() or "CPU"
