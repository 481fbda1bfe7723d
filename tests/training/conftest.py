"""Tiny models: a second thread costs more than it brings, above all on shared cores; and a run collects garbage
twice, which takes long with TRL's half a million objects unless they are set aside."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def imported_once() -> None:
    from trl import SFTTrainer  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
