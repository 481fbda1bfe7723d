"""FlexAttention as two plain calls, for a softcap on the scores: causal, with a window and packed documents.

PyTorch's operators below `torch.nn.attention.flex_attention` are traced and compiled here one by one, forward and backward
each for itself, with the derivative of the softcap written by hand; so neither call needs autograd. What a token may see is one
number, the first key: all keys from there to the token itself. Rows of a batch and documents of a pack are the same thing then,
stretches of one long row, and one compiled kernel serves them all. Its length is rounded up to a few sizes, as every new one
costs seconds to compile. Blocks of 128 x 128 scores that are wholly hidden are never computed; which these are follows from the
first keys in closed form, on the device and without waiting for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nbkit.kernels._launch import on_device

if TYPE_CHECKING:
    from nbkit.models.attention import Attend

BLOCK = 128
SMALLEST_HEAD, LARGEST_HEAD = 16, 256
_OPTIONS = {
    "PRESCALE_QK": False,
    # Every token sees itself, but the kernel asks of each tile of keys: a token that sees none of its first tile has minus
    # infinity as its largest score so far, and minus infinity less itself is NaN. Looking costs one comparison a row and tile.
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}
_ROOMY = 160 * 1024  # bytes of shared memory a block may have on 8.0, 9.0 and 10.0; 8.6, 8.9 and 12.0 have 99 KiB
_SMALL_TILES = {  # for heads above 128 elsewhere: PyTorch's own choice asks for 148 KiB
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 32,
    "fwd_num_stages": 1,
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 32,
    "bwd_num_stages": 1,
}
_COMPILED: dict[tuple[Any, ...], Callable[..., Any]] = {}
_SIGHTS: dict[tuple[Any, ...], Sight] = {}
_RECORDED: dict[tuple[Any, ...], Sight] = {}  # those that CUDA graphs were recorded with
_MOST_SIGHTS = 8  # kept without documents; one of 262,144 tokens takes 64 MiB
_trouble: list[str] = []


class NotCompiled(Exception):
    """FlexAttention cannot run here and now; the message says why."""


@dataclass(frozen=True)
class Sight:
    """What `rows` tokens may see.

    Attributes:
        first: int32 (rows,), the first key that each token sees; it never falls.
        blocks: eight int32 tensors as `BlockMask` orders them: for each block of queries the number (1, 1, n) and the indices
            (1, 1, n, n) of the key blocks that it sees in part, then of those that it sees as a whole; then the same for each
            block of keys and the query blocks that see it.
    """

    first: Tensor
    blocks: tuple[Tensor, ...]


def trouble() -> str | None:
    """Why FlexAttention could not be compiled in this process, or None."""
    return _trouble[0] if _trouble else None


def length(tokens: int) -> int:
    """The number of rows that kernels for `tokens` rows have: the next of 128, 256, 384, 512, 640, 768, 896, 1024, 1280, ..."""
    step = max(BLOCK, 2 ** ((tokens - 1).bit_length() - 3)) if tokens > 1 else BLOCK
    return -(-tokens // step) * step


def first_keys(batch: int, tokens: int, rows: int, window: int | None, starts: Tensor | None, device: torch.device) -> Tensor:
    """`Sight.first` of `batch` rows of `tokens` tokens side by side, then of what fills up to `rows`."""
    place = torch.arange(rows, device=device, dtype=torch.int32)
    first = place - place % tokens
    if starts is not None:
        at = torch.searchsorted(starts, place, right=True, out_int32=True) - 1
        first = torch.maximum(first, starts[at.long()])
    if window is not None:
        first = torch.maximum(first, place - (window - 1))
    # What fills up sees only itself and its like, so that nothing of it reaches a token.
    return torch.where(place < batch * tokens, first, place)


def blocks_of(first: Tensor) -> tuple[Tensor, ...]:
    """`Sight.blocks` of first (rows,). As `first` never falls, the blocks that a block sees, or is seen by, lie side by side."""
    n = first.numel() // BLOCK
    each = torch.arange(n, device=first.device, dtype=torch.int32)
    along = each[None, :]
    any_from = first[::BLOCK] // BLOCK  # the first key block that a query block sees anything of
    whole_from = (first[BLOCK - 1 :: BLOCK] + BLOCK - 1) // BLOCK  # the first that each of its queries sees all of
    any_to, whole_to = (torch.searchsorted(x, each, right=True, out_int32=True) - 1 for x in (any_from, whole_from))
    # Of query block i: whole are whole_from .. i - 1, in part any_from .. whole_from - 1 and i itself.
    low = torch.minimum(whole_from, each)
    part = low - any_from
    keys = torch.where(along < part[:, None], any_from[:, None] + along, each[:, None])
    # Of key block j: seen as a whole by j + 1 .. whole_to, in part by j itself and whole_to + 1 .. any_to.
    high = torch.maximum(whole_to, each)
    queries = torch.where(along == 0, each[:, None], high[:, None] + along)
    found = (part + 1, keys, each - low, low[:, None] + along, any_to - high + 1, queries, high - each, each[:, None] + 1 + along)
    return tuple(x.clamp(0, n)[None, None] if x.dim() == 1 else x.clamp(0, n - 1)[None, None].contiguous() for x in found)


def sight(how: Attend, batch: int, tokens: int, device: torch.device) -> Sight:
    """What a batch may see, kept with its documents, or else for the next batch of its shape."""
    rows = length(batch * tokens)
    key = (batch, tokens, how.window, device)
    recording = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    kept = _SIGHTS if how.documents is None else how.documents.sights
    if key in kept:
        if recording and kept is _SIGHTS:
            _RECORDED[key] = kept[key]  # the graph reads this memory as long as it is replayed
        return kept[key]
    first = first_keys(batch, tokens, rows, how.window, how.documents.starts if how.documents else None, device)
    made = Sight(first, blocks_of(first))
    if kept is _SIGHTS:
        if recording:
            return made  # its memory is the graph's own, and holds nothing before the first replay
        while len(kept) >= _MOST_SIGHTS:
            del kept[next(iter(kept))]
    kept[key] = made
    return made


def forward(how: Attend, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, H, T, K) and the log-sum-exp to base 2 (1, H, rows); arguments as in `attention.forward`. Raises: NotCompiled."""
    b, _, t, _ = q.shape
    seen = sight(how, b, t, q.device)
    rows = [_one_row(x, seen.first.numel()) for x in (q, k, v)]
    out, lse = _call(_forward, how, rows, seen)
    return _batch(out, b, t), lse


