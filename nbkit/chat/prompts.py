"""What generation is given: prompts rendered by the tokenizer's own template, and the model put in order meanwhile."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nbkit.errors import ModelError

Message = Mapping[str, str]
Prompt = str | Sequence[Message]

_LOCKS: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


def render(tokenizer: Any, prompt: Prompt, system: str | None = None) -> str:
    """The text up to where the reply begins. BOS stands in it where the template writes it, so it must be tokenised
    without special tokens.

    Args:
        prompt: the user's words, or messages {"role", "content"} that end with the user's.
        system: put before messages that have no system message; None leaves that to the template.
    Raises: ModelError if the tokenizer has no chat template, or there is nothing to answer.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if not messages:
        raise ModelError("There is nothing to answer: the conversation has no message.")
    if not tokenizer.chat_template:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ModelError(
            f"The tokenizer of {name} has no chat template, as is usual for base models; load an instruct checkpoint, "
            "or set tokenizer.chat_template first."
        )
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def room(model: Any, prompt_tokens: int, max_new_tokens: int) -> int:
    """How many tokens may be generated: `max_new_tokens`, or what the model's context leaves.

    Raises: ModelError if the prompt alone fills the context.
    """
    if max_new_tokens < 1:
        raise ModelError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return max_new_tokens
    if prompt_tokens >= context:
        raise ModelError(f"The prompt has {prompt_tokens:,} tokens, the model's context is {context:,}; shorten the prompt.")
    return min(max_new_tokens, context - prompt_tokens)


def settings(model: Any, tokenizer: Any, temperature: float, top_p: float) -> dict[str, Any]:
    """Keyword arguments of `generate`. Stop tokens are the tokenizer's and those of the model's generation config."""
    if temperature < 0:
        raise ModelError(f"temperature is {temperature}; it must be at least 0 (0 is greedy).")
    listed = getattr(model.generation_config, "eos_token_id", None)
    stop = {tokenizer.eos_token_id, *(listed if isinstance(listed, (list, tuple)) else [listed])} - {None}
    sampled = temperature > 0
    return {
        "do_sample": sampled,
        # None unsets what the checkpoint's generation config may say: greedy is greedy.
        "temperature": temperature if sampled else None,
        "top_p": top_p if sampled else None,
        "top_k": 0 if sampled else None,
        "eos_token_id": sorted(stop),
        "pad_token_id": tokenizer.pad_token_id,
        "use_cache": True,
    }


@contextlib.contextmanager
def answering(model: Any, use_adapter: bool) -> Iterator[None]:
    """The model ready to generate: in eval mode (which also rests gradient checkpointing), without gradients, alone.

    Two generations of one model wait for each other; its mode is what it was afterwards.
    """
    import torch

    with _LOCKS_GUARD:
        lock = _LOCKS.setdefault(model, threading.Lock())
    with lock:
        training = {name: module.training for name, module in model.named_modules()}
        off = not use_adapter and hasattr(model, "disable_adapter")
        model.eval()
        try:
            # no_grad, not inference_mode: what a module caches meanwhile must still serve a backward later.
            with torch.no_grad(), model.disable_adapter() if off else contextlib.nullcontext():
                yield
        finally:
            for name, module in model.named_modules():
                module.training = training.get(name, False)
