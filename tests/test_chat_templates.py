"""The calls that notebooks written for Unsloth make: templates on tokenizers, and labels on an unmodified SFTTrainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from nbkit.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only
from nbkit.config import IGNORE_INDEX
from nbkit.errors import DataError
from tests.data.vocab import tokenizer

SHARE = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")


def test_chatml_on_rows_of_sharegpt() -> None:
    made = tokenizer()
    assert get_chat_template(made, mapping=SHARE, chat_template="chatml") is made
    turns = [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    wanted = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    assert made.apply_chat_template(turns, tokenize=False) == wanted
    assert made.eos_token == "<|im_end|>"
    (standard,) = standardize_sharegpt([{"conversations": turns}])
    assert made.apply_chat_template(standard["conversations"], tokenize=False) == wanted
    asked = made.apply_chat_template(turns[1:2], tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


def test_a_stop_token_that_is_not_in_the_vocabulary() -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    base = get_chat_template(tokenizer(controls=False), "chatml")
    assert base.eos_token == "</s>"
    assert base.apply_chat_template(turns, tokenize=False).endswith("<|im_start|>assistant\nA</s>\n")
    unmapped = get_chat_template(tokenizer(controls=False), "chatml", map_eos_token=False)
    assert unmapped.apply_chat_template(turns, tokenize=False).endswith("A<|im_end|>\n")


def test_a_template_of_ones_own_with_its_stop_token() -> None:
    text = "{{ bos_token }}{% for m in messages %}{{ '>> ' + m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    made = get_chat_template(tokenizer(), (text, "eos_token"))
    assert made.apply_chat_template(turns, tokenize=False) == "<s>>> user: Q</s>\n>> assistant: A</s>\n"
    stopped = get_chat_template(tokenizer(controls=False), (text.replace("eos_token", "'[end]'"), "[end]"))
    assert stopped.apply_chat_template(turns, tokenize=False) == "<s>>> user: Q</s>\n>> assistant: A</s>\n"


def test_a_system_message_goes_before_conversations_that_have_none() -> None:
    said = "Be \"brief\",\n{{ messages }} \\ 'please' é"
    made = get_chat_template(tokenizer(), "llama-3", mapping=SHARE, system_message=said)
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert f"system<|end_header_id|>\n\n{said}<|eot_id|>" in made.apply_chat_template(turns, tokenize=False)
    own = [{"from": "system", "value": "S"}, *turns]
    assert said not in made.apply_chat_template(own, tokenize=False)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(DataError, match="no chat template 'chatlm'.*chatml"):
        get_chat_template(tokenizer(), "chatlm")
    with pytest.raises(DataError, match="the key 'rôle'.*role"):
        get_chat_template(tokenizer(), mapping={"rôle": "from"})
    with pytest.raises(DataError, match="stop token"):
        get_chat_template(tokenizer(), ("{{ messages }}",))  # type: ignore[arg-type]


# -- train_on_responses_only -----------------------------------------------------------------------


class Trainer:
    """What the function needs of a trainer."""

    def __init__(self, tokenizer: Any, texts: list[str], held_out: Any = None) -> None:
        from datasets import Dataset

        self.processing_class = tokenizer
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.train_dataset: Any = Dataset.from_dict({"input_ids": ids})
        self.eval_dataset = held_out


def chatml(*turns: str) -> str:
    return "".join(f"<|im_start|>{'assistant' if n % 2 else 'user'}\n{turn}<|im_end|>\n" for n, turn in enumerate(turns))


def trained(trainer: Any, row: int = 0) -> str:
    labels = trainer.train_dataset[row]["labels"]
    return trainer.processing_class.decode([one for one in labels if one != IGNORE_INDEX])


def test_only_responses_are_trained_on_trls_own_trainer(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"text": chatml("The wind?", "West, 5.")}, {"text": chatml("Rain?", "It rains.", "The cook?", "Cut thumb.")}]
    settings = SFTConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False)
    trainer = SFTTrainer(
        tiny_model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        eval_dataset={"held": Dataset.from_list(rows[:1])},
        processing_class=tiny_tokenizer,
    )
    assert train_on_responses_only(trainer, *CHATML) is trainer
    assert [trained(trainer, n).count("<|im_end|>") for n in (0, 1)] == [2, 3]  # TRL puts one more at the end of a text
    assert "West, 5.<|im_end|>" in trained(trainer) and "wind" not in trained(trainer)
    assert "labels" in trainer.eval_dataset["held"].column_names
    batch = next(iter(trainer.get_train_dataloader()))
    share = (batch["labels"] != IGNORE_INDEX).float().mean()
    assert 0.1 < share < 0.7 and bool(
        (batch["labels"][batch["labels"] != -100] == batch["input_ids"][batch["labels"] != -100]).all()
    )
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))


def test_parts_left_out_are_those_of_the_template() -> None:
    made = get_chat_template(tokenizer(), "chatml")
    trainer = train_on_responses_only(Trainer(made, [chatml("a", "b")]))
    assert trained(trainer) == "b<|im_end|>\n"


def test_a_marker_that_never_occurs_is_refused_with_what_the_template_writes() -> None:
    made = get_chat_template(tokenizer(), "chatml")
    with pytest.raises(DataError, match=r"'### Response:' occurs in none of the 2 rows.*row 1 reads.*<\|im_start\|>assistant"):
        train_on_responses_only(Trainer(made, [chatml("a", "b"), chatml("c", "d")]), "### Instruction:", "### Response:")
    with pytest.raises(DataError, match="response_part is blank"):
        train_on_responses_only(Trainer(made, [chatml("a", "b")]), "x", " ")


def test_rows_without_the_marker_are_left_out_and_named() -> None:
    made = get_chat_template(tokenizer(), "chatml")
    trainer = Trainer(made, [chatml("a", "b"), "Hello there", chatml("c", "d")])
    with pytest.warns(UserWarning, match="does not occur in row 2; they are left out"):
        train_on_responses_only(trainer, *CHATML)
    assert len(trainer.train_dataset) == 2 and trained(trainer, 1) == "d<|im_end|>\n"


def test_a_stream_is_labelled_as_it_comes() -> None:
    made = get_chat_template(tokenizer(), "chatml")
    trainer = Trainer(made, [chatml("a", "b")] * 3)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_on_responses_only(trainer, *CHATML)
    rows = list(trainer.train_dataset)
    assert len(rows) == 3 and all(any(one != IGNORE_INDEX for one in row["labels"]) for row in rows)
    trainer = Trainer(made, ["Hello"])
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(DataError, match="occurs in none"):
        train_on_responses_only(trainer, *CHATML)


def test_data_that_is_no_tokens_yet_is_refused() -> None:
    from datasets import Dataset

    trainer = Trainer(tokenizer(), ["a"])
    trainer.train_dataset = Dataset.from_dict({"text": ["a"]})
    with pytest.raises(DataError, match="no column input_ids, only text"):
        train_on_responses_only(trainer, *CHATML)


# -- the same through a session --------------------------------------------------------------------


def test_an_alpaca_prompt_with_eos_trains_one_eos() -> None:
    from nbkit.config import DataRecipe
    from nbkit.data.pipeline import prepare

    made = tokenizer()
    prompt = "Below is an instruction.\n\n### Instruction:\n{}\n\n### Response:\n{}"
    rows = [{"text": prompt.format(f"Say {n}.", n) + made.eos_token} for n in range(4)]
    report = prepare(rows, made, DataRecipe(format="text"), max_seq_length=512, seed=0)
    assert report.used == 4
    for example in report.examples:
        ids, labels = list(example["input_ids"]), list(example["labels"])
        assert ids.count(made.eos_token_id) == labels.count(made.eos_token_id) == 1 and labels[-1] == made.eos_token_id


def test_a_named_template_is_the_chats_too(tiny_model_dir: Path, tmp_path: Path) -> None:
    from nbkit import DataRecipe, Session
    from nbkit.chat.prompt import encode

    session = Session(workspace=tmp_path)
    session.load(str(tiny_model_dir))
    own = session.tokenizer.chat_template
    rows = [{"instruction": f"Q{n}", "output": f"A{n}"} for n in range(4)]
    report = session.use_data(rows, DataRecipe(template="alpaca"))
    assert report.used == 4
    (ids,) = encode(session.tokenizer, [[{"role": "user", "content": "Q0"}]])
    assert session.tokenizer.decode(ids).endswith("### Instruction:\nQ0\n\n### Response:\n")
    assert list(report.examples[0]["input_ids"])[: len(ids)] == ids
    session.use_data(rows)
    assert session.tokenizer.chat_template == own
