"""GGUF: header and tensors as meant, read by gguf and by transformers' own loader, and what is refused."""

import numpy as np
import pytest
import torch

from nbkit.errors import ExportError
from nbkit.export import export_gguf, gguf_file
from nbkit.export import gguf as room
from nbkit.export.gguf_model import GgufModel
from nbkit.export.replay import relative
from tests.export.rig import PROMPT, adapted, assert_same, files_under, logits, snapshot
from tests.export.test_adapter import four_bit
from tests.tiny import TEMPLATE, save_tiny, tiny_config, tiny_tokenizer

gguf = pytest.importorskip("gguf")
FAMILIES = ["llama", "mistral", "qwen2"]
OPEN = {"mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}}  # llama.cpp has no window here
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}


def header(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


def newer_than(version):
    import transformers
    from packaging.version import Version

    return Version(transformers.__version__) >= Version(version)


def load_with_transformers(path):
    """(model in float32, tokenizer) through transformers' own GGUF loader."""
    import transformers

    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, **options)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**where)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_loader_gives_the_same_model(family, tied, tmp_path):
    model = adapted(family, tie_word_embeddings=tied, **OPEN.get(family, PLAIN_ROPE))
    before = snapshot(model)
    report = export_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", quantization="f16", progress=False)
    assert_same(model, before)
    again, tokenizer = load_with_transformers(report.path)
    again.config.eos_token_id = again.generation_config.eos_token_id = None
    assert type(again).__name__ == ("LlamaForCausalLM" if family == "mistral" else type(model.get_base_model()).__name__)
    ids = tiny_tokenizer()(PROMPT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert tokenizer.chat_template == TEMPLATE
    if newer_than("5.20"):  # before, transformers read the GGUF tokenizer of any llama or qwen2 as that family's own
        assert tokenizer(PROMPT, add_special_tokens=False)["input_ids"] == ids[0].tolist()
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert relative(logits(again, ids), logits(model, ids)) < 5e-3
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(again.generate(ids, **options), model.generate(input_ids=ids, **options))


def test_q8_0_is_half_as_large_and_nearly_as_good(tmp_path):
    model = adapted(hidden_size=64, intermediate_size=128)
    made = {q: export_gguf(model, tiny_tokenizer(), tmp_path / f"{q}.gguf", quantization=q) for q in ("f16", "q8_0")}
    assert header(made["q8_0"].path)["general.file_type"] == 7 and header(made["f16"].path)["general.file_type"] == 1
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(made["q8_0"].path).tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["rope_freqs.weight"] == "F32"
    data = {q: sum(t.n_bytes for t in gguf.GGUFReader(r.path).tensors) for q, r in made.items()}
    assert data["q8_0"] < 0.56 * data["f16"]
    assert 0 < made["q8_0"].check["max_relative_logit_difference"] < 5e-2
    assert export_gguf(model, tiny_tokenizer(), tmp_path / "default.gguf", progress=False).kind == "gguf q8_0"


def test_the_header_says_what_the_config_says(tmp_path):
    model = adapted(bias_key=None)
    path = export_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", source_folder="/x/My-Base", progress=False).path
    found = header(path)
    expected = {
        "general.architecture": "llama",
        "general.name": "My-Base-tuned",
        "llama.vocab_size": 320,
        "llama.context_length": 2048,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(model.config.rms_norm_eps)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["tokenizer.ggml.tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == 320


def test_rope_factors_are_those_that_transformers_uses(tmp_path):
    model = adapted()
    path = export_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", progress=False).path
    factors = next(t.data for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    live = model.get_base_model().model.rotary_emb.inv_freq.numpy()
    plain = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(plain / factors, live, rtol=1e-6)
    assert factors.max() == pytest.approx(4.0) and factors.min() == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_stretched_rope_is_in_the_header(kind, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    model = adapted(rope_parameters=rope)
    found = header(export_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", progress=False).path)
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == (kind, 4.0)
    assert found.get("llama.rope.scaling.original_context_length") == (128 if kind == "yarn" else None)


def test_a_sliding_window_bounds_the_context(tmp_path):
    report = export_gguf(adapted("mistral"), tiny_tokenizer(), tmp_path / "model.gguf", progress=False)
    assert header(report.path)["llama.context_length"] == report.check["context_length"] == 8
    assert "sliding window" in str(report)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_permuted_and_back(family):
    form = GgufModel(tiny_config(family))
    for part in ("self_attn.q_proj.weight", "self_attn.k_proj.bias", "mlp.up_proj.weight"):
        name = f"model.layers.0.{part}"
        value = torch.randn((32, 3) if name.endswith("weight") else (16,))
        there = form.reorder(name, value)
        assert torch.equal(form.reorder(name, there, back=True), value)
        moved = family != "qwen2" and "self_attn" in name
        assert torch.equal(there, value) != moved
        if moved:  # row i of a head's first half goes to 2i, of its second half to 2i + 1
            width = value.shape[0] // {"q_proj": 4, "k_proj": 2}[name.split(".")[-2]]
            assert torch.equal(there[2], value[1]) and torch.equal(there[1], value[width // 2])


def test_a_four_bit_base_is_written_dequantised(tmp_path):
    model, tokenizer = four_bit(save_tiny(tmp_path / "base", "qwen2", hidden_size=64, use_sliding_window=False))
    report = export_gguf(model, tokenizer, tmp_path / "model.gguf", quantization="f16", progress=False)
    assert relative(logits(load_with_transformers(report.path)[0]), logits(model)) < 5e-3


# -- what must be caught, and what is refused ------------------------------------------------------


@pytest.mark.parametrize("damage", ["weight", "header", "cut"])
@pytest.mark.parametrize("quantization", ["f16", "q8_0"])
def test_an_altered_file_is_caught_and_removed(tmp_path, monkeypatch, damage, quantization):
    honest = room._write

    def damaging(file, *arguments):
        honest(file, *arguments)
        data = bytearray(file.read_bytes())
        if damage == "header":
            at = data.index(b"llama.block_count") + len(b"llama.block_count") + 4
            data[at] ^= 1
        elif damage == "weight":
            offset = next(t.data_offset for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight")
            data[offset + 35] ^= 0x42
        file.write_bytes(data[:-70] if damage == "cut" else data)

    monkeypatch.setattr(room, "_write", damaging)
    with pytest.raises(ExportError, match="removed"):
        export_gguf(adapted(), tiny_tokenizer(), tmp_path / "model.gguf", quantization=quantization, progress=False)
    assert files_under(tmp_path) == []


def test_a_writer_that_forgets_the_permutation_or_the_adapter_is_caught(tmp_path, monkeypatch):
    honest = room._converted

    def unpermuted(name, value, kind):
        return honest(name, value[::-1] if "q_proj" in name else value, kind)

    monkeypatch.setattr(room, "_converted", unpermuted)
    with pytest.raises(ExportError, match="attn_q"):
        export_gguf(adapted(), tiny_tokenizer(), tmp_path / "model.gguf", progress=False)
    assert files_under(tmp_path) == []


def test_the_bound_of_each_type_is_its_rounding():
    value = torch.randn(64, 64) * torch.logspace(-6, 2, 64)[:, None]
    for kind in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0):
        raw = gguf.quants.quantize(value.numpy(), kind)
        found = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(raw, kind)))
        error = (found - value).abs()
        assert bool((error <= gguf_file._bound(value, kind.name)).all())
        assert bool((error > 0.4 * gguf_file._bound(value, kind.name)).any())  # and not a wide one


@pytest.mark.parametrize("name", ["model", "model.bin", "model.gguf.txt"])
def test_the_name_must_end_in_gguf(name, tmp_path):
    with pytest.raises(ExportError, match=r"must end in \.gguf"):
        export_gguf(adapted(), tiny_tokenizer(), tmp_path / name)


def test_unknown_types_and_models_are_refused(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from nbkit.config import LoraConfig
    from nbkit.models.adapters import add_lora
    from tests.export.rig import train

    with pytest.raises(ExportError, match="q4_k_m"):
        export_gguf(adapted(), tiny_tokenizer(), tmp_path / "model.gguf", quantization="q4_k_m")
    config = AutoConfig.for_model("gemma", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                  num_key_value_heads=1, head_dim=16, vocab_size=320)  # fmt: skip
    gemma = train(add_lora(AutoModelForCausalLM.from_config(config).float(), LoraConfig(rank=2)))
    with pytest.raises(ExportError, match="gemma"):
        export_gguf(gemma, tiny_tokenizer(), tmp_path / "model.gguf")
    dynamic = adapted(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(ExportError, match="rope"):
        export_gguf(dynamic, tiny_tokenizer(), tmp_path / "model.gguf")
    assert files_under(tmp_path) == []


def test_values_beyond_float16_are_refused(tmp_path):
    model = adapted()
    model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.data[0, 0] = 1e6
    with pytest.raises(ExportError, match="range of F16"):
        export_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", quantization="f16", progress=False)
    assert files_under(tmp_path) == []


@pytest.mark.slow
def test_llama_cpp_answers_with_it(tmp_path):
    """llama.cpp itself, where the package xllamacpp is installed: the same ids for hard texts, the same greedy tokens."""
    import json
    import urllib.request

    server = pytest.importorskip("xllamacpp")
    hard = ["a  b\n\n\tc", "12 345,67", "don't WE'LL", "naïve 数字 🙂", "x" * 70, "<|im_end|>", "  lead", "trail  ", "a\r\nb"]

    def ask(where, path, question):
        request = urllib.request.Request(where + path, json.dumps(question).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    for family in FAMILIES:
        model, tokenizer = adapted(family, **OPEN.get(family, {})), tiny_tokenizer()
        report = export_gguf(model, tokenizer, tmp_path / f"{family}.gguf", quantization="f16", progress=False)
        settings = server.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(report.path), 256, 1
        settings.warmup, settings.port = False, 0
        running = server.Server(settings)
        for text in hard:
            question = {"content": text, "add_special": False, "parse_special": True}
            found = ask(running.listening_address, "/tokenize", question)["tokens"]
            assert found == tokenizer(text, add_special_tokens=False)["input_ids"], text
        ids = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt")["input_ids"]
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 48, "do_sample": False}
        made = model.generate(input_ids=ids, **options)[0, ids.shape[1] :].tolist()
        question = {"prompt": ids[0].tolist(), "n_predict": 48, "temperature": 0, "top_k": 1, "return_tokens": True}
        answer = ask(running.listening_address, "/completion", question)["tokens"]
        same = sum(a == b for a, b in zip(answer, made, strict=False))
        assert same >= 0.9 * len(made), (family, same, len(made))
        del running
