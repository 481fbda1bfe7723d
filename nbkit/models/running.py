"""What a model runs at the moment, in sentences for a log: the plan, the attention, the recorded steps, and what is stock."""

from __future__ import annotations

from typing import Any

from nbkit.families import find
from nbkit.models.asked import UNASKED, unasked
from nbkit.models.forwards import GRAPHS
from nbkit.models.layer import binding_of
from nbkit.models.obstacles import stock_reason


def stock_reasons(model: Any) -> list[str]:
    """Why what runs stock does, one sentence each; none where everything is nbkit's, or on a CPU, where there is no kernel."""
    base = _base(model)
    family, device = find(base.config.model_type), base.get_input_embeddings().weight.device
    whole = stock_reason(base, family, device)
    if whole is not None:
        return [whole]
    if device.type != "cuda":
        return []
    binding = binding_of(base)
    if binding is None:
        return ["the model is not patched, so its layers run stock; call nbkit.patch(model) before training"]
    layers: dict[str, list[int]] = {}
    for index, why in binding.reasons.items():
        layers.setdefault(why, []).append(index)
    said = [f"{numbers(which)} not fused: {why}" for why, which in layers.items()]
    return said + [f"no layer is fused in some steps: {why}" for why in binding.asides]


def choices(model: Any) -> list[str]:
    """What the engine chose for the steps so far: memory plan and attention. Empty before the first step and on a CPU."""
    binding = binding_of(_base(model))
    if binding is None or not binding.bound or binding.planner.plan is None:
        return []
    said = [f"Memory: {binding.planner.plan}."]
    return [*said, f"Attention: {'; '.join(sorted(binding.how))}."] if binding.how else said


def recorded(model: Any) -> str | None:
    """Whether steps are replayed as CUDA graphs, and why not if they are not; None where none were ever asked for."""
    graphs = vars(_base(model)).get(GRAPHS)
    if graphs is None:
        return None
    return f"CUDA graphs: {UNASKED if unasked(graphs) else graphs.note}."


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def numbers(found: list[int]) -> str:
    """Layers 3, 4 and 5 as "layers 3 to 5 are"."""
    found = sorted(found)
    if len(found) == 1:
        return f"layer {found[0]} is"
    if found == list(range(found[0], found[-1] + 1)):
        return f"layers {found[0]} to {found[-1]} are"
    return f"{len(found)} layers ({', '.join(map(str, found[:6]))}{', …' if len(found) > 6 else ''}) are"
