"""`nbkit.certify`: is the patched model the stock model? Measured on this machine, for this model, by the one tolerance rule.

Three questions, each a leg of the certificate:

    float32        loss and every gradient of a float32 copy, patched, against the same copy stock
    own dtype      loss and every gradient of the model itself, patched and stock, against the float32 copy stock
    kernels        each op at the model's sizes, in its dtype, against plain torch in float64

The fused layers are measured at the level that keeps most, at the one that keeps least, and at what training was planned with;
on a GPU steps repeat, and the last may be a replayed CUDA graph. LoRA whose B is still zero is filled with small random numbers
for the comparison, since most of its gradients would be zero. The model is left as it was: weights, gradients, modes, random
states, patched or not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nbkit.config import IGNORE_INDEX
from nbkit.errors import ModelError
from nbkit.families import find
from nbkit.kernels._launch import launch_note
from nbkit.models import twin as twins
from nbkit.models.busy import require_free
from nbkit.models.certificate import Certificate, Row
from nbkit.models.certify_kernels import kernel_rows
from nbkit.models.closeness import LIKE_STOCK, TOLERANCE, by_element, by_norm, like_stock
from nbkit.models.dtype import compute_dtype
from nbkit.models.forwards import GRAPHS, check_labels
from nbkit.models.graphs import EAGER_FIRST
from nbkit.models.layer import Keep, binding_of
from nbkit.models.layer import bind as bind_layers
from nbkit.models.layer.inputs import whole
from nbkit.models.layer.keep import LEVELS
from nbkit.models.patch import PatchReport, base_model, patch, unpatch
from nbkit.models.surroundings import about_machine, commit, versions
from nbkit.models.untouched import as_it_was, levels_kept, ready, stock, training_mode

ROWS, TOKENS = 4, 96  # of the batch that is made where none is given


@dataclass(frozen=True)
class Measured:
    """The loss and the gradients by name, on the CPU, of one forward and backward."""

    loss: Tensor
    grads: dict[str, Tensor]


def certify(model: Any, batch: Mapping[str, Any] | None = None) -> Certificate:
    """Compare the patched model with the stock one on one batch.

    Args:
        model: a transformers causal LM or a PEFT model of one, patched or not, in any dtype or NF4. Its gradients, modes,
            random states, graphs and binding are afterwards as they were.
        batch: {"input_ids", "labels", "attention_mask"}, each (B, T) int64, the last two optional; other keys are handed on.
            None makes one of random ids: rows of unequal length, padded on the right, prompts and one whole row ignored.
    Memory: a float32 copy of the model on its device, else in RAM; where neither fits, the certificate says so.
    Raises: ModelError for what is no causal LM or is being trained by a run, a batch without tokens or labels, or weights
        that are not loaded.
    """
    began = time.monotonic()
    base = base_model(model)
    require_free(base, "certify")
    if not hasattr(base, "lm_head") and base.get_output_embeddings() is None:
        raise ModelError(f"{type(base).__name__} has no next-token loss; certify takes a causal language model.")
    device = _device(base)
    inputs = _inputs(base, batch, device)
    found = _Findings(_names(model), [], [], [], [])
    with as_it_was(model, device), ready(model) as report:
        found.stock += _runs_stock(base, report)
        if report.bound:
            _whole_model(model, inputs, found)
        else:
            found.skipped.append("loss and gradients: nothing is bound, so the patched model is the stock one")
        found.rows += kernel_rows(base, report, inputs["input_ids"].shape, compute_dtype(base), found.skipped, bool(found.names))
    return Certificate(
        model=_name(base),
        family=report.family,
        dtype=str(compute_dtype(base)).removeprefix("torch."),
        weights=twins.weights_text(base),
        batch=_batch_text(inputs),
        machine=about_machine(device),
        versions=versions(),
        commit=commit(),
        date=time.strftime("%Y-%m-%d"),
        seconds=round(time.monotonic() - began, 2),
        rows=tuple(found.rows),
        how=tuple(dict.fromkeys(found.how)),
        stock=tuple(found.stock),
        skipped=tuple(found.skipped),
    )


@dataclass
class _Findings:
    names: list[str]  # of what is trained
    rows: list[Row]
    how: list[str]
    stock: list[str]
    skipped: list[str]


# -- the three legs ------------------------------------------------------------------------------------------------------


def _name(base: Any) -> str:
    """The checkpoint's name at the hub, or of its folder."""
    name = getattr(base.config, "_name_or_path", "")
    return (Path(name).name if Path(name).is_absolute() else name) or type(base).__name__


