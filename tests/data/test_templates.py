"""The named templates against their makers' own: TRL keeps copies of the checkpoints' templates, the rest is written down."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest

from nbkit.data.findings import RowFault
from nbkit.data.template import Renderer, Row
from nbkit.data.templates import NAMED, adopt, find, resolve
from nbkit.errors import DataError
from tests.data.oracle import chat
from tests.data.vocab import tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENIZER = tokenizer()
# our name → TRL's file, which is the checkpoint's; 3.2 writes today's date where 3.1 writes its own
TRL = {
    "llama-3": "llama3",
    "llama-3.1": "llama3_1",
    "gemma": "gemma",
    "gemma-3": "gemma3",
    "phi-3": "phi3",
    "phi-3.5": "phi3_5",
    "qwen-2.5": "qwen2_5",
    "qwen-3": "qwen3",
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather of a place, "as it is" <now>.',
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def called(place: str = "Bergen", text: str = "", count: int = 1, ident: str = "abcdef123") -> list[dict[str, Any]]:
    """A conversation with tool calls, their answers, and a last reply."""
    call = {
        "type": "function",
        "id": ident,
        "function": {"name": "weather", "arguments": {"place": place, "days": 2, "now": True}},
    }
    return [
        {"role": "user", "content": "Does it rain?"},
        {"role": "assistant", "content": text, "tool_calls": [call] * count},
        *[{"role": "tool", "name": "weather", "tool_call_id": ident, "content": f'{{"rain": "{n} mm"}}'} for n in range(count)],
        {"role": "assistant", "content": "It does."},
    ]  # fmt: skip


def trl(name: str) -> str:
    spec = importlib.util.find_spec("trl")
    file = Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja" if spec else Path("none")
    if not file.is_file():
        pytest.skip("this version of TRL does not have the template")
    return file.read_text(encoding="utf-8")


def makers(text: str, messages: Any, tools: Any = None, prompt: bool = False) -> str:
    """As transformers renders a checkpoint's template."""
    return TOKENIZER.apply_chat_template(messages, tools=tools, chat_template=text, tokenize=False, add_generation_prompt=prompt)


def ours(name: str, messages: Any, tools: Any = None, prompt: bool = False) -> str:
    (found,) = Renderer(TOKENIZER, name).render_rows([Row(messages, tools)], prompt)
    if isinstance(found, RowFault):
        raise found
    return found.text


@pytest.mark.parametrize("name", TRL)
def test_a_template_writes_what_its_makers_does(name: str) -> None:
    text, random_ = trl(TRL[name]), random.Random(name)
    for _ in range(100):
        messages = chat(random_, system=name != "gemma", thinking=name == "qwen-3")
        for prompt in (False, True):
            given = messages[:-1] if prompt else messages
            assert ours(name, given, None, prompt) == makers(text, given, None, prompt)


@pytest.mark.parametrize("name", [named.name for named in NAMED if named.name in TRL and named.tools])
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("text", ["", "I look."])
@pytest.mark.parametrize("count", [1, 2])
def test_tools_are_written_as_the_maker_writes_them(name: str, system: str | None, text: str, count: int) -> None:
    messages = [*([{"role": "system", "content": system}] if system else []), *called(text=text, count=count)]
    if name == "llama-3.1" and count == 2:
        with pytest.raises(RowFault, match="one tool call"):
            ours(name, messages, [WEATHER])
        return
    for tools in (None, [WEATHER], [WEATHER, WEATHER]):
        for end in range(1 + (system is not None), len(messages) + 1):
            for prompt in (False, True):
                part = messages[:end]
                assert ours(name, part, tools, prompt) == makers(trl(TRL[name]), part, tools, prompt)


def test_todays_date_is_frozen() -> None:
    made = tokenizer()
    made.chat_template = trl("llama3_2")
    messages = [{"role": "user", "content": "What day is it?"}, {"role": "assistant", "content": "I cannot know."}]
    assert "Today Date: 26 Jul 2024\n" in Renderer(made).render(messages).text
    assert Renderer(made).render(messages).text == ours("llama-3.2", messages) == ours("llama-3.3", messages)


