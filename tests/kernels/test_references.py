"""The references and the plain paths, on CPU: gradients by finite differences in float64, and against torch and transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from nbkit.kernels import Case, KernelOp, adamw8bit, add_rms_norm, all_ops, geglu, layer_norm, qk_norm_rope
from nbkit.kernels import linear_cross_entropy as lce
from nbkit.kernels import rms_norm as rms
from nbkit.kernels import rope as rp
from nbkit.kernels import swiglu as sw
from tests.closeness import assert_close

SMALL = 600  # elements of an input that finite differences are taken over
GRADIENT_CASES = [
    pytest.param(op, case, id=f"{op.name}-{case}")
    for op in all_ops()
    for case in op.cases
    if op.gradients
    and sum(op.inputs(case, torch.float32, "cpu", 0)[name].numel() for name in op.gradients) <= SMALL
    and case.sizes.get("scale", 1) == 1
]


@pytest.mark.parametrize(("op", "case"), GRADIENT_CASES)
def test_gradients_by_finite_differences(op: KernelOp, case: Case) -> None:
    inputs = op.inputs(case, torch.float64, "cpu", 2)
    # Dense copies: gradcheck disturbs one element at a time, and an expanded tensor has one for many.
    leaves = [inputs.pop(name).contiguous().clone().requires_grad_() for name in op.gradients]
    for fn in (op.reference, op.fn):

        def call(*tensors: torch.Tensor, fn: Any = fn) -> torch.Tensor:
            return fn(**dict(zip(op.gradients, tensors, strict=True)), **inputs, **case.options)

        assert torch.autograd.gradcheck(call, leaves)


class _RawSwiGLU(torch.autograd.Function):
    """The raw functions of an op as autograd sees them, so that gradcheck reaches their plain paths."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return sw.swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx: Any, dh: torch.Tensor) -> Any:
        return sw.swiglu_backward(dh.contiguous(), *ctx.saved_tensors)


