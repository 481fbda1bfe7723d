"""The layer's attention: each implementation's forward and backward against PyTorch's own through autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nbkit.models.attention import Attend, Shapes, backward, choose, forward

SIZES = {"odd": (2, 4, 2, 13, 8), "one token": (1, 2, 2, 1, 8), "many groups": (1, 6, 1, 9, 16)}


def tensors(b, h, g, t, k, dtype=torch.float64, device="cpu"):
    """q, k, v as views of one (B, T, heads, K) buffer, and an upstream gradient with strides of its own."""
    make = torch.Generator().manual_seed(0)
    x = torch.randn(b, t, h + 2 * g, k, generator=make).to(device, dtype).transpose(1, 2)
    do = torch.randn(b, t, h, k, generator=make).to(device, dtype).transpose(1, 2)
    return x[:, :h], x[:, h : h + g], x[:, h + g :], do


def truth(q, k, v, do, allowed):
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    out.backward(do.double())
    return out.detach(), q.grad, k.grad, v.grad


def allowed(t, window=None, device="cpu"):
    place = torch.arange(t, device=device)
    distance = place[:, None] - place[None]
    return (distance >= 0) & (distance < (window or t))


def check(how, mask, q, k, v, do, visible, tolerance):
    out, kept, numbers = forward(how, q, k, v, mask)
    grads = backward(how, do, q, k, v, out, mask, kept, numbers)
    for name, mine, right in zip(("out", "dq", "dk", "dv"), (out, *grads), truth(q, k, v, do, visible), strict=True):
        assert mine.shape == right.shape
        error = float((mine.double() - right).norm() / max(right.norm(), do.double().norm()))
        assert error < tolerance, f"{name} of {how.kind}: {error:.1e}"


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("window", [None, 1, 4])
def test_plain(sizes, window):
    q, k, v, do = tensors(*sizes)
    how = Attend("plain", sizes[-1] ** -0.5, window if window and window < sizes[3] else None)
    check(how, None, q, k, v, do, allowed(sizes[3], how.window), 1e-12)


def test_plain_with_boolean_and_additive_masks():
    q, k, v, do = tensors(2, 4, 2, 13, 8)
    visible = allowed(13)[None, None].repeat(2, 1, 1, 1)
    visible[0, :, :, :3] = False
    visible[0, :, :3] |= torch.eye(13, dtype=torch.bool)[:3]
    how = Attend("plain", 8**-0.5)
    check(how, visible, q, k, v, do, visible, 1e-12)
    check(how, torch.zeros(visible.shape).masked_fill(~visible, -math.inf), q, k, v, do, visible, 1e-12)


def test_a_query_that_may_look_nowhere_gives_zeros():
    q, k, v, do = tensors(1, 2, 2, 5, 8)
    visible = allowed(5)[None, None].clone()
    visible[..., 2, :] = False
    how = Attend("plain", 8**-0.5)
    out, kept, numbers = forward(how, q, k, v, visible)
    assert out[:, :, 2].abs().max() == 0
    assert all(g.isfinite().all() for g in backward(how, do, q, k, v, out, visible, kept, numbers))


def test_the_choice_on_a_cpu_is_plain_and_drops_a_window_as_long_as_the_sequence():
    like = torch.zeros(1)
    how = choose((1, 4, 16, 64), like, scale=1.0, mask=None, window=16, shapes=Shapes())
    assert how.kind == "plain" and how.window is None and "cpu" in how.why
    assert choose((1, 4, 17, 64), like, scale=1.0, mask=None, window=16, shapes=Shapes()).window == 16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 8, 2, 77, 64), (1, 4, 4, 256, 128), (3, 6, 2, 1, 64)])
def test_implementations_of_a_gpu(sizes, dtype):
    q, k, v, do = tensors(*sizes, dtype=dtype, device="cuda")
    scale, t = sizes[-1] ** -0.5, sizes[3]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    visible = allowed(t, device="cuda")
    with_cudnn = torch.cuda.get_device_capability()[0] >= 9 and t > 1
    for kind in ("cudnn", "flash", "efficient") if with_cudnn else ("flash", "efficient"):
        check(Attend(kind, scale), None, q, k, v, do, visible, tolerance)
    if t > 1:
        check(Attend("flash", scale, 30), None, q, k, v, do, allowed(t, 30, "cuda"), tolerance)
        masked = visible[None, None].repeat(sizes[0], 1, 1, 1)
        masked[0, :, 5:, :5] = False
        check(Attend("efficient", scale), masked, q, k, v, do, masked, tolerance)


@pytest.mark.gpu
def test_a_shape_gets_a_plan_when_it_comes_again():
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("cuDNN attention is chosen on Hopper and newer")
    like, shapes = torch.zeros(1, device="cuda", dtype=torch.bfloat16), Shapes()
    kinds = [choose((1, 4, 64, 64), like, scale=1.0, mask=None, window=None, shapes=shapes).kind for _ in range(2)]
    assert kinds == ["flash", "cudnn"]
