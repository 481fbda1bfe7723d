"""A family whose attention caps its scores, through the whole fused layer against the stock model made to do the same."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from nbkit.families import find
from nbkit.models.layer import Keep, bind
from nbkit.models.layer.parts import softcap_of
from tests.models.layer.rig import batch, lora, step, worst

CAP = 0.5


@pytest.fixture
def capped(monkeypatch):
    """Makes a toy model of a family whose scores are capped, in stock transformers too; and that family."""

    def make(name, **options):
        model = lora(name, **options)
        family = find(name)
        family = replace(family, attention=replace(family.attention, softcap_key="attn_logit_softcapping"))
        config = model.get_base_model().config
        config.attn_logit_softcapping, config._attn_implementation = CAP, "eager"
        modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")

        def eager(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
            rep = module.num_key_value_groups
            scores = query @ key.repeat_interleave(rep, 1).transpose(2, 3) * scaling
            weights = (CAP * torch.tanh(scores / CAP) + mask).softmax(-1)
            return (weights @ value.repeat_interleave(rep, 1)).transpose(1, 2).contiguous(), weights

        monkeypatch.setattr(modeling, "eager_attention_forward", eager)
        return model, family

    return make


@pytest.mark.parametrize("keep", [None, Keep(0), Keep(2, 16, True, 1), Keep(4, 5, True, 1)], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_capped_model_trains_as_in_stock(name, keep, capped):
    model, family = capped(name)
    inputs = batch(padded=True)
    loss, truth = step(model, **inputs)
    binding = bind(model.get_base_model(), family)
    binding.keep = keep
    fused_loss, fused = step(model, **inputs)
    assert binding.reasons == {} and all(b.parts.softcap == CAP for b in binding.bound)
    assert abs(fused_loss - loss) <= 1e-5 * loss
    error, where = worst(fused, truth)
    assert error <= 1e-5, f"{where} differs by {error:.2e}"
    for bound in binding.bound:
        bound.parts.softcap = None
    assert worst(step(model, **inputs)[1], truth)[0] > 1e-2, "the cap of this test is too wide to be felt"


def test_capped_documents_and_left_padding(capped):
    model, family = capped("mistral")
    packed = batch(rows=1, tokens=24)
    packed["position_ids"] = torch.cat([torch.arange(3), torch.arange(14), torch.arange(7)])[None]
    packed["labels"][0, [0, 3, 17]] = -100
    padded = batch()
    padded["attention_mask"] = torch.ones_like(padded["input_ids"])
    padded["attention_mask"][0, :5] = 0
    padded["labels"][0, :6] = -100
    stock = [step(model, **packed, use_cache=False), step(model, **padded)]
    binding = bind(model.get_base_model(), family)
    for inputs, (loss, truth) in zip((packed, padded), stock, strict=True):
        fused_loss, fused = step(model, **inputs)
        assert binding.reasons == {} and abs(fused_loss - loss) <= 1e-5 * loss and worst(fused, truth)[0] <= 1e-5


def test_a_config_without_a_value_has_no_cap(capped):
    model, family = capped("llama")
    config = model.get_base_model().config
    assert softcap_of(family, config) == CAP and softcap_of(find("llama"), config) is None
    config.attn_logit_softcapping = None
    assert softcap_of(family, config) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), [("mistral", torch.bfloat16)])  # one, as each costs a compilation for each keep
def test_a_capped_model_on_a_gpu_takes_flex(name, dtype, capped):
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("FlexAttention is chosen on Ampere and newer")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model, family = capped(name, **sizes)
    inputs = {k: v.cuda() for k, v in batch(tokens=77, padded=True).items()}
    model = model.to(dtype).cuda()
    _, stock = step(model, **inputs)
    _, truth = step(model.float(), **inputs)
    model = model.to(dtype)
    binding = bind(model.get_base_model(), family)
    for keep in (Keep(0), Keep(4, 64, True, 1)):
        binding.keep = keep
        _, fused = step(model, **inputs)
        assert binding.reasons == {} and binding.how == {"flex: a softcap on the scores"}
        for where, t in truth.items():
            size = t.norm().clamp(min=1e-12)
            mine, theirs = float((fused[where].float() - t).norm() / size), float((stock[where].float() - t).norm() / size)
            assert mine <= 2 * theirs + 1e-2, f"{where}: {mine:.4f}, stock {theirs:.4f}"