# Each as its maker documents it: the source is in the catalog.
DOCUMENTED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "llama-2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST] B </s>",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>\n",
    "phi-4": "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>Q<|im_end|>"
    "<|im_start|>assistant<|im_sep|>A<|im_end|>",
    "vicuna": "<s>S USER: Q ASSISTANT: A</s>USER: R ASSISTANT: B</s>",
    "alpaca": "<s>S\n\n### Instruction:\nQ\n\n### Response:\nA</s>",
    "unsloth": "<s>S\n>>> User: Q\n>>> Assistant: A</s>\n",
    "gemma-chatml": "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "mistral-v1": "<s> [INST] S\n\nQ [/INST] A</s> [INST] R [/INST] B</s>",
    "mistral-v3": "<s>[INST] Q[/INST] A</s>[INST] S\n\nR[/INST] B</s>",
    "mistral-v3-tekken": "<s>[INST]Q[/INST]A</s>[INST]S\n\nR[/INST]B</s>",
    "mistral-v7": "<s>[SYSTEM_PROMPT] S[/SYSTEM_PROMPT][INST] Q[/INST] A</s>[INST] R[/INST] B</s>",
    "mistral-v7-tekken": "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]Q[/INST]A</s>[INST]R[/INST]B</s>",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_template_writes_what_its_maker_documents(name: str) -> None:
    words = "SQARB" if "B" in DOCUMENTED[name].partition("A")[2] else "SQA"
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=False)]
    assert ours(name, messages) == DOCUMENTED[name]


def test_every_name_and_alias_is_found_however_it_is_written() -> None:
    seen = [alias for named in NAMED for alias in (named.name, *named.aliases)]
    assert len(seen) == len(set(seen))
    for named in NAMED:
        for alias in (named.name, *named.aliases):
            for spelled in (alias, alias.upper(), alias.replace("-", "_"), f" {alias} "):
                assert find(spelled) is named
    for alias in ("llama3", "llama-3.2", "phi_3", "gemma_chatml", "gemma2", "qwen2.5", "qwen3", "mistral", "Qwen-2.5-Coder"):
        assert find(alias, TOKENIZER).text
    with pytest.raises(DataError, match=r"no chat template 'lama-3'.*Did you mean.*llama-3"):
        find("lama-3")


def test_mistral_is_the_version_of_the_tokenizer() -> None:
    assert find("mistral", tokenizer("bytes")).name == "mistral-v7-tekken"
    assert find("mistral", tokenizer("legacy")).name == "mistral-v7"
    assert find("mistral", tokenizer("bytes", controls=False)).name == "mistral-v1"

    class Only:
        unk_token_id, unk_token = 0, "<unk>"

        def __init__(self, *known: str) -> None:
            self.known = known

        def convert_tokens_to_ids(self, text: str) -> int:
            return self.known.index(text) + 1 if text in self.known else 0

    assert find("mistral", Only("[INST]")).name == "mistral-v3"
    assert find("mistral", Only("[INST]", "\u0120the")).name == "mistral-v3-tekken"
    assert find("mistral", Only("[INST]", "\u0120the", "[SYSTEM_PROMPT]")).name == "mistral-v7-tekken"


def test_a_tokenizer_without_the_stop_token_ends_replies_with_its_own() -> None:
    base = tokenizer("bytes", controls=False)
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    renderer = Renderer(base, "chatml")
    assert renderer.resolved.stop == "</s>" and renderer.stop_token() == "</s>"
    rendered = renderer.render(turns)
    assert rendered.text == "<|im_start|>user\nQ</s>\n<|im_start|>assistant\nA</s>\n"
    assert [rendered.text[a:b] for a, b in rendered.trained] == ["A</s>"]
    base.eos_token = None
    with pytest.raises(DataError, match="chatml ends a reply with <|im_end|>.*eos_token"):
        Renderer(base, "chatml")


def test_own_template_name_and_jinja_text() -> None:
    made = tokenizer()
    made.chat_template = find("zephyr").text
    assert resolve(None, made).name == "zephyr" and resolve(None, made).known
    assert resolve("{{ messages }}", made).known is False
    made.chat_template = {"default": find("chatml").text, "tool_use": find("qwen-2.5").text}
    assert resolve(None, made).name == "chatml" and resolve(None, made, tools=True).name == "qwen-2.5"
    assert "# Tools" in Renderer(made).render(called(), [WEATHER]).text
    assert "# Tools" not in Renderer(made).render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).text


def test_the_documentation_has_the_table_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (ROOT / "docs" / "templates.md").read_text(encoding="utf-8")
    assert f"<!-- templates -->\n{tables.templates_table()}\n<!-- /templates -->" in text, "run: python docs/tables.py"


def test_a_recipes_template_becomes_the_tokenizers_until_it_is_given_back() -> None:
    base = tokenizer("bytes", controls=False)
    assert base.chat_template is None
    adopt(base, "chatml")
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert base.apply_chat_template(turns, tokenize=False) == "<|im_start|>user\nQ</s>\n<|im_start|>assistant\nA</s>\n"
    assert Renderer(base).render(turns) == Renderer(base, "chatml").render(turns)
    assert Renderer(base).resolved.known
    adopt(base, "llama-3")
    adopt(base, None)
    assert base.chat_template is None
    adopt(base, None)
    with pytest.raises(DataError, match="no chat template"):
        adopt(base, "nothing")
    assert base.chat_template is None
