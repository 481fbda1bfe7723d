"""A stock model run with weights that are fetched one at a time: what was written is computed with, and little memory is used.

The model is built on the meta device from a config. Each module's weights are fetched (from the files just written, say)
right before its forward and dropped right after, so that the peak is one weight in float32 however large the model is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbkit.errors import ExportError
from nbkit.export.weights import HEAD, LiveWeights, Term, evaluating

ROWS, TOKENS = 4, 16
GATE = 1e-2  # of the largest logit; measured: right exports are below 4e-3, a forgotten adapter above 1e-1
NOISE_16 = 0.1  # how far a 16-bit forward may lie from a float32 one before something else must be wrong
TEXTS = (
    "The lighthouse keeper wrote in his log that the wind had turned north in the night and the sea was rising.",
    "Give three reasons why a small language model can run on a laptop without a graphics card.",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([1, 2, 3]))\n# 2.0\n",
    "Am 3. Mai 1997 kamen 1.250 Besucher; le total était de 48,5 % — 数字は増えた。",
)


@dataclass(frozen=True)
class Probe:
    """The same few sequences through the trained model and through its base: logits (rows, tokens, vocabulary), float32, CPU."""

    ids: Tensor
    adapter: Tensor
    base: Tensor


@dataclass(frozen=True)
class Verdict:
    """How far what was written lies from the trained model and from its base, relative to the largest logit."""

    to_adapter: float
    to_base: float

    def sentence(self) -> str:
        return f"max relative logit difference {self.to_adapter:.1e} to the trained model ({self.to_base:.1e} to its base)"


def probe(weights: LiveWeights, tokenizer: Any) -> Probe:
    """Ask the live model, with the adapter on and off; where it computes in 16 bits, a float32 replay of its live weights.

    The rounding of a 16-bit forward is as large as what the check has to see, so that one only must lie near the replay.

    Raises: ExportError if it does not.
    """
    model, ids = weights.model, probe_ids(tokenizer, weights.causal.config.vocab_size)
    device = model.get_input_embeddings().weight.device
    with evaluating(model):
        live = _forward(model, ids.to(device))
        with model.disable_adapter():
            live_base = _forward(model, ids.to(device))
    if _computes_in_float32(weights.causal):
        return Probe(ids, live, live_base)
    config = weights.causal.config
    exact = Probe(
        ids,
        replay(config, weights.base, ids, device, terms={n: e.terms for n, e in weights.entries.items() if e.terms}),
        replay(config, weights.base, ids, device),
    )
    if not (far := relative(exact.adapter, live)) <= NOISE_16:
        raise ExportError(
            f"The live model's logits differ by {far:.2f} from those its own weights give in float32; "
            "nothing was exported: run nbkit.unpatch(model) and try again, and report it if that helps."
        )
    return exact


def probe_ids(tokenizer: Any, vocabulary: int) -> Tensor:
    """(ROWS, TOKENS) int64: short texts, repeated to fill their row. No row has padding."""
    rows = []
    for text in TEXTS[:ROWS]:
        ids = [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i < vocabulary] or [0]
        rows.append((ids * math.ceil(TOKENS / len(ids)))[:TOKENS])
    return torch.tensor(rows)


def judge(what: str, found: Tensor, expected: Probe, gate: float, remedy: str = "") -> Verdict:
    """Compare logits of what was written with the trained model's and its base's.

    Args:
        remedy: what to do about a difference above the gate, if anything.
    Raises: ExportError above `gate`, or if they are nearer to the base than to the trained model, or not finite.
    """
    verdict = Verdict(relative(found, expected.adapter), relative(found, expected.base))
    if not math.isfinite(verdict.to_adapter):
        raise ExportError(f"The {what}, read back, gives logits that are not finite; it was removed.")
    if verdict.to_adapter > gate:
        raise ExportError(f"The {what}, read back, has a {verdict.sentence()}, above {gate:g}; it was removed{remedy}.")
    # By distance in all logits together: rounding spreads over them, the adapter's effect has one direction.
    effect, change = expected.adapter - expected.base, found - expected.base
    share = float((change * effect).sum() / effect.square().sum().clamp(min=1e-30))
    # An adapter that changes less than a tenth of the gate may be lost in the rounding.
    if relative(expected.adapter, expected.base) > gate / 10 and share < 0.5:
        fault = "is nearer to the base than to the trained model"
        raise ExportError(f"The {what}, read back, {fault} ({verdict.sentence()}); it was removed.")
    return verdict


def relative(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|, over all positions and the vocabulary."""
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def replay(
    config: Any,
    fetch: Callable[[str], Tensor],
    ids: Tensor,
    device: Any = "cpu",
    terms: dict[str, tuple[Term, ...]] | None = None,
    names: set[str] | None = None,
) -> Tensor:
    """Float32 logits of the stock model of `config` with the weights `fetch(name)` gives, plus LoRA `terms` if any.

    Args:
        names: what there is to fetch; must be exactly the model's own names.
    Raises: ExportError if a weight is missing, foreign, or of another shape.
    """
    from transformers import AutoModelForCausalLM

    config = plain_config(config)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tied = {HEAD} if config.tie_word_embeddings else set()
    if names is not None and (odd := names ^ (set(skeleton.state_dict()) - tied)):
        raise ExportError(f"The written weights are not the model's: {len(odd)} are missing or foreign, such as {min(odd)}.")
    _recompute_buffers(skeleton, config, device)
    embedding = "model.embed_tokens.weight"
    for path, module in list(skeleton.named_modules()):
        leaves = {leaf: f"{path}.{leaf}" for leaf, value in module._parameters.items() if value is not None}
        if not leaves:
            continue
        source = {leaf: embedding if name in tied else name for leaf, name in leaves.items()}
        module.register_forward_pre_hook(_loader(source, fetch, device))
        module.register_forward_hook(_finisher(leaves, (terms or {}).get(f"{path}.weight", ())))
    return _forward(skeleton.eval(), ids.to(device))


def plain_config(config: Any) -> Any:
    """A copy that names no quantisation. transformers writes into the config a model is made from."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _loader(source: dict[str, str], fetch: Callable[[str], Tensor], device: Any) -> Callable[..., None]:
    def load(module: nn.Module, inputs: Any) -> None:
        for leaf, name in source.items():
            value = fetch(name).to(device=device, dtype=torch.float32)
            if value.shape != module._parameters[leaf].shape:  # type: ignore[union-attr]
                raise ExportError(f"The written {name} has shape {tuple(value.shape)}, the model's has another.")
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    return load


def _finisher(leaves: dict[str, str], terms: tuple[Term, ...]) -> Callable[..., Tensor]:
    def finish(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for leaf in leaves:
            value = module._parameters[leaf]
            module._parameters[leaf] = nn.Parameter(value.to("meta"), requires_grad=False)  # type: ignore[union-attr]
        for term in terms:
            output = output + term.scale * (inputs[0] @ term.a.float().T @ term.b.float().T)
        return output

    return finish


def _recompute_buffers(skeleton: nn.Module, config: Any, device: Any) -> None:
    """Modules whose buffers are computed from the config (rope's frequencies) are made again, off the meta device."""
    for path, module in list(skeleton.named_modules()):
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            parent = skeleton.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], type(module)(config=config).to(device))


def _forward(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float().cpu()


def _computes_in_float32(causal: nn.Module) -> bool:
    for module in causal.modules():
        if getattr(module, "compute_dtype", torch.float32) not in (torch.float32, None):
            return False
    return all(p.dtype == torch.float32 for p in causal.parameters() if p.is_floating_point())