def test_raw_functions_by_finite_differences() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(_RawSwiGLU.apply, (gate, up))
    x, weight = torch.randn(3, 9, dtype=torch.float64, requires_grad=True), torch.rand(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: rms._RMSNorm.apply(*a, 1e-6, 1.0, rms.LAST), (x, weight))
    turned = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    angle = torch.rand(3, 2, dtype=torch.float64)  # two pairs turn, two columns stay
    for pairs in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, p=pairs: rp._Rope.apply(x, angle.cos(), angle.sin(), None, False, p, 4), (turned,)
        )
    for form in (geglu.TANH, geglu.EXACT):
        assert torch.autograd.gradcheck(lambda g, u, f=form: geglu._GeGLU.apply(g, u, f), (gate, up))
    bias, residual = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((9,), (3, 9)))
    assert torch.autograd.gradcheck(lambda *a: layer_norm._LayerNorm.apply(*a, 1e-6), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *a: add_rms_norm._AddRMSNorm.apply(*a, 1e-6, 1.0, rms.LAST), (x, residual, weight))
    k = torch.randn(2, 3, 1, 6, dtype=torch.float64, requires_grad=True)
    wq, wk = (torch.rand(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for pairs in (False, True):
        how = {"offset": 1.0, "interleaved": pairs, "rotary": 4}
        assert torch.autograd.gradcheck(
            lambda *a, h=how: qk_norm_rope._QKNormRope.apply(*a, angle.cos(), angle.sin(), 1e-6, h), (turned, k, wq, wk)
        )


def test_loss_equals_torch_with_weight_gradients() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(30, 12, requires_grad=True), torch.randn(41, 12, requires_grad=True)
    labels = torch.randint(0, 41, (30,))
    labels[torch.rand(30) < 0.5] = -100
    stock = functional.cross_entropy(functional.linear(hidden, weight), labels)
    wanted = torch.autograd.grad(stock, (hidden, weight))
    ours = lce.linear_cross_entropy(hidden, weight, labels, chunk_bytes=600)
    found = torch.autograd.grad(ours, (hidden, weight))
    for name, a, b in zip(("loss", "dhidden", "dweight"), (ours, *found), (stock, *wanted), strict=True):
        assert_close(name, a, b, b.double())
    assert not found[0][labels == -100].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_label_at_all_is_a_zero_loss_with_zero_gradients(reduction: str) -> None:
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    loss = lce.linear_cross_entropy(hidden, weight, torch.full((4,), -100), reduction=reduction)
    loss.sum().backward()
    assert not loss.detach().any() and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("items", [7, 7.0, torch.tensor(7)])
def test_the_denominator_is_num_items(items: Any) -> None:
    hidden, weight, labels = torch.randn(5, 3), torch.randn(7, 3), torch.tensor([1, -100, 2, 3, 6])
    total = lce.linear_cross_entropy(hidden, weight, labels, reduction="sum")
    assert torch.allclose(lce.linear_cross_entropy(hidden, weight, labels, num_items=items), total / 7)


def test_upstream_gradients_are_respected() -> None:
    torch.manual_seed(3)
    hidden, weight = torch.randn(6, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    labels = torch.tensor([0, -100, 8, 2, -100, 3])
    upstream = torch.randn(6)
    stock = functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    wanted = torch.autograd.grad(stock, (hidden, weight), upstream, retain_graph=True)
    ours = lce.linear_cross_entropy(hidden, weight, labels, reduction="none", chunk_bytes=1)
    found = torch.autograd.grad(ours, (hidden, weight), upstream, retain_graph=True)
    again = torch.autograd.grad(ours, (hidden, weight), upstream)
    for a, b, c in zip(found, wanted, again, strict=True):
        assert_close("gradient", a, b, b.double())
        assert torch.equal(a, c), "a second backward gives something else"


def test_a_frozen_weight_costs_no_gradient_and_no_grad_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    stock = lce._project
    monkeypatch.setattr(lce, "_project", lambda *a: asked.append(a[-2:]) or stock(*a))
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3)
    labels = torch.tensor([1, 2, 3, 4])
    lce.linear_cross_entropy(hidden, weight, labels).backward()
    with torch.no_grad():
        lce.linear_cross_entropy(hidden, weight.requires_grad_(), labels)
    assert asked == [(True, False), (False, False)]


def test_logits_never_exist_whole() -> None:
    """The largest tensor that is made is the chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(100, 8)
    labels = torch.randint(0, 100, (64,))
    with Sizes():
        lce.linear_cross_entropy(hidden, weight, labels, chunk_bytes=8 * 100 * 4).backward()
    assert max(sizes) == 8 * 100


def test_autocast_computes_as_a_linear_under_autocast() -> None:
    torch.manual_seed(2)
    hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(11, 16)
    labels = torch.tensor([0, -100, 8, 2, 10, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = functional.cross_entropy(functional.linear(hidden, weight).float(), labels)
        ours = lce.linear_cross_entropy(hidden, weight, labels)
    truth = functional.cross_entropy(functional.linear(hidden.double(), weight.double()), labels)
    wanted = torch.autograd.grad(stock, hidden)[0].bfloat16()
    exact = torch.autograd.grad(truth, hidden)[0]
    assert_close("loss", ours.bfloat16(), stock.bfloat16(), truth)
    assert_close("dhidden", torch.autograd.grad(ours, hidden)[0].bfloat16(), wanted, exact)


def test_references_are_transformers_own_bit_for_bit() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(2, 3, 16, dtype=dtype)
        for stock, options in ((LlamaRMSNorm(16, 1e-5), {}), (GemmaRMSNorm(16, 1e-5), {"offset": 1.0, "cast": rms.LAST})):
            stock.weight.data = torch.randn(16, dtype=dtype)
            assert torch.equal(rms.rms_norm(x, stock.weight, 1e-5, **options), stock(x))
        q, k = torch.randn(2, 4, 5, 16, dtype=dtype), torch.randn(2, 2, 5, 16, dtype=dtype)
        angle = torch.rand(2, 5, 8).repeat(1, 1, 2)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        for x, stock in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
            assert torch.equal(rp.rope(x.transpose(1, 2), cos, sin).transpose(1, 2), stock)


def test_the_8_bit_optimizer_follows_bitsandbytes() -> None:
    """Equal maps and absmax; codes that are nearest, where bitsandbytes on the CPU is so but for near ties; twenty like steps."""
    functional, optim = pytest.importorskip("bitsandbytes.functional"), pytest.importorskip("bitsandbytes.optim")
    for signed in (True, False):
        values = adamw8bit.dynamic_map(signed)
        assert torch.equal(values, functional.create_dynamic_map(signed=signed))
        x = torch.randn(5000, generator=torch.Generator().manual_seed(1))
        x = x if signed else x.square()
        codes, top = adamw8bit.quantize(x, signed)
        other, other_top = torch.ops.bitsandbytes.quantize_blockwise(x, values, 256)
        scaled = x / top.repeat_interleave(256)[:5000]
        assert torch.equal(top, other_top) and float((codes != other).float().mean()) < 0.05
        assert bool(((scaled - values[codes.long()]).abs() <= (scaled - values[other.long()]).abs() + 1e-7).all())
    make = torch.Generator().manual_seed(0)
    start = torch.randn(5000, generator=make)
    param = torch.nn.Parameter(start.clone())
    theirs = optim.AdamW8bit([param], lr=1e-2, weight_decay=0.1)
    ours, state = start.clone(), adamw8bit.State8.zeros([5000], "cpu")
    for _ in range(20):
        grad = torch.randn(5000, generator=make)
        param.grad = grad.clone()
        theirs.step()
        adamw8bit.adamw8bit_([ours], [grad], state, adamw8bit.Rates(1e-2, weight_decay=0.1))
    moved, apart = (ours - start).abs().mean(), (ours - param.detach()).abs().mean()
    assert float(moved) > 0.03 and float(apart) < 1e-3 * float(moved)
