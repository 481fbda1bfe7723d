"""Rows longer than a checkpoint's positions: the frequencies, training beyond the old limit, and what exports carry."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nbkit
from nbkit.config import LoraConfig
from nbkit.errors import ModelError
from nbkit.export import export_adapter, export_gguf, export_merged
from nbkit.families import find
from nbkit.models.adapters import add_lora
from nbkit.models.layer import bind
from nbkit.models.positions import stretch
from tests.closeness import assert_all_like_stock, assert_like_stock
from tests.export.rig import train
from tests.models.layer.rig import batch, fill
from tests.models.loading import load_folder, refused
from tests.tiny import save_tiny, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("own_caches")

MOST, LONG = 64, 96
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
}  # fmt: skip
KINDS = {"default": DEFAULT, "linear": LINEAR, "llama3": LLAMA3, "yarn": YARN, "dynamic": DYNAMIC}
OPEN = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}}


def config_of(rope: dict[str, Any], family: str = "llama", **more: Any) -> Any:
    options = {"max_position_embeddings": MOST, **OPEN[family], **more}
    return tiny_config(family, rope_parameters=dict(rope), **options)


def stretched(config: Any, length: int = LONG, wish: str = "auto") -> str | None:
    return stretch(config, length, find(config.model_type), "tiny", wish)


def frequencies(config: Any) -> tuple[torch.Tensor, float]:
    """As the model made from this config has them."""
    from transformers import AutoModelForCausalLM

    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    return rotary.inv_freq, rotary.attention_scaling


def transformers_own(rope: dict[str, Any], length: int | None = None) -> tuple[torch.Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config_of(rope), torch.device("cpu"), seq_len=length)


def saved(tmp_path: Path, rope: dict[str, Any], family: str = "llama", **more: Any) -> Path:
    return save_tiny(
        tmp_path / "base", family, rope_parameters=dict(rope), **{"max_position_embeddings": MOST, **OPEN[family], **more}
    )


# -- the config --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_plain_rope_is_interpolated(family: str) -> None:
    before, _ = frequencies(config_of(DEFAULT, family))
    config = config_of(DEFAULT, family)
    said = stretched(config)
    assert said == "Its 64 positions are stretched to the 96 tokens of max_seq_length by rope scaling 'linear' with factor 1.5."
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 1.5}
    assert config.max_position_embeddings == LONG
    now, scaling = frequencies(config)
    assert torch.equal(now, before / 1.5) and scaling == 1.0
    if family == "llama":
        assert torch.equal(now, transformers_own({**LINEAR, "factor": 1.5})[0])


@pytest.mark.parametrize(("rope", "factor"), [(LINEAR, 3.0), (LLAMA3, 6.0), (YARN, 3.0)], ids=["linear", "llama3", "yarn"])
def test_a_kind_that_is_there_keeps_its_formula(rope: dict[str, Any], factor: float) -> None:
    config = config_of(rope)
    said = stretched(config)
    assert f"{rope['rope_type']!r} with factor {factor:g}, {rope['factor']:g} before" in str(said)
    (now, scaling), (truth, its_scaling) = frequencies(config), transformers_own({**rope, "factor": factor})
    assert torch.equal(now, truth) and scaling == its_scaling
    assert (scaling > 1) is (rope is YARN)
    assert not torch.equal(now, transformers_own(rope)[0])
    if rope is not LINEAR:
        assert now[0] == transformers_own(rope)[0][0], "the shortest wave stays"


def test_dynamic_is_held_at_what_it_gives_for_the_length() -> None:
    config = config_of(DYNAMIC)
    said = stretched(config)
    assert "'dynamic', held at rope_theta" in str(said) and config.rope_parameters["rope_type"] == "default"
    assert torch.equal(frequencies(config)[0], transformers_own(DYNAMIC, LONG)[0])


def test_the_older_name_of_the_kind_does_not_linger() -> None:
    config = config_of({**DYNAMIC, "type": "dynamic"})
    stretched(config)
    assert "type" not in config.rope_parameters and type(config)(**config.to_dict()).rope_parameters["rope_type"] == "default"


def test_the_temperature_of_yarn_follows_its_factor_unless_it_is_its_own() -> None:
    usual = config_of({**YARN, "attention_factor": 1.0693147})
    own = config_of({**YARN, "attention_factor": 1.25})
    stretched(usual)
    stretched(own)
    assert frequencies(usual)[1] == transformers_own({**YARN, "factor": 3.0})[1]
    assert frequencies(own)[1] == 1.25


def test_yarn_that_reaches_farther_than_the_config_names_is_kept() -> None:
    """As Qwen2.5's model cards have it: positions before the stretching, factor beside them."""
    rope = {**YARN, "factor": 4.0, "original_max_position_embeddings": MOST}
    config = config_of(rope)
    before = frequencies(copy.deepcopy(config))
    assert "reaches 256 positions, beyond the 64 that its config names, and stays" in str(stretched(config, 256))
    assert torch.equal(frequencies(config)[0], before[0]) and config.max_position_embeddings == 256
    assert "'yarn' with factor 8, 4 before" in str(stretched(config_of(rope), 512))


