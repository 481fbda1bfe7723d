"""The loss on rows that are never trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from nbkit.errors import TrainingError


def held_out_loss(
    model: Any,
    examples: Sequence[Any],
    pad_token_id: int,
    batch_size: int = 4,
    should_stop: Callable[[], bool] | None = None,
) -> float:
    """Mean next-token loss over all labelled tokens of `examples`, in nats.

    Every labelled token weighs the same, however the rows are batched; the sum over batches is kept in
    double precision. Rows are batched by length, so that little is spent on padding.

    Args:
        model: any causal LM; its own loss is used, so a patched model builds no logits it can spare.
        examples: pre-tokenised rows, as in `DataReport.held_out_examples`.
        should_stop: asked between batches; once it says True the result is nan.
    Raises: TrainingError if no token of the rows bears a loss.
    """
    import torch

    from nbkit.data.collate import Collator

    if batch_size < 1:
        raise TrainingError(f"batch_size is {batch_size}; held-out rows need at least 1 a batch.")
    collate = Collator(pad_token_id)
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    device = model.get_input_embeddings().weight.device
    total, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(ordered), batch_size):
                if should_stop is not None and should_stop():
                    return math.nan
                batch = {name: value.to(device) for name, value in collate(ordered[start : start + batch_size]).items()}
                count = int((batch["labels"][:, 1:] != -100).sum())
                if count == 0:
                    continue
                total += float(model(**batch, use_cache=False).loss) * count
                tokens += count
    finally:
        model.train(was_training)
    if tokens == 0:
        raise TrainingError("The held-out rows have no labelled token; give rows that end in a reply, or held_out=None.")
    return total / tokens
