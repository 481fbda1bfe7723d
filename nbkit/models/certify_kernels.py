"""Each kernel op at one model's sizes and in its dtype, against plain torch in float64: a leg of `nbkit.certify`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbkit.families import Family
from nbkit.kernels import Case, KernelOp, all_ops, lora_gradients, swiglu_lora
from nbkit.kernels._launch import runs_on
from nbkit.models.certificate import Row
from nbkit.models.closeness import Gap, by_element
from nbkit.models.head import shaping
from nbkit.models.layer import binding_of
from nbkit.models.layer.adapters import Term
from nbkit.models.layer.parts import Parts
from nbkit.models.patch import PatchReport

SEED = 11


def kernel_rows(
    base: Any, report: PatchReport, shape: torch.Size, dtype: torch.dtype, skipped: list[str], gradients: bool
) -> list[Row]:
    """One row for the output and one for each gradient of every op that a step of this model launches.

    Args:
        shape: (B, T) of the batch.
        skipped: gets a sentence for each op that could not be compared.
        gradients: whether anything is trained.
    """
    if report.family is None:
        return []
    from nbkit.families import find

    family = find(base.config.model_type)
    assert family is not None
    device = base.get_input_embeddings().weight.device
    bound = {one.op for one in report.bound}
    rows: list[Row] = []
    for op in all_ops():
        if not launched(op.name, base, bound):
            continue
        case = case_of(op, base, family, shape)
        try:
            rows += compare(op, case, dtype, device, gradients)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            skipped.append(f"kernel {op.name}: float64 at this model's sizes does not fit into the free memory")
    return rows


def launched(name: str, base: Any, bound: set[str]) -> bool:
    """Whether a training step of the model launches the op; ops that no bound forward calls are none of its own."""
    layers = fused_layers(base)
    binding = binding_of(base)
    apart = binding is None or len(layers) < base.config.num_hidden_layers  # some layers run part by part
    bordered = any(group.terms and (group.copied or not group.nf4) for p in layers for group in p.groups)
    mlps = {one for p in layers for one in activations(p)}
    used = {
        "rms_norm": "rms_norm" in bound or bool(layers),
        "rope": "rope" in bound and apart or bool(layers),
        "swiglu": "swiglu" in bound and apart or "swiglu" in mlps,
        "swiglu_lora": "swiglu_lora" in mlps,
        "lora_gradients": any(lora_gradients.fits(_like(p), t.rank) for p in layers for group in p.groups for t in group.terms),
        "linear_cross_entropy": "linear_cross_entropy" in bound,
        "rope_pack": bool(layers),
        "lora_border": bordered,  # packed weights get their border as they are dequantised
        "nf4": any(group.nf4 for p in layers for group in p.groups),
    }
    return used.get(name, False)


def fused_layers(base: Any) -> list[Parts]:
    """The layers that the last training step took, or the next one takes, on the fused path."""
    binding = binding_of(base)
    if binding is None or binding.stands_aside:
        return []
    return [one.parts for one in binding.bound if one.parts.index not in binding.reasons]


def activations(p: Parts) -> set[str]:
    """Which ops make a fused layer's activation: forward together with A of down, backward with all that LoRA gets there."""
    like = _like(p)
    forward = swiglu_lora.fits(like, p.down.rank)
    backward = p.one_pass and swiglu_lora.fits(like, p.down.rank, *(t.rank for t in p.gate_up.terms))
    return {"swiglu_lora" if one else "swiglu" for one in (forward, backward)}


def _like(p: Parts) -> Tensor:
    """A tensor of no elements in the layer's dtype and place."""
    return torch.empty(0, dtype=p.dtype, device=p.qkv.device)


def case_of(op: KernelOp, base: Any, family: Family, shape: torch.Size) -> Case:
    """A case with every letter of the house's notation at this model's sizes, and the options the model calls the op with."""
    config = base.config
    b, t = shape
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = {
        "B": b, "T": t, "S": t, "N": b * t, "D": config.hidden_size, "F": config.intermediate_size, "H": heads,
        "G": getattr(config, "num_key_value_heads", None) or heads, "K": width, "V": config.vocab_size, "R": rank_of(base),
        "I": config.hidden_size, "O": config.intermediate_size, "nested": 1, "tokens_first": 1, "ignored": 25,
    }  # fmt: skip
    sizes = {**op.benchmark[0].sizes, **sizes} if op.benchmark else sizes
    options: dict[str, Any] = {}
    if op.name == "rms_norm":
        options = {"offset": family.norm.offset, "cast": family.norm.cast}
    if op.name == "linear_cross_entropy":
        softcap, scale = shaping(base, family)
        options = {"softcap": softcap, "logit_scale": scale}
    if op.name == "swiglu_lora":
        rank, options = _swiglu_lora_case(next(p for p in fused_layers(base) if op.name in activations(p)))
        sizes["R"] = rank
    if op.name == "lora_gradients":
        sizes["R"], sizes["C"], options = _lora_gradients_case(next(p for p in fused_layers(base) if _terms(p)))
    return Case("this model", sizes, options)


