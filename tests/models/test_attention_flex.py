"""FlexAttention's rows and tiles as its GPU kernels go through them: what no token may see, and what fills up, spoils nothing."""

from __future__ import annotations

import math

import pytest
import torch

from nbkit.models import attention, attention_flex
from nbkit.models.attention import Attend, Documents

BLOCK = attention_flex.BLOCK
CASES = {  # batch, tokens, window, lengths of documents
    "one row of whole blocks": (1, 256, None, None),
    "filled up": (2, 77, None, None),
    "one token": (1, 1, None, None),
    "window": (2, 333, 100, None),
    "window of one": (1, 256, 1, None),
    "documents": (1, 700, None, (130, 1, 300, 0, 269)),
    "documents and a window": (1, 700, 50, (130, 1, 300, 0, 269)),
    "recorded": (1, 400, 64, (100, 200, 100)),
    "replayed": (1, 400, 64, (30, 280, 90)),
}


def attend(window, lengths):
    starts = torch.tensor([0, *lengths]).cumsum(0).int() if lengths else None
    return Attend("flex", 0.3, window, documents=Documents(starts, max(lengths)) if lengths else None, softcap=5.0)


def tensors(b, t, k=16):
    make = torch.Generator().manual_seed(0)
    return [torch.randn(b, t, 1, k, generator=make).transpose(1, 2) * size for size in (4, 1, 1, 1)]


def by_tiles(q, k, v, seen, capped, scale, width, safe):
    """out and lse (to base 2) of one head's rows as the Triton kernel makes them: key blocks seen in part, then those seen as a
    whole, each `width` keys at a time with a running largest score; `safe`: without a look at rows that saw nothing so far."""
    part, which_part, whole, which_whole = (x[0, 0] for x in seen.blocks[:4])
    place = torch.arange(len(q))
    out, lse = torch.empty_like(q), q.new_empty(len(q))
    for i in range(len(q) // BLOCK):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        sums, size, largest = q.new_zeros(BLOCK, q.shape[1]), q.new_zeros(BLOCK), q.new_full((BLOCK,), -math.inf)
        todo = [(int(j), True) for j in which_part[i, : part[i]]] + [(int(j), False) for j in which_whole[i, : whole[i]]]
        for begin, masked in ((j * BLOCK + at, masked) for j, masked in todo for at in range(0, BLOCK, width)):
            keys = slice(begin, begin + width)
            score = capped(q[rows] @ k[keys].T * scale, *[None] * 4) / math.log(2)
            if masked:
                visible = attention_flex._visible(place, place, place[rows, None], place[None, keys], seen.first)
                score = score.masked_fill(~visible, -math.inf)
            top = torch.maximum(largest, score.amax(1))
            around = top if safe else top.masked_fill(top == -math.inf, 0)
            shrink, p = torch.exp2(largest - around), torch.exp2(score - around[:, None])
            size, sums, largest = size * shrink + p.sum(1), sums * shrink[:, None] + p @ v[keys], top
        out[rows], lse[rows] = sums / size[:, None], largest + size.log2()
    return out, lse


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_tile_that_a_row_sees_nothing_of_spoils_no_row(case, width):
    """Each row sees itself, but in a tile of its own: before it the running largest score is still minus infinity."""
    b, t, window, lengths = case
    how, (q, k, v, _) = attend(window, lengths), tensors(b, t)
    out, lse = attention_flex.forward(how, q, k, v)
    seen = attention_flex.sight(how, b, t, q.device)
    rows = [attention_flex._one_row(x, len(seen.first))[0, 0] for x in (q, k, v)]
    safe = attention_flex._options(q)["ROWS_GUARANTEED_SAFE"]
    mine, mine_lse = by_tiles(*rows, seen, attention_flex._mods(how.softcap)[0], how.scale, width, safe)
    assert torch.allclose(mine[: b * t].view(b, t, -1), out[:, 0], atol=1e-5)
    # Rows that fill up count too: their log-sum-exp times a gradient of zero goes into every dv.
    assert torch.allclose(mine_lse, lse[0, 0], atol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_memory_that_nobody_wrote_reaches_no_result(case, monkeypatch):
    b, t, window, lengths = case
    q, k, v, do = tensors(b, t)
    given = []

    def call(function, how, tensors, seen):
        given.extend(tensors)
        return of_module(function, how, tensors, seen)

    def run():
        how = attend(window, lengths)
        out, kept, numbers = attention.forward(how, q, k, v, None)
        return out, *attention.backward(how, do, q, k, v, out, None, kept, numbers)

    of_module = attention_flex._call
    clean = run()
    monkeypatch.setattr(attention_flex, "_call", call)
    monkeypatch.setattr(attention_flex, "_SIGHTS", {})
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN then, and of the largest integers
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
        poisoned = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*pair) for pair in zip(clean, poisoned, strict=True))
    assert len(given) == 9 and all(x.isfinite().all() for x in given)
    assert all(not x[:, :, b * t :].any() for x in given if x.dim() == 4)
