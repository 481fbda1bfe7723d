import json
import os
import struct

import pytest
import torch

from nbkit.config import ModelConfig
from nbkit.models import load as module
from nbkit.models.load import load
from tests.models.loading import load_folder, refused
from tests.tiny import save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("own_caches")

WEIGHTS = "model.safetensors"


def test_folder_loads_as_transformers_would(folder):
    loaded = load_folder(folder)
    assert loaded.source == "folder" and loaded.folder == folder.resolve() and loaded.family.name == "llama"
    assert loaded.shape.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert next(loaded.model.parameters()).dtype == torch.float32 and not loaded.model.training
    ids = torch.arange(10)[None] + 20
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, tiny_model("llama")(ids).logits)
    assert "local folder" in loaded.message and "float32 on the CPU" in loaded.message
    assert loaded.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).startswith(
        "<|im_start|>user"
    )


def test_one_line_and_no_bars_unless_asked(folder, capfd):
    load_folder(folder)
    quiet = capfd.readouterr()
    assert quiet.out == "" and "Loading" not in quiet.err
    loaded = load(ModelConfig(name=str(folder)))
    assert capfd.readouterr().out == loaded.message + "\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(folder, dtype):
    assert next(load_folder(folder, dtype=dtype).model.parameters()).dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("available", "capability", "expected"),
    [(False, None, "float32"), (True, (7, 5), "float16"), (True, (8, 0), "bfloat16"), (True, (12, 0), "bfloat16")],
)
def test_dtype_auto_goes_by_capability(monkeypatch, available, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a: True)
    device, dtype = module._place("auto")
    assert (device, dtype) == ("cuda" if available else "cpu", getattr(torch, expected))


def test_four_bit_on_cpu(folder):
    loaded = load_folder(folder, load_in_4bit=True)
    layers = [m for m in loaded.model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) == 14 and all(m.compute_dtype == torch.float32 for m in layers)
    state = layers[0].weight.quant_state
    assert state.quant_type == "nf4" and state.nested
    assert type(loaded.model.lm_head) is torch.nn.Linear and "4-bit NF4" in loaded.message
    assert loaded.model(torch.tensor([[3, 4]])).logits.isfinite().all()


def test_prequantised_folder_loads_as_it_is(folder, tmp_path):
    first = load_folder(folder, load_in_4bit=True, dtype="bfloat16")
    first.model.save_pretrained(tmp_path / "four")
    first.tokenizer.save_pretrained(tmp_path / "four")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        for config in ({}, {"load_in_4bit": True}):
            again = load_folder(tmp_path / "four", dtype="bfloat16", **config)
            assert again.model.is_loaded_in_4bit
            assert torch.equal(again.model(ids).logits, first.model(ids).logits)


def test_other_quantisation_is_refused(folder):
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused("quantised with gptq, which nbkit does not train", folder)


def test_four_bit_without_bitsandbytes(folder, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    refused(r"bitsandbytes; install it with: pip install 'nbkit-llm\[gpu\]'", folder, load_in_4bit=True)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("tied", [False, True])
def test_pad_and_eos_stay_as_they_are(folder, tied):
    tokenizer = load_folder(folder).tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_missing_pad_takes_a_known_token_and_leaves_eos(folder):
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["pad_token"]
    path.write_text(json.dumps(values))
    loaded = load_folder(folder)
    assert loaded.tokenizer.pad_token == "<|endoftext|>" and loaded.tokenizer.eos_token == "<|im_end|>"
    assert len(loaded.tokenizer) == 320 and loaded.model.config.pad_token_id == 0
    assert loaded.model.get_input_embeddings().num_embeddings == 320


# -- bad input ---------------------------------------------------------------------------------


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    refused(r"has no config\.json", folder)


def test_adapter_folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("LoRA adapter, not a model", tmp_path)


def test_broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama",')
    refused(r"config\.json cannot be read as JSON", folder)
    (folder / "config.json").write_text("[1]")
    refused("is not a JSON object", folder)


def test_pickled_weights_are_never_read(folder):
    (folder / WEIGHTS).unlink()
    canary = folder / "canary"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    torch.save(Evil(), folder / "pytorch_model.bin")
    refused(r"only in pytorch_model\.bin, a pickle", folder)
    assert not canary.exists()


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    refused(r"lacks model\.safetensors", folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_weights(folder, keep):
    path = folder / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    refused(r"model\.safetensors (has|is)", folder)


def test_huge_header_length_is_refused_quickly(folder):
    path = folder / WEIGHTS
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])
    refused("no safetensors file", folder)


