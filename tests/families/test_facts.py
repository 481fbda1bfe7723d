"""Every declared family is proved at toy size: what the facts name is there, and nothing they do not name."""

import subprocess
import sys

import pytest
import torch

from nbkit.families import all_families, checkpoint, find
from tests.tiny import tiny_config, tiny_model

FAMILIES = all_families()
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


@each_family
def test_named_paths_exist(family):
    model = tiny_model(family.name)
    decoder = family.decoder
    for path in (decoder.base, decoder.embeddings, decoder.final_norm, decoder.rotary, family.head.module):
        assert isinstance(model.get_submodule(path), torch.nn.Module), path
    layers = model.get_submodule(decoder.layers)
    assert len(layers) == 2
    for layer in layers:
        for path in (family.norm.attention, family.norm.mlp):
            norm = layer.get_submodule(path)
            assert norm.weight.shape == (32,)
            assert getattr(norm, family.norm.eps) == model.config.rms_norm_eps
        mlp = layer.get_submodule(family.mlp.module)
        assert mlp.get_submodule(family.mlp.gate).weight.shape == (64, 32)
        assert mlp.get_submodule(family.mlp.up).weight.shape == (64, 32)
        assert mlp.get_submodule(family.mlp.down).weight.shape == (32, 64)


@each_family
def test_attention_facts(family):
    model = tiny_model(family.name)
    facts = family.attention
    head = getattr(model.config, "head_dim", None) or 8
    attention = model.get_submodule(family.decoder.layers)[1].get_submodule(facts.module)
    assert attention.get_submodule(facts.q).weight.shape == (4 * head, 32)
    assert attention.get_submodule(facts.k).weight.shape == attention.get_submodule(facts.v).weight.shape == (2 * head, 32)
    assert attention.get_submodule(facts.o).weight.shape == (32, 4 * head)
    for name in (facts.q, facts.k, facts.v):
        assert (attention.get_submodule(name).bias is not None) == facts.qkv_bias, name
    assert (attention.get_submodule(facts.o).bias is not None) == facts.o_bias
    assert attention.scaling == pytest.approx(head**-0.5)
    assert not facts.qk_norm and not hasattr(attention, "q_norm")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.attention.bias_key], ids=lambda f: f.name)
def test_bias_keys_decide(family):
    model = tiny_model(family.name, **{family.attention.bias_key: True, family.mlp.bias_key: True})
    layer = model.get_submodule(family.decoder.layers)[0]
    for module, names in ((family.attention.module, "qkvo"), (family.mlp.module, ("gate", "up", "down"))):
        facts = family.attention if names == "qkvo" else family.mlp
        for name in names:
            assert layer.get_submodule(module).get_submodule(getattr(facts, name)).bias is not None


@each_family
def test_norm_formula(family):
    """The declared offset and cast order give the module's own numbers, bit for bit, in bfloat16."""
    norm = tiny_model(family.name).get_submodule(family.decoder.final_norm).bfloat16()
    torch.manual_seed(1)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(32))
    x = torch.randn(7, 32).bfloat16()
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + getattr(norm, family.norm.eps))
    weight = family.norm.offset + norm.weight
    expected = weight * y.bfloat16() if family.norm.cast == "before_weight" else (weight.float() * y).bfloat16()
    assert torch.equal(norm(x), expected)


@each_family
def test_mlp_formula(family):
    mlp = tiny_model(family.name).get_submodule(family.decoder.layers)[0].get_submodule(family.mlp.module)
    x = torch.randn(5, 32)
    gate, up, down = (mlp.get_submodule(getattr(family.mlp, part)) for part in ("gate", "up", "down"))
    act = {"silu": torch.nn.functional.silu}[family.mlp.activation]
    assert torch.allclose(mlp(x), down(act(gate(x)) * up(x)), atol=1e-6)


@each_family
def test_window_fact(family):
    """A token beyond the declared window changes the last logits only where every layer sees it."""
    config = tiny_config(family.name, num_hidden_layers=1)
    window = getattr(config, "sliding_window", None)
    assert (window is not None) == (family.attention.window != "none")
    model = tiny_model(family.name, num_hidden_layers=1, **({"max_window_layers": 0} if window else {}))
    ids = torch.arange(20)[None] + 10
    other = ids.clone()
    other[0, 0] = 300
    with torch.no_grad():
        moved = (model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max().item()
    assert (moved == 0) == (window is not None)


@each_family
def test_rope_fact(family):
    rotary = tiny_model(family.name).get_submodule(family.decoder.rotary)
    cos, sin = rotary(torch.zeros(1, 6, 32), torch.arange(6)[None])
    head = getattr(rotary.config, "head_dim", None) or 8
    assert cos.shape[-1] == round(head * family.rope.partial)
    assert torch.equal(cos[..., : head // 2], cos[..., head // 2 :]) == (family.rope.kind == "split_half")
    assert rotary.rope_type in family.rope.types


@each_family
def test_lora_targets_are_the_linear_modules(family):
    layers = tiny_model(family.name).get_submodule(family.decoder.layers)
    linear = {name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear == set(family.lora_targets)


def test_checkpoints_are_found_by_name_and_hub_id():
    for family in FAMILIES:
        for entry in family.checkpoints:
            assert checkpoint(entry.name) == checkpoint(entry.repository.upper()) == (family, entry)
    assert checkpoint("smollm2-135m-instruct")[1].repository == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert checkpoint("nobody/nothing") is None


def test_names_are_unique():
    names = [entry.name for family in FAMILIES for entry in family.checkpoints]
    assert len(names) == len(set(names)) >= 30
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))


def test_find():
    assert find("llama").name == "llama"
    assert find("mamba") is None


def test_facts_cost_no_library():
    code = "import sys, nbkit.families as f; f.all_families(); assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
