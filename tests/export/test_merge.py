"""The merged model: what is on disk answers as the live model does, in this process and in a fresh one."""

import json
import subprocess
import sys

import pytest
import torch

from nbkit.errors import ExportError
from nbkit.export import export_merged, merge, safetensors_file, weights
from nbkit.export.replay import relative
from tests.export.rig import adapted, assert_same, files_under, logits, snapshot, train
from tests.export.test_adapter import four_bit
from tests.tiny import save_tiny, tiny_tokenizer

FAMILIES = ["llama", "mistral", "qwen2"]


def reloaded(folder):
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_answers_as_the_live_model(family, tied, tmp_path):
    model = adapted(family, tie_word_embeddings=tied).train()
    before = snapshot(model)
    report = export_merged(model, tiny_tokenizer(), tmp_path / "merged", progress=False)
    assert_same(model, before)
    live = logits(model.eval())
    with model.disable_adapter():
        base = logits(model)
    found = logits(reloaded(report.path))
    assert relative(found, live) < 1e-2
    assert relative(found, base) > 10 * relative(found, live)
    assert report.check["max_relative_logit_difference"] < 1e-2
    assert f"{report.check['max_relative_logit_difference']:.1e}" in str(report)


def test_the_merged_weight_is_exactly_base_plus_scaled_product(tmp_path):
    from safetensors.torch import load_file

    model = adapted()
    report = export_merged(model, tiny_tokenizer(), tmp_path / "merged", progress=False)
    written = load_file(report.path / "model.safetensors")
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    expected = layer.base_layer.weight + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(written["model.layers.1.mlp.down_proj.weight"].float(), expected, rtol=2**-8, atol=1e-6)
    assert {t.dtype for t in written.values()} == {torch.bfloat16}


def test_float16_is_nearer_than_bfloat16(tmp_path):
    model = adapted()
    far = [export_merged(model, tiny_tokenizer(), tmp_path / d, dtype=d, progress=False) for d in ("bfloat16", "float16")]
    assert far[1].check["max_relative_logit_difference"] < far[0].check["max_relative_logit_difference"] / 3
    assert json.loads((far[1].path / "config.json").read_text())["dtype"] == "float16"


