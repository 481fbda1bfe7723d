"""`nbkit.certify`: one certificate per family, faults that it must find, and the model that is left as it was."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import nbkit
import nbkit.models.patch
from nbkit.__main__ import main
from nbkit.errors import ModelError
from nbkit.families import all_families, find
from nbkit.models import certify as room
from nbkit.models import forwards, twin
from nbkit.models.certificate import SCHEMA, Certificate
from nbkit.models.forwards import MARK
from nbkit.models.layer import bind, binding_of
from tests.models.layer.rig import TARGETS, batch, lora
from tests.tiny import tiny_config, tiny_model

FAMILIES = [family.name for family in all_families() if family.mlp.activation == "silu"]


def whole(model: Any) -> Any:
    """Patched, with every layer on the fused path, which a CPU takes through the references."""
    nbkit.patch(model)
    bind(model.get_base_model(), find(model.config.model_type))
    return model


def names(certificate: Certificate, kind: str) -> set[str]:
    return {row.name for row in certificate.rows if row.kind == kind}


@pytest.mark.parametrize("fused", [False, True], ids=["parts", "layers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_certified(family: str, fused: bool) -> None:
    model = lora(family)
    found = nbkit.certify(whole(model) if fused else model)
    assert found.passed and not found.failures and not found.skipped and not found.stock, str(found)
    assert found.verdict.startswith("EXACT: ") and found.family == family and found.dtype == "float32"
    assert len(names(found, "gradient")) == 2 * 2 * len(TARGETS)
    kernels = {name.split()[0] for name in names(found, "kernel")}
    assert {"rms_norm", "rope", "swiglu", "linear_cross_entropy"} <= kernels
    assert ("rope_pack" in kernels) is ("lora_border" in kernels) is fused
    assert any("2 fused layers; level 0, level 4" in text for text in found.how) is fused


def test_a_window_is_crossed_by_the_batch_that_is_made() -> None:
    config = tiny_config("mistral")
    assert room.random_batch(config)["input_ids"].shape[1] > config.sliding_window
    config.sliding_window = 300
    made = room.random_batch(config)
    assert made["input_ids"].shape[1] == 317
    lengths = made["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == room.ROWS and not (made["labels"][-1] != -100).any()
    assert ((made["labels"] != -100) <= (made["attention_mask"] == 1)).all()
    config.max_position_embeddings = 40
    assert room.random_batch(config)["input_ids"].shape[1] == 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_measured_against_a_float32_copy(dtype: torch.dtype) -> None:
    model = lora("qwen2")
    model.get_base_model().to(dtype)
    found = nbkit.certify(whole(model))
    legs = {row.leg for row in found.rows if row.kind != "kernel"}
    name = str(dtype).removeprefix("torch.")
    assert found.passed and legs == {"float32 against stock", f"{name} against float32"}, str(found)
    for row in found.rows:
        if row.kind == "gradient" and row.leg.startswith(name):
            assert row.stock_error is not None and 0 < row.error < 0.2  # both sides round, and neither is lost
    assert all(p.dtype == dtype for n, p in model.named_parameters() if "lora_" not in n)


def test_four_bit_weights() -> None:
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(four_bit(tiny_model(hidden_size=64, intermediate_size=128)), LoraConfig(target_modules=TARGETS, r=4))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = nbkit.certify(model)
    assert found.passed and found.weights == "NF4 weights, double quantisation" and found.dtype == "float32"
    assert {row.leg for row in found.rows if row.kind == "loss"} == {"float32 against stock", "float32 against float32"}
    # A fresh adapter's B is zero, and with it most gradients: it is filled for the comparison alone.
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(not p.any() for n, p in model.named_parameters() if "lora_B" in n)


def four_bit(model: Any) -> Any:
    import bitsandbytes

    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    packed = bitsandbytes.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                    )
                    packed.load_state_dict(linear.state_dict())
                    setattr(parent, name, packed.to("cpu"))
    return model


def test_a_bare_model_trains_all_its_weights() -> None:
    found = nbkit.certify(tiny_model(tie_word_embeddings=True))
    assert found.passed and "model.embed_tokens.weight" in names(found, "gradient")
    frozen = tiny_model()
    frozen.requires_grad_(False)
    found = nbkit.certify(frozen)
    assert found.passed and not names(found, "gradient") and "nothing in the model is trainable" in found.skipped[0]


def test_a_wrong_kernel_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = forwards.swiglu
    monkeypatch.setattr(forwards, "swiglu", lambda gate, up: right(gate, up) * (1 + 1e-4))
    model = lora("llama")
    found = nbkit.certify(model)
    assert not found.passed and found.verdict.startswith("NOT EXACT: ") and "nbkit.unpatch(model)" in found.verdict
    assert {row.kind for row in found.failures} == {"gradient"} and "OUTSIDE" in str(found)


def test_a_gradient_that_is_lost_is_found() -> None:
    model = lora("llama")
    nbkit.patch(model)
    dead = model.get_base_model().model.layers[1].mlp

    def lossy(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forwards.FORWARDS["swiglu"](self, x).detach() if MARK in vars(self) else type(self).forward(self, x)

    dead.forward = MethodType(lossy, dead)
    found = nbkit.certify(model)
    assert not found.passed
    assert any("layers.1.mlp" in row.name and row.note == "only stock has it" for row in found.failures)


@pytest.mark.parametrize("fused", [False, True], ids=["parts", "layers"])
@pytest.mark.parametrize("patched", [False, True])
def test_the_model_is_left_as_it_was(patched: bool, fused: bool) -> None:
    model = lora("llama", lora_dropout=0.2)
    if patched:
        whole(model) if fused else nbkit.patch(model)
    model.get_base_model().model.layers[0].eval()
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = grad = torch.ones_like(first)
    torch.manual_seed(5)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    forwards_then = [vars(module).get("forward") for module in model.modules()]
    binding, random = binding_of(model), torch.get_rng_state()
    found = nbkit.certify(model)
    assert found.passed and any("dropout is off while comparing" in text for text in found.stock)
    assert torch.equal(torch.get_rng_state(), random) and first.grad is grad and torch.equal(grad, torch.ones_like(first))
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert modes == [module.training for module in model.modules()]
    assert forwards_then == [vars(module).get("forward") for module in model.modules()] and binding_of(model) is binding
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in model.named_parameters())
    if binding is not None:
        assert binding.keep is None and binding.planner.plan is None


def test_a_batch_of_ones_own() -> None:
    model = lora("llama")
    inputs = batch(rows=2, tokens=23, padded=True)
    found = nbkit.certify(model, inputs)
    assert found.passed and found.batch == "2 rows of 23 tokens, 41 labelled"
    packed = {"input_ids": inputs["input_ids"][:1], "position_ids": torch.cat([torch.arange(9), torch.arange(14)])[None]}
    found = nbkit.certify(whole(lora("qwen2")), packed)
    assert found.passed and found.batch == "1 rows of 23 tokens, 22 labelled"


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"input_ids": torch.zeros(0, 5, dtype=torch.long)}, r"The batch has no tokens \(input_ids: \(0, 5\)\)"),
        ({"labels": torch.zeros(1, 5, dtype=torch.long)}, r"The batch has no tokens \(input_ids: NoneType\)"),
        ({"input_ids": torch.ones(1, 1, dtype=torch.long)}, "No token of the batch bears a label"),
        (
            torch.ones(2, 5, dtype=torch.long),
            r"The batch is of type Tensor; give \{'input_ids': tensor of shape \(rows, tokens\), ",
        ),
        ([{"input_ids": torch.ones(2, 5)}], "The batch is of type list"),
        ({"input_ids": torch.ones(2, 5)}, "input_ids are torch.float32; give whole numbers .int64."),
        ({"input_ids": torch.full((2, 5), 320)}, "The token 320 in row 0 is none of the 320 of the vocabulary"),
        ({"input_ids": torch.ones(2, 5).long(), "labels": [[1] * 5] * 2}, "labels are a list; give a tensor"),
        (
            {"input_ids": torch.ones(2, 5).long(), "labels": torch.ones(2, 4).long()},
            r"labels are of shape \(2, 4\) and the batch",
        ),
        ({"input_ids": torch.ones(2, 5).long(), "labels": torch.full((2, 5), 999)}, "The label 999 in row 0, token 0 is none of"),
    ],
)
def test_batches_that_are_refused(inputs: dict[str, torch.Tensor], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        nbkit.certify(tiny_model(), inputs)


def test_models_that_are_refused_or_run_stock() -> None:
    from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

    with pytest.raises(ModelError, match="nbkit patches a transformers model"):
        nbkit.certify(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="has no next-token loss"):
        nbkit.certify(AutoModelForSequenceClassification.from_config(tiny_config(num_labels=2)))
    with pytest.raises(ModelError, match="not loaded .they are on the device 'meta'"):
        nbkit.certify(tiny_model().to("meta"))
    found = nbkit.certify(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)))
    assert not found.passed and not found.rows and found.verdict.startswith("NOT CERTIFIED")
    assert "'gpt2' is no declared family" in found.stock[0] and "nothing is bound" in found.skipped[0]


def test_want_of_memory_is_said_and_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "_free", lambda device: 10**6)
    model = lora("llama")
    model.get_base_model().bfloat16()
    found = nbkit.certify(model)
    assert not found.passed and found.verdict.startswith("NOT CERTIFIED")
    assert "a float32 copy needs 0.5 GiB, 0.0 GiB are free on cpu" in found.skipped[0]
    assert {row.kind for row in found.rows} == {"kernel"}


def test_weights_of_an_unknown_format_have_no_truth() -> None:
    model = tiny_model().bfloat16()
    model.model.layers[0].mlp.up_proj.register_buffer("qweight", torch.zeros(2, dtype=torch.int32))
    found = nbkit.certify(model)
    assert not found.passed and "there is no float32 form of Linear weights" in found.skipped[0]


def test_table_html_and_json(tmp_path: Any) -> None:
    model = lora("llama")
    model.get_base_model().config._name_or_path = "<script>alert(1)</script>"
    found = nbkit.certify(model)
    lines = str(found).splitlines()
    assert lines[0] == found.verdict and lines[1].startswith("what") and repr(found) == str(found)
    assert any(line.startswith("gradient q_proj.lora_A x 2") for line in lines)
    page = found._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page and "q_proj.lora_A x 2" in page
    file = tmp_path / "certificate.json"
    text = found.to_json(file)
    read = json.loads(file.read_text())
    assert json.loads(text) == read and read["passed"] is True and read["verdict"] == found.verdict
    assert len(read["rows"]) == len(found.rows) and set(read["versions"]) >= {"nbkit", "torch", "transformers"}
    model.get_base_model().config._name_or_path = str(tmp_path / "of-mine")
    assert nbkit.certify(model).model == "of-mine"  # and not the way to it
    assert read["machine"]["device"] and read["commit"] == found.commit and read["schema"] == 1
    broken = Certificate(**{**vars(found), "rows": (room.Row("loss", "", "float32", float("inf"), float("nan")),)})
    assert json.loads(broken.to_json())["rows"][0]["ratio"] == "inf" and not broken.passed


def test_the_command(tiny_model_dir: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", str(tiny_model_dir), "--json", str(tmp_path / "c.json")]) == 0
    said = capsys.readouterr().out
    assert "EXACT: " in said and "gradient q_proj.lora_A x 2" in said
    assert json.loads((tmp_path / "c.json").read_text())["passed"] is True
    assert main(["certify", str(tmp_path / "nowhere")]) == 1
    assert "ModelError: " in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family: str, dtype: torch.dtype) -> None:
    """Levels 0 and 4, steps repeated until they are recorded, Triton kernels against float64."""
    model = lora(family, hidden_size=256, intermediate_size=512, head_dim=64)
    model.get_base_model().to(dtype)
    model = model.cuda()
    nbkit.certify(model)  # cuBLAS takes its workspaces once
    memory = torch.cuda.memory_allocated()
    found = nbkit.certify(model)
    assert found.passed and not found.skipped, str(found)
    assert any("2 fused layers" in text for text in found.how)
    if dtype == torch.bfloat16 and family == "llama":
        assert any("1 recorded as CUDA graphs" in text or "2 recorded" in text for text in found.how), found.how
    assert torch.cuda.memory_allocated() <= memory + 2**20


@pytest.mark.parametrize("way", ["parts", "layers", "as on a GPU"])
def test_no_copy_and_no_buffer_outlives_it(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float32 copy of an 8B model takes 30 GB: it goes at once, and not when Python next collects its cycles."""
    model = lora("llama", hidden_size=128)
    model.get_base_model().bfloat16()
    if way == "as on a GPU":
        monkeypatch.setattr("nbkit.models.patch._fuses", lambda device: True)
    model = whole(model) if way == "layers" else model
    copies: list[weakref.ref[Any]] = []
    make = twin.wide

    def wide(*given: Any) -> tuple[Any, str]:
        copy, why = make(*given)
        copies.extend(weakref.ref(p) for p in copy.parameters())
        return copy, why

    monkeypatch.setattr(twin, "wide", wide)
    gc.collect()
    gc.disable()
    try:
        assert nbkit.certify(model).passed
        assert copies and not [one for one in copies if one() is not None]
    finally:
        gc.enable()
    binding = binding_of(model.get_base_model())
    assert (binding is not None) is (way == "layers") and (binding is None or binding.stacks.room is None)


