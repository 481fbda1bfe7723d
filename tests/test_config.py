import json
import math

import pytest

from nbkit.config import (
    DataConfig,
    DataRecipe,
    ExportConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from nbkit.errors import ConfigError


def full() -> RunConfig:
    return RunConfig(
        model=ModelConfig(name="smollm2-135m-instruct", load_in_4bit=True, max_seq_length=512),
        lora=LoraConfig(rank=8, alpha=16.0, targets=("q_proj", "v_proj"), use_rslora=True),
        data=DataConfig(source="räume.jsonl", recipe=DataRecipe(format="alpaca", columns={"output": "réponse"}), held_out=0.1),
        train=TrainConfig(max_steps=7, gradient_checkpointing="nbkit", warmup_steps=2),
        exports=(ExportConfig(kind="gguf", quantization="f16"), ExportConfig(kind="adapter", path="out")),
        run_dir="runs/one",
    )


def test_json_round_trip_is_equal_in_text_and_in_a_file(tmp_path):
    config = full()
    path = tmp_path / "run.json"
    assert RunConfig.from_json(config.to_json(path)) == config
    assert RunConfig.from_json(path) == config
    assert RunConfig.from_json(str(path)) == config


def test_whole_numbers_are_accepted_where_a_float_is_asked():
    values = json.loads(full().to_json())
    values["train"]["epochs"] = 2
    config = RunConfig.from_json(json.dumps(values))
    assert config.train.epochs == 2.0 and isinstance(config.train.epochs, float)


def test_replace_checks_anew():
    assert full().replace(run_dir="two").run_dir == "two"
    assert full().run_dir == "runs/one"
    with pytest.raises(TypeError):
        full().replace(nonsense=1)


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("model", "nam"), "x", ["model", "'nam'", "name"]),
        (("train", "learning_rat"), 1, ["learning_rat", "learning_rate"]),
        (("train", "batch_size"), "2", ["batch_size", "int"]),
        (("train", "batch_size"), True, ["batch_size", "int"]),
        (("train", "max_steps"), 1.5, ["max_steps"]),
        (("lora", "rank"), 0, ["rank", "at least 1"]),
        (("lora", "targets"), [1], ["targets[0]", "str"]),
        (("lora", "targets"), [], ["target"]),
        (("data", "source"), None, ["source"]),
        (("data", "recipe"), [], ["recipe", "object"]),
        (("exports", 0), {"kind": "gguf", "quantization": "q9"}, ["q9", "f16"]),
        (("schema",), 99, ["99", "newer"]),
    ],
)
def test_a_bad_file_is_told_in_one_sentence_with_its_place(path, value, words):
    values = json.loads(full().to_json())
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError) as error:
        RunConfig.from_json(json.dumps(values))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_missing_key_and_broken_json(tmp_path):
    with pytest.raises(ConfigError, match="no run file"):
        RunConfig.from_json(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="lacks the key 'lora'"):
        RunConfig.from_json('{"model": {"name": "a"}}')
    with pytest.raises(ConfigError, match="not JSON"):
        RunConfig.from_json("{")
    listed = tmp_path / "list.json"
    listed.write_text("[]")
    with pytest.raises(ConfigError, match="must be an object"):
        RunConfig.from_json(listed)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoraConfig(rank=0),
        lambda: LoraConfig(rank=-3),
        lambda: LoraConfig(dropout=1.0),
        lambda: LoraConfig(alpha=0.0),
        lambda: LoraConfig(bias="some"),
        lambda: ModelConfig(name="  "),
        lambda: ModelConfig(name="a", dtype="float8"),
        lambda: ModelConfig(name="a", max_seq_length=1),
        lambda: TrainConfig(method="ppo"),
        lambda: TrainConfig(batch_size=0),
        lambda: TrainConfig(max_steps=0),
        lambda: TrainConfig(epochs=0.0),
        lambda: TrainConfig(seed=-1),
        lambda: TrainConfig(seed=2**32),
        lambda: TrainConfig(learning_rate=0.0),
        lambda: TrainConfig(learning_rate=math.nan),
        lambda: TrainConfig(gradient_checkpointing="yes"),
        lambda: TrainConfig(schedule="linaer"),
        lambda: ExportConfig(kind="adapter", quantization="q8_0"),
        lambda: DataRecipe(format="alpacca"),
        lambda: DataConfig(source="x", held_out=0),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_lora_scale_is_alpha_over_rank_and_over_its_root_for_rslora():
    assert LoraConfig(rank=16).scale == 1.0
    assert LoraConfig(rank=16, alpha=32.0).scale == 2.0
    assert LoraConfig(rank=16, alpha=32.0, use_rslora=True).scale == 8.0
