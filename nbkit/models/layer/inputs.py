"""What a forward of the decoder is given: whether fused layers can take it at all, and what its mask and positions say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbkit.config import IGNORE_INDEX
from nbkit.errors import ModelError
from nbkit.models import attention


def aside(
    kwargs: dict[str, Any],
    device: str,
    dtype: torch.dtype,
    embedded: torch.dtype,
    config: Any,
    some_stock: bool,
    training: bool = True,
) -> str | None:
    """Why the fused layers stand aside in this training forward; None if they can take it.

    Asked before a mask is taken from the stock layers, which need it.

    Args:
        kwargs: of the decoder's forward.
        device: "cuda" or "cpu".
        dtype: in which the layers compute.
        embedded: of the embedding of tokens.
        some_stock: whether some layers run stock anyway.
        training: whether the decoder is in training mode. In eval mode a cache that nobody has forbidden may be read.
    """
    if kwargs.get("past_key_values") is not None:
        return "keys and values from outside come with the batch (prefix tuning, a cache)"
    if kwargs.get("use_cache"):
        return "use_cache=True asks for keys and values, which fused layers do not hand out; leave it out"
    if not training and kwargs.get("use_cache") is None and getattr(config, "use_cache", False):
        return (
            "the model is in eval mode with gradients on, where a cache may be wanted; call model.train() to train, "
            "torch.no_grad() to evaluate"
        )
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        return "output_attentions asks for scores that a fused layer never holds"
    if autocast_differs(device, dtype):
        wanted = _name(torch.get_autocast_dtype(device))
        return f"autocast asks for {wanted} and the weights are {_name(dtype)}; load the model with dtype={wanted}"
    given = kwargs.get("inputs_embeds")
    found = embedded if given is None else given.dtype
    if found != dtype:
        return (
            f"embeddings are {_name(found)} and the layers compute in {_name(dtype)}, as prepare_model_for_kbit_training leaves "
            "them; leave that call out"
        )
    packed = kwargs.get("attention_mask") is None and documents_of(kwargs)[0] is not None if some_stock else False
    if packed and getattr(config, "_attn_implementation", "sdpa") not in ("sdpa", "eager"):
        return "rows are packed, some layers run stock, and their attention builds no mask"
    return None


def autocast_differs(device: str, dtype: torch.dtype) -> bool:
    """Whether autocast asks for another dtype than the weights': then stock is faster, and what was asked for."""
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != dtype


def causal_only(mask: Tensor | None, targets: Tensor | None = None) -> bool:
    """Whether a 2-D padding mask (B, T) needs no masking beyond the causal one: no padding, or padding on the right alone.

    A real token never looks at what follows it, so right padding changes only the padding's own outputs, which nothing reads,
    unless they have a label: `targets` (B, T) is what each token is to predict, -100 for nothing; None: not known.
    Costs one wait for the device where the mask lies on a GPU.
    """
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.dim() != 2 or (targets is not None and mask.shape != targets.shape):
        return False
    odd = (mask[:, 1:] > mask[:, :-1]).any()
    if targets is not None:
        odd = odd | ((mask == 0) & (targets.to(mask.device) != IGNORE_INDEX)).any()
    return not bool(odd)


def whole(numbers: Tensor) -> bool:
    """Whether these are whole numbers, as tokens and labels are."""
    return not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)


def check_tokens(ids: Any, embeds: Any) -> None:
    """Raises: ModelError for a batch without tokens, or of another shape than (B, T) and (B, T, D)."""
    name, given, axes = ("inputs_embeds", embeds, 3) if ids is None else ("input_ids", ids, 2)
    if given is None:
        raise ModelError("The batch has no tokens; give input_ids or inputs_embeds.")
    if given.numel() == 0:
        raise ModelError(f"The batch is empty ({name} of shape {tuple(given.shape)}); give at least one row of one token.")
    if given.dim() != axes:
        more = ", width" if axes == 3 else ""
        shape = f"{name} are of shape {tuple(given.shape)}"
        raise ModelError(f"{shape}; give (rows, tokens{more}), {name}[None] for a single row.")


def documents_of(kwargs: dict[str, Any]) -> tuple[attention.Documents | None, bool]:
    """(the documents of a pack, or None; whether every row is one document from its first token on).

    A pack says where its documents begin by `cu_seq_lens_q` and `max_length_q`, as transformers' collators do, or by positions
    that begin again at 0; the latter are read from the device, which costs a wait.
    """
    starts, longest, places = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q"), kwargs.get("position_ids")
    if starts is not None and longest is not None:
        return attention.Documents(starts.to(torch.int32), int(longest)), False
    if places is None:
        return None, True
    if kwargs.get("attention_mask") is not None or places.dim() != 2:
        return None, False
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    places = places.expand(tokens.shape[0], -1)
    fresh = torch.ones_like(places, dtype=torch.bool)
    fresh[:, 1:] = places[:, 1:] != places[:, :-1] + 1
    begins = fresh.flatten().nonzero().flatten()
    if len(begins) == places.shape[0]:
        return None, True
    starts = torch.cat([begins, begins.new_tensor([places.numel()])]).to(torch.int32)
    return attention.Documents(starts, int(starts.diff().max())), False


def mask_of(documents: attention.Documents | None, window: int | None, hidden: Tensor) -> Tensor:
    """What a token may look at, for a stock layer whose mask was taken away: (1 or B, 1, T, T), 0 or the least number."""
    b, t, _ = hidden.shape
    at = torch.arange(t, device=hidden.device)
    far = at[:, None] - at[None]
    seen = (far >= 0) & (far < (window or t))
    if documents is not None:
        starts = documents.starts[1:].to(hidden.device)
        of = torch.bucketize(torch.arange(b * t, device=hidden.device), starts, right=True).view(b, 1, t)
        seen = seen & (of.transpose(1, 2) == of)
    least = torch.finfo(hidden.dtype).min
    return torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~seen, least).view(-1, 1, t, t)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
