"""Raw functions of the norms: given buffers, rows that lie apart, sums over their own inputs. Test names begin with the op's."""

from __future__ import annotations

import pytest
import torch

from nbkit.kernels import _launch
from nbkit.kernels import add_rms_norm as arn
from nbkit.kernels import layer_norm as ln
from nbkit.kernels import rms_norm as rms
from tests.kernels.test_raw import DEVICE, DTYPES, ON_GPU, bordered, close, untouched

pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_rms_norm_over_its_own_residual(dtype: torch.dtype, offset: float) -> None:
    """s is exactly what a separate addition gives, y what the separate norm gives of it, bit for bit where kernels run."""
    _, x = bordered(6, 40, dtype, 1)
    kept, residual = bordered(6, 40, dtype, 2)
    buffer, out = bordered(6, 40, dtype, 3)
    weight = torch.linspace(0.5, 1.5, 40).to(DEVICE, dtype)
    total = residual + x
    y, root = rms.rms_norm_forward(total, weight, 1e-5, offset=offset, cast=rms.LAST)
    s, ours, rstd = arn.add_rms_norm_forward(x, residual, weight, 1e-5, offset=offset, cast=rms.LAST, total=residual, out=out)
    assert s is residual and ours is out and untouched(kept, 40) and untouched(buffer, 40)
    assert torch.equal(s, total)
    close("y", ours, rms.reference(total.double(), weight.double(), 1e-5, offset=offset, cast=rms.LAST))
    close("rstd", rstd, root.double())
    assert torch.equal(ours, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", [rms.BEFORE_WEIGHT, rms.LAST])
def test_add_rms_norm_the_other_way_round(dtype: torch.dtype, cast: str) -> None:
    """Norm, then add, as sandwich norms do; equal to the separate kernels but for a multiply and add that the compiler fuses."""
    _, x = bordered(5, 33, dtype, 1)
    kept, residual = bordered(5, 33, dtype, 2)
    weight = torch.linspace(-0.5, 1.5, 33).to(DEVICE, dtype)
    y, _ = rms.rms_norm_forward(x, weight, 1e-6, cast=cast)
    expected = residual + y
    s, rstd = arn.rms_norm_add_forward(x, residual, weight, 1e-6, cast=cast, total=residual)
    assert s is residual and untouched(kept, 33)
    torch.testing.assert_close(s, expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    close("rstd", rstd, (x.double().square().mean(-1) + 1e-6).rsqrt())


def test_add_rms_norm_refuses_unlike_rows() -> None:
    x, weight = torch.randn(3, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    with pytest.raises(ValueError, match="must be alike"):
        arn.add_rms_norm(x, x[:2], weight)
    with pytest.raises(ValueError, match=r"residual is \(3, 8\) torch.float16, x \(3, 8\) torch.float32; make them alike"):
        arn.add_rms_norm_forward(x, x.half(), weight, 1e-5)
    with pytest.raises(ValueError, match="'first'"):
        arn.add_rms_norm(x, x, weight, cast="first")


def test_add_rms_norm_without_a_gradient_for_y() -> None:
    """Only s is used later: its gradient passes through whole."""
    x, residual = (torch.randn(4, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    s, _ = arn.add_rms_norm(x, residual, torch.ones(16, device=DEVICE))
    s.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(residual.grad, torch.ones_like(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_backward_adds_to_the_residual(dtype: torch.dtype) -> None:
    _, x = bordered(21, 24, dtype, 1)
    _, dy = bordered(21, 24, dtype, 2)
    buffer, residual = bordered(21, 24, dtype, 3)
    target, out = bordered(21, 24, dtype, 4)
    weight, bias = torch.linspace(-0.5, 0.5, 24).to(DEVICE, dtype), torch.linspace(0, 1, 24).to(DEVICE, dtype)
    leaf, w, b = (t.double().requires_grad_() for t in (x, weight, bias))
    truth = ln.reference(leaf, w, b, 1e-6)
    truth.backward(dy.double())
    expected = leaf.grad + residual.double()
    y, mean, rstd = ln.layer_norm_forward(x, weight, bias, 1e-6, out=out)
    assert y is out and untouched(target, 24)
    close("y", y, truth)
    dx, dw, db = ln.layer_norm_backward(dy, x, weight, mean, rstd, add_to=residual, weight_grad=True)
    assert dx is residual and untouched(buffer, 24)
    close("dx", dx, expected)
    assert dw is not None and db is not None and dw.dtype == db.dtype == torch.promote_types(mean.dtype, torch.float32)
    close("dweight", dw, w.grad)
    close("dbias", db, b.grad)
    fresh, *none = ln.layer_norm_backward(dy, x, weight, mean, rstd)
    assert none == [None, None]
    close("dx alone", fresh, leaf.grad)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_layer_norm_frozen_parts_and_no_bias(frozen: str) -> None:
    x = torch.randn(4, 16, device=DEVICE, requires_grad=True)
    weight = torch.rand(16, device=DEVICE, requires_grad=frozen == "bias")
    bias = torch.rand(16, device=DEVICE, requires_grad=frozen == "weight")
    ln.layer_norm(x, weight, bias).square().sum().backward()
    assert (weight.grad is None) == (frozen != "bias") and (bias.grad is None) == (frozen != "weight")
    plain = ln.layer_norm(x, weight)
    close("without bias", plain, torch.nn.functional.layer_norm(x.double(), (16,), weight.double(), None, 1e-5))
    plain.sum().backward()


def test_layer_norm_refuses_weights_of_another_width() -> None:
    x = torch.randn(3, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"bias is \(4,\); for x \(3, 8\) it must be \(8,\)"):
        ln.layer_norm(x, torch.ones(8, device=DEVICE), torch.ones(4, device=DEVICE))
    if _launch.use_triton(x):
        with pytest.raises(ValueError, match="stride 1 along D"):
            ln.layer_norm_forward(x.t(), torch.ones(3, device=DEVICE), None, 1e-5)
