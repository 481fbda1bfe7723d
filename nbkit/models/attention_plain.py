"""Attention by its formulas in plain torch, a tile of queries at a time: exact everywhere, and never all T x T scores at once.

    Z = scale q k^T      S = Z, or softcap tanh(Z / softcap); -inf where a query may not look, or a mask added
    lse = log sum exp S      P = exp(S - lse)      out = P v
    dv = P^T do      dS = P (do v^T - sum(do out))      dZ = dS, or dS (1 - tanh(Z / softcap)^2)
    dq = scale dZ k      dk = scale dZ^T q

In float32 or wider (Dao et al., FlashAttention-2, section 3, gives the same tiling). A tile's keys end at its last query and
begin where the window or the longest document of a pack lets its first query look. The sums of dk and dv go through the tiles
in order, so equal inputs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nbkit.models.attention import Attend

TILE_BYTES = 64 * 2**20  # of one tile's scores; about four tensors of this size live at once
SMALLEST_TILE = 64  # queries, where there is room for them


def forward(how: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (B, H, T, K) in q's dtype and lse (B, H, T) in float32 or wider; arguments as in `attention.forward`."""
    b, h, t, width = q.shape
    g = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(b, t, h, width).transpose(1, 2)  # as (B, T, H, K) underneath, so that merging the heads is a view
    lse = q.new_empty(b, h, t, dtype=wide)
    which = _documents(how, q)
    for rows, keys in _tiles(how, q, mask):
        r = rows.stop - rows.start
        scores, _ = _scores(how, _folded(q, g, rows, wide), k[:, :, keys].to(wide), mask, which, rows, keys)
        total = scores.logsumexp(-1, keepdim=True)
        total = torch.where(total == -math.inf, 0.0, total)  # a row that may look nowhere (a padded query) gives zeros, not NaN
        p = scores.sub_(total).exp_()
        out[:, :, rows] = (p.flatten(2, 3) @ v[:, :, keys].to(wide)).view(b, h, r, width).to(q.dtype)
        lse[:, :, rows] = total.view(b, h, r)
    return out, lse


def backward(
    how: Attend, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, H, T, K), dk and dv (B, G, T, K) in dtypes of q, k, v; arguments as in `attention.backward`, lse is `forward`'s."""
    b, h, t, width = q.shape
    g = k.shape[1]
    rep = h // g
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = q.new_empty(b, t, h, width).transpose(1, 2)
    dk, dv = (q.new_zeros(b, g, t, width, dtype=wide) for _ in range(2))
    which = _documents(how, q)
    for rows, keys in _tiles(how, q, mask):
        r = rows.stop - rows.start
        q_, do_, out_ = (_folded(x, g, rows, wide) for x in (q, do, out))
        k_ = k[:, :, keys].to(wide)
        p, slope = _scores(how, q_, k_, mask, which, rows, keys)
        p.sub_(lse[:, :, rows].reshape(b, g, rep, r, 1)).exp_()
        p = p.flatten(2, 3)
        dv[:, :, keys] += p.transpose(-1, -2) @ do_
        ds = do_ @ v[:, :, keys].to(wide).transpose(-1, -2)
        ds.sub_((do_ * out_).sum(-1, keepdim=True)).mul_(p).mul_(how.scale)
        if slope is not None:
            ds.mul_(slope.flatten(2, 3))
        dk[:, :, keys] += ds.transpose(-1, -2) @ q_
        dq[:, :, rows] = (ds @ k_).view(b, h, r, width).to(q.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _folded(x: Tensor, groups: int, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of x (B, H, T, K) as (B, G, H / G r, K): the query heads of one key/value head one below the other."""
    return x[:, :, rows].to(dtype).unflatten(1, (groups, -1)).flatten(2, 3)


def _tiles(how: Attend, q: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Queries and the keys that any of them may see, tile by tile."""
    b, h, t, _ = q.shape
    reach = t if how.window is None or mask is not None else how.window
    if how.documents is not None and mask is None:
        reach = min(reach, how.documents.longest)
    room = TILE_BYTES // (b * h * torch.promote_types(q.dtype, torch.float32).itemsize)
    # n queries see at most reach + n keys, and never more than t: the n for which n (reach + n), or n t, is `room`
    rows = max(1, room // t, (math.isqrt(reach**2 + 4 * room) - reach) // 2)
    rows = min(rows, max(SMALLEST_TILE, reach // 8))  # the fewer, the less is computed of what none of them may see
    for start in range(0, t, rows):
        stop = min(start + rows, t)
        yield slice(start, stop), slice(0, t) if mask is not None else slice(max(0, start - reach + 1), stop)


def _documents(how: Attend, q: Tensor) -> Tensor | None:
    """The document of each token, (B, T), or None where there is but one a row."""
    if how.documents is None:
        return None
    b, _, t, _ = q.shape
    every = torch.arange(b * t, device=q.device)
    return torch.searchsorted(how.documents.starts.long(), every, right=True).view(b, t)


def _scores(
    how: Attend, q: Tensor, k: Tensor, mask: Tensor | None, which: Tensor | None, rows: slice, keys: slice
) -> tuple[Tensor, Tensor | None]:
    """S (B, G, H / G, r, s), -inf where a query may not look, and dS/dZ where there is a softcap.

    q (B, G, H / G r, K) folded, k (B, G, s, K).
    """
    scores = (q @ k.transpose(-1, -2)).mul_(how.scale).unflatten(2, (-1, rows.stop - rows.start))
    slope = None
    if how.softcap is not None:
        scores.div_(how.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(how.softcap)
    if mask is not None:
        part = mask[:, :, rows if mask.shape[2] > 1 else slice(None), keys if mask.shape[3] > 1 else slice(None)]
        part = part[:, :, None] if part.shape[1] == 1 else part.unflatten(1, (k.shape[1], -1))
        return (scores.masked_fill_(~part, -math.inf) if part.dtype == torch.bool else scores.add_(part)), slope
    place = torch.arange(keys.start, rows.stop, device=q.device)
    distance = place[rows.start - keys.start :, None] - place[None, : keys.stop - keys.start]
    hidden = distance < 0 if how.window is None else (distance < 0) | (distance >= how.window)
    if which is not None:
        hidden = hidden | (which[:, None, None, rows, None] != which[:, None, None, None, keys])
    return scores.masked_fill_(hidden, -math.inf), slope