def _whole_model(model: Any, inputs: dict[str, Any], found: _Findings) -> None:
    """The float32 leg and the own-dtype leg."""
    base = base_model(model)
    own = compute_dtype(base)
    if not found.names:
        found.skipped.append("gradients: nothing in the model is trainable")
    plain_float32 = own == torch.float32 and not twins.is_quantised(base)
    if plain_float32 or own == torch.float64:
        with stock(model):
            truth = measure(model, inputs)
        for ours, how in _runs(model, inputs):
            found.rows += _against_stock(model, inputs, ours, truth, f"{own} against stock".removeprefix("torch."))
            found.how += how
        found.rows[:] = worst_of(found.rows)
        return
    truth = _float32_leg(model, inputs, found)
    if truth is None:
        return
    with stock(model):
        eager = measure(model, inputs)
    leg = f"{str(own).removeprefix('torch.')} against float32"
    rows: list[Row] = []
    for ours, how in _runs(model, inputs):
        rows += _against_truth(ours, eager, truth, own, leg)
        found.how += how
    found.rows += worst_of(rows)


def _float32_leg(model: Any, inputs: dict[str, Any], found: _Findings) -> Measured | None:
    """What the stock model gives in float32, None where there is no memory for it; the rows of the patched copy."""
    base = base_model(model)
    family = find(base.config.model_type)
    with stock(model):
        copy, where = twins.wide(model)
    if copy is None:
        found.skipped.append(f"loss and gradients, in float32 and in the model's own dtype: {where}")
        return None
    if where:
        found.skipped.append(f"the kernels of the whole model in float32: {where}, so the float32 comparison ran on the CPU")
    device = _device(base_model(copy))
    there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with training_mode(copy):
        truth = measure(copy, there)
        patch(copy)
        # Also on a CPU, where patch leaves the layers to whoever binds them.
        if binding_of(base) is not None and family is not None:
            bind_layers(base_model(copy), family)
        rows: list[Row] = []
        for ours, _ in _runs(copy, there):
            rows += _against_stock(copy, there, ours, truth, "float32 against stock")
        unpatch(copy)  # what is bound refers to the layers and they to it: the copy would outlive this until it is collected
    found.rows += worst_of(rows)
    return truth


def _runs(model: Any, inputs: dict[str, Any]) -> Iterator[tuple[Measured, list[str]]]:
    """The patched model's results, at each level; on a GPU each step is repeated until a graph may be replayed."""
    base = base_model(model)
    binding, graphs = binding_of(base), vars(base).get(GRAPHS)
    if binding is None:
        yield measure(model, inputs), ["norms, rope, MLP and loss bound one by one; no fused layer"]
        return
    times = EAGER_FIRST + 2 if inputs["input_ids"].is_cuda else 1
    planned = [binding.planner.plan.keep] if binding.planner.plan is not None else []
    keeps = list(dict.fromkeys((Keep(LEVELS[0]), Keep(LEVELS[-1]), *planned)))
    with levels_kept(binding, graphs):
        for keep in keeps:
            binding.keep = keep
            for _ in range(times):
                yield measure(model, inputs), []
        how = [f"attention {one}" for one in sorted(binding.how)]
        how += [f"no layer was fused: {why}" for why in binding.asides]
        recorded = len(graphs.recorded) if graphs is not None else 0
        names = ", ".join(str(keep) for keep in keeps)
        steps = f"{times} step{'s' if times > 1 else ''} each"
        how.append(f"{len(binding.bound)} fused layers; {names}; {steps}, {recorded} recorded as CUDA graphs")
        yield measure(model, inputs), how