def test_missing_shard_and_foreign_path(folder):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )
    refused(r"lacks model-00002-of-00002\.safetensors", folder)
    index.write_text(json.dumps({"weight_map": {"a": "../other/model.safetensors"}}))
    refused("outside its folder", folder)


def test_missing_tensors(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    refused(r"lack 1 tensors of the model, such as model\.layers\.1\.mlp\.up_proj\.weight", folder)


def test_wrong_shapes(folder):
    edit(folder, intermediate_size=72)
    refused("cannot be loaded from", folder)


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    refused("has no tokenizer", folder)


def test_remote_code_is_refused_and_never_run(folder):
    (folder / "evil.py").write_text(f"open({str(folder / 'canary')!r}, 'w')")
    edit(folder, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    refused("brings its own Python code, which nbkit never runs", folder)
    edit(folder, model_type="llama")  # a class that transformers has is used in place of the checkpoint's own code
    assert type(load_folder(folder).model).__name__ == "LlamaForCausalLM"
    assert not (folder / "canary").exists()


def test_no_language_model(folder):
    edit(folder, model_type="vit")
    refused("model type 'vit', which is no causal language model", folder)


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("olmo2", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}),
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}),
    ],
)
def test_undeclared_family_loads_and_says_so(tmp_path, model_type, sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = save_tiny(tmp_path / "m", "llama")
    config = AutoConfig.for_model(model_type, vocab_size=320, pad_token_id=2, bos_token_id=1, eos_token_id=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    loaded = load_folder(folder)
    assert loaded.family is None and not loaded.shape.exact and loaded.shape.hidden == 32
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in loaded.message
    assert f"'{model_type}' is not among nbkit's families, so it runs on transformers' own code" in loaded.message


def test_weights_larger_than_the_machine(folder, monkeypatch):
    from nbkit.hardware import probe

    monkeypatch.setattr(probe, "ram", lambda: (100_000, 90_000, True))
    refused(r"need 0\.\d MiB, this machine has 0\.1 MiB of memory; choose a smaller checkpoint, or load_in_4bit=True", folder)


def test_paths_that_are_not_there(tmp_path):
    refused("There is no folder", tmp_path / "nothing")
    refused("There is no folder ./nothing", "./nothing")
    refused("There is no folder ~/no/such", "~/no/such")
    (tmp_path / "model.gguf").write_text("x")
    refused("is a file", tmp_path / "model.gguf")


# -- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("four", [False, True])
def test_gpu_takes_the_model_in_the_dtype_of_its_capability(folder, four):
    loaded = load_folder(folder, load_in_4bit=four)
    expected = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    assert {p.device.type for p in loaded.model.parameters()} == {"cuda"}
    assert loaded.model.get_input_embeddings().weight.dtype == expected and "on the GPU" in loaded.message
    layers = [m for m in loaded.model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) == (14 if four else 0) and all(m.compute_dtype == expected for m in layers)
    assert loaded.model(torch.tensor([[3, 4]], device="cuda")).logits.isfinite().all()


@pytest.mark.gpu
def test_no_wide_copy_of_4bit_weights_stays(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 320, "num_hidden_layers": 4}
    folder = save_tiny(tmp_path / "wide", "llama", **sizes)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    loaded = load_folder(folder, load_in_4bit=True)
    held = torch.cuda.memory_allocated() - before
    from nbkit.hardware.fit import weight_bytes

    assert held < 1.05 * weight_bytes(loaded.shape, load_in_4bit=True, bytes_per_weight=2)