def test_rslora_scale_and_several_layers_of_bias(tmp_path):
    from nbkit.config import LoraConfig
    from nbkit.models.adapters import add_lora
    from tests.tiny import tiny_model

    lora = LoraConfig(rank=4, alpha=8, use_rslora=True, bias="lora_only", targets=("q_proj", "v_proj"))
    model = train(add_lora(tiny_model("qwen2"), lora))
    report = export_merged(model, tiny_tokenizer(), tmp_path / "merged", progress=False)
    assert relative(logits(reloaded(report.path)), logits(model)) < 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_four_bit_base_is_dequantised(family, tmp_path):
    folder = save_tiny(tmp_path / "base", family, hidden_size=64, tie_word_embeddings=family == "qwen2")
    model, tokenizer = four_bit(folder)
    before = snapshot(model)
    report = export_merged(model, tokenizer, tmp_path / "merged", source_folder=folder, progress=False)
    assert_same(model, before)
    config = json.loads((report.path / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16" and config["architectures"]
    assert relative(logits(reloaded(report.path)), logits(model)) < 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_live_model_in_16_bits_is_judged_by_its_weights(dtype, tmp_path):
    model = adapted()
    base = model.get_base_model()
    for name, parameter in base.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    report = export_merged(model, tiny_tokenizer(), tmp_path / "merged", dtype=dtype, progress=False)
    assert report.check["max_relative_logit_difference"] < 1e-2


def test_config_tokenizer_template_and_licence_go_along(tmp_path, tiny_model_dir):
    from transformers import AutoTokenizer

    source = tmp_path / "source"
    source.mkdir()
    (source / "LICENSE").write_text("Apache-2.0")
    model, tokenizer = adapted(), tiny_tokenizer()
    model.generation_config.temperature = 0.5  # without do_sample: transformers' own save_pretrained refuses this
    report = export_merged(model, tokenizer, tmp_path / "merged", source_folder=source, progress=False)
    again = AutoTokenizer.from_pretrained(report.path)
    assert again.chat_template == tokenizer.chat_template and again.get_vocab() == tokenizer.get_vocab()
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert json.loads((report.path / "generation_config.json").read_text())["temperature"] == 0.5
    assert (report.path / "LICENSE").read_text() == "Apache-2.0"
    assert not list(report.path.glob("*.bin"))


def test_a_fresh_process_gives_the_same_greedy_tokens(tmp_path):
    model = adapted()
    report = export_merged(model, tiny_tokenizer(), tmp_path / "merged", dtype="float16", progress=False)
    ids = tiny_tokenizer()("The wind is", return_tensors="pt")["input_ids"]
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = AutoTokenizer.from_pretrained(sys.argv[1])("The wind is", return_tensors="pt")["input_ids"]
print(model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code, str(report.path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        assert done.stdout.strip() == str(model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0].tolist())


def test_shards_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file.write_checkpoint, "__defaults__", (40_000,))
    model = adapted()
    report = export_merged(model, tiny_tokenizer(), tmp_path / "merged", progress=False)
    shards = sorted(p.name for p in report.path.glob("model-*.safetensors"))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert relative(logits(reloaded(report.path)), logits(model)) < 1e-2


# -- what must be caught ---------------------------------------------------------------------------


def no_adapter(self, name):
    return self.base(name).cpu().contiguous()


def scaled_wrongly(self, name):
    value = self.base(name)
    for term in self.entries[name].terms:
        value = torch.addmm(value, term.b.detach(), term.a.detach(), alpha=term.scale * 2)
    return value.contiguous()


def one_layer_zeroed(self, name):
    value = honest_merged(self, name)
    return torch.zeros_like(value) if name == "model.layers.1.self_attn.v_proj.weight" else value


def not_finite(self, name):
    value = honest_merged(self, name)
    return torch.full_like(value, float("nan")) if name == "model.norm.weight" else value


honest_merged = weights.LiveWeights.merged


@pytest.mark.parametrize("wrong", [no_adapter, scaled_wrongly, one_layer_zeroed, not_finite])
def test_wrong_weights_are_caught_and_removed(tmp_path, monkeypatch, wrong):
    model = adapted()
    monkeypatch.setattr(weights.LiveWeights, "merged", wrong)
    with pytest.raises(ExportError, match="removed"):
        export_merged(model, tiny_tokenizer(), tmp_path / "merged", progress=False)
    assert files_under(tmp_path) == []


def test_a_forgotten_adapter_is_caught_even_where_the_gate_is_wide(tmp_path, monkeypatch):
    monkeypatch.setattr(weights.LiveWeights, "merged", no_adapter)
    monkeypatch.setattr(merge, "GATE", 1.0)
    with pytest.raises(ExportError, match="nearer to the base"):
        export_merged(adapted(), tiny_tokenizer(), tmp_path / "merged", progress=False)
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_file_is_caught_and_an_earlier_export_stays(tmp_path, monkeypatch, damage):
    model = adapted()
    first = export_merged(model, tiny_tokenizer(), tmp_path / "merged", progress=False)
    good = (first.path / "model.safetensors").read_bytes()
    honest = safetensors_file.write_checkpoint

    def damaging(folder, shapes, dtype, make):
        shapes = {k: v for k, v in shapes.items() if damage != "missing" or k != "model.norm.weight"}
        honest(folder, shapes, dtype, make)
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[-30_000] ^= 1  # the last bit of one weight
        path.write_bytes(data[:-9] if damage == "cut" else data)

    monkeypatch.setattr(merge, "write_checkpoint", damaging)
    with pytest.raises(ExportError):
        export_merged(model, tiny_tokenizer(), tmp_path / "merged", progress=False)
    assert (first.path / "model.safetensors").read_bytes() == good
    assert [name for name in files_under(tmp_path) if "tmp" in name] == []


def test_a_config_that_says_something_else_is_caught(tmp_path, monkeypatch):
    honest = merge._write_small_files

    def damaging(folder, *arguments):
        honest(folder, *arguments)
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 500.0
        (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(merge, "_write_small_files", damaging)
    with pytest.raises(ExportError, match="removed"):
        export_merged(adapted(), tiny_tokenizer(), tmp_path / "merged", progress=False)


def test_values_beyond_float16_are_refused(tmp_path):
    model = adapted()
    model.get_base_model().model.layers[0].input_layernorm.weight.data[0] = 1e5
    with pytest.raises(ExportError, match="float16"):
        export_merged(model, tiny_tokenizer(), tmp_path / "merged", dtype="float16", progress=False)
    assert files_under(tmp_path) == []


def test_settings_that_are_refused(tmp_path):
    model = adapted()
    with pytest.raises(ExportError, match="dtype 'int8'"):
        export_merged(model, tiny_tokenizer(), tmp_path / "merged", dtype="int8")
    with pytest.raises(ExportError, match="16-bit"):
        export_merged(model, tiny_tokenizer(), tmp_path / "merged", quantization="q8_0")


def test_adapters_that_cannot_be_merged_are_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    from tests.tiny import tiny_model

    dora = train(get_peft_model(tiny_model(), LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])))
    with pytest.raises(ExportError, match="variant of LoRA"):
        export_merged(dora, tiny_tokenizer(), tmp_path / "merged")
    embedded = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(ExportError, match="not LoRA on a linear"):
        export_merged(train(embedded), tiny_tokenizer(), tmp_path / "merged")
    tied = train(get_peft_model(tiny_model(tie_word_embeddings=True), LoraConfig(r=4, target_modules=["lm_head"])))
    with pytest.raises(ExportError, match="tied to the embeddings"):
        export_merged(tied, tiny_tokenizer(), tmp_path / "merged")
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(ExportError, match="already merged"):
        export_merged(merged, tiny_tokenizer(), tmp_path / "merged")


def test_modules_that_were_trained_whole_are_written(tmp_path):
    from peft import LoraConfig, get_peft_model

    from tests.tiny import tiny_model

    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = train(get_peft_model(tiny_model(), config))
    model.get_base_model().lm_head.modules_to_save["default"].weight.data.mul_(-1)
    report = export_merged(model, tiny_tokenizer(), tmp_path / "merged", progress=False)
    assert relative(logits(reloaded(report.path)), logits(model)) < 1e-2