def measure(model: Any, inputs: Mapping[str, Any], loss_of: Callable[[Any], Tensor] | None = None) -> Measured:
    """One forward and backward of the model's loss, or of what `loss_of` gives; gradients are taken off the parameters again."""
    with torch.enable_grad():
        loss = model(**inputs, use_cache=False).loss if loss_of is None else loss_of(model)
        if loss.requires_grad:
            loss.backward()
    grads = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grads[name] = p.grad.detach().to("cpu", copy=True)
            p.grad = None
    return Measured(loss.detach().to("cpu"), grads)


def _against_stock(model: Any, inputs: dict[str, Any], ours: Measured, truth: Measured, leg: str) -> list[Row]:
    """Rows in float32. Where ours is further from stock than the rule says, float64 decides who is right, if it fits."""
    rows = [_like_stock("loss", "", leg, ours.loss, truth.loss), *_missing(ours, truth, leg)]
    both = truth.grads.keys() & ours.grads.keys()
    rows += [_like_stock("gradient", name, leg, ours.grads[name], truth.grads[name]) for name in both]
    if all(row.ok or row.note for row in rows):
        return rows
    exact = _in_float64(model, inputs)
    if exact is None:
        return rows
    judged = []
    for row in rows:
        if row.ok or row.note or (row.kind == "gradient" and row.name not in exact.grads):
            judged.append(row)
            continue
        mine, theirs, right = (one.loss if row.kind == "loss" else one.grads[row.name] for one in (ours, truth, exact))
        gap = by_norm(mine, theirs, right)
        size, note = max(gap.truth, 1e-30), "stock itself errs more than 1e-5: judged against float64"
        judged.append(Row(row.kind, row.name, leg, gap.ratio, gap.ours / size, gap.eager / size, note))
    return judged


def _like_stock(kind: str, name: str, leg: str, ours: Tensor, stock_: Tensor) -> Row:
    gap = like_stock(ours, stock_)
    return Row(kind, name, leg, gap.ratio, gap.ratio * LIKE_STOCK)


def _in_float64(model: Any, inputs: dict[str, Any]) -> Measured | None:
    """What the stock model gives in float64, the loss included, which transformers itself computes in float32."""
    with stock(model):
        copy, _ = twins.wide(model, torch.float64)
    if copy is None:
        return None
    device = _device(base_model(copy))
    there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    labels = there.pop("labels")

    def loss_of(model: Any) -> Tensor:
        logits = model(**there, use_cache=False).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)

    with training_mode(copy):
        return measure(copy, there, loss_of)


def _against_truth(ours: Measured, eager: Measured, truth: Measured, dtype: torch.dtype, leg: str) -> list[Row]:
    gap = by_element(ours.loss.to(dtype), eager.loss.to(dtype), truth.loss)
    size = max(abs(float(truth.loss)), 1e-30)
    errors = [abs(float(one.loss) - float(truth.loss)) / size for one in (ours, eager)]
    rows = [Row("loss", "", leg, gap.ratio, errors[0], errors[1]), *_missing(ours, truth, leg)]
    for name in truth.grads.keys() & ours.grads.keys() & eager.grads.keys():
        gap = by_norm(ours.grads[name], eager.grads[name], truth.grads[name], TOLERANCE[dtype])
        size = max(gap.truth, 1e-30)
        rows.append(Row("gradient", name, leg, gap.ratio, gap.ours / size, gap.eager / size))
    return rows


def _missing(ours: Measured, truth: Measured, leg: str) -> list[Row]:
    """A gradient that only one side has counts as infinitely wrong, unless the other side's is zero."""
    rows = []
    for name in sorted(ours.grads.keys() ^ truth.grads.keys()):
        have, side = (ours, "nbkit") if name in ours.grads else (truth, "stock")
        if have.grads[name].abs().max() > 0:
            rows.append(Row("gradient", name, leg, float("inf"), float("inf"), note=f"only {side} has it"))
    return rows


def worst_of(rows: list[Row]) -> list[Row]:
    """Of each tensor in each leg the worst row, in the order of their first appearance, loss first."""
    kept: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row.leg, row.kind, row.name)
        if key not in kept or row.ratio > kept[key].ratio:
            kept[key] = row
    return sorted(kept.values(), key=lambda row: (row.kind != "loss", row.name))


