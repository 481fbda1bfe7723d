"""The loss of a language model's head: projection and cross-entropy in one, whose logits never exist whole.

    x_NV = hidden_ND @ weight_VD^T      z = logit_scale * x, or softcap * tanh(logit_scale * x / softcap)
    loss_N = lse_V(z) - z[label]
    dz = softmax(z) - onehot(label)     dx = dz * logit_scale * (1 - (z / softcap)^2)
    dhidden = dx @ weight               dweight = dx^T @ hidden

Only rows with a label are projected, in chunks of at most 256 MB of logits. A chunk's logits become their own gradient in
place, and the gradient of `hidden` is computed there and then (as Liger-Kernel does, arXiv:2410.10989), so a step keeps one
(labelled rows, D) tensor. It is kept for an upstream gradient of 1, which loses nothing in float16, and scaled in the backward.
Shapes: hidden (N, D), weight (V, D), labels (N,) int64 with -100 where no loss is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from nbkit.config import IGNORE_INDEX
from nbkit.kernels._autograd import first_order
from nbkit.kernels._launch import check_rows, jit, kernel, on_device, power_of_two, tl, use_triton
from nbkit.kernels._op import Case, KernelOp

CHUNK_BYTES = 256_000_000
_BLOCK = 8192

# -- reference -------------------------------------------------------------------------------------


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    reduction: str = "mean",
    num_items: float | torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """Plain torch with whole logits, as transformers computes it; `chunk_bytes` has no meaning here."""
    logits = hidden @ weight.t()
    z = _shape_logits(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap, logit_scale)
    losses = functional.cross_entropy(z, labels, ignore_index=IGNORE_INDEX, reduction="none")
    return _reduce(losses, reduction, num_items, int((labels != IGNORE_INDEX).sum()))


def _shape_logits(x: torch.Tensor, softcap: float | None, logit_scale: float) -> torch.Tensor:
    z = x if logit_scale == 1.0 else x * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _reduce(
    losses: torch.Tensor, reduction: str, num_items: float | torch.Tensor | None, labelled: int | torch.Tensor
) -> torch.Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    if num_items is None:
        return total / (labelled if isinstance(labelled, torch.Tensor) else max(labelled, 1))
    if isinstance(num_items, torch.Tensor):
        return total / num_items.to(total.device).clamp(min=1)
    return total / max(num_items, 1)


# -- kernel ----------------------------------------------------------------------------------------


@jit
def _shaped(x, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """z. tanh(u) = 2 sigmoid(2u) - 1."""
    z = x * logit_scale
    if SOFTCAP:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@kernel
def _rows_kernel(
    LOGITS, LABELS, LOSS, SCALES, stride, scale, logit_scale, softcap,
    SOFTCAP: tl.constexpr, SCALE_ROWS: tl.constexpr, GRADIENT: tl.constexpr, IGNORED: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """One row a program: its loss, and its logits become their gradient. A label outside 0 … V-1 gives a loss of nan."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(LABELS + row).to(tl.int64)
    start = LOGITS + row * stride
    if label == IGNORED:
        tl.store(LOSS + row, 0.0)
        if GRADIENT:
            for offset in range(0, V, BLOCK):
                col = offset + tl.arange(0, BLOCK)
                tl.store(start + col, tl.zeros((BLOCK,), dtype=LOGITS.dtype.element_ty), mask=col < V)
    else:
        top = -3.0e38  # not -inf: a block of -inf logits would give inf - inf
        total = 0.0
        for offset in range(0, V, BLOCK):
            col = offset + tl.arange(0, BLOCK)
            x = tl.load(start + col, mask=col < V, other=-float("inf")).to(tl.float32)
            z = _shaped(x, logit_scale, softcap, SOFTCAP)
            z = tl.where(col < V, z, -float("inf"))
            higher = tl.maximum(top, tl.max(z, axis=0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), axis=0)
            top = higher
        lse = top + tl.log(total)
        known = (label >= 0) & (label < V)
        own = _shaped(tl.load(start + label, mask=known, other=float("nan")).to(tl.float32), logit_scale, softcap, SOFTCAP)
        tl.store(LOSS + row, lse - own)
        if GRADIENT:
            if SCALE_ROWS:
                scale = tl.load(SCALES + row).to(tl.float32)
            for offset in range(0, V, BLOCK):
                col = offset + tl.arange(0, BLOCK)
                x = tl.load(start + col, mask=col < V, other=0.0).to(tl.float32)
                z = _shaped(x, logit_scale, softcap, SOFTCAP)
                dz = tl.exp(z - lse) - tl.where(col == label, 1.0, 0.0)
                dx = dz * (logit_scale * scale)
                if SOFTCAP:
                    dx *= 1.0 - (z / softcap) * (z / softcap)
                tl.store(start + col, dx.to(LOGITS.dtype.element_ty), mask=col < V)


