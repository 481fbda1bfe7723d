"""Loading in one line, and refusals in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbkit.config import ModelConfig
from nbkit.errors import ModelError
from nbkit.models.load import LoadedModel, load


def load_folder(path: Path, **options: Any) -> LoadedModel:
    return load(ModelConfig(name=str(path), **options), progress=False)


def refused(match: str, name: str | Path, **options: Any) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        load(ModelConfig(name=str(name), **options), progress=False)
    assert "\n" not in str(caught.value)
