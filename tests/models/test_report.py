"""What `nbkit.patch` prints, before and after steps: nothing that runs stock is left unsaid. Layers are fused as on a GPU."""

from __future__ import annotations

import copy
import gc
import re
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import nbkit
from nbkit.errors import ConfigError
from nbkit.models import patch as room
from nbkit.models import running
from nbkit.models.graphs import Graphs
from nbkit.models.layer import binding_of
from tests.closeness import assert_all_like_stock, assert_like_stock
from tests.models.layer.rig import TARGETS, batch, fill, lora, step
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def fused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_fuses", lambda device: True)


def adapted(**options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(**{"r": 4, "target_modules": TARGETS, **options}))  # type: ignore[arg-type]
    fill(model)
    return model.train()


def exact(model: Any, inputs: dict[str, Any] | None = None) -> Any:
    """The report of a model whose patched step equals the stock one."""
    inputs = inputs or batch(padded=True)
    torch.manual_seed(3)
    loss, grads = step(model, **inputs)
    report = nbkit.patch(model)
    torch.manual_seed(3)
    ours, found = step(model, **inputs)
    assert_like_stock("loss", torch.tensor(ours), torch.tensor(loss))
    assert_all_like_stock(found, grads)
    return report


FUSED = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"use_rslora": True},
    {"r": 7},
    {"lora_alpha": 0},
    {"bias": "all"},
    {"target_modules": "all-linear"},
    {"layers_to_transform": [1]},
    {"modules_to_save": ["input_layernorm", "embed_tokens"]},
    {"modules_to_save": ["up_proj"], "target_modules": ["q_proj"]},
    {"trainable_token_indices": [5, 6]},
    {"target_modules": [*TARGETS, "embed_tokens"]},
    {"init_lora_weights": "pissa"},
]
STOCK = [
    ({"lora_dropout": 0.05}, "q_proj has lora_dropout 0.05"),
    ({"use_dora": True}, "q_proj uses a variant of LoRA (DoraLinearVariant)"),
    ({"lora_bias": True}, "q_proj has a bias in its adapter"),
]


@pytest.mark.parametrize("options", FUSED, ids=str)
def test_adapters_that_are_fused_say_nothing_of_stock(options: dict[str, Any]) -> None:
    report = exact(adapted(**options))
    assert not report.skipped and [one.op for one in report.bound].count("layer") == 2, str(report)
    assert "stock" not in str(report) and "attention     plain" in str(report) and "memory        keep level 0" in str(report)


@pytest.mark.parametrize(("options", "why"), STOCK, ids=str)
def test_adapters_that_are_not_are_named_before_the_first_step(options: dict[str, Any], why: str) -> None:
    model = adapted(**options)
    report = exact(model)
    line = f"  skipped     2 x model.layers.*: {why}; its parts are bound one by one"
    assert line in str(report).splitlines() and str(report).count(why) == 1, str(report)
    assert not any(one.op == "layer" for one in report.bound)
    assert running.stock_reasons(model) == []  # on a CPU nothing is claimed


def test_adapters_of_another_method_are_named() -> None:
    from peft import IA3Config, LoHaConfig, get_peft_model

    for config, why in (
        (IA3Config(task_type="CAUSAL_LM"), "k_proj carries an adapter of peft.tuners.ia3, which is not LoRA"),
        (LoHaConfig(r=4, target_modules=["o_proj"]), "o_proj carries an adapter of peft.tuners.loha, which is not LoRA"),
    ):
        report = exact(get_peft_model(tiny_model("llama"), config).train())
        assert f"  skipped     2 x model.layers.*: {why}; its parts are bound one by one" in str(report).splitlines(), str(report)


def test_what_comes_to_run_stock_later_is_named_then() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    report = nbkit.patch(model)
    assert "stock" not in str(report) and [one.op for one in report.bound].count("layer") == 2
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.1, layers_to_transform=[1])).train()
    step(model, **batch())
    assert "  stock         layer 1 is not fused: q_proj has lora_dropout 0.1" in str(report).splitlines()
    with pytest.warns(UserWarning, match="stand aside"), torch.autocast("cpu", torch.bfloat16):
        step(model, **batch())
    assert "  stock         no layer is fused in some steps: autocast asks for bfloat16 and the weights are float32" in str(
        report
    )


def test_an_adapter_on_the_head() -> None:
    report = exact(adapted(target_modules=[*TARGETS, "lm_head"]))
    assert "lm_head: it carries an adapter and makes its own projection of the labelled rows" in str(report)
    assert not any(one.op == "graphs" for one in report.bound)
    assert not [one for one in exact(adapted(modules_to_save=["lm_head"])).bound if one.note]


