"""Examples in flat arrays: five bytes a token, whatever the number of rows.

The ids of all sequences lie one after the other; beside each stands whether it is trained. Parts of a set (what is trained
on, what is held out, what is left after duplicates) are lists of indices into it, so that nothing is copied.
Sets above `SPILL` tokens are written to an unnamed file as they are made, and read back through the page cache.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, overload

import numpy as np

from nbkit.config import IGNORE_INDEX

SPILL = 1 << 26  # tokens (320 MB) that are held in memory before a set goes to a file
RAGGED = ("ids", "trained", "starts", "counts")
Example = dict[str, Any]  # "input_ids" and "labels": lists of int, of one length; pairs: "rejected_…" too; KTO: "label": bool


@dataclass(frozen=True)
class Ragged:
    """Sequences of unequal lengths. `ids` int32 (N,); `trained` bool (N,): is a loss borne; `starts` int64 (n + 1,);
    `counts` int64 (n,): trained tokens of each."""

    ids: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 (n,)."""
        return np.diff(self.starts)

    def arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels) of one sequence, int32; labels are -100 where no loss is borne."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        ids = np.asarray(self.ids[part])
        return ids, np.where(self.trained[part], ids, np.int32(IGNORE_INDEX))


class RaggedBuilder:
    """Takes sequences one by one. `folder` is where the unnamed file of a large set lies; None: the system's own."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])  # ids, trained
        self._files: tuple[Any, Any] | None = None
        self._pending = self._tokens = 0
        self._lengths: list[int] = []
        self._counts: list[int] = []

    @property
    def tokens(self) -> int:
        """Tokens taken so far."""
        return self._tokens

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, ids: np.ndarray, trained: np.ndarray) -> None:
        """ids int32 (T,), trained bool (T,), T at least 1."""
        self._parts[0].append(ids)
        self._parts[1].append(trained)
        self._lengths.append(len(ids))
        self._counts.append(int(np.count_nonzero(trained)))
        self._pending += len(ids)
        self._tokens += len(ids)
        if self._pending >= SPILL:
            self._spill()

    def _spill(self) -> None:
        if self._files is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._files = (_unnamed(self._folder), _unnamed(self._folder))
        for file, parts in zip(self._files, self._parts, strict=True):
            for part in parts:
                file.write(part.tobytes())
            file.flush()
            parts.clear()
        self._pending = 0

    def finish(self) -> Ragged:
        """All that was taken. Call it once."""
        starts = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(np.asarray(self._lengths, np.int64), out=starts[1:])
        if self._files is not None:
            self._spill()
            ids, trained = (np.memmap(f, t, "r") for f, t in zip(self._files, (np.int32, np.bool_), strict=True))
        else:
            ids, trained = (_joined(p, t) for p, t in zip(self._parts, (np.int32, np.bool_), strict=True))
        return Ragged(ids, trained, starts, np.asarray(self._counts, np.int64))


def _unnamed(folder: Path | None) -> Any:
    return tempfile.TemporaryFile(dir=folder)


def _joined(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    """The parts as one array; each is let go of as soon as it is copied."""
    whole, at = np.empty(sum(map(len, parts)), dtype), 0
    parts.reverse()
    while parts:
        part = parts.pop()
        whole[at : at + len(part)] = part
        at += len(part)
    return whole


class Examples(Sequence[Example]):
    """What is trained on, as a sequence of {"input_ids", "labels"} made when asked for.

    Rows of preferences have "rejected_input_ids" and "rejected_labels" too, rows of KTO a "label".

    Args:
        tokens: all sequences of the set.
        rows: the row number of each sequence of the set.
        order: which sequences these examples are.
        rejected: the worse replies of preference rows, index by index.
        liked: the label of KTO rows.
    """

    def __init__(
        self,
        tokens: Ragged,
        rows: np.ndarray,
        order: np.ndarray,
        rejected: Ragged | None = None,
        liked: np.ndarray | None = None,
    ) -> None:
        self.tokens, self.rows, self.order, self.rejected, self.liked = tokens, rows, order, rejected, liked

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.taken(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no example {index}; there are {len(self)}")
        place = int(self.order[index])
        ids, labels = self.tokens.arrays(place)
        example: Example = {"input_ids": ids.tolist(), "labels": labels.tolist()}
        if self.rejected is not None:
            ids, labels = self.rejected.arrays(place)
            example |= {"rejected_input_ids": ids.tolist(), "rejected_labels": labels.tolist()}
        if self.liked is not None:
            example["label"] = bool(self.liked[place])
        return example

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Examples({len(self):,} of {int(self.lengths.sum()):,} tokens)"

    def taken(self, indices: np.ndarray) -> Examples:
        """Some of these examples, in the order of `indices`; nothing is copied."""
        return self.ordered(self.order[indices])

    def ordered(self, order: np.ndarray) -> Examples:
        """Other sequences of the same set."""
        return Examples(self.tokens, self.rows, order, self.rejected, self.liked)

    def arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels) of an example, int32 (T,)."""
        return self.tokens.arrays(int(self.order[index]))

    def parts(self) -> dict[str, np.ndarray]:
        """All arrays, by name: what `of_parts` takes."""
        found = {"rows": self.rows, "order": self.order}
        for name, ragged in (("tokens", self.tokens), ("rejected", self.rejected)):
            if ragged is not None:
                found |= {f"{name}_{part}": getattr(ragged, part) for part in RAGGED}
        return found if self.liked is None else {**found, "liked": self.liked}

    @classmethod
    def of_parts(cls, parts: Mapping[str, np.ndarray]) -> Self:
        """The examples that gave these arrays."""
        tokens, rejected = (
            Ragged(*(parts[f"{name}_{part}"] for part in RAGGED)) if f"{name}_ids" in parts else None
            for name in ("tokens", "rejected")
        )
        assert tokens is not None
        return cls(tokens, parts["rows"], parts["order"], rejected, parts.get("liked"))

    @property
    def row_numbers(self) -> np.ndarray:
        """The row number of each example, int64; a row that was split has several."""
        return self.rows[self.order]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64; of preference rows those of both replies."""
        both = self.tokens.lengths if self.rejected is None else self.tokens.lengths + self.rejected.lengths
        return both[self.order]

    @property
    def trained_counts(self) -> np.ndarray:
        """Trained tokens of each example, int64; of preference rows those of both replies."""
        both = self.tokens.counts if self.rejected is None else self.tokens.counts + self.rejected.counts
        return both[self.order]


def fingerprint(*parts: Sequence[Example]) -> str:
    """SHA-256 over the ids and labels, as 32-bit integers, each with its length before it."""
    digest = hashlib.sha256()
    for examples in parts:
        digest.update(len(examples).to_bytes(8, "little"))
        for numbers in _all_numbers(examples):
            digest.update(len(numbers).to_bytes(8, "little") + numbers.tobytes())
    return digest.hexdigest()


def _all_numbers(examples: Sequence[Example]) -> Iterator[np.ndarray]:
    if isinstance(examples, Examples):
        for place in examples.order:
            yield from examples.tokens.arrays(int(place))
            if examples.rejected is not None:
                yield from examples.rejected.arrays(int(place))
            if examples.liked is not None:
                yield examples.liked[place : place + 1].astype(np.int32)
        return
    for example in examples:
        for value in example.values():
            yield np.asarray([value] if isinstance(value, bool) else value, np.int32)