def test_linear_that_names_its_length_apart_is_kept() -> None:
    config = config_of(LINEAR, max_sequence_length=128)
    assert "linear rope reaches 128 positions" in str(stretched(config, 128)) and config.rope_parameters["factor"] == 2.0


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_window_on_every_layer_needs_no_stretching(family: str) -> None:
    window = {"sliding_window": 8, **({"use_sliding_window": True, "max_window_layers": 0} if family == "qwen2" else {})}
    config = config_of(DEFAULT, family, **window)
    said = stretched(config)
    assert "its sliding window of 8 keeps what sees each other within them" in str(said)
    assert config.rope_parameters == DEFAULT and config.sliding_window == 8 and config.max_position_embeddings == LONG


def test_a_window_on_some_layers_or_wider_than_the_positions_does() -> None:
    some = config_of(DEFAULT, "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    wide = config_of(DEFAULT, "mistral", sliding_window=80)
    for config in (some, wide):
        assert "'linear' with factor 1.5" in str(stretched(config))
    assert some.sliding_window == 8 and wide.sliding_window == 80


@pytest.mark.parametrize("rope", [*KINDS.values(), LONGROPE], ids=[*KINDS, "longrope"])
def test_rows_that_fit_change_nothing(rope: dict[str, Any]) -> None:
    config = config_of(rope)
    before = config.to_dict()
    for wish in ("auto", "none"):
        assert stretched(config, MOST, wish) is None
    assert config.to_dict() == before


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="reaches 64 positions by rope scaling 'longrope'.*set max_seq_length to at most 64"):
        stretched(config_of(LONGROPE))
    folder = saved(tmp_path, DEFAULT)
    refused(
        "max_seq_length is 96 and .* has 64 positions, which rope_scaling='none'", folder, max_seq_length=96, rope_scaling="none"
    )
    with pytest.raises(nbkit.errors.ConfigError, match="rope_scaling 'linear' is not known; use one of auto, none"):
        load_folder(folder, rope_scaling="linear")


def test_a_family_that_is_not_declared_is_left_alone(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.tiny import tiny_tokenizer

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=320)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_folder(tmp_path, max_seq_length=96)
    assert "names 64 positions, which nbkit stretches for its own families only" in loaded.message
    assert loaded.model.config.n_positions == 64
    refused("has 64 positions", tmp_path, max_seq_length=96, rope_scaling="none")


# -- the model -----------------------------------------------------------------------------------------------------------


def test_loaded_once_and_said_once(tmp_path: Path) -> None:
    folder = saved(tmp_path, DEFAULT)
    loaded = load_folder(folder, max_seq_length=LONG)
    assert loaded.message.endswith("by rope scaling 'linear' with factor 1.5.") and loaded.message.count("stretched") == 1
    assert loaded.shape.context == LONG and loaded.tokenizer.model_max_length >= LONG
    assert torch.equal(loaded.model.model.rotary_emb.inv_freq, transformers_own({**LINEAR, "factor": 1.5})[0])
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == MOST
    fits = load_folder(folder, max_seq_length=MOST)
    ids = batch(1, 20)["input_ids"]
    stock = tiny_model("llama", rope_parameters=DEFAULT, max_position_embeddings=MOST)
    with torch.no_grad():
        assert torch.equal(fits.model(ids).logits, stock(ids).logits)
        assert not torch.equal(loaded.model(ids).logits, stock(ids).logits)


