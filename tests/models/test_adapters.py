import warnings

import pytest
import torch

from nbkit.config import ALL_LINEAR, LoraConfig, ModelConfig
from nbkit.errors import ModelError
from nbkit.families import all_families
from nbkit.hardware.shapes import shape_of
from nbkit.models.adapters import adapter_report, add_lora, count_parameters
from nbkit.models.load import load
from tests.tiny import save_tiny
from tests.tiny import tiny_model as build


def lora_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("family", [f.name for f in all_families()])
def test_counts_equal_the_shape_and_only_lora_trains(family):
    model = build(family)
    shape = shape_of(model.config.to_dict())
    adapted = add_lora(model, LoraConfig(rank=4))
    trained, total = count_parameters(adapted)
    assert trained == shape.lora_parameters(4, ALL_LINEAR)
    assert total == shape.parameters + trained
    assert all(p.requires_grad == ("lora_" in name) for name, p in adapted.named_parameters())


def test_fresh_adapter_changes_nothing(tiny_model):
    ids = torch.arange(12)[None] + 30
    with torch.no_grad():
        before = tiny_model(ids).logits
        adapted = add_lora(tiny_model, LoraConfig())
        assert torch.equal(adapted(ids).logits, before)


def test_seed_decides_the_start_bit_for_bit():
    first, second = (lora_weights(add_lora(build(), LoraConfig(rank=4))) for _ in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    other = lora_weights(add_lora(build(), LoraConfig(rank=4, seed=1)))
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_start_does_not_depend_on_the_base(dtype):
    wide, narrow = (lora_weights(add_lora(build().to(kind), LoraConfig(rank=4))) for kind in (torch.float32, dtype))
    assert all(torch.equal(wide[k], narrow[k]) for k in wide)
    bound = 32**-0.5  # Kaiming uniform with a = sqrt(5): 1 / sqrt(inputs)
    first = next(weight for name, weight in wide.items() if "q_proj.lora_A" in name)
    assert 0.9 * bound < first.abs().max() <= bound


def test_random_state_of_the_caller_is_untouched(tiny_model):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    add_lora(tiny_model, LoraConfig())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 1.0),
        ({"alpha": 32}, 8.0),
        ({"alpha": 2.5}, 0.625),
        ({"use_rslora": True}, 2.0),
        ({"alpha": 6, "use_rslora": True}, 3.0),
    ],
)
def test_scale_is_the_configs(tiny_model, options, scale):
    lora = LoraConfig(rank=4, **options)
    layer = add_lora(tiny_model, lora).base_model.model.model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == pytest.approx(lora.scale) == scale


def test_dropout_and_bias(tiny_model):
    lora = LoraConfig(rank=2, dropout=0.3, targets=("q_proj",))
    layer = add_lora(tiny_model, lora).base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_dropout["default"].p == 0.3
    biased = add_lora(build("qwen2"), LoraConfig(rank=2, bias="all"))
    assert all(p.requires_grad for name, p in biased.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapter_is_float32_whatever_the_base_is(tiny_model, dtype):
    adapted = add_lora(tiny_model.to(dtype), LoraConfig(rank=2))
    assert {w.dtype for w in lora_weights(adapted).values()} == {torch.float32}
    assert adapted.base_model.model.lm_head.weight.dtype == dtype


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [("q_porj",), ("q_proj", "v_proj", "q_porj"), (*ALL_LINEAR, "q_porj")])
def test_every_unmatched_target_is_refused(tiny_model, targets):
    with pytest.raises(
        ModelError, match=r"'q_porj' matches no linear module.*there are q_proj, k_proj.*Did you mean q_proj"
    ) as caught:
        add_lora(tiny_model, LoraConfig(targets=targets))
    assert "\n" not in str(caught.value)
    assert not any("lora_" in name for name, _ in tiny_model.named_parameters())


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("mlp", "it is a LlamaMLP"),
        ("input_layernorm", "it is a LlamaRMSNorm"),
        ("proj", "matches no"),
        ("", "matches no"),
        (".*", "matches no"),
    ],
)
def test_targets_that_are_no_linear_module(tiny_model, target, said):
    with pytest.raises(ModelError, match=said):
        add_lora(tiny_model, LoraConfig(targets=(target,)))