def backward(how: Attend, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, H, T, K), dk and dv (B, G, T, K); lse from `forward`. Raises: NotCompiled."""
    b, _, t, _ = q.shape
    seen = sight(how, b, t, q.device)
    rows = [_one_row(x, seen.first.numel()) for x in (q, k, v, out, do)]
    dq, dk, dv = (_batch(x, b, t) for x in _call(_backward, how, [*rows[:4], lse, rows[4]], seen))
    return dq, dk, dv


def natural(lse: Tensor, b: int, t: int) -> Tensor:
    """What `forward` gave, as the formulas have it: (B, H, T), to base e."""
    return (lse[0, :, : b * t] * math.log(2)).unflatten(1, (b, t)).transpose(0, 1)


def _one_row(x: Tensor, rows: int) -> Tensor:
    """(B, heads, T, K) as (1, heads, rows, K), zeros after the last token; a view where nothing is to be added."""
    flat = x.transpose(1, 2).flatten(0, 1)
    if len(flat) < rows:
        longer = x.new_zeros(rows, *flat.shape[1:])
        longer[: len(flat)] = flat
        flat = longer
    return flat.transpose(0, 1)[None]


def _batch(x: Tensor, b: int, t: int) -> Tensor:
    """(1, heads, rows, K) as (B, heads, T, K), a view."""
    return x[0].transpose(0, 1)[: b * t].unflatten(0, (b, t)).transpose(1, 2)


def _call(function: Callable[..., Any], how: Attend, tensors: list[Tensor], seen: Sight) -> Any:
    """`function` of the tensors: compiled on a GPU, elsewhere as it stands (which holds all scores at once)."""
    args = (*tensors, seen.first, *seen.blocks)
    key = (function, how.scale, how.softcap, tensors[0].dtype, tensors[0].device, *((x.shape, x.stride()) for x in tensors))
    ready = _COMPILED.get(key)
    if ready is None:
        traced = function(how.scale, how.softcap)
        if tensors[0].device.type != "cuda":
            return traced(*args)
        ready = _COMPILED[key] = _compile(traced, args)
    return ready(*args)


def _compile(function: Callable[..., Any], args: tuple[Tensor, ...]) -> Callable[..., Any]:
    """A kernel of `function` for tensors like `args`. Raises: NotCompiled, and says so once in a warning."""
    if _trouble:
        raise NotCompiled(_trouble[0])
    if torch.cuda.is_current_stream_capturing():
        raise NotCompiled("FlexAttention was not compiled before a CUDA graph was recorded")
    try:
        import torch._inductor as inductor

        with on_device(args[0]), torch.autocast(args[0].device.type, enabled=False):
            ready: Any = inductor.compile(_traced(function, args), list(args), options={"compile_threads": 1})
            ready(*args)  # what Triton compiles is compiled with the first call
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, no room for its cache, a head too wide for the GPU: whatever it is, it is said
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _trouble.append(f"FlexAttention could not be compiled: {reason}")
        warnings.warn(f"{_trouble[0]}; attention with a softcap runs as plain tiles, slower.", stacklevel=2)
        raise NotCompiled(_trouble[0]) from error
    return ready


def _traced(function: Callable[..., Any], args: tuple[Tensor, ...]) -> torch.fx.GraphModule:
    """The operators that `function` calls on tensors like `args`; nothing is computed."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="fake")(*args)