@pytest.mark.gpu
def test_a_patched_model_keeps_its_graphs() -> None:
    model = lora("llama", hidden_size=256, intermediate_size=512, head_dim=64)
    model.get_base_model().bfloat16()
    model = model.cuda()
    nbkit.patch(model)
    inputs = {k: v.cuda() for k, v in batch(tokens=64).items()}
    for _ in range(4):
        model(**inputs).loss.backward()
        model.zero_grad()
    graphs = vars(model.get_base_model())[forwards.GRAPHS]
    known = dict(graphs.recorded)
    assert known and nbkit.certify(model).passed
    assert vars(model.get_base_model())[forwards.GRAPHS] is graphs and graphs.recorded == known


@pytest.mark.parametrize("is_cuda", [True, False])
def test_slow_launches_are_in_the_certificate_of_a_gpu(is_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "launch_note", lambda: "nbkit launches kernels fast under Triton 3.6; under 4.0 it does not.")
    weight = SimpleNamespace(weight=SimpleNamespace(is_cuda=is_cuda))
    base = SimpleNamespace(get_input_embeddings=lambda: weight, modules=list)
    said = room._runs_stock(base, nbkit.models.patch.PatchReport("Toy", "llama", "cuda:0", "Triton kernels"))
    assert said == (["note: nbkit launches kernels fast under Triton 3.6; under 4.0 it does not"] if is_cuda else [])


