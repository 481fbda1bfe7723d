"""Conversations rendered with a chat template, and the replies labelled exactly.

The label mask never comes from searching token ids. The template is rendered once with marks for the texts of the
conversation (`nbkit.data.skeleton`); what stands around them is the template's own text, so that each reply's place in the
real rendering is known in characters. Those spans go through the offsets of the fast tokenizer to tokens:

    <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nHi there<|im_end|>\\n
                                                         ^^^^^^^^^^^^^^^^^^ trained

Trained are the reply and the stop token that the template puts after it, which is so also where the stop token is the
padding token. A reply is what the model writes at inference: its thinking as far as the template shows it, its text, its tool
calls, and what the template writes between the generation prompt and the reply (the empty thinking block of some models).
What a tool answers is never trained. BOS stands where the template puts it and nowhere else, and is never trained.

The template is kept as it is: if it adds a default system message to rows that have none (about 20 tokens a row with
SmolLM2), so does the chat, and the two agree. `DataRecipe.system` puts another one there; an empty string leaves
only its empty frame. Dates are frozen, see `nbkit.data.jinja_worker`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from nbkit.data import sandbox
from nbkit.data.encoding import encode
from nbkit.data.findings import RowFault
from nbkit.data.jinja_worker import Job
from nbkit.data.masks import Ints, Labelled, Span, labelled, pieces_of, tiled, trained_mask
from nbkit.data.skeleton import Marked, Skeleton, build, cut, mark, match, prepared
from nbkit.data.templates.catalog import Resolved, is_token, resolve
from nbkit.errors import DataError

__all__ = ["Labelled", "Rendered", "Renderer", "Row", "Span", "pieces_of", "tiled", "trained_mask"]

PROBE = 32  # characters a token is thought to have at most, in the beginning of a text that is looked at first
SLACK = 64  # tokens by which the beginning of a text may have more alone than within the text
KEPT_SKELETONS = 4096  # shapes of conversations that are remembered


@dataclass(frozen=True)
class Row:
    """A conversation to be rendered. `completion_start`: the first message of the completion, for train_on="completions"."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    completion_start: int | None = None


@dataclass(frozen=True)
class Rendered:
    """One conversation as text.

    Attributes:
        trained: the characters that are trained: the replies with their stop tokens.
        texts: the characters of all texts of the messages.
        notes: what is worth a warning: (kind, sentence).
        raw: is it text without a template? Then control tokens spelled in it are control tokens.
    """

    text: str
    trained: tuple[Span, ...]
    texts: tuple[Span, ...]
    notes: tuple[tuple[str, str], ...] = ()
    raw: bool = False


