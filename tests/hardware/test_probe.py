import subprocess
import sys
import types

import psutil
import pytest

from nbkit.hardware import probe as module
from nbkit.hardware.probe import cgroup_limits, cpu_name, disk_free, probe, torch_has_cuda, visible_gpu


def test_probe_of_this_machine(tmp_path):
    machine = probe(tmp_path / "not" / "there" / "yet")
    assert 0 < machine.ram_free_bytes <= machine.ram_total_bytes <= psutil.virtual_memory().total
    assert machine.disk_free_bytes > 0 and machine.cores >= 1 and machine.name
    if machine.device == "cpu":
        assert not machine.bf16 and machine.capability is None
        assert machine.free_bytes == machine.ram_free_bytes and machine.memory == "RAM"


def test_probe_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from nbkit.hardware.probe import probe; from nbkit.hardware.meter import Meter;"
        "m = probe(); Meter().read(); assert m.device == 'cuda' or 'torch' not in sys.modules;"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("capability", "bf16"), [((7, 5), False), ((6, 0), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_is_by_capability_whatever_torch_says(monkeypatch, capability, bf16):
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        is_bf16_supported=lambda: True,
        get_device_properties=lambda i: types.SimpleNamespace(name="Tesla", major=capability[0], minor=capability[1]),
        mem_get_info=lambda i: (10, 16),
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    machine = probe()
    assert (machine.device, machine.capability, machine.bf16) == ("cuda", capability, bf16)
    assert (machine.free_bytes, machine.total_bytes, machine.memory) == (10, 16, "VRAM")


def test_gpu_that_torch_cannot_use_is_named(monkeypatch):
    gpu = module.Gpu(name="RTX", capability=(8, 9), total_bytes=1, free_bytes=1)
    monkeypatch.setattr(module, "visible_gpu", lambda: gpu)
    monkeypatch.setattr(module, "torch_has_cuda", lambda: False)
    machine = probe()
    assert machine.device == "cpu" and machine.gpu_without_torch == "RTX" and machine.capability is None


def test_hidden_gpus_are_not_seen(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for value in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert visible_gpu() is None


def test_cuda_build_is_read_off_torchs_files(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin=str(tmp_path / "torch" / "__init__.py"))
    )
    for text, expected in (("cuda: Optional[str] = None\n", False), ("debug = False\ncuda: Optional[str] = '12.8'\n", True)):
        (tmp_path / "torch" / "version.py").write_text(text)
        assert torch_has_cuda() is expected
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert torch_has_cuda() is False


def test_cgroup_v2_limit_counts_without_page_cache(tmp_path):
    pod = tmp_path / "kubepods" / "pod"
    pod.mkdir(parents=True)
    (pod / "memory.max").write_text("2147483648\n")
    (pod / "memory.current").write_text("1000000000\n")
    (pod / "memory.stat").write_text("anon 5\ninactive_file 400000000\nactive_file 9\n")
    (tmp_path / "kubepods" / "memory.max").write_text("max\n")
    (tmp_path / "kubepods" / "memory.current").write_text("5\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/kubepods/pod\n")
    assert cgroup_limits(tmp_path, membership) == [(2147483648, 600000000)]


def test_cgroup_v1_and_no_limit(tmp_path):
    memory = tmp_path / "memory"
    memory.mkdir()
    (memory / "memory.usage_in_bytes").write_text("100")
    (memory / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert cgroup_limits(tmp_path, tmp_path / "none") == []
    (memory / "memory.limit_in_bytes").write_text("3000")
    assert cgroup_limits(tmp_path, tmp_path / "none") == [(3000, 100)]


def test_limit_bounds_total_and_free(monkeypatch):
    monkeypatch.setattr(module, "cgroup_limits", lambda: [(2000, 500), (2**70, 1)])
    assert module.ram() == (2000, 1500, True)
    monkeypatch.setattr(module, "cgroup_limits", lambda: [(2000, 2500)])
    assert module.ram() == (2000, 0, True)


def test_small_helpers(tmp_path):
    assert disk_free(tmp_path / "a" / "b") == pytest.approx(disk_free(tmp_path), rel=0.1)
    assert cpu_name()


@pytest.mark.gpu
def test_gpu_is_seen_alike_with_and_without_torch(monkeypatch):
    import torch

    torch.zeros(1, device="cuda")
    with_torch = probe()
    monkeypatch.delitem(sys.modules, "torch")
    without = probe()
    assert with_torch.device == without.device == "cuda" and with_torch.capability == without.capability
    assert with_torch.name == without.name and with_torch.bf16 == without.bf16
    assert abs(with_torch.vram_total_bytes - without.vram_total_bytes) < 2**31
    assert abs(with_torch.vram_free_bytes - without.vram_free_bytes) < 2**31
