import sys
import types

import pytest

from nbkit.hardware.meter import Meter, process_peak, release_memory

MIB = 2**20


def test_rss_and_its_peak():
    meter = Meter()
    before = meter.read()
    assert before.memory == "RSS"
    assert 0 < before.used_bytes <= before.peak_bytes <= before.total_bytes
    block = b"x" * (300 * MIB)
    held = meter.read()
    assert held.used_bytes - before.used_bytes > 250 * MIB
    del block
    release_memory()
    after = meter.read()
    assert held.used_bytes - after.used_bytes > 250 * MIB
    assert after.peak_bytes >= held.used_bytes


def test_process_peak_is_the_systems():
    assert process_peak() >= Meter().read().used_bytes * 0.9


def test_vram_counts_the_whole_device(monkeypatch):
    state = {"free": 60, "reserved": 20, "most": 20, "resets": 0}

    def reset():
        state["resets"] += 1

    cuda = types.SimpleNamespace(
        is_initialized=lambda: True,
        mem_get_info=lambda: (state["free"], 100),
        memory_reserved=lambda: state["reserved"],
        max_memory_reserved=lambda: state["most"],
        reset_peak_memory_stats=reset,
        empty_cache=lambda: state.update(emptied=True),
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    meter = Meter()
    assert state["resets"] == 0
    reading = meter.read()
    assert (reading.memory, reading.used_bytes, reading.peak_bytes, reading.total_bytes) == ("VRAM", 40, 40, 100)
    state.update(free=70, reserved=10, most=55)  # 20 held by others, torch once had 55
    assert meter.read().peak_bytes == 75
    Meter(reset=True)
    assert state["resets"] == 1
    release_memory()
    assert state["emptied"]


@pytest.mark.gpu
def test_vram_on_a_gpu():
    import torch

    torch.zeros(1, device="cuda")
    release_memory()
    meter = Meter(reset=True)
    before = meter.read()
    block = torch.zeros(512 * MIB, dtype=torch.uint8, device="cuda")
    held = meter.read()
    assert held.memory == "VRAM" and 500 * MIB <= held.used_bytes - before.used_bytes < 700 * MIB
    del block
    release_memory()
    after = meter.read()
    assert held.used_bytes - after.used_bytes >= 500 * MIB
    assert after.peak_bytes >= held.used_bytes - 64 * MIB
