"""Why a model, or a part of it, runs stock: one sentence each, for the report of `patch` and for the log of a run."""

from __future__ import annotations

from typing import Any

import torch

from nbkit.families import Family, all_families
from nbkit.kernels._launch import MIN_CAPABILITY


def stock_reason(base: Any, family: Family | None, device: torch.device) -> str | None:
    """Why nothing of this model can be bound; None if it can."""
    if family is None:
        names = ", ".join(one.name for one in all_families())
        return f"model type {base.config.model_type!r} is no declared family ({names}), so it runs stock"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        have, need = (f"{major}.{minor}" for major, minor in (torch.cuda.get_device_capability(device), MIN_CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} has capability {have}, kernels need {need}, so it runs stock, and slowly"
    try:
        layers = base.get_submodule(family.decoder.layers)
        base.get_submodule(family.decoder.final_norm)
    except AttributeError:
        return f"{type(base).__name__} has no decoder at {family.decoder.layers}, so it runs stock"
    away = sum(any(p.device.type == "meta" for p in layer.parameters()) for layer in layers)
    if away:
        return f"{away} of {len(layers)} layers are not in memory (offloaded, device meta), so it runs stock; load it whole"
    return None


def mixed_devices(base: Any, family: Family) -> str | None:
    """Why the layers cannot be fused as they lie; None if they all lie on one device."""
    found = sorted({str(p.device) for p in base.get_submodule(family.decoder.layers).parameters()})
    if len(found) < 2:
        return None
    names = ", ".join(found)
    return f"the layers lie on several devices ({names}), the fused layer needs one; load with device_map={{'': 0}}"


def weight_format(base: Any) -> str | None:
    """Why the linears run in another library's code; None for plain and NF4 weights."""
    settings = getattr(base.config, "quantization_config", None)
    if settings is None:
        return None
    read = settings.get if isinstance(settings, dict) else lambda name, default=None: getattr(settings, name, default)
    method = read("quant_method", None)
    method = str(getattr(method, "value", method) or type(settings).__name__).lower()
    if method == "bitsandbytes" and read("load_in_4bit", False):
        kind = str(read("bnb_4bit_quant_type", "nf4")).lower()
        return None if kind == "nf4" else f"weights in {kind} (bitsandbytes) run stock, the kernels know nf4 alone; load with nf4"
    name = "8 bits (bitsandbytes)" if method == "bitsandbytes" else method.upper()
    return f"weights in {name} run stock, in their own library's code, since nbkit has no kernel for them; load in 16 bits or nf4"


def longer_than_positions(tokens: int, config: Any) -> str | None:
    """The sentence for rows that are longer than what the model was made for; None where they are not."""
    most = getattr(config, "max_position_embeddings", None)
    if not most or tokens <= most:
        return None
    return (
        f"Rows of {tokens:,} tokens are longer than the {most:,} positions of this model, which has learned nothing of what lies "
        "beyond; cut the rows, load it through nbkit with that max_seq_length, or set rope_parameters in its config."
    )
