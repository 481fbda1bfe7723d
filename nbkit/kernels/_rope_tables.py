"""Rotary frequencies and tables for every kind of `rope_parameters` that transformers' configs know.

Pair i of R rotated columns turns by position * w_i, plain w_i = theta^(-2i/R) with wavelength 2 pi / w_i. The kinds stretch it:

    linear        w / factor                                              (kaiokendev; Chen et al. 2023, arXiv:2306.15595)
    dynamic       theta * (factor * length / max - (factor - 1))^(R / (R - 2)) in place of theta, for lengths above max
    yarn          between w (short waves) and w / factor (long ones) by a ramp over i; tables times 0.1 ln(factor) + 1
                  (Peng et al. 2023, arXiv:2309.00071)
    longrope      w / short_i, or w / long_i beyond the original length; tables times sqrt(1 + ln(factor) / ln(original))
                  (Ding et al. 2024, arXiv:2402.13753)
    llama3        w where the wave is shorter than original / high, w / factor where longer than original / low, a mix between
                  (Llama Team 2024, arXiv:2407.21783, as released)
    proportional  theta^(-2i/K) for the rotated pairs, 0 for the others of the K/2 pairs of a head, all divided by factor

In float32, as transformers computes them. Shapes: frequencies (R/2,); tables (…, R/2) for positions (…).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


def rope_frequencies(
    parameters: Mapping[str, Any], head_dim: int, max_positions: int, *, length: int | None = None
) -> tuple[Tensor, float]:
    """(frequencies (R/2,) float32 on the CPU, factor of the tables).

    Args:
        parameters: one entry of a config's `rope_parameters`: rope_type, rope_theta and what the kind needs.
        head_dim: K. R is K times parameters["partial_rotary_factor"], where that is given (proportional: always K).
        max_positions: the config's `max_position_embeddings`.
        length: positions to be covered; only the kinds "dynamic" and "longrope" look at it.
    Raises: ValueError for a kind that is not known, or a value that the kind needs and `parameters` lacks.
    """
    kind = parameters.get("rope_type") or "default"
    if kind not in KINDS:
        raise ValueError(f"rope_type is {kind!r}; known are {', '.join(KINDS)}.")
    missing = [name for name in _NEEDED[kind] if parameters.get(name) is None]
    if missing:
        raise ValueError(f"rope_parameters of type {kind!r} lack {', '.join(missing)}.")
    share = parameters.get("partial_rotary_factor") or 1.0
    rotary = int(head_dim * share)
    if kind == "proportional":
        return _proportional(parameters, head_dim, share), 1.0
    theta = parameters["rope_theta"]
    if kind == "dynamic":
        stretch = parameters["factor"] * max(length or 0, max_positions) / max_positions - (parameters["factor"] - 1)
        theta = theta * stretch ** (rotary / (rotary - 2))
    waves = theta ** (torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)
    if kind in ("default", "dynamic"):
        return 1.0 / waves, 1.0
    make: Callable[..., tuple[Tensor, float]] = {"linear": _linear, "yarn": _yarn, "longrope": _longrope, "llama3": _llama3}[kind]
    return make(parameters, waves, max_positions, length)


_NEEDED: dict[str, tuple[str, ...]] = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "dynamic": ("rope_theta", "factor"),
    "yarn": ("rope_theta", "original_max_position_embeddings"),
    "longrope": ("rope_theta", "short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "proportional": ("rope_theta",),
}


def _linear(parameters: Mapping[str, Any], waves: Tensor, _: int, __: int | None) -> tuple[Tensor, float]:
    return 1.0 / waves / parameters["factor"], 1.0


def _proportional(parameters: Mapping[str, Any], head_dim: int, share: float) -> Tensor:
    turning = int(share * head_dim // 2)
    waves = parameters["rope_theta"] ** (torch.arange(0, 2 * turning, 2, dtype=torch.float32) / head_dim)
    return torch.cat([1.0 / waves, torch.zeros(head_dim // 2 - turning)]) / (parameters.get("factor") or 1.0)


def _yarn(parameters: Mapping[str, Any], waves: Tensor, max_positions: int, _: int | None) -> tuple[Tensor, float]:
    original, rotary = parameters["original_max_position_embeddings"], 2 * waves.numel()
    factor = parameters.get("factor") or max_positions / original

    def pair_that_turns(times: float) -> float:
        """The pair that turns so often over the original length, as a real number."""
        return rotary * math.log(original / (times * 2 * math.pi)) / (2 * math.log(parameters["rope_theta"]))

    low, high = (pair_that_turns(parameters.get(name) or usual) for name, usual in (("beta_fast", 32), ("beta_slow", 1)))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary - 1)
    ramp = ((torch.arange(rotary // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    keep = 1 - ramp
    frequencies = 1.0 / (factor * waves) * (1 - keep) + 1.0 / waves * keep
    scaling = parameters.get("attention_factor")
    if scaling is None:
        one, other = parameters.get("mscale"), parameters.get("mscale_all_dim")
        scaling = _mscale(factor, one) / _mscale(factor, other) if one and other else _mscale(factor, 1)
    return frequencies, float(scaling)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(parameters: Mapping[str, Any], waves: Tensor, max_positions: int, length: int | None) -> tuple[Tensor, float]:
    original = parameters["original_max_position_embeddings"]
    name = "long_factor" if length and length > original else "short_factor"
    stretch = torch.tensor(parameters[name], dtype=torch.float32)
    if stretch.numel() != waves.numel():
        raise ValueError(f"{name} of rope_parameters has {stretch.numel()} values; {waves.numel()} pairs of columns turn.")
    scaling = parameters.get("attention_factor")
    if scaling is None:
        factor = parameters.get("factor") or max_positions / original
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0 / (stretch * waves), float(scaling)


def _llama3(parameters: Mapping[str, Any], waves: Tensor, _: int, __: int | None) -> tuple[Tensor, float]:
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original, plain = parameters["original_max_position_embeddings"], 1.0 / waves
    length = 2 * math.pi / plain
    mix = (original / length - low) / (high - low)
    mixed = (1 - mix) * plain / factor + mix * plain
    return torch.where(length > original / low, plain / factor, torch.where(length < original / high, plain, mixed)), 1.0


class Rotary:
    """Tables for any positions, as a transformers model's own rotary module would give them, growth of "dynamic" included.

    A "dynamic" rope keeps the frequencies of the longest length it has met, until one below `max_positions` comes again.
    """

    def __init__(self, parameters: Mapping[str, Any], head_dim: int, max_positions: int) -> None:
        """Raises: ValueError as `rope_frequencies`."""
        self.parameters, self.head_dim, self.max_positions = dict(parameters), head_dim, max_positions
        self.kind = self.parameters.get("rope_type") or "default"
        self.longest = max_positions
        self.frequencies, self.scaling = rope_frequencies(self.parameters, head_dim, max_positions)
        self._of: int | None = None  # the length that `frequencies` were made for

    def tables(self, positions: Tensor, dtype: torch.dtype = torch.float32, length: int | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (…, R/2) in `dtype` on the device of positions (…).

        Args:
            length: the largest position and one. Where None, the kinds "dynamic" and "longrope" look, which waits for the device.
        """
        if self.kind in ("dynamic", "longrope"):
            self._meet(int(positions.max()) + 1 if length is None else length)
        self.frequencies = self.frequencies.to(positions.device)
        angles = positions[..., None].float() * self.frequencies
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)

    def _meet(self, length: int) -> None:
        if self.kind == "longrope":
            wanted = length
        else:
            if length > self.longest:
                self.longest = length
            elif length < self.max_positions:
                self.longest = self.max_positions
            wanted = self.longest
        if wanted != self._of:
            self.frequencies, self.scaling = rope_frequencies(self.parameters, self.head_dim, self.max_positions, length=wanted)
            self._of = wanted