def test_steps_that_are_not_recorded_say_why() -> None:
    model = adapted()
    report = nbkit.patch(model)
    graphs = lambda: next(line for line in str(report).splitlines() if line.startswith("  graphs"))  # noqa: E731
    logits = model(input_ids=batch()["input_ids"]).logits  # a loss of one's own, as TRL has it
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch()["labels"][:, 1:].flatten()).backward()
    assert "no step was recorded, since its loss was computed outside the model's own head, as TRL's" in graphs()
    assert str(running.recorded(model)).startswith("CUDA graphs: no step was recorded, since its loss")
    step(model, **batch(), position_ids=torch.arange(19)[None])
    assert graphs().endswith("steps that are given position_ids run eagerly")
    step(model, **batch(), use_cache=True)
    assert graphs().endswith("a cache, padding on the left or labels on padding run eagerly")
    step(model, **batch())
    assert graphs().endswith("the tokens are not on the GPU")
    assert not any(one.op == "graphs" for one in nbkit.patch(adapted(), graphs=False).bound)


def own_loss(model: Any) -> None:
    logits = model(input_ids=batch()["input_ids"]).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch()["labels"][:, 1:].flatten()).backward()


def test_steps_that_could_have_been_recorded_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TRL's SFTTrainer takes them on a GPU."""
    monkeypatch.setattr(Graphs, "fits", lambda self, ids: ids.shape == (3, 19))
    model = adapted()
    nbkit.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(3):
            own_loss(model)
    with pytest.warns(UserWarning, match="Slower than it could be: no step was recorded, since its loss was computed outside"):
        own_loss(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        own_loss(model)
        copy.deepcopy(model)(**batch()).loss.backward()
        nbkit.unpatch(model)
        own_loss(model)
    assert not any("_nbkit_asked" in vars(module) for module in model.modules())


def test_steps_that_are_asked_for_or_could_not_be_recorded_are_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = adapted()
        report = nbkit.patch(model)  # not on a GPU
        for _ in range(6):
            own_loss(model)
        assert "graphs        the tokens are not on the GPU" in str(report)
        monkeypatch.setattr(Graphs, "fits", lambda self, ids: True)
        monkeypatch.setattr(Graphs, "record_if_due", lambda self, *args: setattr(self, "note", "asked"))
        model = adapted()
        nbkit.patch(model)
        step(model, **batch())
        for _ in range(6):
            own_loss(model)


def test_another_librarys_forward_and_hooks() -> None:
    model = adapted()
    base = model.get_base_model()
    mlp = base.model.layers[1].mlp
    theirs = mlp.forward
    mlp.forward = lambda x: theirs(x) * 0.5
    base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, out: out * 2)
    report = exact(model)
    lines = str(report).splitlines()
    parts = "its parts are bound one by one"
    for line in (
        f"  skipped     1 x model.layers.*: self_attn.q_proj is hooked, and a fused layer does not call it; {parts}",
        f"  skipped     1 x model.layers.*: another library has bound a forward of its own to mlp; {parts}",
        "  skipped     1 x model.layers.*.mlp: another library has bound a forward of its own to it",
    ):
        assert line in lines, str(report)


def test_a_classifier_has_fused_layers_and_no_head() -> None:
    """As reward models are."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_model().config).float()
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, task_type="SEQ_CLS"))
    fill(model)
    inputs = {k: v for k, v in batch(padded=True).items() if k != "labels"} | {"labels": torch.tensor([0, 1, 1])}
    inputs["input_ids"][inputs["attention_mask"] == 0] = model.config.pad_token_id  # by which it finds a row's last token
    report = exact(model.train(), inputs)
    assert [one.op for one in report.bound].count("layer") == 2 and not any(one.op == "graphs" for one in report.bound)
    assert "LlamaForSequenceClassification has no next-token loss; its own forward stays" in str(report)
    nbkit.unpatch(model)


@pytest.mark.parametrize("unpatched", [True, False])
def test_a_report_that_is_kept_keeps_no_model(unpatched: bool) -> None:
    """A notebook holds what a cell shows for good: the model's memory must not hang on it."""
    model = adapted()
    report = nbkit.patch(model)
    step(model, **batch())
    gone = weakref.ref(model.get_base_model())
    if unpatched:
        nbkit.unpatch(model)
    del model
    gc.collect()
    assert gone() is None and str(report).startswith("LlamaForCausalLM (family llama) on cpu: ")


def test_a_report_at_the_end_of_a_cell_is_made_to_be_read() -> None:
    report = nbkit.patch(adapted())
    assert repr(report) == str(report)


def test_a_report_of_a_model_that_was_unpatched_says_so() -> None:
    model = adapted()
    report = nbkit.patch(model)
    step(model, **batch())
    assert "unpatched" not in str(report)
    nbkit.unpatch(model)
    assert str(report).splitlines()[-1] == "  unpatched     since: the model runs stock"
    nbkit.patch(model)
    assert "unpatched" not in str(report)