def test_four_bit_weights_load_with_it_too(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = saved(tmp_path, DEFAULT)
    first = load_folder(folder, max_seq_length=LONG, load_in_4bit=True)
    assert first.model.is_loaded_in_4bit and first.model.config.max_position_embeddings == LONG
    first.model.save_pretrained(tmp_path / "four")
    first.tokenizer.save_pretrained(tmp_path / "four")
    again = load_folder(tmp_path / "four", max_seq_length=2 * LONG)  # stretched a second time
    assert again.model.is_loaded_in_4bit and again.model.config.rope_parameters["factor"] == 3.0


@pytest.mark.filterwarnings("error:Rows of")
@pytest.mark.parametrize("way", ["parts", "layers"])
@pytest.mark.parametrize(("family", "kind"), [*(("llama", kind) for kind in KINDS), ("mistral", "default"), ("qwen2", "default")])
def test_training_beyond_the_old_limit_equals_the_stock_model(family: str, kind: str, way: str, tmp_path: Path) -> None:
    loaded = load_folder(saved(tmp_path, KINDS[kind], family), max_seq_length=LONG)
    model = add_lora(loaded.model, LoraConfig(rank=4)).train()
    fill(model)
    found = []
    for patched in (False, True):
        if patched:
            nbkit.patch(model)
            if way == "layers":
                bind(model.get_base_model(), find(family))  # type: ignore[arg-type]
        loss = model(**batch(2, LONG), use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
    (stock, truth), (ours, grads) = found
    assert stock.isfinite()
    assert_like_stock("loss", ours, stock)
    assert_all_like_stock(grads, truth)


# -- what is written -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> Any:
    loaded = load_folder(saved(tmp_path, DEFAULT), max_seq_length=LONG)
    return train(add_lora(loaded.model, LoraConfig(rank=4))), loaded.tokenizer


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(batch(1, LONG)["input_ids"]).logits.float()


def test_a_merged_model_has_it(trained: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = export_merged(*trained, tmp_path / "merged", progress=False).path
    again = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert again.config.rope_parameters == trained[0].config.rope_parameters and again.config.max_position_embeddings == LONG
    assert_like_stock("logits", logits(again), logits(trained[0]), 1e-2)
    assert "stretched" not in load_folder(path, max_seq_length=LONG).message


def test_an_adapter_has_the_config_of_its_base_beside_it(trained: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    model, tokenizer = trained
    report = export_adapter(model, tokenizer, tmp_path / "adapter", progress=False)
    assert "load the base with the config.json beside the adapter" in report.verdict
    config = AutoConfig.from_pretrained(report.path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", config=config, dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(base, report.path).eval()), logits(model))
    assert "config.json" in json.loads((report.path / "nbkit_export.json").read_text())["files"]


def test_an_adapter_of_a_base_as_it_was_has_none(tmp_path: Path) -> None:
    loaded = load_folder(saved(tmp_path, DEFAULT), max_seq_length=MOST)
    model = train(add_lora(loaded.model, LoraConfig(rank=4)))
    report = export_adapter(model, loaded.tokenizer, tmp_path / "adapter", progress=False)
    assert not (report.path / "config.json").exists() and "stretched" not in report.verdict


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_has_it(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    most, length = 60, 100  # a factor that float32 cannot hold exactly
    loaded = load_folder(saved(tmp_path, KINDS[kind], max_position_embeddings=most), max_seq_length=length)
    model = train(add_lora(loaded.model, LoraConfig(rank=4)))
    reader = gguf.GGUFReader(export_gguf(model, loaded.tokenizer, tmp_path / "model.gguf", progress=False).path)
    found = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}
    assert found["context_length"] == length
    scaling = (
        found.get("rope.scaling.type"),
        found.get("rope.scaling.factor"),
        found.get("rope.scaling.original_context_length"),
    )
    expected = {
        "default": ("linear", length / most, None),
        "linear": ("linear", 2 * length / most, None),
        "yarn": ("yarn", length / 32, 32),
    }
    assert scaling == pytest.approx(expected.get(kind, (None, None, None)))
    factors = [t.data for t in reader.tensors if t.name == "rope_freqs.weight"]
    assert [float(f.max()) for f in factors] == ([pytest.approx(4.0 * length / most)] if kind == "llama3" else [])
    theta = model.config.rope_parameters["rope_theta"]
    assert found["rope.freq_base"] == pytest.approx(theta) and (theta > 10000) is (kind == "dynamic")