@dataclass(frozen=True)
class _Asked:
    """A conversation on its way to the template. `key` is that of its skeleton."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    marked: Marked
    key: tuple[str, str, bool]


def _asked(row: Row, prompt: bool) -> _Asked | RowFault:
    try:
        messages, tools = prepared(row.messages), list(row.tools) if row.tools else None
        marked = mark(messages)
        return _Asked(messages, tools, marked, (marked.key, json.dumps(tools, sort_keys=True) if tools else "", prompt))
    except (TypeError, ValueError, RecursionError) as error:
        return RowFault("wrong_type", f"a tool, or a tool call, holds a value that is not JSON ({error})")


class Renderer:
    """Renders and labels conversations for one tokenizer.

    Args:
        template: None is the tokenizer's own; else a name (`nbkit.data.templates`) or Jinja text.
        train_on: "replies", "last_reply", "completions" (the replies from `completion_start` on; the last one where there is
            no such place) or "all" (every token but a BOS at the start).

    Raises: DataError if there is no such template, or the tokenizer cannot tell where in the text its tokens lie.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, train_on: str = "replies") -> None:
        self.resolved = resolve(template, tokenizer)
        if not tokenizer.is_fast:
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise DataError(
                f"The tokenizer of {name} is not a fast one and does not tell where its tokens lie in the text; "
                "load a checkpoint that has a tokenizer.json."
            )
        self.tokenizer = tokenizer
        self.train_on = train_on
        self._with_tools = resolve(template, tokenizer, tools=True)
        added = tokenizer.added_tokens_decoder.values()
        self.controls = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        if self.resolved.stop:
            self.controls.add(self.resolved.stop)
        longest_first = sorted(filter(None, self.controls), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._control_ids = [tokenizer.convert_tokens_to_ids(name) for name in longest_first if is_token(tokenizer, name)]
        self._skeletons: dict[tuple[str, str, bool], Skeleton | RowFault] = {}
        self._probed: tuple[str, str] | None = None

    # -- text ------------------------------------------------------------------------------------------

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, completion_start: int | None = None
    ) -> Rendered:
        """The text of a conversation, with the characters of its replies.

        Raises: RowFault if the template refuses the messages, or changes a text so that its place is not certain.
        """
        (found,) = self.render_rows([Row(messages, tools, completion_start)])
        if isinstance(found, RowFault):
            raise found
        return found

    def render_rows(self, rows: Sequence[Row], prompt: bool = False) -> list[Rendered | RowFault]:
        """The texts of many conversations, or what is wrong with each; quicker than one by one.

        With `prompt` each ends in the generation prompt, as it is given to the model, and nothing is trained.
        """
        asked = [_asked(row, prompt) for row in rows]
        good = [one for one in asked if isinstance(one, _Asked)]
        if len(self._skeletons) >= KEPT_SKELETONS:
            self._skeletons.clear()
        texts = iter(self._apply([(one.messages, one.tools, prompt) for one in good]))
        for one in good:
            if one.key not in self._skeletons:
                self._skeletons[one.key] = self._skeleton(one.marked, one.tools, prompt)
        found: list[Rendered | RowFault] = []
        for row, one in zip(rows, asked, strict=True):
            try:
                found.append(one if isinstance(one, RowFault) else self._placed(row, next(texts), one.marked, one.key))
            except RowFault as fault:
                found.append(fault)
        return found

    def render_text(self, text: str) -> Rendered:
        """Text without a template: BOS if the tokenizer adds one, the text, the end-of-sequence token; each once, and all but
        BOS trained. Control tokens spelled in it count as such: it may have been rendered before it was given."""
        bos, eos = self._bos or "", self.tokenizer.eos_token or ""
        start = 0 if text.startswith(bos) else len(bos)
        whole = (bos if start else "") + text + ("" if eos and text.rstrip().endswith(eos) else eos)
        notes = () if eos else (("no_stop", "the tokenizer has no end-of-sequence token to put after the text"),)
        return Rendered(whole, ((len(bos), len(whole)),), ((start, start + len(text)),), notes, raw=True)

    @cached_property
    def _bos(self) -> str | None:
        """The BOS token, if the tokenizer puts one before a text."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.bos_token if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else None

    def _apply(self, jobs: Sequence[Job]) -> list[str | RowFault]:
        """The template's texts: messages, tools, and is the generation prompt wanted?"""
        with_tools = [number for number, job in enumerate(jobs) if job[1]]
        if with_tools and self._with_tools != self.resolved:
            found = dict(zip(with_tools, self._run(self._with_tools, [jobs[number] for number in with_tools]), strict=True))
            rest = [number for number in range(len(jobs)) if number not in found]
            found |= dict(zip(rest, self._run(self.resolved, [jobs[number] for number in rest]), strict=True))
            return [found[number] for number in range(len(jobs))]
        return self._run(self.resolved, jobs)

    def _run(self, template: Resolved, jobs: Sequence[Job]) -> list[str | RowFault]:
        names = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return (sandbox.render_here if template.known else sandbox.worker.render)(template.text, names, jobs)

    def _skeleton(self, marked: Marked, tools: list[Any] | None, prompt: bool) -> Skeleton | RowFault:
        """What the template writes around the texts of conversations like this one."""
        if self._control.search(marked.key) or (tools and self._control.search(json.dumps(tools, ensure_ascii=False))):
            return RowFault("control_text", "a name in a tool call, or a tool, spells a control token")
        if prompt:
            (full,) = self._apply([(marked.messages, tools, True)])
            return full if isinstance(full, RowFault) else Skeleton(*cut(full))
        replies = [number for number, message in enumerate(marked.messages) if message["role"] == "assistant"]
        parts: list[Job] = [(marked.messages[:number], tools, asked) for number in replies if number for asked in (False, True)]
        full, *before = self._apply([(marked.messages, tools, False), *parts])
        if isinstance(full, RowFault):
            return full
        pairs = zip([number for number in replies if number], zip(before[::2], before[1::2], strict=True), strict=True)
        known = {n: (a, b) if isinstance(a, str) and isinstance(b, str) else None for n, (a, b) in pairs}
        try:
            return build(marked, full, {number: known.get(number) for number in replies}, self._stop, self._plain_reply()[1])
        except RowFault as fault:
            return fault

    def _placed(self, row: Row, text: str | RowFault, marked: Marked, key: tuple[str, str, bool]) -> Rendered:
        """A rendering with its spans. Raises: RowFault."""
        skeleton = self._skeletons[key]
        for fault in (text, skeleton):
            if isinstance(fault, RowFault):
                raise RowFault(fault.kind, fault.sentence)
        assert isinstance(text, str) and isinstance(skeleton, Skeleton)
        places = match(text, marked.texts, skeleton)
        if places is None:
            raise RowFault(
                "template_rewrites", "the chat template changes the texts, so that where the replies lie is not certain"
            )
        notes = list(skeleton.notes)
        for number, one in enumerate(marked.texts):
            if found := self._control.search(one):
                sentence = f"the text of turn {marked.owners[number] + 1} spells the control token {found[0]!r}"
                notes.append(("control_text", sentence))
                break
        return Rendered(text, self._trained(row, text, places, skeleton), tuple(places), tuple(notes))

    def _trained(self, row: Row, text: str, places: Sequence[Span], skeleton: Skeleton) -> tuple[Span, ...]:
        if self.train_on == "all":
            bos = self.tokenizer.bos_token
            return ((len(bos) if bos and text.startswith(bos) else 0, len(text)),)
        spans = [(t.message, (places[t.first][0] - t.lead, places[t.last][1] + t.tail)) for t in skeleton.turns]
        if self.train_on == "completions" and row.completion_start is not None:
            return tuple(span for message, span in spans if message >= row.completion_start)
        return tuple(span for _, span in (spans if self.train_on == "replies" else spans[-1:]))

    def _stop(self, after: str, called: bool) -> str:
        """What ends a reply in the text after it, up to and with the stop token; '' if nothing does.

        The stop token follows the reply at once, or after white space. After a tool call the template still closes the call.
        """
        if called:
            known = [stop for stop in (self.resolved.stop, self.stop_token(), self.tokenizer.eos_token) if stop and stop in after]
            found = self._control.search(after)
            ends = [after.index(stop) + len(stop) for stop in known] or ([found.end()] if found else [0])
            return after[: min(ends)]
        bare = after.lstrip()
        found = self._control.match(bare)
        return after[: len(after) - len(bare)] + found[0] if found else ""

    def stop_token(self) -> str | None:
        """The token that the template puts after a reply; None if it puts none there."""
        return self._plain_reply()[0] or None

    def _plain_reply(self) -> tuple[str, str]:
        """(stop token, header) of a reply of text. The header is what a template without a generation prompt writes before a
        reply; one that writes only white space there leaves it to the model."""
        if self._probed is None:
            self._probed = "", ""
            marked = mark([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
            question = marked.messages[:1]
            found = self._apply([(marked.messages, None, False), (question, None, False), (question, None, True)])
            full, plain, prompt = ("" if isinstance(one, RowFault) else one for one in found)
            pieces, order = cut(full)
            if order and order[-1] == 1:
                before, header = cut(plain)[0][-1], pieces[-2]
                asked = prompt != plain or not header.startswith(before) or not header[len(before) :].strip()
                self._probed = self._stop(pieces[-1], False).lstrip(), "" if asked else header[len(before) :]
        return self._probed

    # -- tokens ----------------------------------------------------------------------------------------

    def label(self, rendered: Sequence[Rendered], most: int | None = None) -> list[Labelled | RowFault]:
        """Ids and labels of many conversations; the ids are those of the template's own tokenisation.

        Args:
            most: tokens; of a text that is known to have more by its beginning, only that beginning is made (`whole` is False).
        """
        if most is None:
            return self._label(rendered)
        most += SLACK
        begun = [one if len(one.text) <= most * PROBE else replace(one, text=one.text[: most * PROBE]) for one in rendered]
        found = self._label(begun)
        doubt: list[int] = []
        for number, (one, begin, made) in enumerate(zip(rendered, begun, found, strict=True)):
            if one is not begin and isinstance(made, Labelled) and len(made.input_ids) > most:
                found[number] = replace(made, whole=False)
            elif one is not begin:
                doubt.append(number)
        for number, made in zip(doubt, self._label([rendered[number] for number in doubt]), strict=True):
            found[number] = made
        return found

    def _label(self, rendered: Sequence[Rendered]) -> list[Labelled | RowFault]:
        encoded = encode(self.tokenizer, [one.text[one.trained[0][0] :] if one.raw else one.text for one in rendered])
        found: list[Labelled | RowFault] = []
        for one, (ids, offsets) in zip(rendered, encoded, strict=True):
            try:
                if one.raw:
                    ids, offsets = self._raw(one, ids, offsets)
                elif any(kind == "control_text" for kind, _ in one.notes):
                    ids, offsets = self._plainly(one)
                found.append(labelled(one.text, ids, offsets, one.trained))
            except RowFault as fault:
                found.append(fault)
        return found

    def prompt_ids(self, rows: Sequence[Row]) -> list[list[int] | RowFault]:
        """Ids of each conversation up to where the reply begins, as training has them."""
        rendered = self.render_rows(rows, prompt=True)
        good = [one for one in rendered if isinstance(one, Rendered)]
        found = iter(self.label(good))
        made = [one if isinstance(one, RowFault) else next(found) for one in rendered]
        return [one if isinstance(one, RowFault) else one.input_ids.tolist() for one in made]

    def _raw(self, one: Rendered, ids: Ints, offsets: Ints) -> tuple[Ints, Ints]:
        """Tokens of raw text: BOS, and then those of the text as the tokenizer takes a text that stands alone."""
        start = one.trained[0][0]
        if start:
            first = np.array([self.tokenizer.bos_token_id], dtype=np.int32)
            ids, offsets = np.concatenate((first, ids)), np.concatenate(([[0, start]], offsets + start)).astype(np.int32)
        return ids, offsets

    def _plainly(self, one: Rendered) -> tuple[Ints, Ints]:
        """Tokens of a text in whose messages control tokens are spelled: there they stay plain characters.

        The text is cut at the template's own control tokens. That the cut changes nothing else is checked on the
        same text with the spelled tokens blotted out. Raises: RowFault if it does.
        """
        letters = list(one.text)
        for start, end in one.texts:
            for found in self._control.finditer(one.text, start, end):
                letters[found.start() : found.end()] = "x" * len(found[0])
        blotted = "".join(letters)
        own = [found.span() for found in self._control.finditer(blotted)]
        parts, whole = (
            labelled(blotted, *made, one.trained) for made in (self._cut(blotted, own), encode(self.tokenizer, [blotted])[0])
        )
        same = np.array_equal(parts.input_ids, whole.input_ids) and np.array_equal(parts.labels, whole.labels)
        ids, places = self._cut(one.text, own)
        if not same or int(np.isin(ids, self._control_ids).sum()) != len(own):
            raise RowFault("control_text", "a message spells a control token, which this tokenizer cannot keep as plain text")
        return ids, places

    def _cut(self, text: str, controls: list[Span]) -> tuple[Ints, Ints]:
        edges = [0, *(edge for span in controls for edge in span), len(text)]
        between = list(zip(edges[::2], edges[1::2], strict=True))
        encoded = encode(self.tokenizer, [text[a:b] for a, b in between], plain=True)
        ids: list[Ints] = []
        offsets: list[Ints] = []
        for number, ((start, _), (part, places)) in enumerate(zip(between, encoded, strict=True)):
            ids.append(part)
            offsets.append(places + start)
            if number < len(controls):
                a, b = controls[number]
                ids.append(np.array([self.tokenizer.convert_tokens_to_ids(text[a:b])]))
                offsets.append(np.array([[a, b]]))
        return np.concatenate(ids).astype(np.int32), np.concatenate(offsets).astype(np.int32)
