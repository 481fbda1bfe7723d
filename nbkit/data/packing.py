"""Documents packed into sequences of a fixed token budget, none of them cut.

Best fit, longest first: each document goes into the fullest pack that still has room for it (at most 11/9 of the fewest packs
possible, plus one; Johnson 1973, https://doi.org/10.1137/0203025). Documents of one length change places with the epoch, and so
does the order of the packs; how many packs there are and how full the fullest is never changes, as both follow from the lengths
alone. A step recorded for one pack thus fits all.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nbkit.errors import ConfigError

ROUND = 64  # tokens to which the width of a pack is rounded up


@dataclass(frozen=True)
class Packs:
    """`packs`: indices of the documents of each, not to be changed; `width`: tokens of a packed sequence, padding included;
    `tokens`: those of all documents."""

    packs: list[list[int]]
    width: int
    tokens: int

    def __len__(self) -> int:
        return len(self.packs)

    @property
    def fill(self) -> float:
        """Tokens of documents as a share of all tokens, 0 to 1."""
        return self.tokens / (self.width * len(self.packs))


def pack(lengths: Sequence[int] | np.ndarray, budget: int, seed: int, epoch: int = 0) -> Packs:
    """Packs of at most `budget` tokens that hold every document once, in an order that follows from seed and epoch alone.

    Args:
        lengths: tokens of each document, at least 1.
    Raises: ConfigError if a document is longer than the budget.
    """
    sizes = np.asarray(lengths, np.int64)
    return _packed(sizes.tobytes(), budget, seed, epoch)


@functools.lru_cache(maxsize=2)  # a run asks for its first epoch several times before it starts
def _packed(lengths: bytes, budget: int, seed: int, epoch: int) -> Packs:
    sizes = np.frombuffer(lengths, np.int64)
    longer = int((sizes > budget).sum())
    if longer:
        raise ConfigError(
            f"{longer:,} of {len(sizes):,} documents are longer than a pack of {budget:,} tokens; the longest has "
            f"{int(sizes.max()):,}: set pack_tokens to that or more."
        )
    draw = np.random.default_rng([seed, epoch])
    shuffled = draw.permutation(len(sizes))
    longest_first = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    packs, used = _best_fit(longest_first, sizes, budget)
    width = min(budget, -(-max(used, default=1) // ROUND) * ROUND)
    return Packs([packs[place] for place in draw.permutation(len(packs))], width, int(sizes.sum()))


def _best_fit(order: np.ndarray, sizes: np.ndarray, budget: int) -> tuple[list[list[int]], list[int]]:
    """(documents of each pack, tokens of each pack). Bit r of `rooms` is set while a pack has room for exactly r tokens."""
    packs: list[list[int]] = []
    used: list[int] = []
    with_room: list[list[int]] = [[] for _ in range(budget + 1)]
    rooms = 0
    for document, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            packs[number].append(document)
            used[number] += size
        else:
            room, number = budget, len(packs)
            packs.append([document])
            used.append(size)
        left = room - size
        with_room[left].append(number)
        rooms |= 1 << left
    return packs, used
