"""A model that another thread has in hand is neither patched, unpatched nor certified."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import nbkit
from nbkit.errors import ModelError
from nbkit.models.busy import in_hand
from tests.models.layer.rig import lora


@pytest.fixture
def trained_elsewhere() -> Iterator[Any]:
    model, begun, end = lora("llama"), threading.Event(), threading.Event()
    nbkit.patch(model)

    def work() -> None:
        with in_hand(model.get_base_model(), "being trained"):
            nbkit.patch(model)  # whoever has it in hand may
            begun.set()
            end.wait(60)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert begun.wait(60)
    yield model
    end.set()
    thread.join()
    nbkit.unpatch(model)  # it is free again


@pytest.mark.parametrize("doing", [nbkit.certify, nbkit.patch, nbkit.unpatch], ids=lambda f: f.__name__)
def test_a_model_in_another_threads_hand_is_left_alone(trained_elsewhere: Any, doing: Any) -> None:
    with pytest.raises(ModelError, match=rf"being trained at the moment, and {doing.__name__} would reach into that"):
        doing(trained_elsewhere)
    doing(copy.deepcopy(trained_elsewhere))


def test_a_thread_that_is_gone_holds_nothing() -> None:
    model = lora("llama")
    kept: list[Any] = []

    def work() -> None:
        kept.append(in_hand(model.get_base_model(), "being trained"))
        kept[0].__enter__()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    nbkit.patch(model)
