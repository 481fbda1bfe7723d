"""Each panel over a session: what it asks of it, what it shows, and what it refuses."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

import nbkit
from nbkit.config import ALL_LINEAR, FORMATS, TOO_LONG, TRAIN_ON, DataRecipe, TrainConfig
from nbkit.data.repairs import Repair
from nbkit.errors import ConfigError, DataError, ModelError, TrainingError
from nbkit.widgets import _mapping
from nbkit.widgets._mapping import ROLES
from nbkit.widgets.chat import ChatPanel
from nbkit.widgets.dataset_mapper import DatasetMapper
from nbkit.widgets.lora import LoraPanel
from nbkit.widgets.model_picker import ModelPicker
from nbkit.widgets.train import TrainPanel
from tests.widgets.fake import FakeSession
from tests.widgets.hostile import CORPUS, fixed_words, inert, inert_tree

PANELS = (ModelPicker, LoraPanel, DatasetMapper, TrainPanel, ChatPanel)


@pytest.fixture
def session(tmp_path: Path) -> FakeSession:
    return FakeSession(tmp_path)


@pytest.fixture
def loaded(session: FakeSession) -> FakeSession:
    session.load("smollm2-135m-instruct", max_seq_length=512)
    return session


@pytest.fixture
def ready(loaded: FakeSession) -> FakeSession:
    loaded.add_lora(rank=4)
    loaded.use_data("sample:ships-log")
    loaded.calls.clear()
    return loaded


# -- model -----------------------------------------------------------------------------------------


def test_the_picker_says_what_fits_and_why_not(session: FakeSession) -> None:
    panel = ModelPicker(session)
    lines = [text for text, _ in panel._list.options]
    assert lines[0].startswith("✓ fits  smollm2-135m-instruct") and "135 M" in lines[0]
    assert any(line.startswith("✗ no    llama-3.1-8b") and "needs  40.0 GiB" in line and "4bit" in line for line in lines)
    assert "Fits: needs about 1.2 GiB of 22.0 GiB free." in inert(panel._reason.value).text
    panel._list.value = "llama-3.1-8b-instruct"
    assert panel.values()["name"] == "llama-3.1-8b-instruct"
    assert "Does not fit" in panel._reason.value and "load_in_4bit=True would do" in panel._reason.value
    panel.set(name="someone/else")
    assert panel._list.value is None and "not in the list" in panel._reason.value


def test_the_list_is_asked_again_for_4_bit(session: FakeSession) -> None:
    asked = []
    session.catalog = lambda load_in_4bit=None: asked.append(load_in_4bit) or []  # type: ignore[method-assign]
    panel = ModelPicker(session)
    panel.set(load_in_4bit=True)
    assert asked == [False, True]


def test_load_loads_what_is_named(session: FakeSession) -> None:
    panel = ModelPicker(session)
    panel.set(name="  a/b ", load_in_4bit=True, max_seq_length=512, dtype="bfloat16")
    panel.click("load")
    assert session.calls == [("load", ("a/b",), {"load_in_4bit": True, "dtype": "bfloat16", "max_seq_length": 512})]
    assert "a/b was loaded from the cache." in panel.said.value and panel.summary() == "✓ a/b is loaded"


def test_an_unknown_model_is_a_sentence_with_names(session: FakeSession) -> None:
    panel = ModelPicker(session)
    panel._fields["name"].widget.value = "no-such-model"
    panel._buttons["load"].click()
    assert "did you mean smollm2-135m-instruct" in inert(panel.said.value).text
    with pytest.raises(ModelError, match="did you mean"):
        panel.click("load")


def test_the_picker_shows_what_code_has_loaded(loaded: FakeSession) -> None:
    assert ModelPicker(loaded).values()["max_seq_length"] == 512
    panel = ModelPicker(loaded)
    loaded.load("a/b", load_in_4bit=True)
    assert panel.values() == {"name": "a/b", "load_in_4bit": True, "max_seq_length": 2048, "dtype": "auto"}


def test_no_panel_has_a_box_for_secrets(session: FakeSession) -> None:
    for kind in PANELS:
        panel = kind(session)
        assert not [name for name in panel._fields if "token" in name and name not in ("max_new_tokens", "pack_tokens")]


# -- LoRA ------------------------------------------------------------------------------------------


def test_the_cost_is_shown_as_the_rank_changes(session: FakeSession) -> None:
    panel = LoraPanel(session, model="llama-3.1-8b-instruct")
    assert "41,943,040" in panel._figures.value and "160 MiB" in panel._figures.value and "0.52 %" in panel._figures.value
    panel._fields["rank"].widget.value = 8  # a hand
    assert "20,971,520" in panel._figures.value
    panel.estimate_for("someone/else")
    assert "known once it is loaded" in panel._figures.value
    panel.estimate_for(None)
    assert "Pick or load a model" in panel._figures.value


def test_the_real_shapes_give_the_real_figure() -> None:
    import nbkit

    session = nbkit.Session()
    panel = LoraPanel(session, model="meta-llama/Llama-3.1-8B-Instruct")  # type: ignore[arg-type]
    assert panel.cost()[0] == 41_943_040
    assert "41,943,040" in panel._figures.value
    panel.set(targets=["q_proj", "v_proj"])
    assert panel.cost()[0] == 6_815_744


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"alpha": "many"}, "Alpha takes a number"),
        ({"alpha": -1}, "alpha is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": ()}, "no target modules"),
        ({"targets": (1, 2)}, "Target modules are names"),
    ],
)
def test_bad_lora_settings_are_sentences(loaded: FakeSession, values: dict[str, Any], said: str) -> None:
    panel = LoraPanel(loaded)
    with pytest.raises(ConfigError, match=said):
        panel.set(**values)
    assert said in inert(panel.said.value).text or "targets" in values or "alpha" in values


def test_rank_0_typed_by_hand_is_a_sentence_and_no_adapter(loaded: FakeSession) -> None:
    panel = LoraPanel(loaded)
    panel._fields["rank"].widget.value = 0
    assert "LoRA rank is 0; it must be at least 1" in panel.said.value
    panel._buttons["add"].click()
    assert "LoRA rank is 0" in panel.said.value and loaded.lora is None


def test_add_puts_the_adapter_on(loaded: FakeSession) -> None:
    panel = LoraPanel(loaded)
    panel.set(rank=8, alpha=16, targets="qkv_proj", use_rslora=True)
    panel.click("add")
    lora = loaded.lora
    assert lora is not None and (lora.rank, lora.alpha, lora.targets, lora.use_rslora) == (8, 16, ("qkv_proj",), True)
    assert "20,971,520 parameters will be trained" in panel.said.value


def test_the_panel_shows_what_code_has_added(loaded: FakeSession) -> None:
    panel = LoraPanel(loaded)
    loaded.add_lora(rank=5, alpha=2.5, targets=("k_proj", "other"))
    assert panel.values() == {"rank": 5, "alpha": 2.5, "dropout": 0.0, "use_rslora": False, "targets": ("k_proj", "other")}
    assert LoraPanel(loaded).values() == panel.values()
    panel.set(targets=ALL_LINEAR)
    assert panel.values()["targets"] == ALL_LINEAR


def test_lora_without_a_model_is_refused(session: FakeSession) -> None:
    with pytest.raises(ModelError, match="No model is loaded"):
        LoraPanel(session).click("add")


# -- data ------------------------------------------------------------------------------------------


def test_rows_are_read_and_shown_beside_what_is_trained(loaded: FakeSession) -> None:
    panel = DatasetMapper(loaded)
    panel.set(source="rows.jsonl", held_out="30", system="Be brief.", too_long="drop")
    panel.click("read")
    recipe = DataRecipe(system="Be brief.", too_long="drop")
    assert loaded.calls[-1] == ("read_data", ("rows.jsonl",), {"recipe": recipe, "held_out": 30})
    found = inert(panel._found.value).text
    assert "messages" in found and "40 of 100 (40%)" in found and "row 30: plain" in found and "30, 31, 32" in found
    view = inert(panel.inspector._tokens.value)
    assert "⟦plain <|im_end|>⟧" in view.text and '"user": "plain 1"' in view.text and "Row 3 of the source" in view.text
    assert "⟦trained⟧" in view.text and "mark" in view.tags
    assert panel.values()["format"] == "messages" and panel.values()["columns"] == {"messages": "messages"}
    assert "4 of 4 rows are ready to train on." in panel.said.value


def test_every_line_of_the_recipe_is_a_setting(loaded: FakeSession) -> None:
    panel = DatasetMapper(loaded)
    recipe = DataRecipe(
        format="preference",
        columns={"chosen": "good", "rejected": "bad"},
        roles={"npc": "assistant", "player": "user"},
        prompt="{question}[[ {context}]]",
        system="Be brief.",
        template="chatml",
        train_on="last_reply",
        faulty="drop",
        too_long="split",
        duplicates="drop",
        same_role="join",
        first_reply="skip",
    )
    panel.set(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)})
    assert panel.recipe() == recipe
    made = eval(panel.code().split("recipe=")[1].rsplit(",\n)", 1)[0], {"nbkit": nbkit})
    assert made == recipe


def test_a_template_of_ones_own_is_kept(loaded: FakeSession) -> None:
    panel = DatasetMapper(loaded)
    jinja = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    panel.set(template=jinja)
    assert panel.recipe().template == jinja and ("a template of yours", jinja) in panel._fields["template"].widget.options
    panel.set(template=None)
    assert panel.recipe().template is None
    for wrong, said in (("chatlm", "There is no template 'chatlm'"), (3, "takes a name or Jinja text")):
        with pytest.raises(ConfigError, match=said):
            panel.set(template=wrong)


@pytest.mark.parametrize("said", ["npc", "npc=", "=user", "npc=boss", 3])
def test_names_of_roles_that_are_none_are_sentences(loaded: FakeSession, said: Any) -> None:
    panel = DatasetMapper(loaded)
    with pytest.raises(ConfigError, match="takes pairs|is not known"):
        if isinstance(said, str):
            panel._fields["roles"].widget.value = said
            panel.values()
        else:
            panel.set(roles=said)


def test_a_repair_writes_its_line_and_reads_again(loaded: FakeSession) -> None:
    panel = DatasetMapper(loaded)
    assert panel._buttons["faulty_drop"].disabled
    panel.click("read")
    shown = [row for row in panel._repairs.children if row.layout.display != "none"]
    assert len(shown) == 1 and "Drop rows: plain" in inert(shown[0].children[1].value).text
    panel.click("faulty_drop")
    assert loaded.calls[-1][2]["recipe"].faulty == "drop" and panel.values()["faulty"] == "drop"
    assert 'faulty="drop"' in panel.code()
    with pytest.raises(ConfigError, match="nothing to do"):
        panel.click("faulty_drop")
    with pytest.raises(ConfigError, match="nothing to do"):
        panel.click("too_long_cut")


def test_reading_tells_how_far_it_is_and_the_loop_goes_on(loaded: FakeSession) -> None:
    loaded.pause, loaded.chunks = 0.02, 40

    async def main() -> tuple[DatasetMapper, set[str], int]:
        panel = DatasetMapper(loaded)
        panel.click("read")
        seen, ticks = set(), 0
        while panel._tasks:
            await asyncio.sleep(0.05)
            ticks += 1
            seen.add(inert(panel._progress.value).text)
        await panel.finished()
        return panel, seen, ticks

    panel, seen, ticks = asyncio.run(main())
    told = [text for text in seen if "of 4,000 rows" in text]
    assert ticks > 5 and len(told) > 2 and sum("rows/s" in text and "left" in text for text in told) > 1
    assert panel._progress.value == "" and loaded.data is not None and panel._buttons["stop"].disabled


def test_a_large_set_is_looked_through_after_reading_unless_stopped(loaded: FakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbkit.widgets.inspector.AT_ONCE", 0)
    panel = DatasetMapper(loaded)
    panel.click("read")
    assert panel.inspector.inspection.set.counted and "No problem found" in panel.inspector._found.value
    take = loaded.take_data

    def take_and_stop(report: Any, config: Any) -> Any:
        panel._stop()
        return take(report, config)

    loaded.take_data = take_and_stop  # type: ignore[method-assign]
    panel.click("read")
    assert not panel.inspector.inspection.set.counted and "4 of 4 rows are ready" in panel.said.value
    panel.inspector.click("look")
    assert "No problem found" in panel.inspector._found.value


def test_reading_can_be_stopped_and_leaves_the_data_as_they_were(ready: FakeSession) -> None:
    ready.pause, ready.chunks = 0.02, 500
    before = ready.data

    async def main() -> DatasetMapper:
        panel = DatasetMapper(ready)
        panel.set(source="other.jsonl")
        panel.click("read")
        await asyncio.sleep(0.2)
        assert panel._buttons["read"].disabled
        panel.click("stop")
        await panel.finished()
        return panel

    panel = asyncio.run(main())
    assert ready.data is before and "Reading was stopped" in panel.said.value and not panel._buttons["read"].disabled


@pytest.mark.parametrize(("said", "value"), [("", None), ("30", 30), ("0.1", 0.1), ("eval.jsonl", "eval.jsonl")])
def test_held_out_takes_a_number_a_share_or_a_source(loaded: FakeSession, said: str, value: Any) -> None:
    panel = DatasetMapper(loaded)
    panel._fields["held_out"].widget.value = said
    assert panel.values()["held_out"] == value and type(panel.values()["held_out"]) is type(value)


def test_the_boxes_of_the_format_are_shown(session: FakeSession) -> None:
    panel = DatasetMapper(session)

    def shown() -> list[str]:
        return [role for role, box in panel._columns.boxes.items() if box.layout.display != "none"]

    assert not shown()
    for form, roles in ROLES.items():
        panel.set(format=form)
        assert set(shown()) == set(roles)
    with pytest.raises(ConfigError, match="no role of a column; use instruction"):
        panel.set(columns={"reply": "x"})


def test_formats_and_roles_are_those_of_the_engine() -> None:
    from nbkit.data import conversion

    assert {form: list(roles) for form, roles in ROLES.items()} == {form: list(roles) for form, roles in conversion.ROLES.items()}
    for options, known in ((_mapping.FORMATS, FORMATS), (_mapping.TRAIN_ON, TRAIN_ON), (_mapping.TOO_LONG, TOO_LONG)):
        assert [value for _, value in options] == list(known)


def test_a_missing_file_is_a_sentence(loaded: FakeSession) -> None:
    panel = DatasetMapper(loaded)
    panel._fields["source"].widget.value = "missing.jsonl"
    panel._buttons["read"].click()
    assert "There is no file missing.jsonl" in panel.said.value
    with pytest.raises(DataError):
        panel.click("read")
    panel.set(source=" ")
    with pytest.raises(DataError, match="There is no source yet"):
        panel.click("read")


def test_what_was_found_in_one_source_is_not_told_of_another(loaded: FakeSession) -> None:
    panel = DatasetMapper(loaded)
    panel.click("read")
    assert panel.values()["format"] == "messages" and 'format="messages"' in panel.code()
    panel.click("read")  # the same question again, so that what was kept of it is found
    assert loaded.calls[-1][2]["recipe"] == DataRecipe()
    panel.set(source="other.jsonl")
    assert panel.values()["format"] == "auto" and panel.values()["columns"] == {}
    panel.set(format="alpaca", columns={"instruction": "q", "output": "a"})
    panel.click("read")
    assert loaded.calls[-1][2]["recipe"] == DataRecipe(format="alpaca", columns={"instruction": "q", "output": "a"})
    panel.set(source="third.jsonl")
    assert panel.values()["format"] == "messages", "what was told by hand stays"


def test_columns_that_were_seen_are_offered_where_the_format_is_not_known(loaded: FakeSession) -> None:
    def read_data(*_: Any, **__: Any) -> Any:
        error = DataError("rows.jsonl is in no known format.")
        error.columns = ("question", "half \ud800", "answer")
        raise error

    loaded.read_data = read_data  # type: ignore[method-assign]
    panel = DatasetMapper(loaded)
    with pytest.raises(DataError, match="no known format"):
        panel.click("read")
    panel.set(format="prompt_completion")
    assert panel._columns.boxes["completion"].options == ("question", "answer")


def test_repairs_are_offered_where_no_row_could_be_used(loaded: FakeSession) -> None:
    true, changed = loaded.read_data, DataRecipe(roles={"alien": "user"})

    def read_data(*_: Any, **__: Any) -> Any:
        error = DataError("None of the 2 rows of rows.jsonl can be trained on.")
        error.repairs = (Repair("Take 'alien' for the user in rows 1, 2.", ("roles", "guess"), changed, (1, 2)),)
        raise error

    loaded.read_data = read_data  # type: ignore[method-assign]
    panel = DatasetMapper(loaded)
    with pytest.raises(DataError, match="None of the 2 rows"):
        panel.click("read")
    shown = [row for row in panel._repairs.children if row.layout.display != "none"]
    assert len(shown) == 1 and "Take 'alien' for the user" in inert(shown[0].children[1].value).text
    loaded.read_data = true  # type: ignore[method-assign]
    panel.click("roles_guess")
    assert loaded.calls[-1][2]["recipe"] == changed and "roles_guess" not in panel._offers


def test_a_download_is_told_in_megabytes(loaded: FakeSession) -> None:
    panel = DatasetMapper(loaded)
    panel._show_progress({"what": "Fetching", "done": 1_500_000, "total": 3_000_000, "began": time.monotonic() - 1})
    said = inert(panel._progress.value).text
    assert "Fetching: 1.5 of 3.0 MB" in said and "MB/s" in said and "rows" not in said


def test_the_mapper_shows_what_code_has_read(ready: FakeSession) -> None:
    panel = DatasetMapper(ready)
    assert panel.values()["source"] == "sample:ships-log" and "Row 3 of the source" in panel.inspector._tokens.value
    ready.use_data("other.jsonl", held_out=3)
    assert panel.values()["source"] == "other.jsonl" and panel.values()["held_out"] == 3
    ready.data = None
    ready._changed("model")
    assert panel.inspector._tokens.value == "" and panel._found.value == ""


# -- training --------------------------------------------------------------------------------------


def test_start_trains_with_the_settings_and_the_plot_moves(ready: FakeSession) -> None:
    async def main() -> TrainPanel:
        panel = TrainPanel(ready)
        panel.set(max_steps=7, learning_rate=1e-3, batch_size=4, schedule="cosine", gradient_checkpointing=False)
        panel.click("start")
        assert panel._buttons["start"].disabled and not panel._buttons["stop"].disabled
        await panel.finished()
        return panel

    panel = asyncio.run(main())
    want = TrainConfig(max_steps=7, learning_rate=1e-3, batch_size=4, schedule="cosine", gradient_checkpointing=False)
    assert ready.calls == [("train", (want,), {})]
    assert panel.plot.progress.step == 3 and "<svg" in panel.plot._picture.value
    assert "Trained at step 3 in 0:01; the adapter is in runs/one/adapter." in panel.said.value
    assert not panel._buttons["start"].disabled and panel._buttons["stop"].disabled
    assert panel.summary() == "Finished, step 3 of 3 in 0:01"


def test_stop_ends_the_run_at_a_step(ready: FakeSession) -> None:
    async def main() -> TrainPanel:
        ready.steps = 500
        panel = TrainPanel(ready)
        panel.click("start")
        await asyncio.sleep(0.1)
        panel._buttons["stop"].click()  # a hand, while the cell awaits
        assert "Stopping" in panel.said.value and panel._buttons["stop"].disabled
        await panel.finished()
        return panel

    panel = asyncio.run(main())
    assert ready.run is not None and ready.run.status == "stopped"
    assert 0 < panel.plot.progress.step < 500 and "Stopped at step" in panel.said.value


def test_a_run_that_code_started_is_followed_too(ready: FakeSession) -> None:
    async def main() -> TrainPanel:
        panel = TrainPanel(ready)
        await ready.train(TrainConfig(max_steps=9, gradient_checkpointing="unsloth"))
        return panel

    panel = asyncio.run(main())
    assert panel.values()["max_steps"] == 9 and panel.values()["gradient_checkpointing"] == "unsloth"
    assert "Trained at step 3" in panel.said.value and panel.plot.progress.state == "finished"
    assert "Finished, step 3 of 3" in inert(TrainPanel(ready).plot._picture.value).text


@pytest.mark.parametrize(
    ("missing", "said"), [("model", "No model is loaded"), ("lora", "no adapter yet"), ("tokens", "No token of")]
)
def test_start_is_refused_with_what_is_missing(session: FakeSession, missing: str, said: str) -> None:
    if missing != "model":
        session.load("a")
    if missing == "tokens":
        session.add_lora()
        session.use_data("x").trained_tokens = 0
    panel = TrainPanel(session)
    panel._buttons["start"].click()
    assert said in panel.said.value and session.run is None
    with pytest.raises((ModelError, ConfigError, TrainingError), match=said):
        panel.click("start")
    with pytest.raises(ConfigError, match="nothing to do"):
        panel.click("stop")


@pytest.mark.parametrize("values", [{"max_steps": 0}, {"batch_size": 0}, {"learning_rate": -1}, {"epochs": 0}, {"schedule": "x"}])
def test_bad_training_settings_are_sentences(ready: FakeSession, values: dict[str, Any]) -> None:
    panel = TrainPanel(ready)
    with pytest.raises(ConfigError):
        panel.set(**values)
    assert ready.calls == []


def test_a_run_that_fails_is_a_sentence_and_is_raised_in_the_cell(ready: FakeSession) -> None:
    ready.failure = TrainingError("The disk is full; free 2 GB.")

    async def main(awaited: bool) -> TrainPanel:
        panel = TrainPanel(ready)
        panel.click("start")
        if awaited:
            await panel.finished()
        await asyncio.sleep(0.1)
        return panel

    with pytest.raises(TrainingError, match="disk is full"):
        asyncio.run(main(awaited=True))
    panel = asyncio.run(main(awaited=False))
    assert "The disk is full; free 2 GB." in panel.said.value and isinstance(panel.error, TrainingError)
    assert not panel._buttons["start"].disabled and panel.plot.progress.state == "failed"


# -- chat ------------------------------------------------------------------------------------------


def asked(panel: ChatPanel, prompt: str) -> ChatPanel:
    async def main() -> None:
        panel.set(prompt=prompt)
        panel.click("send")
        await panel.finished()

    asyncio.run(main())
    return panel


def test_both_replies_stand_side_by_side(ready: FakeSession) -> None:
    panel = asked(ChatPanel(ready), "Who are you?")
    assert [(call[1], call[2]["adapter"]) for call in ready.calls] == [(("Who are you?",), False), (("Who are you?",), True)]
    (exchange,) = panel.exchanges
    assert (exchange.base, exchange.tuned) == ("base plain", "tuned plain")
    said = inert(panel._talk.value).text
    assert "Base modelbase plain" in said and "With the adaptertuned plain" in said and "writing" not in said


def test_without_an_adapter_there_is_one_reply(loaded: FakeSession) -> None:
    panel = asked(ChatPanel(loaded), "Who are you?")
    assert panel.exchanges[0].tuned is None and "With the adapter" not in panel._talk.value


def test_the_reply_streams_while_the_loop_goes_on(ready: FakeSession) -> None:
    ready.said, ready.pause = "word " * 40, 0.01

    async def main() -> tuple[int, set[str]]:
        panel = ChatPanel(ready)
        panel.set(prompt="Who?")
        panel.click("send")
        ticks, seen = 0, set()
        while panel.exchanges[0].writing or not ticks:
            await asyncio.sleep(0.02)
            ticks += 1
            seen.add(panel._talk.value)
        await panel.finished()
        return ticks, seen

    ticks, seen = asyncio.run(main())
    assert ticks > 10 and 3 < len(seen) <= ticks


def test_a_reply_can_be_stopped(ready: FakeSession) -> None:
    ready.said, ready.pause = "word " * 400, 0.02

    async def main() -> ChatPanel:
        panel = ChatPanel(ready)
        panel.set(prompt="Who?")
        panel.click("send")
        await asyncio.sleep(0.25)
        panel.click("stop")
        await panel.finished()
        return panel

    panel = asyncio.run(main())
    assert 0 < len(panel.exchanges[0].base) < 1000 and panel.exchanges[0].tuned is None
    assert panel._buttons["stop"].disabled and not panel._buttons["send"].disabled


def test_held_out_prompts_are_offered_with_what_is_expected(ready: FakeSession) -> None:
    panel = ChatPanel(ready)
    panel.click("example")
    assert panel.values()["prompt"] == "held plain"
    asked(panel, "held plain")
    assert panel.exchanges[0].expected == "plain" and "Expected" in panel._talk.value
    ready.data = None
    with pytest.raises(DataError, match="no held-out rows"):
        panel.click("example")


@pytest.mark.parametrize("values", [{"prompt": " \n"}, {"prompt": "a", "max_new_tokens": 0}, {"prompt": "a", "temperature": -1}])
def test_what_cannot_be_asked_is_refused(ready: FakeSession, values: dict[str, Any]) -> None:
    panel = ChatPanel(ready)
    panel.set(**values)
    with pytest.raises(ConfigError):
        panel.click("send")
    assert not panel.exchanges and ready.calls == []


def test_chat_without_a_model_is_refused(session: FakeSession) -> None:
    panel = ChatPanel(session)
    panel.set(prompt="hi")
    with pytest.raises(ModelError, match="No model is loaded"):
        panel.click("send")
    assert not panel.exchanges and not panel._buttons["send"].disabled


def test_a_reply_that_breaks_off_is_a_sentence(ready: FakeSession) -> None:
    class Broken:
        def __iter__(self) -> Any:
            yield "half a "
            raise ModelError("The model went away.")

    ready.chat = lambda *_, **__: Broken()  # type: ignore[method-assign]
    panel = ChatPanel(ready)
    with pytest.raises(ModelError, match="went away"):
        asked(panel, "hi")
    assert panel.exchanges[0].base == "half a " and "went away" in panel.said.value
    assert not panel._buttons["send"].disabled


# -- all of them -----------------------------------------------------------------------------------


def given(panel: Any, **values: Any) -> None:
    """Set what can be set; what has no UTF-8 is refused with a sentence."""
    try:
        panel.set(**values)
    except ConfigError as error:
        assert "half a surrogate pair" in str(error)
        assert "\\ud" in ascii(values)


SURROGATE = next(said for said in CORPUS if "\ud800" in said)


@pytest.mark.parametrize("said", [SURROGATE, *CORPUS[::8]], ids=lambda said: ascii(said[:20]))
def test_whatever_the_world_says_is_shown_as_text(tmp_path: Path, said: str) -> None:
    """Model names, reasons, messages, rows, column names, findings, prompts, replies, errors: in every panel."""
    session = FakeSession(tmp_path, said=said, failure=TrainingError(said))
    panels: list[Any] = [kind(session) for kind in PANELS]
    words = set().union(*(fixed_words(panel.widget) for panel in panels))
    model, lora, data, training, chat = panels

    async def drive() -> None:
        name = "named " + said
        given(model, name=name)
        model._buttons["load"].click()
        lora.estimate_for(name)
        lora.click("add")
        given(data, source=name, format="alpaca", columns={"output": said}, system=said or None)
        data.click("read")
        await data.finished()
        data.inspector.set(view="batch")
        chat.set(prompt="hi")
        given(chat, prompt=said or "hi")
        chat._buttons["send"].click()
        await asyncio.gather(*chat._tasks)
        chat._buttons["example"].click()
        given(training, optimizer=said)
        training._buttons["start"].click()
        await asyncio.gather(*training._tasks)
        for panel in panels:
            panel.message(said, "error")
            panel._show_code.value = True

    asyncio.run(drive())
    for panel in panels:
        inert_tree(panel.widget)
        inert(panel.static_html())
        assert len(panel.static_html()) < 150_000
        repr(panel).encode()
        words |= fixed_words(panel.widget)
    assert words <= set().union(*(fixed_words(kind(FakeSession(tmp_path)).widget) for kind in PANELS)) | {"Hide code"}


def test_every_control_is_labelled(session: FakeSession) -> None:
    for kind in PANELS:
        panel = kind(session)
        for name, field in panel._fields.items():
            for widget in field.watched:
                assert widget.description, f"{kind.__name__}.{name}"
        for button in panel._buttons.values():
            assert button.description and button.tooltip


def test_every_panel_has_a_static_form(ready: FakeSession) -> None:
    for kind in PANELS:
        reader = inert(kind(ready).static_html())
        assert "h3" in reader.tags and kind.title in reader.text
