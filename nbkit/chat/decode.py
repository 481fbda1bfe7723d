"""Next tokens, one step at a time, for one row or a left-padded batch, with the key/value cache of transformers.

An own loop in place of `generate`: it stops between any two tokens, samples from a generator of its own so that the
caller's random state stays as it was, and yields each token when it is there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nbkit.errors import ConfigError, DataError, ModelError

Choose = Callable[[Tensor], Tensor]  # logits (B, V) float32 -> ids (B,)
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.Lock] = weakref.WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


def bare(model: Any) -> Any:
    """The transformers model itself, whose layers still carry the adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lock_of(model: Any) -> threading.Lock:
    """One lock a model: replies switch its mode and its adapter, so only one is written at a time."""
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(bare(model), threading.Lock())


@contextmanager
def answering(model: Any, use_adapter: bool, should_stop: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """The model to oneself: in eval mode, without gradients, the adapter on or off; afterwards as it was.

    Yields False, without the model, if `should_stop` says so while another reply is still being written.
    """
    lock = lock_of(model)
    while not lock.acquire(timeout=0.1):
        if should_stop():
            yield False
            return
    try:
        with _quiet(model), model.disable_adapter() if not use_adapter and hasattr(model, "disable_adapter") else nullcontext():
            yield True
    finally:
        lock.release()


@contextmanager
def _quiet(model: Any) -> Iterator[None]:
    """Eval mode without gradients. Modes and `requires_grad`, which PEFT sets anew with the adapter, come back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: a layer may keep a buffer made here, and training must be able to use it
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad = flag


def context_of(model: Any) -> int | None:
    """Tokens the model's positions reach, if its config tells."""
    return getattr(bare(model).config, "max_position_embeddings", None)


def check_room(model: Any, prompt_tokens: int, max_new_tokens: int) -> int:
    """How many new tokens there is room for. Raises: ConfigError, DataError."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number of at least 1.")
    context = context_of(model)
    if context is None:
        return max_new_tokens
    if prompt_tokens >= context:
        raise DataError(f"The prompt has {prompt_tokens} tokens, the model's context is {context}; shorten it.")
    return min(max_new_tokens, context - prompt_tokens)


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def sampler(temperature: float, top_p: float, seed: int | None) -> Choose:
    """Samples at `temperature` from the smallest set of tokens that holds `top_p` of the probability; 0 is greedy.

    Nucleus sampling: arXiv 1904.09751. `seed` None draws a fresh one.

    Raises: ConfigError for values out of range.
    """
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature is {temperature}; it must be 0 (greedy) or above.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; it must be above 0 and at most 1.")
    if temperature == 0:
        return greedy
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        # On the CPU, so that a seed gives one reply whatever the device.
        scaled = logits.cpu() / temperature
        probabilities, order = torch.softmax(scaled, dim=-1).sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
        return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)

    return choose


def tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    room: Sequence[int],
    choose: Choose,
    stops: Collection[int],
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[list[int | None]]:
    """Yields the next token of every prompt, step by step; None for one whose reply has ended.

    `room` is the most new tokens of each. Stop tokens are not yielded. Rows are padded on the left.
    The caller holds `answering(model, …)`.
    """
    causal = bare(model)
    device = causal.get_input_embeddings().weight.device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    ended = [False] * len(prompts)
    cache = None
    for number in range(max(room)):
        if should_stop():
            return
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = causal(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
        chosen = choose(output.logits[:, -1].float()).tolist()
        ended = [over or number >= most or t in stops for over, most, t in zip(ended, room, chosen, strict=True)]
        if all(ended):
            return
        yield [None if over else token for over, token in zip(ended, chosen, strict=True)]
        ids = torch.tensor([[pad_id if over else token] for over, token in zip(ended, chosen, strict=True)], device=device)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)


def explained(error: Exception) -> Exception:
    """Out of memory as a sentence; the frames, which would keep the memory, are let go. Others as they are."""
    if type(error).__name__ != "OutOfMemoryError":
        return error
    return ModelError("The GPU ran out of memory while a reply was written; ask a shorter prompt or lower max_new_tokens.")
