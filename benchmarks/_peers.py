"""What bench_kernels times: nbkit's raw functions where the public ones copy, what else would be used, the peers' kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nbkit.kernels import Case, adamw8bit, add_rms_norm, lora_border, lora_products, nf4, qk_norm_rope

from nbkit.kernels import lora_gradients, swiglu, swiglu_lora  # isort: skip

HELD: dict[Any, Any] = {}
Inputs = dict[str, Any]


def held(key: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives, made once for a row of the table."""
    key = id(key) if isinstance(key, Tensor) else key
    if key not in HELD:
        HELD[key] = make()
    return HELD[key]


# -- nbkit's, in place -----------------------------------------------------------------------------


def many(param: Tensor, grad: Tensor, sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    return held(("tensors", id(param)), lambda: (list(param.split(sizes)), list(grad.split(sizes))))


def adamw8bit_in_place(param: Tensor, grad: Tensor, state: Any, sizes: list[int], missing: int, **rates: Any) -> Tensor:
    """With the table of tensors made once, as the optimizer has it."""
    table = held(("table", id(param)), lambda: adamw8bit.table_of(sizes, param.device))
    adamw8bit.adamw8bit_(*many(param, grad, sizes), state, adamw8bit.Rates(**rates), table)
    return param


def borders(sources: Any, factors: Any, dtype: torch.dtype, one_by_one: bool = False) -> Any:
    """The copies alone: destinations and the table of addresses are made once."""

    def make() -> Any:
        out, copies = lora_border._places(sources, factors, dtype)
        return out, partial(lora_border.write_borders, copies) if one_by_one else lora_border.BorderWriter(copies).write

    out, write = held((id(sources), one_by_one), make)
    write()
    return out


def mlp_parts(gate: Tensor, r: int, gate_rank: int) -> list[Tensor]:
    """Where the gated MLP's results go: h | x A^T, [dgate | dup], da, db_gate, db_up (float32, as gradients are)."""
    (n, f), like = gate.shape, {"device": gate.device}
    sums = [torch.empty(*s, dtype=torch.float32, **like) for s in ((r, f), (f, gate_rank), (f, r))]
    return [torch.empty(n, f + r, dtype=gate.dtype, **like), torch.empty(n, 2 * f, dtype=gate.dtype, **like), *sums]


def mlp_with_lora(dh: Tensor, gate: Tensor, up: Tensor, u: Tensor, xa: Tensor, a: Tensor, gate_rank: int, scales: Any) -> Any:
    """Forward and backward in the fused kernels."""
    f, r = gate.shape[1], a.shape[0]
    parts = held((id(gate), "parts"), lambda: mlp_parts(gate, r, gate_rank))
    buffer, d, da, db_gate, db_up = parts
    swiglu_lora.swiglu_lora_forward(gate, up, a, buffer[:, :f], buffer[:, f:])
    names = {"da": da, "db_gate": db_gate, "db_up": db_up}
    swiglu_lora.swiglu_lora_backward(dh, gate, up, u, xa, d[:, :f], d[:, f:], gate_rank=gate_rank, scales=scales, **names)
    return parts


def mlp_then_products(dh: Tensor, gate: Tensor, up: Tensor, u: Tensor, xa: Tensor, a: Tensor, gate_rank: int, scales: Any) -> Any:
    """The same with swiglu's own kernels and cuBLAS for the thin products."""
    f, r = gate.shape[1], a.shape[0]
    buffer, d, da, db_gate, db_up = held((id(gate), "parts"), lambda: mlp_parts(gate, r, gate_rank))
    h = held((id(gate), "h"), lambda: torch.empty_like(dh))
    swiglu.swiglu_forward(gate, up, buffer[:, :f])
    torch.mm(buffer[:, :f], a.t(), out=buffer[:, f:])
    swiglu.swiglu_backward(dh, gate, up, d[:, :f], d[:, f:], h=h)
    da.copy_(u[:, :r].t() @ h)
    db_gate.copy_(d[:, :f].t() @ xa[:, :gate_rank]).mul_(scales[0])
    db_up.copy_(d[:, f:].t() @ xa[:, gate_rank : gate_rank + r]).mul_(scales[1])
    return [buffer, d, da, db_gate, db_up]


def gradients(thin: Tensor, wide: Tensor, spans: Any, scale: float) -> Tensor:
    """One launch, into float32."""
    flat, _, run, tensors = held((id(thin), "gradients"), lambda: gradient_parts(thin, wide, spans, scale))
    run(*tensors)
    return flat


def gradients_one_by_one(thin: Tensor, wide: Tensor, spans: Any, scale: float) -> Tensor:
    """The same in cuBLAS's products."""
    flat, parts, *_ = held((id(thin), "gradients"), lambda: gradient_parts(thin, wide, spans, scale))
    for p in parts:
        lora_gradients.one_product(p)
    return flat


def gradient_parts(thin: Tensor, wide: Tensor, spans: Any, scale: float) -> tuple[Any, ...]:
    """(all gradients in float32, the products, what launches them, the tensors it takes)."""
    flat = torch.empty(sum((r[1] - r[0]) * (c[1] - c[0]) for r, c, _ in spans), dtype=torch.float32, device=thin.device)
    parts = lora_gradients.products_of(thin, wide, flat, spans, scale)
    run = lora_gradients.prepared_products([p.turned for p in parts], [p.scale for p in parts])
    return flat, parts, run, [t for p in parts for t in (p.thin, p.wide, p.out)]


# -- what else would be used -----------------------------------------------------------------------


def adamw_of_torch(param: Tensor, grad: Tensor, state: Any, sizes: list[int], missing: int, **rates: Any) -> Any:
    """torch's fused AdamW over the same tensors, with 32-bit states."""
    params, grads = many(param, grad, sizes)
    m, v = held(("zeros", id(param)), lambda: [[torch.zeros_like(p) for p in params] for _ in range(2)])
    steps = held(("steps", id(param)), lambda: [state.steps[0].float().clone() for _ in params])
    torch._fused_adamw_(params, grads, m, v, [], steps, beta1=0.9, beta2=0.999, eps=1e-8, amsgrad=False, maximize=False, **rates)
    return param


def dequantise_and_multiply(x: Any, packed: Any, lora: Any = None, residual: Any = None) -> Any:
    weight = held(packed.data, lambda: torch.empty(packed.shape, dtype=x.dtype, device=x.device))
    nf4.dequantize_nf4(packed, weight)
    y = x @ weight.t() if residual is None else torch.addmm(residual, x, weight.t())
    return y if lora is None else y.addmm_(lora[0], lora[1].t(), alpha=lora[2])


IN_PLACE = {"adamw8bit": ("grad",), "lora_products": ("x", "a", "b")}  # which inputs are only read
TIMED: dict[str, Callable[..., Any]] = {
    "adamw8bit": adamw8bit_in_place,
    "add_rms_norm": add_rms_norm.add_rms_norm,
    "lora_border": borders,
    "lora_gradients": gradients,
    "lora_products": lambda x, a, b, y: lora_products.lora_out_(y, lora_products.lora_in(x, a), b),
    "qk_norm_rope": qk_norm_rope.qk_norm_rope,
    "swiglu_lora": mlp_with_lora,
}
BASELINES: dict[str, Callable[..., Any]] = {
    "adamw8bit": adamw_of_torch,
    "add_rms_norm": add_rms_norm.reference,
    "lora_border": partial(borders, one_by_one=True),
    "lora_gradients": gradients_one_by_one,
    "lora_products": lambda x, a, b, y: y.addmm_(x @ a.t(), b.t()),
    "nf4_gemv": dequantise_and_multiply,
    "qk_norm_rope": qk_norm_rope.reference,
    "swiglu_lora": mlp_then_products,
}

# -- peers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """Another library's kernel for the same work. `prepare` gives it the inputs in the layout it takes, before the clock runs."""

    name: str
    needs: str
    fn: Callable[..., Any]
    prepare: Callable[[Inputs], Inputs] = dict
    fits: Callable[[Case], bool] = lambda case: True

    @property
    def there(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


def liger(name: str) -> Callable[..., Any]:
    """Liger's function of that name, imported when it is called."""

    def call(*args: Any, **options: Any) -> Any:
        from liger_kernel.transformers import functional

        return getattr(functional, name)(*args, **options)

    return call


def contiguous(inputs: Inputs) -> Inputs:
    return {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def for_liger_rope(inputs: Inputs) -> Inputs:
    """Its tables cover the whole head, and have a batch."""
    tables = {k: torch.cat([inputs[k]] * (inputs["x"].shape[-1] // inputs[k].shape[-1]), -1)[None] for k in ("cos", "sin")}
    return {"x": inputs["x"], **tables}


def liger_rope(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """It takes queries and keys, (B, heads, T, K): half of the heads each."""
    half = x.shape[2] // 2
    q, k = (part.transpose(1, 2) for part in (x[:, :, :half], x[:, :, half:]))
    return liger("liger_rope")(q, k, cos, sin)


def bitsandbytes_state(packed: Any, dtype: torch.dtype) -> Any:
    from bitsandbytes.functional import QuantState

    inner = None
    if packed.code2 is not None:
        inner = QuantState(absmax=packed.absmax2, blocksize=256, code=packed.code2, dtype=torch.float32)
    return QuantState(
        absmax=packed.absmax, shape=torch.Size(packed.shape), code=packed.lut, blocksize=packed.block, quant_type="nf4",
        dtype=dtype, offset=packed.offset, state2=inner,
    )  # fmt: skip


def for_bitsandbytes(inputs: Inputs) -> Inputs:
    """The parts of `nf4`'s inputs, or of `nf4_gemv`'s, as bitsandbytes holds them."""
    if "packed" in inputs:
        packed, more = inputs["packed"], {"x": inputs["x"]}
    else:
        packed, more = nf4.Nf4(inputs["data"], inputs["absmax"], inputs["lut"], inputs["shape"], 64, *(inputs["inner"] or ())), {}
    return {"data": packed.data.view(-1, 1), "state": bitsandbytes_state(packed, inputs.get("dtype", torch.bfloat16)), **more}


def bitsandbytes_dequantise(data: Tensor, state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(data, state)


def bitsandbytes_multiply(x: Tensor, data: Tensor, state: Any) -> Tensor:
    import bitsandbytes

    return bitsandbytes.matmul_4bit(x, data.t(), quant_state=state)


def bitsandbytes_adamw(param: Tensor, grad: Tensor, state: Any, sizes: list[int], missing: int, **rates: Any) -> Tensor:
    """Its optimizer over the same tensors, a launch each."""

    def make() -> Any:
        import bitsandbytes

        params = [torch.nn.Parameter(p) for p in param.split(sizes)]
        for p, g in zip(params, grad.split(sizes), strict=True):
            p.grad = g
        return bitsandbytes.optim.AdamW8bit(params, **rates)

    held(("bitsandbytes", id(param)), make).step()
    return param


def of_liger(fn: Callable[..., Any], prepare: Callable[[Inputs], Inputs] = dict, **more: Any) -> Peer:
    return Peer("liger", "liger_kernel", fn, prepare, **more)


def of_bitsandbytes(fn: Callable[..., Any], prepare: Callable[[Inputs], Inputs] = dict, **more: Any) -> Peer:
    return Peer("bitsandbytes", "bitsandbytes", fn, prepare, **more)


PEERS: dict[str, Peer] = {
    "adamw8bit": of_bitsandbytes(bitsandbytes_adamw),
    "add_rms_norm": of_liger(lambda x, residual, weight: liger("liger_fused_add_rms_norm")(x, residual, weight, 1e-6)),
    "geglu": of_liger(lambda gate, up: liger("liger_geglu")(gate, up), contiguous, fits=lambda case: not case.options),
    "layer_norm": of_liger(lambda x, weight, bias: liger("liger_layer_norm")(x, weight, bias, 1e-5)),
    "linear_cross_entropy": of_liger(
        lambda hidden, weight, labels: liger("liger_fused_linear_cross_entropy")(hidden, weight, labels)
    ),
    "nf4": of_bitsandbytes(bitsandbytes_dequantise, for_bitsandbytes),
    "nf4_gemv": of_bitsandbytes(bitsandbytes_multiply, for_bitsandbytes, fits=lambda case: not case.sizes.get("R")),
    "rms_norm": of_liger(lambda x, weight: liger("liger_rms_norm")(x, weight, 1e-6)),
    "rope": of_liger(liger_rope, for_liger_rope),
    "swiglu": of_liger(lambda gate, up: liger("liger_swiglu")(gate, up), contiguous),
}


# -- LoRA's products one by one --------------------------------------------------------------------


def products(case: Case, inputs: Inputs) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any], list[Tensor]]]:
    """(name, nbkit's, cuBLAS's, what moves) of y += xa B^T, for a case of lora_products; x A^T is cuBLAS's own."""
    x, a, b, y = (inputs[name] for name in ("x", "a", "b", "y"))
    xa = lora_products.lora_in(x, a)
    yield "y += xa B^T", lambda: lora_products.lora_out_(y, xa, b), lambda: y.addmm_(xa, b.t()), [y, y, xa, b]
