"""The adapter export: equal tensors on disk, loadable by PEFT, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nbkit.errors import ExportError
from nbkit.export import export_adapter
from tests.export.rig import adapted, assert_same, files_under, logits, snapshot, train
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_loads_onto_the_same_base_with_equal_logits(family, tmp_path):
    from peft import PeftModel

    model = adapted(family)
    before = snapshot(model)
    report = export_adapter(model, tiny_tokenizer(), tmp_path / "adapter", progress=False)
    assert_same(model, before)
    again = PeftModel.from_pretrained(tiny_model(family), report.path).eval()
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    again.load_state_dict(biases, strict=False)
    assert torch.equal(logits(again), logits(model))
    assert report.check["tensors"] == 2 * 7 * 2 == len(load_file(report.path / "adapter_model.safetensors"))
    assert report.bytes == sum(p.stat().st_size for p in report.path.iterdir())
    assert "28 tensors" in str(report) and str(report.path) in str(report)


def test_no_pickle_and_nothing_from_outside_is_written(tmp_path):
    report = export_adapter(adapted(), tiny_tokenizer(), tmp_path / "adapter")
    assert files_under(tmp_path)[0] == "adapter"
    assert not [name for name in files_under(tmp_path) if name.endswith((".bin", ".pt", ".pkl", ".tmp"))]
    marked = json.loads((report.path / "nbkit_export.json").read_text())
    assert marked["kind"] == "adapter" and set(marked["files"]) == {p.name for p in report.path.iterdir()}


def test_an_adapter_that_was_never_trained_is_refused(tmp_path):
    with pytest.raises(ExportError, match="never trained"):
        export_adapter(adapted(scale=0.0), tiny_tokenizer(), tmp_path / "adapter")
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(tmp_path, value):
    model = adapted()
    next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] = value
    with pytest.raises(ExportError, match="nan or infinity"):
        export_adapter(model, tiny_tokenizer(), tmp_path / "adapter")
    assert files_under(tmp_path) == []


def test_a_model_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ExportError, match="no LoRA adapter"):
        export_adapter(tiny_model(), tiny_tokenizer(), tmp_path / "adapter")


def test_quantization_is_refused(tmp_path):
    with pytest.raises(ExportError, match="GGUF only"):
        export_adapter(adapted(), tiny_tokenizer(), tmp_path / "adapter", quantization="q8_0")


@pytest.mark.parametrize("damage", ["flip", "drop", "cut"])
def test_a_file_that_was_altered_is_caught_and_removed(tmp_path, monkeypatch, damage):
    from peft import PeftModel

    honest = PeftModel.save_pretrained

    def damaging(self, folder, **options):
        honest(self, folder, **options)
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        name = sorted(tensors)[3]
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-7])
            return
        tensors[name].view(torch.int32)[0, 0] ^= 1
        save_file({k: v for k, v in tensors.items() if damage == "flip" or k != name}, path)

    monkeypatch.setattr(PeftModel, "save_pretrained", damaging)
    with pytest.raises(ExportError, match="removed"):
        export_adapter(adapted(), tiny_tokenizer(), tmp_path / "adapter")
    assert files_under(tmp_path) == []


def test_a_four_bit_base_needs_no_dequantising(tmp_path, tiny_model_dir):
    model, tokenizer = four_bit(tiny_model_dir)
    assert export_adapter(model, tokenizer, tmp_path / "adapter").check["max_difference"] == 0.0


def four_bit(folder, **options):
    """(PeftModel on NF4 weights, tokenizer)."""
    pytest.importorskip("bitsandbytes")
    from nbkit.config import LoraConfig, ModelConfig
    from nbkit.models.adapters import add_lora
    from nbkit.models.load import load

    loaded = load(ModelConfig(name=str(folder), load_in_4bit=True, **options), progress=False)
    return train(add_lora(loaded.model, LoraConfig(rank=4))), loaded.tokenizer
