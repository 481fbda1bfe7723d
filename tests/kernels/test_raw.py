"""The raw functions: any row stride, given buffers, sources that are targets, labels out of range. On this device as it is,
and under the interpreter through `test_interpreted.py`. Test names begin with the op's, so that one process runs one op."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from nbkit.kernels import _launch, nf4
from nbkit.kernels import geglu as gg
from nbkit.kernels import linear_cross_entropy as lce
from nbkit.kernels import lora_products as lp
from nbkit.kernels import qk_norm_rope as qkn
from nbkit.kernels import rms_norm as rms
from nbkit.kernels import rope as rp
from nbkit.kernels import rope_pack as pack
from nbkit.kernels import swiglu as sw
from tests.closeness import assert_close

ON_GPU = torch.cuda.is_available() and not _launch.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = [torch.float32, torch.float16] + ([] if _launch.INTERPRETED else [torch.bfloat16])
MARK = 7.0  # what spare columns hold, and must still hold afterwards


def bordered(n: int, d: int, dtype: torch.dtype, seed: int = 0, spare: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """(buffer (n, d + spare), its first d columns filled with random values)."""
    buffer = torch.full((n, d + spare), MARK, dtype=dtype, device=DEVICE)
    buffer[:, :d] = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return buffer, buffer[:, :d]


def untouched(buffer: torch.Tensor, d: int) -> bool:
    return bool((buffer[:, d:] == MARK).all())


def close(name: str, ours: torch.Tensor, truth: torch.Tensor) -> None:
    assert_close(name, ours, truth.to(ours.dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_forward_writes_into_a_border(dtype: torch.dtype) -> None:
    _, x = bordered(6, 40, dtype, 1)
    buffer, out = bordered(6, 40, dtype, 2)
    weight = torch.linspace(0.5, 1.5, 40).to(DEVICE, dtype)
    rstd = torch.full((6,), -1.0, device=DEVICE)
    y, kept = rms.rms_norm_forward(x, weight, 1e-5, out=out, rstd=rstd)
    assert y is out and kept is rstd and untouched(buffer, 40)
    close("y", y, rms.reference(x.double(), weight.double(), 1e-5))
    close("rstd", rstd, (x.double().square().mean(-1) + 1e-5).rsqrt())
    again, copy = bordered(6, 40, dtype, 3)
    torch.testing.assert_close(rms.rms_norm_forward(x, weight, 1e-5, copy=copy)[0], y, rtol=0, atol=0)
    assert torch.equal(copy, x) and untouched(again, 40)
    with pytest.raises(ValueError, match="copy is"):
        rms.rms_norm_forward(x, weight, 1e-5, copy=copy[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_backward_adds_to_the_residual(dtype: torch.dtype, offset: float) -> None:
    _, x = bordered(21, 24, dtype, 1)
    _, dy = bordered(21, 24, dtype, 2)
    buffer, residual = bordered(21, 24, dtype, 3)
    weight = torch.linspace(-0.5, 0.5, 24).to(DEVICE, dtype)
    leaf, w = x.double().requires_grad_(), weight.double().requires_grad_()
    truth = rms.reference(leaf, w, 1e-6, offset=offset, cast=rms.LAST)
    truth.backward(dy.double())
    expected = leaf.grad + residual.double()
    rstd = (x.double().square().mean(-1) + 1e-6).rsqrt().float()
    dx, dw = rms.rms_norm_backward(dy, x, weight, rstd, offset=offset, add_to=residual, weight_grad=True)
    assert dx is residual and untouched(buffer, 24)
    close("dx", dx, expected)
    assert dw is not None and dw.dtype == torch.float32
    close("dweight", dw, w.grad)
    fresh, none = rms.rms_norm_backward(dy, x, weight, rstd, offset=offset)
    assert none is None
    close("dx alone", fresh, leaf.grad)


def test_rms_norm_mixed_dtypes_give_the_wider() -> None:
    x = torch.randn(3, 16, device=DEVICE).half()
    weight = torch.rand(16, device=DEVICE)
    y = rms.rms_norm(x, weight, 1e-5)
    assert y.dtype == torch.float32 and rms.rms_norm(x, weight, 1e-5, cast=rms.LAST).dtype == torch.float16
    assert_close("y", y, rms.reference(x, weight, 1e-5), rms.reference(x, weight, 1e-5).double())


def test_rms_norm_refuses_what_kernels_cannot_address() -> None:
    with pytest.raises(ValueError, match="stride 1 along D"):
        rms.rms_norm_forward(torch.randn(4, 6, device=DEVICE).t(), torch.ones(4, device=DEVICE), 1e-5)
    with pytest.raises(ValueError, match="'later'"):
        rms.rms_norm(torch.randn(4, 6), torch.ones(6), cast="later")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_turns_part_of_a_buffer_in_place_and_back(dtype: torch.dtype) -> None:
    b, t, h, k = 2, 5, 3, 16
    buffer, rows = bordered(b * t, (h + 2) * k, dtype, 4)
    before = rows.clone()
    view = rows.unflatten(1, (h + 2, k)).unflatten(0, (b, t))[:, :, :h]
    angle = torch.rand(t, k // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 6
    cos, sin = angle.cos(), angle.sin()
    truth = rp.reference(view.double(), cos.double(), sin.double())
    assert rp.rope_rotate_(view, cos, sin) is view
    close("rotated", view, truth)
    assert torch.equal(rows[:, h * k :], before[:, h * k :]) and untouched(buffer, (h + 2) * k)
    again = rp.rope_rotate_(view, cos, sin, True, out=torch.empty_like(view))
    close("rotated back", again, rp.reference(view.double(), cos.double(), sin.double(), inverse=True))


def test_rope_positions_and_tables_that_do_not_fit_are_refused() -> None:
    x = torch.randn(2, 5, 3, 16, device=DEVICE)
    table = torch.rand(5, 8, device=DEVICE)
    with pytest.raises(ValueError, match="do not fit"):
        rp.rope_rotate_(x, table[:4], table[:4])
    with pytest.raises(ValueError, match="positions of x"):
        rp.rope_rotate_(x, table, table, positions=torch.zeros(3, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="even number"):
        rp.rope_rotate_(torch.randn(2, 5, 16, 3, device=DEVICE).transpose(2, 3), table, table)


@pytest.mark.parametrize("rotary", [None, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_norm_rope_in_place_and_back_into_rows(dtype: torch.dtype, rotary: int | None) -> None:
    """Forward over its own inputs; backward from attention's layout into rows [dq | dk | dv] with a border, dv copied along."""
    b, t, h, g, k = 2, 3, 4, 2, 12
    buffer, rows = bordered(b * t, (h + 2 * g) * k, dtype, 1)
    raw = rows.clone()
    heads = [x.unflatten(1, (h + 2 * g, k)).unflatten(0, (b, t)) for x in (rows, raw)]
    (q, kk), (q0, k0) = ((x[:, :, :h], x[:, :, h : h + g]) for x in heads)
    wq, wk = torch.linspace(0.5, 1.5, k).to(DEVICE, dtype), torch.linspace(-1, 1, k).to(DEVICE, dtype)
    angle = torch.rand(t, (rotary or k) // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 6
    tables, how = (angle.cos(), angle.sin()), {"rotary": rotary, "offset": 1.0}
    leaves = [x.double().requires_grad_() for x in (q0, k0, wq, wk)]
    truth = qkn.reference(*leaves, *(x.double() for x in tables), 1e-5, **how)
    kept = rows[:, (h + g) * k :].clone()
    found = qkn.qk_norm_rope_forward(q, kk, wq, wk, *tables, 1e-5, **how, out=(q, kk))
    assert found[0] is q and found[1] is kk and untouched(buffer, (h + 2 * g) * k) and torch.equal(rows[:, (h + g) * k :], kept)
    close("q", q, truth[0])
    close("k", kk, truth[1])
    up = [torch.randn(b, n, t, k, generator=torch.Generator().manual_seed(n)).to(DEVICE, dtype) for n in (h, g, g + 1)]
    dq, dk, dv = up[0].transpose(1, 2), up[1].transpose(1, 2), up[2][:, :g].transpose(1, 2)
    torch.autograd.backward(truth, (dq.double(), dk.double()))
    border, target = bordered(b * t, (h + 2 * g) * k, dtype, 2)
    to = target.unflatten(1, (h + 2 * g, k)).unflatten(0, (b, t))
    places = {"out": (to[:, :, :h], to[:, :, h : h + g]), "dv": (dv, to[:, :, h + g :])}
    ours = qkn.qk_norm_rope_backward(dq, dk, q0, k0, wq, wk, *tables, 1e-5, **how, **places, weight_grad=True)
    assert untouched(border, (h + 2 * g) * k) and torch.equal(to[:, :, h + g :], dv)
    for name, one, leaf in zip(("dq", "dk", "dwq", "dwk"), ours, leaves, strict=True):
        assert one is not None
        close(name, one, leaf.grad)
    again = qkn.qk_norm_rope_backward(dq, dk, q0, k0, wq, wk, *tables, 1e-5, **how, out=(q0, k0))
    assert again[2] is None and again[3] is None
    close("dq over q", q0, leaves[0].grad)


def test_qk_norm_rope_refuses_what_does_not_fit() -> None:
    q, k, w, table = (torch.randn(*s, device=DEVICE) for s in ((1, 2, 3, 8), (1, 2, 1, 8), (8,), (2, 3)))
    with pytest.raises(ValueError, match="do not fit"):
        qkn.qk_norm_rope_forward(q, k, w, w, table, table, 1e-5)
    with pytest.raises(ValueError, match="stride 1 along K"):
        qkn.qk_norm_rope_forward(
            q, k, w, w, q[0, :, 0], q[0, :, 0], 1e-5, out=(q, torch.zeros(1, 2, 8, 8, device=DEVICE).mT[:, :, :1])
        )


@pytest.mark.parametrize("rotary", [16, 6])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_pack_undoes_rope(interleaved: bool, rotary: int) -> None:
    """Rows that rope turned come back as they were, dv as it is."""
    b, t, h, g, k = 2, 3, 4, 2, 16
    x = torch.randn(b, t, h + 2 * g, k, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    angle = torch.rand(b, t, rotary // 2, generator=torch.Generator().manual_seed(2)).to(DEVICE) * 6
    whole = torch.cat((angle, angle), -1)
    y = x.clone()
    rp.rope_rotate_(y[:, :, : h + g], angle.cos(), angle.sin(), interleaved=interleaved, rotary=rotary)
    dq, dk, dv = (part.transpose(1, 2) for part in y.split((h, g, g), dim=2))
    out = torch.empty(b * t, (h + 2 * g) * k, device=DEVICE)
    pack.rotate_pack(dq, dk, dv, whole.cos(), whole.sin(), out, interleaved=interleaved, rotary=rotary)
    close("turned back", out, x.reshape(b * t, -1).double())
    assert torch.equal(out[:, (h + g) * k :], x[:, :, h + g :].reshape(b * t, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_leaves_the_rest_of_a_head_alone(dtype: torch.dtype, interleaved: bool) -> None:
    x = torch.randn(2, 3, 4, 20, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    angle = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 6
    truth = rp.reference(x.double(), angle.cos().double(), angle.sin().double(), rotary=8, interleaved=interleaved)
    out = rp.rope_rotate_(x, angle.cos(), angle.sin(), rotary=8, interleaved=interleaved, out=torch.empty_like(x))
    close("beside", out, truth)
    assert torch.equal(out[..., 8:], x[..., 8:])
    close("in place", rp.rope_rotate_(x, angle.cos(), angle.sin(), rotary=8, interleaved=interleaved), truth)
    for rotary in (7, 0, 22):
        with pytest.raises(ValueError, match="even number of rotated columns"):
            rp.rope_rotate_(x, angle.cos(), angle.sin(), rotary=rotary)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_backward_over_its_own_inputs(dtype: torch.dtype) -> None:
    n, f = 5, 33
    buffer, both = bordered(n, 2 * f, dtype, 1)
    keep, dh = bordered(n, f, dtype, 2)
    gate, up = both[:, :f], both[:, f:]
    g, u, d = (x.double().requires_grad_() for x in (gate, up, dh))
    truth = sw.reference(g, u)
    truth.backward(d)
    h = sw.swiglu_forward(gate, up, out=torch.empty_like(gate))
    close("h", h, truth)
    dgate, dup = sw.swiglu_backward(dh, gate, up, dgate=gate, dup=up, h=dh)
    assert dgate is gate and dup is up and untouched(buffer, 2 * f) and untouched(keep, f)
    close("dgate", gate, g.grad)
    close("dup", up, u.grad)
    close("h in place of dh", dh, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [gg.TANH, gg.EXACT])
def test_geglu_backward_over_its_own_inputs(dtype: torch.dtype, form: str) -> None:
    n, f = 5, 33
    buffer, both = bordered(n, 2 * f, dtype, 1)
    keep, dh = bordered(n, f, dtype, 2)
    gate, up = both[:, :f], both[:, f:]
    g, u, d = (x.double().requires_grad_() for x in (gate, up, dh))
    truth = gg.reference(g, u, approximate=form)
    truth.backward(d)
    h = gg.geglu_forward(gate, up, out=torch.empty_like(gate), approximate=form)
    close("h", h, truth)
    dgate, dup = gg.geglu_backward(dh, gate, up, dgate=gate, dup=up, h=dh, approximate=form)
    assert dgate is gate and dup is up and untouched(buffer, 2 * f) and untouched(keep, f)
    close("dgate", dgate, g.grad)
    close("dup", dup, u.grad)
    close("h in place of dh", dh, truth)


def test_geglu_is_accurate_over_all_gates() -> None:
    """Both forms and their slopes, in float32 against float64, from where they vanish to where they are the identity."""
    gate = torch.linspace(-12, 12, 4001, device=DEVICE)[None]
    one = torch.ones_like(gate)
    for form in (gg.TANH, gg.EXACT):
        wide = gate.double().requires_grad_()
        truth = gg.reference(wide, one.double(), approximate=form)
        truth.sum().backward()
        truth = truth.detach()
        slope, act = gg.geglu_backward(one, gate, one, approximate=form)
        assert float((act.double() - truth).abs().max()) < 2e-6 and float((slope.double() - wide.grad).abs().max()) < 2e-6
        assert float(((act.double() - truth) / gate.abs().clamp(min=0.1)).abs().max()) < 3e-7


def test_geglu_refuses_unlike_inputs_and_unknown_forms() -> None:
    with pytest.raises(ValueError, match="must be alike"):
        gg.geglu(torch.randn(2, 4), torch.randn(2, 5))
    with pytest.raises(ValueError, match="approximate is 'erf'; it must be 'none' or 'tanh'"):
        gg.geglu(torch.randn(2, 4), torch.randn(2, 4), approximate="erf")


def test_swiglu_refuses_unlike_inputs() -> None:
    with pytest.raises(ValueError, match="must be alike"):
        sw.swiglu(torch.randn(2, 4), torch.randn(2, 5))
    with pytest.raises(ValueError, match="must be alike"):
        sw.swiglu(torch.randn(2, 4), torch.randn(2, 4).half())


def test_nf4_knows_its_own_packing_alone() -> None:
    """bitsandbytes packs weights another way for generation on a CPU, where absmax is no longer quantised."""
    state = SimpleNamespace(code=torch.arange(16.0), shape=(2, 64), state2=None, absmax=torch.ones(2), blocksize=64)
    weight = torch.zeros(64, 1, dtype=torch.uint8)
    weight.quant_state = state  # type: ignore[attr-defined]
    assert nf4.Nf4.of(weight) is not None
    state.packing_format_for_cpu = True
    assert nf4.Nf4.of(weight) is None and nf4.Nf4.of(torch.zeros(2, 2)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [0, 1])
def test_nf4_is_dequantised_bit_for_bit(nested: int, dtype: torch.dtype) -> None:
    parts = nf4.OP.inputs(nf4.Case("", {"O": 37, "I": 320, "nested": nested}), dtype, DEVICE, 5)
    packed = nf4.Nf4(parts["data"], parts["absmax"], parts["lut"], parts["shape"], 64, *(parts["inner"] or ()))
    weight = torch.empty(37, 320, dtype=dtype, device=DEVICE)
    nf4.dequantize_nf4(packed, weight)
    assert torch.equal(weight, nf4.dequantize_reference(packed).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("by_row", [False, True])
def test_linear_cross_entropy_rows_become_their_gradient(dtype: torch.dtype, softcap: float | None, by_row: bool) -> None:
    buffer, logits = bordered(6, 37, dtype, 1)
    labels = torch.tensor([3, -100, 0, 36, -100, 5], device=DEVICE)
    scale = torch.tensor([0.5, 9.0, -2.0, 1.0, 3.0, 0.0], device=DEVICE) if by_row else 0.25
    leaf = logits.double().requires_grad_()
    z = leaf * 1.5 if softcap is None else softcap * torch.tanh(leaf * 1.5 / softcap)
    truth = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    truth.backward((scale if by_row else torch.full((6,), 0.25, device=DEVICE)).double())
    loss = lce.cross_entropy_rows_(logits, labels, scale, softcap=softcap, logit_scale=1.5)
    assert loss.dtype == torch.float32 and untouched(buffer, 37)
    close("loss", loss, truth)
    close("gradient", logits, leaf.grad)
    assert not logits[[1, 4]].any()


def test_linear_cross_entropy_rows_of_infinities_and_ignored_nan() -> None:
    logits = torch.randn(4, 20, device=DEVICE)
    logits[0, :19] = -math.inf  # only the label is possible
    logits[1] = math.nan  # ignored
    logits[2, 4] = math.inf
    labels = torch.tensor([19, -100, 3, 1], device=DEVICE)
    expected = torch.nn.functional.cross_entropy(logits[3:].clone(), labels[3:])
    loss = lce.cross_entropy_rows_(logits, labels)
    assert loss[0] == 0 and loss[1] == 0 and not torch.isfinite(loss[2])
    close("loss", loss[3:], expected.double()[None])
    assert not logits[:2].any(), "an ignored row gives no gradient, whatever it held"


def test_linear_cross_entropy_loss_alone_leaves_16_bit_logits() -> None:
    logits = torch.randn(3, 11, device=DEVICE).half()
    before = logits.clone()
    lce.cross_entropy_rows_(logits, torch.tensor([1, 2, -100], device=DEVICE), gradient=False)
    assert torch.equal(logits, before)


def test_linear_cross_entropy_label_out_of_range_reads_nothing() -> None:
    logits, labels = torch.randn(2, 11, device=DEVICE), torch.tensor([1, 11], device=DEVICE)
    if ON_GPU or _launch.INTERPRETED:
        loss = lce.cross_entropy_rows_(logits, labels)
        assert torch.isfinite(loss[0]) and torch.isnan(loss[1])
    else:
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            lce.cross_entropy_rows_(logits, labels)


@pytest.mark.parametrize("rank", [3, 40, 100])
def test_lora_products_write_into_borders(rank: int) -> None:
    """xa goes into spare columns beside x, as the layer has it; y is updated in place."""
    buffer, x = bordered(33, 96, torch.float16, 1, spare=rank + 2)
    target, y = bordered(33, 50, torch.float16, 2)
    a, b = (
        torch.randn(*s, generator=torch.Generator().manual_seed(3)).to(DEVICE, torch.float16) for s in ((rank, 96), (50, rank))
    )
    xa = lp.lora_in(x, a, out=buffer[:, 96 : 96 + rank])
    assert bool((buffer[:, 96 + rank :] == MARK).all())
    close("xa", xa, x.double() @ a.double().t())
    expected = y.double() + xa.double() @ b.double().t() * 0.25
    assert lp.lora_out_(y, xa, b, 0.25) is y and untouched(target, 50)
    close("y", y, expected)
    with pytest.raises(ValueError, match="of one dtype"):
        lp.lora_in(x, a.float())
    with pytest.raises(ValueError, match=r"\(N, O\), \(N, R\) and \(O, R\)"):
        lp.lora_out_(y, xa[:5], b)


def test_linear_cross_entropy_refuses_what_does_not_fit() -> None:
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="reduction"):
        lce.linear_cross_entropy(hidden, weight, labels, reduction="average")
    with pytest.raises(ValueError, match="must be \\(N, D\\)"):
        lce.linear_cross_entropy(hidden, weight.t(), labels)
    with pytest.raises(ValueError, match="must be alike"):
        lce.linear_cross_entropy(hidden, weight.half(), labels)
