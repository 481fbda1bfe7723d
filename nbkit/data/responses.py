"""Labels for sequences that are tokens already: trained is what stands between a response's marker and the next instruction's.

The markers are searched for in the text that the tokens spell, never among the ids: a marker is often cut into other tokens
where it stands than where it is alone. What is found goes back to tokens by the characters of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nbkit.config import IGNORE_INDEX
from nbkit.data.findings import RowFault
from nbkit.data.masks import Ints, Span, arrays, tiled, trained_mask
from nbkit.data.template import Renderer, Row
from nbkit.data.templates.catalog import NAMED
from nbkit.errors import DataError


def markers(tokenizer: Any) -> tuple[str, str]:
    """What the tokenizer's chat template writes before a user's and before an assistant's text.

    Raises: DataError if there is no template, or the two cannot be told from what it writes.
    """
    renderer = Renderer(tokenizer)
    for named in NAMED:
        if renderer.resolved.name == named.name:
            return named.instruction, named.response
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    (whole, shorter), (prompt,) = (
        renderer.render_rows([Row(turns), Row(turns[:1])]),
        renderer.render_rows([Row(turns[:1])], prompt=True),
    )
    if not (isinstance(whole, RowFault) or isinstance(shorter, RowFault) or isinstance(prompt, RowFault)) and whole.trained:
        response = whole.text[whole.texts[0][1] : whole.trained[0][0]]
        ends = [one.text[one.texts[-1][1] :] for one in (shorter, prompt)]  # after the question
        if ends[1].startswith(ends[0]) and ends[1] != ends[0]:
            response = ends[1][len(ends[0]) :]
        instruction = whole.text[whole.trained[0][1] : whole.texts[-1][0]].lstrip()
        if response.strip() and instruction.strip():
            return instruction, response
    raise DataError(
        "What stands before a question and before a reply cannot be told from the chat template; "
        "give instruction_part and response_part."
    )


def spans_of(tokenizer: Any, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[str, Ints]]:
    """The text that each sequence of ids spells, and the characters of each token, (T, 2) int32."""
    backend = tokenizer.backend_tokenizer
    given = [[int(number) for number in sequence] for sequence in sequences]
    texts = backend.decode_batch(given, skip_special_tokens=False)
    again = backend.encode_batch(texts, add_special_tokens=False)
    for ids, text, encoding in zip(given, texts, again, strict=True):
        if encoding.ids == ids:
            yield text, tiled(text, arrays(encoding)[1])
        else:  # the tokens are not those that the text would have by itself
            yield _piece_by_piece(backend, ids)


def _piece_by_piece(backend: Any, ids: Sequence[int]) -> tuple[str, Ints]:
    """The same by decoding one token after the other; the bytes of one character have its span together."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    pieces: list[str] = []
    spans: list[Span] = []
    at = waiting = 0
    for number in ids:
        piece = stream.step(backend, number) or ""
        waiting += 1
        if piece:
            spans += [(at, at + len(piece))] * waiting
            at, waiting = at + len(piece), 0
            pieces.append(piece)
    return "".join(pieces), np.array([*spans, *[(at, at)] * waiting], dtype=np.int32).reshape(-1, 2)


def answered(text: str, instruction: str, response: str) -> list[Span]:
    """The characters after each response marker, up to the next instruction marker."""
    found, at = [], 0
    while (start := text.find(response, at)) >= 0:
        start += len(response)
        end = text.find(instruction, start)
        at = len(text) if end < 0 else end
        if at > start:
            found.append((start, at))
    return found


def _respelled(tokenizer: Any, part: str) -> str:
    """A marker as its tokens spell it: some tokenizers put a blank after a control token."""
    return tokenizer.decode(tokenizer(part, add_special_tokens=False)["input_ids"], skip_special_tokens=False)


def labels_of(
    tokenizer: Any,
    sequences: Sequence[Sequence[int]],
    instruction: str,
    response: str,
    lengths: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """The labels of many sequences; all -100 where the response's marker does not occur.

    Args:
        lengths: of packed sequences, the tokens of each document in them; no reply goes over the edge of its document.
    """
    documents: list[list[int]] = []
    counts: list[int] = []
    for number, sequence in enumerate(sequences):
        edges = [0, *np.cumsum(lengths[number]).tolist()] if lengths is not None else [0, len(sequence)]
        parts = [list(sequence[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
        documents += parts
        counts.append(len(parts))
    labelled = []
    forms = [(part, _respelled(tokenizer, part)) for part in (instruction, response)]
    for ids, (text, spans) in zip(documents, spans_of(tokenizer, documents), strict=True):
        parts = [part if part in text else other for part, other in forms]
        mask = trained_mask(spans, answered(text, *parts))
        labelled.append(np.where(mask, ids, IGNORE_INDEX).tolist())
    rest = iter(labelled)
    return [[label for _ in range(count) for label in next(rest)] for count in counts]
