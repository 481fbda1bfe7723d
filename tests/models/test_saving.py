"""Models are saved while they are patched: by transformers and PEFT, after training, between steps, as copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nbkit
from nbkit.models import patch as room
from nbkit.models.layer import binding_of
from tests.models.layer.rig import batch, lora, step, worst


@pytest.fixture
def fuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_fuses", lambda device: True)


def equal(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == stock.keys() and all(torch.equal(ours[name], stock[name]) for name in stock)


@pytest.mark.usefixtures("fuses")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_merged_model_is_saved_as_stock_saves_it(family: str, tied: bool, tmp_path: Path) -> None:
    stock, model = (lora(family, tie_word_embeddings=tied) for _ in range(2))
    nbkit.patch(model)
    step(model, **batch())
    for one, name in ((model, "ours"), (stock, "stock")):
        merged = one.merge_and_unload()
        merged.save_pretrained(tmp_path / name)
        assert merged.dtype == torch.float32
    assert equal(load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "stock/model.safetensors"))


@pytest.mark.usefixtures("fuses")
def test_training_goes_on_after_saving_also_between_forward_and_backward(tmp_path: Path) -> None:
    model = lora("llama")
    truth = step(model, **batch())
    nbkit.patch(model)
    binding = binding_of(model)
    assert binding is not None
    loss = model(**batch()).loss
    model.get_base_model().save_pretrained(tmp_path)
    loss.backward()
    assert worst({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, truth[1])[0] < 1e-5
    model.zero_grad(set_to_none=True)
    assert step(model, **batch())[0] == pytest.approx(truth[0], rel=1e-6) and binding.how and not binding.reasons
    nbkit.unpatch(model)


@pytest.mark.usefixtures("fuses")
def test_trained_copies_of_linears_are_saved(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    from tests.tiny import tiny_model

    def made() -> Any:
        torch.manual_seed(1)
        return get_peft_model(
            tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["k_proj"])
        ).train()

    model = made()
    nbkit.patch(model)
    step(model, **batch())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True).train()
    assert step(again, **batch())[0] == pytest.approx(step(made(), **batch())[0], rel=1e-6)


@pytest.mark.usefixtures("fuses")
def test_copies_and_pickles_save_themselves(tmp_path: Path) -> None:
    model = lora("llama")
    nbkit.patch(model)
    step(model, **batch())
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            twin.get_base_model().model.norm.weight.fill_(number + 2)
        twin.merge_and_unload().save_pretrained(tmp_path / str(number))
        assert load_file(tmp_path / str(number) / "model.safetensors")["model.norm.weight"][0] == number + 2


@pytest.mark.usefixtures("fuses")
def test_accelerate_and_torch_leave_no_weight_out(tmp_path: Path) -> None:
    """accelerate looks for weights of one storage, and keeps one of them."""
    from accelerate import Accelerator

    model = lora("qwen2")
    nbkit.patch(model)
    step(model, **batch())
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(model, str(tmp_path))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    wanted = {name: p.clone() for name, p in model.state_dict().items()}
    assert equal(load_file(tmp_path / "state/model.safetensors"), wanted)
    assert equal(load_file(tmp_path / "model.safetensors"), wanted)
    assert equal(torch.load(tmp_path / "model.pt"), wanted)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert not equal(model.state_dict(), wanted)
    nbkit.unpatch(model)  # safetensors' own loader wants every weight to fill its storage
    accelerator.load_state(str(tmp_path / "state"))
    assert equal(model.state_dict(), wanted)