def _visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor, first: Tensor) -> Tensor:
    return (key <= query) & (key >= first[query])


def _mods(softcap: float | None) -> tuple[Callable[..., Tensor], Callable[..., list[Tensor | None]]]:
    """What is done to one score, and its derivative as the operator wants it: of the score, the four places, nothing else."""

    def capped(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    def slope(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor, g: Tensor) -> list[Tensor | None]:
        if softcap is None:
            return [g, None, None, None, None]
        unit = torch.tanh(score / softcap)
        return [g * (1 - unit * unit), None, None, None, None]

    return capped, slope


def _options(q: Tensor) -> dict[str, Any]:
    """What the operators are told about their kernels."""
    if q.device.type != "cuda" or q.shape[-1] <= 128:
        return dict(_OPTIONS)
    roomy = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin >= _ROOMY
    return dict(_OPTIONS) if roomy else {**_OPTIONS, **_SMALL_TILES}


def _mask(first: Tensor, blocks: tuple[Tensor, ...]) -> tuple[Any, ...]:
    from torch.nn.attention.flex_attention import BlockMask

    rows = first.numel()
    mod: Any = _visible  # the operator gives it `first` too
    return BlockMask((rows, rows), *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mod).as_tuple()


def _forward(scale: float, softcap: float | None) -> Callable[..., Any]:
    capped, _ = _mods(softcap)

    def run(q: Tensor, k: Tensor, v: Tensor, first: Tensor, *blocks: Tensor) -> tuple[Tensor, Tensor]:
        mask = _mask(first, blocks)
        return torch.ops.higher_order.flex_attention(q, k, v, capped, mask, scale, _options(q), (), (first,))[:2]

    return run


def _backward(scale: float, softcap: float | None) -> Callable[..., Any]:
    capped, slope = _mods(softcap)

    def run(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor, first: Tensor, *blocks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask = _mask(first, blocks)
        operator = torch.ops.higher_order.flex_attention_backward
        none = torch.zeros_like(lse)  # nothing flows back into lse
        return operator(q, k, v, out, lse, do, none, capped, slope, mask, scale, _options(q), (), (first,))[:3]

    return run