def _swiglu_lora_case(p: Parts) -> tuple[int, dict[str, Any]]:
    """Rank of down's LoRA and up's, and of gate's as an option; a part without LoRA is given the rank of one that has it."""
    found = {t.start: t for t in p.gate_up.terms}
    gate, up = found.get(0), found.get(p.f)
    rank = sum(t.rank for t in p.down.terms) or next(t.rank for t in (up, gate) if t is not None)
    scales = tuple(t.scale if t is not None else 1.0 for t in (gate, up))
    return rank, {"gate_rank": gate.rank if gate is not None else rank, "scales": scales}


def _lora_gradients_case(p: Parts) -> tuple[int, int, dict[str, Any]]:
    """Columns of all thin matrices, of all wide ones, and where in them the products of one launch lie: the attention's, or,
    where that has no LoRA, the MLP's."""
    spans, thin, wide = [], 0, 0
    groups = [p.o, p.qkv] if p.o.terms or p.qkv.terms else [p.down, p.gate_up]
    for group in groups:
        products = [(group.rank, group.inputs, False)] if group.terms else []
        for rank, columns, turned in products + [(t.rank, t.stop - t.start, True) for t in group.terms]:
            spans.append(((thin, thin + rank), (wide, wide + columns), turned))
            thin, wide = thin + rank, wide + columns
    return thin, wide, {"spans": tuple(spans), "scale": _terms(p)[0].scale}


def _terms(p: Parts) -> list[Term]:
    return [t for group in p.groups for t in group.terms]


def rank_of(base: Any) -> int:
    """The largest LoRA rank; 16 where there is no adapter."""
    ranks = [p.shape[0] for name, p in base.named_parameters() if ".lora_A." in name]
    return max(ranks, default=16)


def compare(op: KernelOp, case: Case, dtype: torch.dtype, device: torch.device, gradients: bool) -> list[Row]:
    """Rows of one op: its output, and the gradients of what is no weight (base weights are frozen under LoRA)."""
    inputs = op.inputs(case, dtype, str(device), SEED)
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    wanted = [name for name in op.gradients if gradients and name != "weight"]
    with torch.no_grad():
        like = op.reference(**inputs, **case.options)
    make = torch.Generator().manual_seed(SEED)
    upstream = torch.randn(like.shape, generator=make, dtype=torch.float64).to(device, like.dtype)
    ours, eager, truth = (
        _run(fn, values, case.options, wanted, upstream)
        for fn, values in ((op.fn, inputs), (op.reference, inputs), (op.reference, wide))
    )
    leg = f"{str(dtype).removeprefix('torch.')} against float64"
    note = "" if runs_on(device) else "plain PyTorch here"
    return [_row(f"{op.name} {what}", leg, ours[what], eager[what], truth[what], note) for what in truth]


def _row(name: str, leg: str, ours: Tensor, eager: Tensor, truth: Tensor, note: str) -> Row:
    if ours.dtype != eager.dtype or ours.shape != truth.shape:
        got = f"{tuple(ours.shape)} {ours.dtype}, plain torch {tuple(eager.shape)} {eager.dtype}"
        return Row("kernel", name, leg, float("inf"), float("inf"), note=got)
    gap: Gap = by_element(ours, eager, truth)
    size = max(float(truth.abs().max()) if truth.numel() else 0.0, 1e-30)
    return Row("kernel", name, leg, gap.ratio, abs(gap.ours - gap.truth) / size, abs(gap.eager - gap.truth) / size, note)


def _run(fn: Any, inputs: dict[str, Any], options: Any, wanted: list[str], upstream: Tensor) -> dict[str, Tensor]:
    leaves = {k: v.detach().requires_grad_() if k in wanted else v for k, v in inputs.items()}
    with torch.set_grad_enabled(bool(wanted)):
        out = fn(**leaves, **options)
    found = {"output": out.detach()}
    if wanted:
        out.backward(upstream.to(out.dtype))
        found |= {f"d{name}": leaves[name].grad for name in wanted}
    return found
