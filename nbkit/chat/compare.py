"""Many replies at once, and the base model's beside the tuned one's."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbkit.chat.prompts import Prompt, answering, render, room, settings


def answer_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    use_adapter: bool = True,
    batch_size: int = 16,
    system: str | None = None,
    progress: bool = False,
) -> list[str]:
    """Greedy replies in the order of the prompts.

    Prompts of like length go together, padded on the left, where padding moves no reply: positions and mask count real
    tokens only.

    Raises: ModelError as `stream` does.
    """
    from tqdm import tqdm

    texts = [render(tokenizer, prompt, system) for prompt in prompts]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    replies = [""] * len(ids)
    with answering(model, use_adapter), tqdm(total=len(ids), desc="replies", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for i, reply in zip(batch, _greedy(model, tokenizer, [ids[i] for i in batch], max_new_tokens), strict=True):
                replies[i] = reply
            bar.update(len(batch))
    return replies


def _greedy(model: Any, tokenizer: Any, rows: list[list[int]], max_new_tokens: int) -> list[str]:
    import torch

    longest = max(map(len, rows))
    limit = room(model, longest, max_new_tokens)
    choices = settings(model, tokenizer, temperature=0.0, top_p=1.0)
    device = model.get_input_embeddings().weight.device
    padding = [[choices["pad_token_id"]] * (longest - len(row)) for row in rows]
    ids = torch.tensor([pad + row for pad, row in zip(padding, rows, strict=True)], device=device)
    mask = torch.tensor([[0] * len(pad) + [1] * len(row) for pad, row in zip(padding, rows, strict=True)], device=device)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=limit, **choices)
    return [text.strip() for text in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]


def field_accuracy(reply: str, expected: str) -> tuple[int, int]:
    """(right, all) fields of `expected`. Fields are separated by ";" or line ends; a field is right if the reply has the
    same text, apart from case and outer spaces, at the same place. Extra fields of the reply gain nothing."""
    wanted, got = _fields(expected), _fields(reply)
    return sum(i < len(got) and got[i] == field for i, field in enumerate(wanted)), len(wanted)


def _fields(text: str) -> list[str]:
    return [part.strip().casefold() for part in re.split(r"[;\n]", text) if part.strip()]


@dataclass(frozen=True)
class Comparison:
    """Replies to the same prompts with the adapter off (`before`) and on (`after`)."""

    prompts: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]

    def __str__(self) -> str:
        rows = zip(self.prompts, self.before, self.after, strict=True)
        return "\n\n".join(f"prompt: {prompt}\nbefore: {before}\nafter:  {after}" for prompt, before, after in rows)

    def _repr_html_(self) -> str:
        head = "<tr><th>prompt</th><th>before</th><th>after</th></tr>"
        body = "".join(
            "<tr>"
            + "".join(f'<td style="text-align:left;white-space:pre-wrap">{html.escape(cell)}</td>' for cell in row)
            + "</tr>"
            for row in zip(self.prompts, self.before, self.after, strict=True)
        )
        return f"<table>{head}{body}</table>"


def compare(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 64, system: str | None = None
) -> Comparison:
    """Ask the base model and the tuned one the same, greedily. Raises: ModelError as `stream` does."""
    sides = [
        answer_all(model, tokenizer, prompts, max_new_tokens=max_new_tokens, use_adapter=on, system=system)
        for on in (False, True)
    ]
    return Comparison(tuple(prompts), tuple(sides[0]), tuple(sides[1]))
