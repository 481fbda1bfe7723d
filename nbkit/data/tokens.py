"""A collated batch, token by token: what each token says, and what training does with it.

A `Line` is one row of the batch: a padded conversation, or a pack of several. Where a pack's documents begin comes from
`position_ids` that restart or from `cu_seqlens`, never from the ids, so that a wrong edge is seen and not repeated.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbkit.config import IGNORE_INDEX

TRAINED, MASKED, PADDING = "trained", "masked", "padding"
BOUNDARIES = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens")  # names under which collators hand on document boundaries
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Token:
    """One place of a batch.

    Attributes:
        position: column of the batch, from 0.
        place: position in its own document, from 0.
        label: the id, or -100 where no loss is borne.
        text: what it stands for; empty for a byte whose character is completed by a later token.
        note: the bytes of such a token, else "".
        state: "trained", "masked" or "padding".
        real: whether it is attended to; padding is not.
        control: whether it is a control token of the tokenizer.
        edge: whether a further document of a pack begins here.
    """

    position: int
    place: int
    id: int
    label: int
    text: str
    note: str
    state: str
    real: bool
    control: bool
    edge: bool


@dataclass(frozen=True)
class Line:
    """One row of a batch. `rows` are the row numbers of its documents, empty where they are not known; `part` is "chosen"
    or "rejected" where a row has two replies."""

    tokens: tuple[Token, ...]
    rows: tuple[int, ...] = ()
    part: str = ""

    def count(self, state: str) -> int:
        return sum(token.state == state for token in self.tokens)

    @property
    def documents(self) -> int:
        return 1 + sum(token.edge for token in self.tokens)


def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes (GPT-2, section 2.2): printable ones stand for themselves,
    the others are numbered from U+0100 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(256 + n): byte for n, byte in enumerate(rest)}


class Reader:
    """What the ids of one tokenizer say. Texts of single ids are kept, as a batch repeats them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._seen: dict[int, str | bytes] = {}
        self._alphabet = byte_alphabet()
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.controls = {index for index, token in added.items() if token.special} | set(tokenizer.all_special_ids)

    def texts(self, ids: Sequence[int]) -> list[tuple[str, str]]:
        """(text, note) of each id. A character of several tokens stands at the last of them; the others note their bytes."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        found = []
        for index in ids:
            piece = self._piece(index)
            if isinstance(piece, str):
                decoder.reset()
                found.append((piece, ""))
            else:
                said = decoder.decode(piece)
                found.append((said, "" if said else " ".join(f"{byte:02X}" for byte in piece)))
        return found

    def text(self, ids: Sequence[int]) -> str:
        """The ids as one text, control tokens included."""
        return "".join(said for said, _ in self.texts(ids))

    def _piece(self, index: int) -> str | bytes:
        if index not in self._seen:
            self._seen[index] = self._read(index)
        return self._seen[index]

    def _read(self, index: int) -> str | bytes:
        piece = self.tokenizer.convert_ids_to_tokens(index) if index >= 0 else None
        if piece is None:
            return f"<no token {index}>"
        if index in self.controls:
            return str(piece)
        if byte := _BYTE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        if "\u2581" in piece:  # SentencePiece's space, which decoding a single id would drop
            return piece.replace("\u2581", " ")
        said = self.tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" in said and all(letter in self._alphabet for letter in piece):
            return bytes(self._alphabet[letter] for letter in piece)
        return said


def lines(batch: Mapping[str, Any], reader: Reader, rows: Sequence[Sequence[int]] = ()) -> list[Line]:
    """The rows of a collated batch.

    Args:
        batch: "input_ids" (B, T); "labels", "attention_mask", "position_ids" (B, T) and document boundaries where there are any.
        rows: for each row of the batch the row numbers of its documents.
    """
    ids = _table(batch["input_ids"])
    labels = _table(batch["labels"]) if batch.get("labels") is not None else ids
    mask = _table(batch["attention_mask"]) if _is_table(batch.get("attention_mask")) else None
    starts = _starts(batch, ids)
    found = []
    for n, row in enumerate(ids):
        real = mask[n] if mask is not None else _real(row, labels[n], starts[n], reader)
        edges = {at for at in starts[n] if real[at]}
        found.append(Line(_tokens(row, labels[n], real, edges, reader), tuple(rows[n]) if n < len(rows) else ()))
    return found


def _tokens(ids: list[int], labels: list[int], mask: list[int], starts: set[int], reader: Reader) -> tuple[Token, ...]:
    found, begin = [], 0
    for position, (index, label, real, (said, note)) in enumerate(zip(ids, labels, mask, reader.texts(ids), strict=True)):
        edge = position in starts
        begin = position if edge else begin
        state = TRAINED if label != IGNORE_INDEX else MASKED if real else PADDING
        found.append(
            Token(position, position - begin, index, label, said, note, state, bool(real), index in reader.controls, edge)
        )
    return tuple(found)


def _starts(batch: Mapping[str, Any], ids: list[list[int]]) -> list[set[int]]:
    """Columns at which a further document of a pack begins, for each row."""
    bounds = next((batch[name] for name in BOUNDARIES if batch.get(name) is not None), None)
    if bounds is not None and len(ids) == 1:  # the bounds of a pack: 0, the end of each document
        return [{int(bound) for bound in _flat(bounds)} & set(range(1, len(ids[0])))]
    if not _is_table(batch.get("position_ids")):
        return [set() for _ in ids]
    places = _table(batch["position_ids"])
    if len(places) < len(ids):
        places = places * len(ids)
    return [{at for at in range(1, len(row)) if places[n][at] <= places[n][at - 1]} for n, row in enumerate(ids)]


def _real(ids: list[int], labels: list[int], starts: set[int], reader: Reader) -> list[int]:
    """Which tokens are no padding, where no mask says so: a pack's padding is a last document of its own, without labels."""
    last = max(starts, default=0)
    pad = getattr(reader.tokenizer, "pad_token_id", None)
    padded = last > 0 and set(labels[last:]) == {IGNORE_INDEX} and set(ids[last:]) == {pad if pad is not None else ids[last]}
    return [1] * last + [0 if padded else 1] * (len(ids) - last)


def _is_table(value: Any) -> bool:
    """Masks and positions of more than two axes say nothing that can be shown by token."""
    return value is not None and (len(value.shape) <= 2 if hasattr(value, "shape") else True)


def _table(value: Any) -> list[list[int]]:
    rows: list[Any] = value.tolist() if hasattr(value, "tolist") else list(value)
    return [list(row) for row in rows] if rows and hasattr(rows[0], "__len__") else [rows]


def _flat(value: Any) -> list[int]:
    return value.reshape(-1).tolist() if hasattr(value, "reshape") else list(value)
