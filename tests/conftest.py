"""Fixtures shared by all rooms. Tests never reach the network unless they are marked `network`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# The test machine's cores are shared; more threads than this only slow tiny models down.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Waiting threads sleep. By default they spin, which on a core shared with another process costs ten times the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny random Llama with its chat tokenizer. Shared by the session: do not write into it."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture
def tiny_model(tiny_model_dir: Path) -> Any:
    """A fresh float32 tiny Llama in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float32").eval()


@pytest.fixture
def tiny_tokenizer(tiny_model_dir: Path) -> Any:
    """The tiny model's tokenizer, fresh."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device."""
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