# -- facts ---------------------------------------------------------------------------------------------------------------


def _device(base: Any) -> torch.device:
    kinds = {p.device for p in base.parameters()}
    if any(device.type == "meta" for device in kinds):
        raise ModelError("Parts of the model are not loaded (they are on the device 'meta'); load it whole before certify.")
    if len({device for device in kinds if device.type != "cpu"}) > 1 or len(kinds) > 2:
        names = ", ".join(sorted(map(str, kinds)))
        raise ModelError(f"The model lies on several devices ({names}); certify compares a model that lies on one.")
    return base.get_input_embeddings().weight.device if len(kinds) == 1 else next(d for d in kinds if d.type != "cpu")


def _names(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def _runs_stock(base: Any, report: PatchReport) -> list[str]:
    """What is not nbkit's in the steps that are compared, by reason."""
    reasons: dict[str, list[str]] = {}
    for one in report.skipped:
        reasons.setdefault(one.reason, []).append(one.path or type(base).__name__)
    binding = binding_of(base)
    if binding is not None:
        for index, why in binding.reasons.items():
            if f"{why}; its parts are bound one by one" not in reasons:  # not yet known when it was patched
                reasons.setdefault(why, []).append(f"layer {index}")
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in base.modules()):
        reasons["dropout is off while comparing: its random masks differ between precisions"] = ["note"]
    note = launch_note() if base.get_input_embeddings().weight.is_cuda else ""
    if note:
        reasons[note.removesuffix(".")] = ["note"]
    named = {why: paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "") for why, paths in reasons.items()}
    return [f"{paths}: {why}" for why, paths in named.items()]


def _inputs(base: Any, batch: Mapping[str, Any] | None, device: torch.device) -> dict[str, Any]:
    if batch is not None and not isinstance(batch, Mapping):
        raise ModelError(
            f"The batch is of type {type(batch).__name__}; give "
            "{'input_ids': tensor of shape (rows, tokens), 'labels': the same}, or batch=None."
        )
    given = random_batch(base.config) if batch is None else dict(batch)
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ModelError(f"The batch has no tokens (input_ids: {shape}); give input_ids of shape (rows, tokens), or batch=None.")
    if not whole(ids):
        raise ModelError(f"input_ids are {ids.dtype}; give whole numbers (int64).")
    tokens = base.get_input_embeddings().weight.shape[0]
    odd = ((ids < 0) | (ids >= tokens)).nonzero()
    if len(odd):
        row, at = odd[0].tolist()
        raise ModelError(f"The token {int(ids[row, at])} in row {row} is none of the {tokens} of the vocabulary.")
    if given.get("labels") is None:
        mask = given.get("attention_mask")
        given["labels"] = ids if mask is None else ids.masked_fill(mask.to(ids.device) == 0, IGNORE_INDEX)
    given["labels"] = check_labels(base, given["labels"], tuple(ids.shape))
    if not bool((given["labels"][:, 1:] != IGNORE_INDEX).any()):
        raise ModelError("No token of the batch bears a label, so there is no loss to compare; give labels other than -100.")
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items() if v is not None}


def random_batch(config: Any, seed: int = 0) -> dict[str, Tensor]:
    """ROWS rows of random ids, unequal lengths padded on the right: prompts ignored, one row ignored whole. (B, T) int64.

    T is TOKENS, or what the window of the model needs where that is not much longer, or the model's positions if fewer.
    """
    window = getattr(config, "sliding_window", None) or 0
    tokens = window + 17 if TOKENS <= window <= 4 * TOKENS else TOKENS + 1
    tokens = min(tokens, int(getattr(config, "max_position_embeddings", tokens) or tokens))
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (ROWS, tokens), generator=make)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(ROWS):
        length = tokens - row * tokens // 5
        mask[row, length:] = 0
        labels[row, : length // (row + 3)] = IGNORE_INDEX
    labels[mask == 0] = IGNORE_INDEX
    labels[-1] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _batch_text(inputs: Mapping[str, Any]) -> str:
    rows, tokens = inputs["input_ids"].shape
    labelled = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
    return f"{rows} rows of {tokens} tokens, {labelled} labelled"