def test_dotted_target_adapts_that_part_only(tiny_model):
    adapted = add_lora(tiny_model, LoraConfig(rank=2, targets=("layers.1.mlp.up_proj",)))
    assert len(lora_weights(adapted)) == 2
    with pytest.raises(ModelError, match=r"'layers\.7\.mlp\.up_proj' matches no"):
        add_lora(adapted, LoraConfig(targets=("layers.7.mlp.up_proj",)))


def test_tied_head_is_refused_and_a_free_one_is_not():
    with pytest.raises(ModelError, match="'lm_head' shares its weight with the embeddings"):
        add_lora(build(tie_word_embeddings=True), LoraConfig(targets=("lm_head",)))
    assert len(lora_weights(add_lora(build(), LoraConfig(targets=("lm_head",))))) == 2


# -- a second adapter --------------------------------------------------------------------------


def test_second_adapter_replaces_the_first(tiny_model):
    ids = torch.arange(12)[None] + 30
    with torch.no_grad():
        before = tiny_model(ids).logits
        first = add_lora(tiny_model, LoraConfig(rank=8))
        for name, parameter in first.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        assert not torch.equal(first(ids).logits, before)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = add_lora(first, LoraConfig(rank=2, targets=("q_proj",)))
        assert torch.equal(second(ids).logits, before)
    assert list(second.peft_config) == ["default"] and len(lora_weights(second)) == 4
    fresh = add_lora(build(), LoraConfig(rank=2, targets=("q_proj",)))
    ours, theirs = lora_weights(second), lora_weights(fresh)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_second_adapter_after_biases_trained_is_refused(tiny_model):
    adapted = add_lora(tiny_model, LoraConfig(bias="all"))
    with pytest.raises(ModelError, match="load it again"):
        add_lora(adapted, LoraConfig())


# -- what it says ------------------------------------------------------------------------------


def test_report(tiny_model):
    adapted = add_lora(tiny_model, LoraConfig(rank=4))
    trained, total = count_parameters(adapted)
    expected = (
        f"{trained:,} of {total:,} parameters train ({100 * trained / total:.2f} %), adapter {4 * trained / 2**20:.1f} MiB."
    )
    assert adapter_report(adapted) == expected


def test_four_bit_base(tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    loaded = load(ModelConfig(name=str(folder), load_in_4bit=True), progress=False)
    adapted = add_lora(loaded.model, LoraConfig(rank=4))
    trained, total = count_parameters(adapted)
    assert trained == loaded.shape.lora_parameters(4, ALL_LINEAR) and total == loaded.shape.parameters + trained
    ids = torch.tensor([[3, 4, 5, 6]])
    loss = adapted(ids, labels=ids).loss
    loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(gradients) == 14 and all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients)
    assert len(lora_weights(add_lora(adapted, LoraConfig(rank=2, targets=("q_proj",))))) == 4


@pytest.mark.gpu
def test_gpu_starts_from_the_cpus_numbers_and_trains_in_float32():
    on_cpu = lora_weights(add_lora(build(), LoraConfig(rank=4)))
    adapted = add_lora(build().to("cuda", torch.bfloat16), LoraConfig(rank=4))
    on_gpu = lora_weights(adapted)
    assert {w.dtype for w in on_gpu.values()} == {torch.float32} and {w.device.type for w in on_gpu.values()} == {"cuda"}
    assert all(torch.equal(on_cpu[name], on_gpu[name].cpu()) for name in on_cpu)
    ids = torch.tensor([[3, 4, 5, 6]], device="cuda")
    adapted(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)
