import pytest
import torch

from nbkit.config import ALL_LINEAR
from nbkit.errors import ModelError
from nbkit.families import all_families
from nbkit.hardware.shapes import known_shape, shape_of
from tests.tiny import tiny_model

# Totals as the checkpoints' own safetensors state them.
PUBLISHED = {
    "smollm2-135m-instruct": 134_515_008,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-chat-hf": 68_976_648_192,
    "codellama/CodeLlama-34b-Instruct-hf": 33_743_970_304,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B-Instruct": 405_853_388_800,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "HuggingFaceH4/zephyr-7b-beta": 7_241_732_096,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mistral-Small-Instruct-2409": 22_247_282_688,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    assert known_shape(name).parameters == PUBLISHED[name]


@pytest.mark.parametrize("family", [f.name for f in all_families()])
@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4, "vocab_size": 97}])
def test_count_equals_the_model(family, overrides):
    model = tiny_model(family, **overrides)
    shape = shape_of(model.config.to_dict())
    assert shape.exact
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    linear = [m for m in model.get_submodule("model.layers").modules() if isinstance(m, torch.nn.Linear)]
    assert shape.linear_parameters == sum(m.weight.numel() for m in linear)


def test_biases_are_counted():
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    assert shape_of(model.config.to_dict()).parameters == sum(p.numel() for p in model.parameters())


def test_lora_of_llama_31_8b():
    shape = known_shape("meta-llama/Llama-3.1-8B-Instruct")
    assert shape.lora_parameters(16, ALL_LINEAR) == 41_943_040
    assert shape.adapter_bytes(16, ALL_LINEAR) == 4 * 41_943_040
    assert shape.lora_parameters(16, ("q_proj", "v_proj")) == 6_815_744
    assert shape.lora_parameters(16, ("q_proj", "q_proj")) == shape.lora_parameters(16, ("q_proj",))


def test_lora_of_smollm2_and_of_wide_heads():
    assert known_shape("smollm2-135m-instruct").lora_parameters(16, ALL_LINEAR) == 4_884_480
    nemo = known_shape("mistralai/Mistral-Nemo-Instruct-2407")
    assert nemo.linear["q_proj"] == (4096, 5120)
    assert nemo.linear["o_proj"] == (5120, 4096)


def test_unknown_target_names_the_nearest():
    with pytest.raises(ModelError, match=r"'q_porj'.*Did you mean q_proj"):
        known_shape("smollm2-135m-instruct").lora_parameters(8, ("v_proj", "q_porj"))


def test_unknown_name_offers_known_ones():
    with pytest.raises(ModelError, match=r"meta-llama/Llama-3\.1-8B-Instruct"):
        known_shape("meta-llama/Llama-3.1-8B")


def test_unknown_model_type_is_marked():
    config = {"model_type": "new", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert not shape_of({**config, "intermediate_size": 16, "vocab_size": 10}).exact
    assert shape_of({**config, "vocab_size": 10}).intermediate == 32  # four times as wide, where the config leaves it out
    with pytest.raises(ModelError, match="'new' lacks vocab_size"):
        shape_of(config)
    with pytest.raises(ModelError, match="'llama' lacks intermediate_size, vocab_size"):
        shape_of({**config, "model_type": "llama"})
    assert shape_of({"text_config": {**config, "intermediate_size": 16, "vocab_size": 10}}).hidden == 8
