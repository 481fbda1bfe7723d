"""The dtype that a model computes in."""

from __future__ import annotations

from typing import Any


def compute_dtype(model: Any) -> Any:
    """The torch dtype of activations: the compute dtype of 4-bit linears as they stand (loading may have settled on another than
    the checkpoint's config names), else the dtype of the input embeddings. `model` may be wrapped by PEFT."""
    for module in model.modules():
        # PEFT's wrapper around such a linear has the same name, and no dtype.
        if type(module).__name__ == "Linear4bit" and getattr(module, "compute_dtype", None) is not None:
            return module.compute_dtype
    return model.get_input_embeddings().weight.dtype