# -- raw function, without autograd ----------------------------------------------------------------


def cross_entropy_rows_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    scale: float | torch.Tensor = 1.0,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    gradient: bool = True,
    loss: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss (n,) float32 of each row of logits (n, V, any row stride), which become their own gradient in place.

    Args:
        labels: (n,) int64; a row labelled -100 has loss 0 and gradient 0.
        scale: the upstream gradient: one number for all rows, or a float32 tensor (n,).
        gradient: False computes the loss alone and leaves the logits as they are.
        loss: (n,) float32 to write to.
    """
    check_rows("logits", logits)
    n, v = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.empty(n, dtype=wide, device=logits.device) if loss is None else loss
    by_row = isinstance(scale, torch.Tensor)
    if not use_triton(logits, loss):
        return _plain_rows(logits, labels, scale, softcap, logit_scale, gradient, loss)
    block = min(_BLOCK, power_of_two(v))
    with on_device(logits):
        _rows_kernel[(n,)](
            logits, labels.contiguous(), loss, scale.contiguous() if by_row else loss, logits.stride(0),
            1.0 if by_row else float(scale), float(logit_scale), float(softcap or 1.0),
            SOFTCAP=softcap is not None, SCALE_ROWS=by_row, GRADIENT=gradient, IGNORED=IGNORE_INDEX, V=v, BLOCK=block,
            num_warps=16 if block >= 8192 else 4
        )  # fmt: skip
    return loss


def _plain_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    scale: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    gradient: bool,
    loss: torch.Tensor,
) -> torch.Tensor:
    z = _shape_logits(logits.to(loss.dtype), softcap, logit_scale)
    ignored = labels == IGNORE_INDEX
    place = labels.masked_fill(ignored, 0)[:, None]
    lse = torch.logsumexp(z, dim=-1)
    loss.copy_((lse - z.gather(1, place)[:, 0]).masked_fill(ignored, 0))
    if not gradient:
        return loss
    factor = torch.as_tensor(scale, dtype=z.dtype, device=z.device).expand(len(labels)).masked_fill(ignored, 0)[:, None]
    slope = None if softcap is None else 1 - (z / softcap).square()
    dz = z.sub_(lse[:, None]).exp_()  # the logits themselves where they are wide and plain already: (n, V) is the large one
    dz.scatter_add_(1, place, torch.full_like(place, -1, dtype=dz.dtype))
    dz.mul_(factor * logit_scale)
    dz.masked_fill_(ignored[:, None], 0)  # a row that is ignored may hold inf
    logits.copy_(dz if slope is None else dz.mul_(slope))
    return loss


# -- with autograd ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spec:
    """What is no tensor. `uniform`: all rows get the same upstream gradient. `grad`: autograd is on."""

    softcap: float | None
    logit_scale: float
    chunk_bytes: int
    uniform: bool
    grad: bool


def _project(
    rows: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    spec: _Spec,
    scale: float | torch.Tensor,
    want_dh: bool,
    want_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(losses (n,), drows (n, D) or None, dweight (V, D) or None), chunk by chunk, for an upstream gradient of `scale`."""
    n, v = rows.shape[0], weight.shape[0]
    step = max(1, min(n, spec.chunk_bytes // (v * rows.element_size())))
    logits = rows.new_empty(step, v)
    losses = torch.empty(n, dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    dh = torch.empty_like(rows) if want_dh else None
    # More chunks than one are summed in float32, as one GEMM over all rows would be.
    make = torch.empty if n else torch.zeros
    dw = make(weight.shape, dtype=weight.dtype if n <= step else losses.dtype, device=rows.device) if want_dw else None
    for first in range(0, n, step):
        part = slice(first, min(first + step, n))
        block = torch.mm(rows[part], weight.t(), out=logits[: part.stop - first])
        cross_entropy_rows_(
            block,
            targets[part],
            scale[part] if isinstance(scale, torch.Tensor) else scale,
            softcap=spec.softcap,
            logit_scale=spec.logit_scale,
            gradient=want_dh or want_dw,
            loss=losses[part],
        )
        if dh is not None:
            torch.mm(block, weight, out=dh[part])
        if dw is not None:
            _add_product(dw, block.t(), rows[part], first > 0)
    return losses, dh, dw


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, add: bool) -> None:
    """out = a @ b (+ out if `add`), with no temporary of out's size where the device can sum 16-bit products in float32."""
    beta = 1.0 if add else 0.0
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.is_cuda and out.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=beta, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


class _LinearCrossEntropy(torch.autograd.Function):
    """The losses (n,) of the rows in `index`, in their order."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, index: torch.Tensor, spec: _Spec
    ) -> torch.Tensor:
        every = len(index) == len(labels)
        rows, targets = (hidden, labels) if every else (hidden[index], labels[index])
        want_dh, want_dw = (spec.grad and needed for needed in ctx.needs_input_grad[:2])
        losses, dh, dw = _project(rows, weight, targets, spec, 1.0, want_dh, want_dw and spec.uniform)
        again = (rows, weight, targets) if want_dw and not spec.uniform else (None, None, None)
        ctx.save_for_backward(None if every else index, dh, dw, *again)
        ctx.spec, ctx.shape, ctx.dtype = spec, hidden.shape, weight.dtype
        return losses

    @staticmethod
    @first_order
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        index, dh, dw, rows, weight, targets = ctx.saved_tensors
        dhidden = dweight = None
        if dh is not None:
            scaled = torch.mul(dh, g[:, None], out=torch.empty_like(dh))
            dhidden = scaled if index is None else scaled.new_zeros(ctx.shape).index_copy_(0, index, scaled)
        if dw is not None:
            dweight = torch.mul(dw, g[0] if len(g) else 1.0, out=torch.empty_like(dw, dtype=ctx.dtype))
        elif rows is not None:  # each row has an upstream gradient of its own: known only now
            _, _, dweight = _project(rows, weight, targets, ctx.spec, g.contiguous(), False, True)
            dweight = dweight.to(ctx.dtype)
        return dhidden, dweight, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    reduction: str = "mean",
    num_items: float | torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    labelled_only: bool = True,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy, in nats, of labels (N,) under the logits hidden (N, D) @ weight (V, D)^T.

    Args:
        labels: the class of each row itself (no shift is made here); -100 for none.
        reduction: "mean" over the labelled rows, or their sum divided by `num_items` if that is given; "sum"; or "none",
            float32 (N,) with 0 where there is no label.
        num_items: denominator of "mean", say the labels of a whole optimizer step.
        softcap, logit_scale: z = softcap * tanh(logit_scale * x / softcap).
        chunk_bytes: most bytes of logits that exist at a time.
        labelled_only: False projects every row, which spares a wait for the device to count them (a CUDA graph has to).
        index: the labelled rows, int64 (labelled,), ascending, where they are known already; found here otherwise.
    Without any label the loss is 0 and so are its gradients. Under autocast the product is made in autocast's dtype.
    Raises: ValueError for shapes, dtypes or a reduction that do not fit.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'.")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(f"{shapes} must be (N, D), (V, D) and (N,).")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        hidden, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, weight))
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; they must be alike.")
    spec = _Spec(softcap, logit_scale, chunk_bytes, uniform=reduction != "none", grad=torch.is_grad_enabled())
    if labelled_only:
        index = (labels != IGNORE_INDEX).nonzero().squeeze(1) if index is None else index
        count: int | torch.Tensor = len(index)
    else:
        index, count = labels, (labels != IGNORE_INDEX).sum().clamp(min=1)  # only the length of this index is read
    with torch.autocast(kind, enabled=False):
        losses = _LinearCrossEntropy.apply(hidden, weight, labels, index, spec)
        if reduction == "none" and labelled_only:
            return losses.new_zeros(len(labels)).index_copy(0, index, losses)
        return _reduce(losses, reduction, num_items, count)


# -- op --------------------------------------------------------------------------------------------


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)
    n, d, v = (case.sizes[letter] for letter in "NDV")
    hidden = torch.randn(n, d, generator=make)
    weight = torch.randn(v, d, generator=make) * (case.sizes.get("scale", 1) / d**0.5)
    labels = torch.randint(0, v, (n,), generator=make)
    labels[torch.rand(n, generator=make) < case.sizes.get("ignored", 40) / 100] = IGNORE_INDEX
    if n > 1 and case.sizes.get("ignored", 40) < 100:
        labels[0], labels[-1] = v - 1, 0
    hidden, weight = hidden.to(device, dtype), weight.to(device, dtype)
    if case.sizes.get("strided"):
        hidden = torch.cat([hidden, hidden], dim=1)[:, :d]
        weight = weight.t().contiguous().t()
    if case.sizes.get("expanded"):
        hidden = hidden[:1].expand(n, d)
    return {"hidden": hidden, "weight": weight, "labels": labels.to(device)}


_SMALL = {"N": 9, "D": 16, "V": 53}
OP = KernelOp(
    name="linear_cross_entropy",
    fn=linear_cross_entropy,
    reference=reference,
    inputs=_inputs,
    gradients=("hidden", "weight"),
    cases=(
        Case("odd sizes, some rows ignored", _SMALL),
        Case("all rows labelled", {**_SMALL, "ignored": 0}, {"reduction": "sum"}),
        Case("no row labelled", {**_SMALL, "ignored": 100}),
        Case("one row", {"N": 1, "D": 8, "V": 11, "ignored": 0}),
        Case("many chunks", {"N": 23, "D": 16, "V": 64}, {"chunk_bytes": 1024}),
        Case("a loss per token", _SMALL, {"reduction": "none"}),
        Case("a loss per token in many chunks", _SMALL, {"reduction": "none", "chunk_bytes": 1}),
        Case("an explicit denominator", _SMALL, {"num_items": 37}),
        Case("softcap and logit scale", {**_SMALL, "scale": 30}, {"softcap": 5.0, "logit_scale": 0.25}),
        Case("softcap per token", {**_SMALL, "scale": 9}, {"softcap": 30.0, "logit_scale": 2.0, "reduction": "none"}),
        Case("huge logits", {**_SMALL, "scale": 300}),
        Case("vocabulary of more than one block", {"N": 3, "D": 4, "V": 8200, "ignored": 30}),
        Case("rows that lie apart", {**_SMALL, "strided": 1}),
        Case("one row expanded", {**_SMALL, "expanded": 1}),
    ),
    benchmark=(
        Case("Llama-3.2-1B, 2 x 512, all labelled", {"N": 1024, "D": 2048, "V": 128256, "ignored": 0}),
        Case("Llama-3.1-8B, 2 x 2048, all labelled", {"N": 4096, "D": 4096, "V": 128256, "ignored": 0}),
        Case("Llama-3.1-8B, 2 x 2048, a quarter labelled", {"N": 4096, "D": 4096, "V": 128256, "ignored": 75}),
    ),
)
