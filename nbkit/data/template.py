"""Conversations rendered with the tokenizer's own chat template, and the replies labelled exactly.

The label mask never comes from searching token ids. The template is rendered once with a placeholder for every text
of the conversation; what stands around the placeholders is the template's own text, so that each reply's place
in the real rendering is known in characters. Those spans go through the offsets of the fast tokenizer to tokens:

    <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nHi there<|im_end|>\\n
                                                         ^^^^^^^^^^^^^^^^^^ trained

Trained are the reply and the stop token that the template puts after it, which is so also where the stop token is the
padding token. What the template writes between its generation prompt and the reply (the empty thinking block of some
models) is trained as well, since the model has to write it. BOS stands where the template puts it and nowhere else.

The template is kept as it is: if it adds a default system message to rows that have none (about 20 tokens a row with
SmolLM2), so does the chat, and the two agree. `DataRecipe.system` puts another one there; an empty string leaves
only its empty frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nbkit.config import IGNORE_INDEX
from nbkit.data.findings import RowFault
from nbkit.data.formats import Message
from nbkit.errors import DataError

Span = tuple[int, int]  # characters [start, end) of the rendered text


@dataclass(frozen=True)
class Rendered:
    """One conversation as text. `trained`: spans of the replies with their stop tokens; `texts`: spans of all messages."""

    text: str
    trained: tuple[Span, ...]
    texts: tuple[Span, ...]
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Labelled:
    """One example. `labels` are the ids, or -100 where no loss is borne; `spans` the characters of each token."""

    input_ids: list[int]
    labels: list[int]
    spans: list[Span]


@dataclass(frozen=True)
class _Skeleton:
    """What the template writes around the texts of a conversation with these roles."""

    pieces: tuple[str, ...]  # one more than `order`: before, between and after the texts
    order: tuple[int, ...]  # the messages, as their texts appear
    leads: dict[int, int]  # message → characters before the reply that the model has to write too


class Renderer:
    """Renders and labels conversations for one tokenizer.

    Raises: DataError if the tokenizer has no chat template, or cannot tell where in the text its tokens lie.
    """

    def __init__(self, tokenizer: Any) -> None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not tokenizer.chat_template:
            raise DataError(
                f"The tokenizer of {name} has no chat template, as is usual for base models; load an instruct checkpoint, "
                "or set tokenizer.chat_template to the Jinja template the model is to learn."
            )
        if not tokenizer.is_fast:
            raise DataError(
                f"The tokenizer of {name} is not a fast one and does not tell where its tokens lie in the text; "
                "load a checkpoint that has a tokenizer.json."
            )
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self.controls = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        longest_first = sorted(filter(None, self.controls), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._skeletons: dict[tuple[tuple[str, bool], ...], _Skeleton] = {}

    # -- text ------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The text of a conversation, with the characters of its replies.

        Raises: RowFault if the template refuses the messages, or changes a text so that its place is not certain.
        """
        shape = tuple((message["role"], bool(message["content"])) for message in messages)
        for _ in range(2):  # a template may write the time: what was seen before is looked at afresh once
            text = self._apply(messages)
            places = self._match(text, messages, self._skeleton(shape))
            if places is not None:
                return self._trained(text, messages, places, self._skeleton(shape))
            del self._skeletons[shape]
        raise RowFault("template_rewrites", "the chat template changes the texts, so that where the replies lie is not certain")

    def _apply(self, messages: Sequence[Message], prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # whatever a template's own code may raise
            raise RowFault("template", f"the chat template refuses it: {str(error).strip() or type(error).__name__}") from error

    def _skeleton(self, shape: tuple[tuple[str, bool], ...]) -> _Skeleton:
        if shape not in self._skeletons:
            marks = [f"\ue000{i}\ue001" if filled else "" for i, (_, filled) in enumerate(shape)]
            marked = [{"role": role, "content": mark} for (role, _), mark in zip(shape, marks, strict=True)]
            text = self._apply(marked)
            found = [(match.start(), match.end(), int(match[1])) for match in re.finditer("\ue000(\\d+)\ue001", text)]
            edges = [0, *(edge for start, end, _ in found for edge in (start, end)), len(text)]
            pieces = tuple(text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
            order = tuple(index for _, _, index in found)
            leads = {i: self._lead(marked, i, text, start) for start, _, i in found if shape[i][0] == "assistant"}
            for index, (role, _) in enumerate(shape):
                times = order.count(index)
                if role == "assistant" and times != 1:
                    raise RowFault("template_rewrites", f"the chat template writes the reply of turn {index + 1} {times} times")
            self._skeletons[shape] = _Skeleton(pieces, order, leads)
        return self._skeletons[shape]

    def _lead(self, marked: list[Message], index: int, text: str, start: int) -> int:
        """Characters between the generation prompt and the reply: at inference the model itself writes them."""
        try:
            plain, prompt = self._apply(marked[:index]), self._apply(marked[:index], prompt=True)
        except RowFault:
            return 0
        if not text.startswith(prompt) or len(prompt) > start:
            return 0
        lead = text[len(prompt) : start]
        # A template without a generation prompt leaves the header of the turn; only white space is then the model's.
        return len(lead) if prompt != plain or not lead.strip() else 0

    @staticmethod
    def _match(text: str, messages: Sequence[Message], skeleton: _Skeleton) -> list[Span] | None:
        """The span of each text in `skeleton.order`, or None if the text is not the pieces around the messages' texts."""
        if not text.startswith(skeleton.pieces[0]):
            return None
        at, spans = len(skeleton.pieces[0]), []
        for number, index in enumerate(skeleton.order):
            content, after = messages[index]["content"], skeleton.pieces[number + 1]
            last = number + 1 == len(skeleton.order)
            for form in dict.fromkeys((content, content.strip(), content.rstrip(), content.lstrip())):
                end = at + len(form)
                if text.startswith(form, at) and (text[end:] == after if last else text.startswith(after, end)):
                    break
            else:
                return None
            spans.append((at, end))
            at = end + len(after)
        return spans

    def _trained(self, text: str, messages: Sequence[Message], places: list[Span], skeleton: _Skeleton) -> Rendered:
        replies = [(number, index) for number, index in enumerate(skeleton.order) if messages[index]["role"] == "assistant"]
        stop = self._stop(skeleton.pieces[replies[-1][0] + 1]) if replies else ""
        trained, notes = [], []
        for number, index in replies:
            (start, end), after = places[number], skeleton.pieces[number + 1]
            tail = stop if stop and after.startswith(stop) else ""
            if not tail and not notes:
                notes.append(("no_stop", f"the chat template puts no stop token after the reply of turn {index + 1}"))
            trained.append((start - skeleton.leads[index], end + len(tail)))
        for index, message in enumerate(messages):
            if found := self._control.search(message["content"]):
                notes.append(("control_text", f"the text of turn {index + 1} spells the control token {found[0]!r}"))
                break
        return Rendered(text, tuple(trained), tuple(places), tuple(notes))

    def _stop(self, after: str) -> str:
        """The stop token right after a reply, with the white space before it; '' if there is none."""
        bare = after.lstrip()
        found = self._control.match(bare)
        return after[: len(after) - len(bare)] + found[0] if found else ""

    # -- tokens ----------------------------------------------------------------------------------------

    def label(self, rendered: Sequence[Rendered]) -> list[Labelled | RowFault]:
        """Ids and labels of many conversations; the ids are those of the template's own tokenisation."""
        encoded = self._encode([one.text for one in rendered])
        labelled: list[Labelled | RowFault] = []
        for one, (ids, offsets) in zip(rendered, encoded, strict=True):
            if any(kind == "control_text" for kind, _ in one.notes):
                try:
                    ids, offsets = self._plainly(one)
                except RowFault as fault:
                    labelled.append(fault)
                    continue
            spans = tiled(one.text, offsets)
            mask = trained_mask(spans, one.trained)
            labels = [i if trained else IGNORE_INDEX for i, trained in zip(ids, mask, strict=True)]
            labelled.append(Labelled(ids, labels, spans))
        return labelled

    def _encode(self, texts: list[str], plain: bool = False) -> list[tuple[list[int], list[Span]]]:
        if not texts:
            return []
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,  # the template has written them
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
            padding=False,
            verbose=False,
            split_special_tokens=plain,
        )
        return list(zip(batch["input_ids"], batch["offset_mapping"], strict=True))

    def _plainly(self, one: Rendered) -> tuple[list[int], list[Span]]:
        """Tokens of a text in whose messages control tokens are spelled: there they stay plain characters.

        The text is cut at the template's own control tokens. That the cut changes nothing else is checked on the
        same text with the spelled tokens blotted out. Raises: RowFault if it does.
        """
        blotted = list(one.text)
        for start, end in one.texts:
            for found in self._control.finditer(one.text, start, end):
                blotted[found.start() : found.end()] = "x" * len(found[0])
        own = [found.span() for found in self._control.finditer("".join(blotted))]
        if self._cut("".join(blotted), own) != self._encode(["".join(blotted)])[0]:
            raise RowFault("control_text", "a message spells a control token, which this tokenizer cannot keep as plain text")
        return self._cut(one.text, own)

    def _cut(self, text: str, controls: list[Span]) -> tuple[list[int], list[Span]]:
        edges = [0, *(edge for span in controls for edge in span), len(text)]
        between = list(zip(edges[::2], edges[1::2], strict=True))
        encoded = self._encode([text[a:b] for a, b in between], plain=True)
        ids: list[int] = []
        offsets: list[Span] = []
        for number, ((start, _), (part, places)) in enumerate(zip(between, encoded, strict=True)):
            ids += part
            offsets += [(a + start, b + start) for a, b in places]
            if number < len(controls):
                a, b = controls[number]
                ids.append(self.tokenizer.convert_tokens_to_ids(text[a:b]))
                offsets.append((a, b))
        return ids, offsets


def tiled(text: str, offsets: Sequence[Span]) -> list[Span]:
    """The spans with the white space that some tokenizers trim off their offsets; it is part of the token after it.

    Other characters between two tokens are those that a normaliser drops; they are part of no token.
    """
    spans, at = [], 0
    for start, end in offsets:
        spans.append((at if text[at:start].isspace() else start, end))
        at = max(at, end)
    return spans


def trained_mask(spans: Sequence[Span], trained: Sequence[Span]) -> list[bool]:
    """Is each token trained? It is if it holds a character of a trained span, or is empty and lies in one."""
    mask, number = [], 0
    for start, end in spans:
        while number < len(trained) and trained[number][1] <= start:
            number += 1
        if number == len(trained):
            mask.append(False)
            continue
        first, last = trained[number]
        mask.append(first < end and start < last if start < end else first <= start < last)
    return mask


def pieces_of(text: str, labelled: Labelled) -> Iterator[tuple[str, bool]]:
    """The text cut where the training changes: (text, trained). Joined, they are the text."""
    at, piece, now = 0, "", False
    for (_, end), label in zip(labelled.spans, labelled.labels, strict=True):
        if end <= at:
            continue  # a further byte of a character that is shown already
        if (label != IGNORE_INDEX) != now:
            if piece:
                yield piece, now
            piece, now = "", not now
        piece += text[at:end]
        at = end
    if piece:
        yield piece, now
    if at < len(text):
        yield text[at:], False
