"""Each kernel op at one model's sizes and in its dtype, against plain torch in float64: a leg of `nbkit.certify`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbkit.families import Family
from nbkit.kernels import Case, KernelOp, all_ops
from nbkit.kernels._launch import runs_on
from nbkit.models.certificate import Row
from nbkit.models.closeness import Gap, by_element
from nbkit.models.forwards import shaping
from nbkit.models.layer import binding_of
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
    """Whether a training step of the model uses the op; ops that no bound forward calls are none of its own."""
    binding = binding_of(base)
    fused = binding is not None
    bordered = binding is not None and any(not g.nf4 or g.copied for b in binding.bound for g in b.parts.groups)
    nf4 = any(type(module).__name__ == "Linear4bit" for module in base.modules())
    lora = any(hasattr(module, "lora_A") for module in base.modules())
    used = {
        "rms_norm": "rms_norm" in bound or fused,
        "rope": "rope" in bound or fused,
        "swiglu": "swiglu" in bound or fused,
        "linear_cross_entropy": "linear_cross_entropy" in bound,
        "rope_pack": fused,
        "lora_border": bordered and lora,  # packed weights get their border as they are dequantised
        "nf4": fused and nf4,
    }
    return used.get(name, False)


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
    return Case("this model", sizes, options)


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
