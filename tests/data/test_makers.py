"""Ids against the makers' own tokenizers, where a package carries them: `make slow`."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from nbkit.data.template import Labelled, Renderer
from tests.data import makers
from tests.data.test_templates import WEATHER, called

pytestmark = [pytest.mark.slow, pytest.mark.network]
WORDS = (
    *("The", "wind", "is", "west,", "force", "5;", "it", "rains.", "Très", "bien!", "日本語", "😀", "code:", "x", "=", "[1,"),
    *("2]\n  return", "x\n\n42", "«ok»"),
)


def chats(count: int) -> list[list[dict[str, Any]]]:
    random_ = random.Random(0)
    made = []
    for number in range(count):
        messages = [{"role": "system", "content": " ".join(random_.choices(WORDS, k=6))}] if number % 3 else []
        for _ in range(random_.randint(1, 4)):
            messages += [
                {"role": role, "content": " ".join(random_.choices(WORDS, k=random_.randint(1, 12))).strip()}
                for role in ("user", "assistant")
            ]
        made.append(messages)
    return made


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = makers.lay(tmp_path_factory.mktemp("mistral"), *makers.MISTRAL)
    sys.path.append(str(folder))
    yield folder / "mistral_common" / "data"
    sys.path.remove(str(folder))


def officially(path: Path, messages: list[dict[str, Any]], tools: Any) -> list[int]:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    made = OFFICIAL.setdefault(str(path), MistralTokenizer.from_file(str(path), mode=ValidationMode.finetuning))
    request = ChatCompletionRequest.from_openai(messages, tools=tools)
    return made.encode_chat_completion(request).tokens


OFFICIAL: dict[str, Any] = {}


@pytest.mark.parametrize("name", makers.FILES)
def test_mistrals_ids_are_mistral_commons(mistral: Path, name: str) -> None:
    path = mistral / makers.FILES[name]
    renderer = Renderer(makers.fast(path), name)
    given: list[tuple[list[dict[str, Any]], Any]] = [(messages, None) for messages in chats(60)]
    if name != "mistral-v1":
        given += [(called(text=text, count=count), tools) for text in ("",) for count in (1, 2) for tools in (None, [WEATHER])]
    for messages, tools in given:
        (found,) = renderer.label([renderer.render(messages, tools)])
        assert isinstance(found, Labelled)
        assert found.input_ids.tolist() == officially(path, messages, tools), messages


@pytest.mark.parametrize(("package", "name"), [("qwen3", "qwen-3"), ("llama3", "llama-3"), ("gemma3", "gemma-3")])
def test_ids_are_those_of_the_checkpoints_tokenizer(tmp_path: Path, package: str, name: str) -> None:
    tokenizer = makers.node(tmp_path, package)
    named, own = Renderer(tokenizer, name), Renderer(tokenizer)
    for messages in chats(40):
        (found,) = named.label([named.render(messages)])
        assert isinstance(found, Labelled)
        theirs = tokenizer.apply_chat_template(messages, return_dict=False)
        if package == "llama3":  # this copy of the template ends in the generation prompt
            theirs = theirs[: len(found.input_ids)]
        assert found.input_ids.tolist() == theirs
        (again,) = own.label([own.render(messages)])
        assert isinstance(again, Labelled)
        assert [one for one in again.labels.tolist() if one != -100] == [one for one in found.labels.tolist() if one != -100]
