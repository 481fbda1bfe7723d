from dataclasses import replace

import pytest

from nbkit.config import LoraConfig
from nbkit.hardware.fit import GIB, MIB, catalog, fit, largest, largest_that_fits, needs, weight_bytes, with_free
from nbkit.hardware.probe import Machine
from nbkit.hardware.shapes import known_shape

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def machine(free_gib: float, device: str = "cuda") -> Machine:
    gpu = device == "cuda"
    size = int(free_gib * GIB)
    return Machine(
        device=device,
        name="test",
        capability=(8, 0) if gpu else None,
        bf16=gpu,
        vram_total_bytes=size if gpu else 0,
        vram_free_bytes=size if gpu else 0,
        ram_total_bytes=16 * GIB if gpu else size,
        ram_free_bytes=16 * GIB if gpu else size,
        ram_limited=False,
        cores=2,
        disk_free_bytes=100 * GIB,
    )


def test_weights_of_llama_31_8b():
    shape = known_shape(LLAMA)
    assert weight_bytes(shape, load_in_4bit=False, bytes_per_weight=2) == 16_060_522_496
    # 6.98 billion linear weights at 0.5159 bytes; embeddings and head stay at 2 bytes each (1.05 GB each).
    four = weight_bytes(shape, load_in_4bit=True, bytes_per_weight=2)
    assert four == pytest.approx(3.60e9 + 2 * 1.05e9, rel=0.01)


def test_parts_add_up_and_name_everything():
    found = fit(known_shape(LLAMA), machine(80), load_in_4bit=True, batch_size=2, max_seq_length=2048)
    assert sum(found.parts.values()) == found.needed_bytes
    assert found.ok and "VRAM" in found.reason and found.instead == ""
    assert found.parts["adapter"] == 4 * 41_943_040


def test_qlora_8b_fits_a_16_gb_card_and_lora_does_not():
    shape = known_shape(LLAMA)
    card = machine(14.6)  # a T4's free memory
    assert fit(shape, card, load_in_4bit=True).ok
    refused = fit(shape, card, load_in_4bit=False)
    assert not refused.ok
    assert "load_in_4bit=True would bring it to" in refused.reason


def test_every_alternative_named_does_fit():
    shape = known_shape(LLAMA)
    for free in (8.5, 9, 10, 12, 14, 18, 22):
        found = fit(shape, machine(free), load_in_4bit=False, batch_size=8, max_seq_length=8192)
        assert not found.ok
        if "would bring it to" not in found.instead:
            continue
        words = dict(part.split("=") for part in found.instead.split(" would")[0].split(" and "))
        again = fit(
            shape,
            machine(free),
            load_in_4bit=words.get("load_in_4bit") == "True",
            batch_size=int(words.get("batch_size", 8)),
            max_seq_length=int(words.get("max_seq_length", 8192)),
        )
        assert again.ok, (free, found.instead)


def test_too_large_in_any_form_names_a_checkpoint_that_fits():
    found = fit(known_shape("meta-llama/Llama-3.1-405B-Instruct"), machine(24))
    best = largest_that_fits(machine(24))
    assert found.instead == f"{best} fits here"
    assert fit(known_shape(best), machine(24), load_in_4bit=True, max_seq_length=512).ok
    hopeless = fit(known_shape(LLAMA), machine(0.2))
    assert "machine with more" in hopeless.reason


def test_needs_grow_with_every_knob():
    shape, here = known_shape(LLAMA), machine(80)

    def total(rank=16, four=True, batch=1, length=1024):
        return sum(needs(shape, here, LoraConfig(rank=rank), load_in_4bit=four, batch_size=batch, max_seq_length=length).values())

    base = total()
    assert total(rank=64) > base < total(batch=4)
    assert total(length=4096) > base < total(four=False)


def test_smollm2_on_cpu_covers_what_was_measured():
    # Measured on 2 cores: 1565 MiB peak for batch 2 x 40 steps of about 110 tokens, rank 8, checkpointing.
    found = fit(known_shape("smollm2-135m-instruct"), machine(8, "cpu"), LoraConfig(rank=8), batch_size=2, max_seq_length=110)
    assert 1400 * MIB < found.needed_bytes < 2048 * MIB
    assert fit(known_shape("smollm2-135m-instruct"), machine(2.2, "cpu"), LoraConfig(rank=8), max_seq_length=128).ok


def test_catalog_is_whole_sorted_and_of_this_device():
    entries = catalog(machine=machine(14.6))
    assert [e.parameters for e in entries] == sorted(e.parameters for e in entries)
    assert all(e.load_in_4bit for e in entries)
    by_name = {e.name: e for e in entries}
    assert by_name[LLAMA].fits and not by_name["meta-llama/Llama-3.3-70B-Instruct"].fits
    assert by_name[LLAMA].reason.startswith("Most of it: weights")
    assert by_name["meta-llama/Llama-3.3-70B-Instruct"].reason.endswith(".")
    assert not any(e.load_in_4bit for e in catalog(machine=machine(8, "cpu")))
    assert not any(e.load_in_4bit for e in catalog(load_in_4bit=False, machine=machine(14.6)))


def test_with_free_changes_the_right_memory():
    assert with_free(machine(14), 5).free_bytes == 5
    assert with_free(machine(14, "cpu"), 5).ram_free_bytes == 5


def test_the_largest_of_each_fits_and_one_more_does_not():
    shape, here = known_shape(LLAMA), replace(machine(16), ram_free_bytes=128 * GIB, ram_total_bytes=128 * GIB)
    lora = LoraConfig(rank=32)
    found = largest(shape, here, lora, load_in_4bit=True, batch_size=1, max_seq_length=2048)
    asked = {"load_in_4bit": True, "batch_size": 1, "max_seq_length": 2048}
    for name, most in (("batch_size", found.batch_size), ("max_seq_length", found.max_seq_length)):
        assert fit(shape, here, lora, **{**asked, name: most}).ok
        assert not fit(shape, here, lora, **{**asked, name: most + 1}).ok
    assert fit(shape, here, replace(lora, rank=found.rank), **asked).ok
    assert not fit(shape, here, replace(lora, rank=found.rank + 1), **asked).ok
    assert found.host_bytes == found.max_seq_length * 32 * 4096 * 2


def test_host_memory_bounds_the_context_and_nothing_fits_nowhere():
    shape = known_shape(LLAMA)
    rich, poor = (replace(machine(24), ram_free_bytes=ram * GIB) for ram in (128, 8))
    contexts = [largest(shape, here, load_in_4bit=True).max_seq_length for here in (rich, poor)]
    assert contexts[0] > 3 * contexts[1] > 0
    none = largest(shape, machine(2), load_in_4bit=True)
    assert (none.batch_size, none.max_seq_length, none.rank) == (0, 0, 0)