def test_every_line_is_short_enough_to_read() -> None:
    model = adapted(lora_dropout=0.05)
    report = nbkit.patch(model)
    step(model, **batch())
    for line in str(report).splitlines():
        assert len(line) < 240 and re.fullmatch(r"\S.*\.|  \w+ +.+", line), line


# -- gradient checkpointing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "level"), [(True, 4), ("nbkit", 4), ("unsloth", 4), (False, 0), ("auto", 0), (None, 0)])
def test_use_gradient_checkpointing(asked: bool | str | None, level: int) -> None:
    model = adapted()
    loss, grads = step(model, **batch())
    report = nbkit.patch(model, use_gradient_checkpointing=asked)
    ours, found = step(model, **batch())
    assert_like_stock("loss", torch.tensor(ours), torch.tensor(loss))
    assert_all_like_stock(found, grads)
    assert binding_of(model).planner.keep.level == level  # type: ignore[union-attr]
    assert ("gradient checkpointing was asked for" in str(report)) is (level == 4)
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in model.get_base_model().model.layers)
    nbkit.unpatch(model)
    on = bool(asked)
    assert all(layer.gradient_checkpointing is on for layer in model.get_base_model().model.layers)


def test_the_models_own_switch_is_heard_too() -> None:
    model = adapted()
    nbkit.patch(model)
    planner = binding_of(model).planner  # type: ignore[union-attr]
    for on, level in ((True, 4), (False, 0), (True, 4)):
        model.gradient_checkpointing_enable() if on else model.gradient_checkpointing_disable()
        step(model, **batch())
        assert planner.keep.level == level
    model.eval()
    step(model, **batch())  # as transformers does: nothing is checkpointed in eval mode
    assert planner.keep.level == 0


def test_ways_of_checkpointing_that_are_not_known() -> None:
    for wrong in ("on", 1.5, "NBKIT"):
        model = adapted()
        with pytest.raises(ConfigError, match="is not known; give one of True, False, 'auto', 'nbkit', 'unsloth'"):
            nbkit.patch(model, use_gradient_checkpointing=wrong)  # type: ignore[arg-type]
        assert binding_of(model) is None and not any("forward" in vars(module) for module in model.modules())


def test_checkpointing_where_no_layer_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_fuses", lambda device: False)
    model = lora("llama")
    nbkit.patch(model, use_gradient_checkpointing="unsloth")
    assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)
    nbkit.patch(model, use_gradient_checkpointing=False)
    assert not any(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)


# -- machines ------------------------------------------------------------------------------------------------------------


def test_layers_on_several_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are bound where they lie; no layer is fused."""
    monkeypatch.setattr(room, "mixed_devices", lambda base, family: "the layers lie on several devices (cuda:0, cuda:1)")
    model = adapted()
    report = nbkit.patch(model)
    assert "  skipped     1 x model.layers: the layers lie on several devices (cuda:0, cuda:1)" in str(report).splitlines()
    assert binding_of(model) is None and [one.op for one in report.bound].count("rms_norm") == 5


@pytest.mark.gpu
def test_an_old_gpu_runs_stock_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted().cuda()
    inputs = {k: v.cuda() for k, v in batch().items()}
    wanted = step(model, **inputs)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 1))
    report = nbkit.patch(model)
    assert not report.bound and report.runs == "everything runs stock"
    assert "has capability 6.1, kernels need 7.0, so it runs stock, and slowly" in str(report)
    got = step(model, **inputs)
    assert got[0] == wanted[0] and all(torch.equal(got[1][n], wanted[1][n]) for n in wanted[1])
    assert running.stock_reasons(model) == [one.reason for one in report.skipped]


@pytest.mark.gpu
def test_layers_that_lie_on_the_cpu_beside_a_gpu() -> None:
    """As a device_map leaves them that is too large for the card."""
    from accelerate import dispatch_model

    model = tiny_model("llama")
    ids = batch()["input_ids"]
    wanted = model(input_ids=ids, labels=ids).loss.item()
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0, "model.rotary_emb": 0}
    model = dispatch_model(model, {**places, "lm_head": 0})
    report = nbkit.patch(model)
    assert "not in memory (offloaded, device meta)" in str(report) and not report.bound
    assert model(input_ids=ids.cuda(), labels=ids.cuda()).loss.item() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"lora_dropout": 0.05}, {"use_dora": True}], ids=str)
def test_what_runs_stock_is_told_to_a_run(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_fuses", lambda device: device.type == "cuda")
    model = adapted(**options).cuda()
    nbkit.patch(model)
    assert len(running.stock_reasons(model)) == 1 and running.stock_reasons(model)[0].startswith(
        "layers 0 to 1 are not fused: q_proj"
    )