def test_layers_that_run_stock_are_in_the_certificate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbkit.models.patch._fuses", lambda device: True)
    model = lora("llama", use_dora=True)
    found = nbkit.certify(model)
    assert found.passed, str(found)
    assert [one for one in found.stock if "Dora" in one] == [
        "model.layers.0 and 1 more: q_proj uses a variant of LoRA (DoraLinearVariant); its parts are bound one by one"
    ]


def test_layers_that_stand_aside_are_in_the_certificate() -> None:
    """The batch brings scores; steps of another kind, which a run had before, are not spoken of."""
    model = whole(lora("llama", attn_implementation="eager"))
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast"):
        model(**batch())
    with pytest.warns(UserWarning, match="output_attentions"):
        found = nbkit.certify(model, {**batch(), "output_attentions": True})
    assert found.passed and [one for one in found.how if one.startswith("no layer was fused: ")] == [
        "no layer was fused: output_attentions asks for scores that a fused layer never holds"
    ]
    assert len(binding_of(model).asides) == 2  # type: ignore[union-attr]


KEPT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "certificates"


@pytest.mark.parametrize("weights", ["float32", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_certificate_of_every_family_is_kept(family: str, weights: str) -> None:
    """Made by `python -m benchmarks.certify_families`; each new family brings its own."""
    path = KEPT / f"{family}-{weights}-cpu.json"
    assert path.is_file(), f"run: python -m benchmarks.certify_families {family}"
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["passed"] and kept["verdict"].startswith("EXACT: ") and kept["family"] == family
    assert kept["schema"] == SCHEMA and not kept["skipped"] and not kept["stock"]
    rows = [row for row in kept["rows"] if row["kind"] == "gradient"]
    assert len(rows) == 2 * 2 * len(TARGETS) * (1 if weights == "float32" else 2)
    assert all(float(row["ratio"]) <= 1 for row in kept["rows"]) and any("2 fused layers" in how for how in kept["how"])
    assert kept["weights"].startswith("NF4" if weights == "nf4" else "float32") and len(kept["commit"]) == 40
