"""Silence for messages of libraries that are harmless, appear on every machine of a kind, and lead a newcomer astray."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """While PEFT is imported and wraps a model.

    bitsandbytes says on CPUs with avx512_bf16 that a kernel of the hub is missing, which no install can fix; PEFT calls
    a name that transformers 5.23 has renamed. Both are left as they were afterwards.
    """
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        logger.setLevel(before)
