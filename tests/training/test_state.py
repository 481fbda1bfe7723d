"""The state in a checkpoint: exact, readable without running any code, and never taken for another's."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from nbkit.errors import TrainingError
from nbkit.training import state
from nbkit.training.optim import AdamW8bit

LEAVES = some.one_of(
    some.none(),
    some.booleans(),
    some.integers(-(2**70), 2**70),
    some.floats(),
    some.text(),
    some.sampled_from([math.inf, -0.0, 5e-324]),
)
TREES = some.recursive(
    LEAVES,
    lambda inner: some.one_of(
        some.lists(inner), some.lists(inner).map(tuple), some.dictionaries(some.one_of(some.text(), some.integers()), inner)
    ),
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.cpu(), b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


@pytest.mark.hypothesis
@given(tree=TREES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tree_comes_back_as_it_was(tmp_path: Path, tree: Any) -> None:
    state.save(tmp_path, {"optimizer": tree})
    assert same(tree, state.load(tmp_path, "optimizer"))
    assert state.load(tmp_path, "scaler") is None


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    kinds = [torch.ones(3, dtype=d) for d in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)]
    tree = {
        "kinds": kinds,
        "scalar": torch.tensor(1e-45),
        "empty": torch.zeros(0, 3),
        "transposed": whole.t(),
        "part": whole[1:3, 2:],
        "twice": (whole, whole),
        "parameter": torch.nn.Parameter(torch.zeros(2)),
        "nan": torch.tensor([math.nan, math.inf]).nan_to_num(1.0),
        0: numpy.float64(0.1),
        1: numpy.int64(7),
    }
    state.save(tmp_path, {"optimizer": tree})
    found = state.load(tmp_path, "optimizer")
    assert found.pop(0) == 0.1 and found.pop(1) == 7
    tree = {key: value for key, value in tree.items() if isinstance(key, str)}
    assert same({**tree, "parameter": tree["parameter"].detach()}, found)
    assert (tmp_path / state.TENSORS).stat().st_size < 3000  # what comes twice is there once, and of a part nothing else


@pytest.mark.parametrize("make", [lambda: object(), lambda: torch.zeros(2, dtype=torch.complex64), lambda: {1, 2}, lambda: len])
def test_what_cannot_be_kept_is_refused_with_its_place(tmp_path: Path, make: Any) -> None:
    with pytest.raises(TrainingError, match=r"optimizer\.state\.0\.strange is a \w+, which a checkpoint cannot keep"):
        state.save(tmp_path, {"optimizer": {"state": {0: {"strange": make()}}}})
    assert not list(tmp_path.iterdir())


def stepped(optimizer: Any) -> Any:
    for number in range(2):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 0.5 + number)
        optimizer.step()
    return optimizer


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(20, 300)), torch.nn.Parameter(torch.ones(5))]


def bitsandbytes(params: Any) -> Any:
    return pytest.importorskip("bitsandbytes.optim").AdamW8bit(params, min_8bit_size=100)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw_8bit": AdamW8bit,
    "adamw_bnb_8bit": bitsandbytes,
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_as_if_it_had_never_stopped(tmp_path: Path, name: str) -> None:
    first, second = weights(), weights()
    one = stepped(OPTIMIZERS[name](first))
    assert state.bytes_of(one) >= sum(t.numel() for s in one.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    state.save(tmp_path, {"optimizer": state.of_optimizer(one)})
    two = OPTIMIZERS[name](second)
    with torch.no_grad():
        for p, q in zip(first, second, strict=True):
            q.copy_(p)
    state.restore_optimizer(state.load(tmp_path, "optimizer"), two, tmp_path)
    for optimizer in (one, two):
        stepped(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_a_schedule_and_a_scaler_go_on(tmp_path: Path) -> None:
    from transformers import get_scheduler

    def made() -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW(weights(), lr=0.3)
        return get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=20), torch.amp.GradScaler("cpu", 2.0**11)

    (schedule, scaler), (other, other_scaler) = made(), made()
    stepped(schedule.optimizer)
    for _ in range(7):
        schedule.step()
    scaler.scale(torch.zeros(()))
    state.save(tmp_path, {"scheduler": schedule.state_dict(), "scaler": scaler.state_dict()})
    other.load_state_dict(state.load(tmp_path, "scheduler"))
    other_scaler.load_state_dict(state.load(tmp_path, "scaler"))
    assert other.state_dict() == schedule.state_dict() and other_scaler.state_dict() == scaler.state_dict()


def test_random_states_come_back(tmp_path: Path) -> None:
    def drawn() -> list[Any]:
        return [
            random.random(),
            random.gauss(0, 1),
            float(numpy.random.rand()),
            float(numpy.random.randn()),
            torch.rand(3).tolist(),
        ]

    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        drawn()  # half of a pair of normal numbers is kept for the next call
        state.save(tmp_path, {"random": state.of_random()})
        expected = drawn()
        assert drawn() != expected
        assert state.restore_random(state.load(tmp_path, "random"), tmp_path) == ""
        assert drawn() == expected
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        torch.set_rng_state(before[2])


@pytest.mark.parametrize("saved", [None, {}, {"python": (1, 2)}, {"python": 3, "numpy": {"state": {"key": []}}, "torch": 4}])
def test_random_states_that_are_none_are_refused(tmp_path: Path, saved: Any) -> None:
    with pytest.raises(TrainingError, match="random states in .* cannot be put back"):
        state.restore_random(saved, tmp_path)


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    one = stepped(AdamW8bit(weights()))
    state.save(tmp_path, {"optimizer": state.of_optimizer(one)})
    saved = state.load(tmp_path, "optimizer")
    with pytest.raises(TrainingError, match="is of AdamW8bit, this run has AdamW; resume with the optimizer of that run"):
        state.restore_optimizer(saved, torch.optim.AdamW(weights()), tmp_path)
    with pytest.raises(TrainingError, match="is of none, this run has AdamW8bit"):
        state.restore_optimizer(state.load(tmp_path, "scaler"), AdamW8bit(weights()), tmp_path)
    with pytest.raises(TrainingError, match="does not fit this run: The state belongs to other parameters"):
        state.restore_optimizer(saved, AdamW8bit(weights()[:1]), tmp_path)


def crafted(folder: Path, structure: Any) -> None:
    state.save(folder, {"optimizer": {"m": torch.ones(4)}})
    text = structure if isinstance(structure, str) else json.dumps(structure)
    (folder / state.STRUCTURE).write_text(text)


@pytest.mark.parametrize(
    "structure",
    [
        "",
        "[" * 100_000,
        "[]",
        {"optimizer": {"tensor": "optimizer.other"}},
        {"optimizer": {"tensor": {}}},
        {"optimizer": {"call": ["os.system", "true"]}},
        {"optimizer": {"dict": [[["list"], 1]]}},
        {"optimizer": {"dict": [1, 2]}},
        {"optimizer": {}},
        {"optimizer": {"dict": 3, "tuple": []}},
    ],
    ids=lambda value: str(value)[:30],
)
def test_files_that_are_no_state_give_a_sentence(tmp_path: Path, structure: Any) -> None:
    crafted(tmp_path, structure)
    with pytest.raises(TrainingError, match=r"The optimizer state in .* cannot be read \(\w+.*; take that checkpoint away"):
        state.load(tmp_path, "optimizer")


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "a pickle"])
def test_tensors_that_are_no_safetensors_give_a_sentence(tmp_path: Path, how: str) -> None:
    state.save(tmp_path, {"optimizer": {"m": torch.ones(400)}})
    file = tmp_path / state.TENSORS
    if how == "missing":
        file.unlink()
    elif how == "a pickle":
        torch.save({"m": torch.ones(400)}, file)
    else:
        file.write_bytes(b"" if how == "empty" else file.read_bytes()[:300])
    with pytest.raises(TrainingError, match="cannot be read"):
        state.load(tmp_path, "optimizer")


@pytest.fixture(scope="module")
def unpickled() -> Iterator[list[str]]:
    """Names that an unpickler looked up, while `watching` is set; an audit hook cannot be taken off again."""
    found: list[str] = []
    watching = [True]
    sys.addaudithook(lambda event, args: found.append(str(args)) if event == "pickle.find_class" and watching[0] else None)
    yield found
    watching[0] = False


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_run_writes_no_pickle_and_opens_none(tmp_path: Path, unpickled: list[str], optimizer: str) -> None:
    from nbkit.training.runner import Run
    from tests.tiny import tiny_tokenizer
    from tests.training import rig

    unpickled.clear()
    for steps in (2, 4):
        config = rig.config(tmp_path / "run", max_steps=steps, optimizer=optimizer, schedule="constant")
        Run(config, rig.lora_model(), tiny_tokenizer(), rig.rows(), resume=steps == 4).wait(progress=False)
    assert unpickled == []
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"training_state.json", "training_state.safetensors"} <= {path.name for path in files}
    assert {path.suffix for path in files if path.name[0] != "."} == {".json", ".jsonl", ".md", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        assert path.read_bytes()[:2] != b"PK", f"{path.name} is a zip archive, as torch writes pickles into"
