"""The layer's attention: each implementation's forward and backward against the formulas in float64 through autograd."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nbkit.models import attention, attention_flex, attention_plain
from nbkit.models.attention import Attend, Documents, Shapes, backward, choose, forward, of_heads

SIZES = {"odd": (2, 4, 2, 13, 8), "one token": (1, 2, 2, 1, 8), "many groups": (1, 6, 1, 9, 16)}


def tensors(b, h, g, t, k, dtype=torch.float64, device="cpu"):
    """q, k, v as views of one (B, T, heads, K) buffer, and an upstream gradient with strides of its own."""
    make = torch.Generator().manual_seed(0)
    x = torch.randn(b, t, h + 2 * g, k, generator=make).to(device, dtype).transpose(1, 2)
    do = torch.randn(b, t, h, k, generator=make).to(device, dtype).transpose(1, 2)
    return x[:, :h], x[:, h : h + g], x[:, h + g :], do


def truth(how, q, k, v, do, mask=None):
    """out, dq, dk, dv by autograd in float64, all scores at once."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    rep = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(rep, 1).transpose(-1, -2) * how.scale
    if how.softcap:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    if mask is None:
        mask = visible(how, *q.shape[::2], q.device)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    out = scores.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(rep, 1)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), do.double())


def visible(how, b, t, device):
    place = torch.arange(t, device=device)
    distance = place[:, None] - place[None]
    seen = ((distance >= 0) & (distance < (how.window or t))).expand(b, 1, t, t)
    if how.documents is not None:
        every = torch.arange(b * t, device=device)
        which = (every[:, None] >= how.documents.starts[None].to(device)).sum(-1).view(b, 1, t)
        seen = seen & (which[..., :, None] == which[..., None, :])
    return seen


def pack(*lengths, device="cpu", longest=None):
    starts = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return Documents(starts, longest or max(lengths))


def check(how, mask, q, k, v, do, tolerance):
    out, kept, numbers = forward(how, q, k, v, mask)
    grads = backward(how, do, q, k, v, out, mask, kept, numbers)
    for name, mine, right in zip(("out", "dq", "dk", "dv"), (out, *grads), truth(how, q, k, v, do, mask), strict=True):
        assert mine.shape == right.shape
        error = float((mine.double() - right).norm() / max(right.norm(), do.double().norm()))
        assert error < tolerance, f"{name} of {how.kind}: {error:.1e}"
    return out, kept, numbers, grads


# -- the formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("tile", [attention_plain.TILE_BYTES, 700])
def test_plain(sizes, window, softcap, tile, monkeypatch):
    monkeypatch.setattr(attention_plain, "TILE_BYTES", tile)
    how = Attend("plain", sizes[-1] ** -0.5, window if window and window < sizes[3] else None, softcap=softcap)
    check(how, None, *tensors(*sizes), 1e-12)


@pytest.mark.parametrize("tile", [attention_plain.TILE_BYTES, 2000, 1])
@pytest.mark.parametrize("window", [None, 3])
def test_plain_with_documents(window, tile, monkeypatch):
    monkeypatch.setattr(attention_plain, "TILE_BYTES", tile)
    how = Attend("plain", 0.4, window, documents=pack(5, 1, 0, 7), softcap=1.5)
    check(how, None, *tensors(1, 4, 2, 13, 8), 1e-12)
    how = Attend("plain", 0.4, window, documents=pack(13, 2, 11, longest=20))  # two rows, one of them two documents
    check(how, None, *tensors(2, 4, 2, 13, 8), 1e-12)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("tile", [attention_plain.TILE_BYTES, 3000])
def test_plain_with_boolean_and_additive_masks(softcap, tile, monkeypatch):
    monkeypatch.setattr(attention_plain, "TILE_BYTES", tile)
    q, k, v, do = tensors(2, 4, 2, 13, 8)
    how = Attend("plain", 8**-0.5, softcap=softcap)
    seen = visible(how, 2, 13, "cpu").clone()
    seen[0, :, :, :3] = False
    seen[0, :, :3] |= torch.eye(13, dtype=torch.bool)[:3]
    seen[1, :, 4, 9] = True  # a given mask need not be causal
    check(how, seen, q, k, v, do, 1e-12)
    check(how, torch.randn(2, 4, 13, 13).masked_fill(~seen, -math.inf), q, k, v, do, 1e-12)
    check(how, torch.ones(1, 1, 1, 13, dtype=torch.bool), q, k, v, do, 1e-12)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_a_query_that_may_look_nowhere_gives_zeros(softcap):
    how = Attend("plain", 8**-0.5, softcap=softcap)
    seen = visible(how, 1, 5, "cpu").clone()
    seen[..., 2, :] = False
    q, k, v, do = tensors(1, 2, 2, 5, 8)
    out, kept, numbers = forward(how, q, k, v, seen)
    assert out[:, :, 2].abs().max() == 0
    dq, dk, dv = backward(how, do, q, k, v, out, seen, kept, numbers)
    assert dq[:, :, 2].abs().max() == 0 and dk.isfinite().all() and dv.isfinite().all()


class Largest(TorchDispatchMode):
    """Remembers how many bytes the largest tensor has that any operator gives."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.numel() * x.element_size())
        return found


@pytest.mark.parametrize("window", [None, 16])
def test_plain_never_holds_all_scores(window, monkeypatch):
    monkeypatch.setattr(attention_plain, "TILE_BYTES", 100_000)
    q, k, v, do = tensors(1, 4, 2, 600, 8, torch.float32)
    how = Attend("plain", 0.3, window, softcap=2.0)
    with Largest() as seen:
        out, kept, numbers = forward(how, q, k, v, None)
        backward(how, do, q, k, v, out, None, kept, numbers)
    assert 20_000 < seen.size <= 100_000  # all scores: 5,760,000


def test_plain_on_16_bits_is_as_exact_as_its_output():
    for dtype, tolerance in ((torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        check(Attend("plain", 0.3, 30, softcap=5.0), None, *tensors(1, 4, 2, 70, 16, dtype), tolerance)


# -- FlexAttention: on a CPU its operators run as they stand, which tells whether they are given the right things ----------------


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_flex(sizes, window, softcap):
    how = Attend("flex", sizes[-1] ** -0.5, window, softcap=softcap)
    out, kept, numbers, _ = check(how, None, *tensors(*sizes), 1e-12)
    lse = attention_plain.forward(how, *tensors(*sizes)[:3], None)[1]
    assert torch.allclose(attention_flex.natural(kept[0], sizes[0], sizes[3]), lse, atol=1e-12)


def test_flex_with_documents_and_for_some_of_the_heads():
    how = Attend("flex", 0.4, 3, documents=pack(5, 1, 0, 7, 140), softcap=1.5)
    q, k, v, do = tensors(1, 4, 2, 153, 8)
    out, kept, numbers, grads = check(how, None, q, k, v, do, 1e-12)
    assert len(how.documents.sights) == 1  # made once for forward and backward
    mine, kv = slice(2, 4), slice(1, 2)
    some = of_heads(how, kept, mine)
    parts = backward(how, do[:, mine], q[:, mine], k[:, kv], v[:, kv], out[:, mine], None, some, numbers)
    for part, whole in zip(parts, (grads[0][:, mine], grads[1][:, kv], grads[2][:, kv]), strict=True):
        assert torch.allclose(part, whole, atol=1e-12)


def test_what_flex_compiles_is_traced_within_a_forward_and_a_backward_without_autograd(monkeypatch):
    """As on a GPU, save that the traced operators then run as they stand."""
    how = Attend("flex", 0.3, 20, softcap=0.7)
    inputs = tensors(2, 4, 2, 70, 8)
    graphs = []

    def call(function, how, given, seen):
        args = (*given, seen.first, *seen.blocks)
        graphs.append(attention_flex._traced(function(how.scale, how.softcap), args))
        return graphs[-1](*args)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, ctx.kept, ctx.numbers = forward(how, q, k, v, None)
            ctx.save_for_backward(q, k, v, out)
            return out

        @staticmethod
        def backward(ctx, do):
            def never(*args, **kwargs):
                raise AssertionError("autograd within a backward")

            with monkeypatch.context() as m:
                m.setattr(torch.autograd, "grad", never)
                m.setattr(torch.autograd, "backward", never)
                *saved, out = ctx.saved_tensors
                return backward(how, do, *saved, out, None, ctx.kept, ctx.numbers)

    monkeypatch.setattr(attention_flex, "_call", call)
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    Node.apply(q, k, v).backward(inputs[3])
    for x, right in zip((q, k, v), truth(how, *inputs)[1:], strict=True):
        assert torch.allclose(x.grad, right, atol=1e-12)
    assert len(graphs) == 2 and all("flex_attention" in g.code for g in graphs)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize("lengths", [(1000,), (128, 256, 384), (1, 200, 0, 3, 500, 257), (64,) * 11])
def test_the_blocks_of_flex_hold_just_what_may_be_seen(lengths, window):
    tokens = sum(lengths)
    rows = attention_flex.length(tokens)
    first = attention_flex.first_keys(1, tokens, rows, window, pack(*lengths).starts, torch.device("cpu"))
    place = torch.arange(rows)
    seen = (place[None] <= place[:, None]) & (place[None] >= first[:, None])
    assert torch.equal(seen[:tokens, :tokens], visible(Attend("", 1.0, window, documents=pack(*lengths)), 1, tokens, "cpu")[0, 0])
    assert not seen[:tokens, tokens:].any() and not seen[tokens:, :tokens].any() and seen.any(1).all()
    tiles = seen.view(rows // 128, 128, rows // 128, 128)
    some, whole = tiles.any(3).any(1), tiles.all(3).all(1)
    given = attention_flex.blocks_of(first)
    for (number, index), right in zip(
        zip(given[::2], given[1::2], strict=True), (some & ~whole, whole, (some & ~whole).T, whole.T), strict=True
    ):
        assert number.dtype == index.dtype == torch.int32 and int(index.min()) >= 0 and int(index.max()) < rows // 128
        for i, row in enumerate(right):
            n = int(number[0, 0, i])
            assert index[0, 0, i, :n].tolist() == row.nonzero().flatten().tolist()


def test_rows_of_a_batch_do_not_see_each_other_in_flex():
    first = attention_flex.first_keys(3, 50, 256, 20, None, torch.device("cpu"))
    assert first[49] == 30 and first[50] == 50 and first[149] == 130 and first[150] == 150 and first[255] == 255


def test_lengths_of_flex_are_few_and_not_much_longer():
    lengths = [attention_flex.length(n) for n in range(1, 20000)]
    assert all(n <= found and found % 128 == 0 for n, found in enumerate(lengths, 1)) and lengths == sorted(lengths)
    assert all(found <= max(128, 1.25 * n + 128) for n, found in enumerate(lengths, 1))
    assert len(set(lengths)) < 30 and attention_flex.length(4096) == 4096


def test_where_flex_cannot_be_compiled_the_formulas_run_and_it_is_said(monkeypatch):
    def fail(*args):
        raise attention_flex.NotCompiled("no compiler")

    how = Attend("flex", 0.3, 5, softcap=2.0)
    inputs = tensors(2, 4, 2, 13, 8)
    with monkeypatch.context() as m:
        m.setattr(attention_flex, "_call", fail)
        check(how, None, *inputs, 1e-12)
    q, k, v, do = inputs
    out, kept, numbers = forward(how, q, k, v, None)
    monkeypatch.setattr(attention_flex, "_call", fail)  # the forward's kernel was there, the backward's is not
    grads = backward(how, do, q, k, v, out, None, kept, numbers)
    for mine, right in zip(grads, truth(how, q, k, v, do)[1:], strict=True):
        assert torch.allclose(mine, right, atol=1e-12)


def test_a_failed_compilation_is_warned_of_once_and_remembered(monkeypatch):
    monkeypatch.setattr(attention_flex, "_trouble", [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def broken(x):
        raise RuntimeError("disk full\nmore")

    said = pytest.warns(UserWarning, match="could not be compiled: disk full; attention")
    with said, pytest.raises(attention_flex.NotCompiled):
        attention_flex._compile(broken, (torch.zeros(1),))
    with warnings.catch_warnings(), pytest.raises(attention_flex.NotCompiled, match="disk full"):
        warnings.simplefilter("error")
        attention_flex._compile(broken, (torch.zeros(1),))
    assert attention_flex.trouble() == "FlexAttention could not be compiled: disk full"


# -- the choice -------------------------------------------------------------------------------------------------------------


def test_the_choice_on_a_cpu_is_plain_and_drops_a_window_as_long_as_the_sequence():
    like = torch.zeros(1)
    how = choose((1, 4, 16, 64), like, scale=1.0, mask=None, window=16, shapes=Shapes())
    assert how.kind == "plain" and how.window is None and "cpu" in how.why
    assert choose((1, 4, 17, 64), like, scale=1.0, mask=None, window=16, shapes=Shapes()).window == 16
    how = choose((1, 4, 17, 64), like, scale=1.0, mask=None, window=9, shapes=Shapes(), documents=pack(8, 9), softcap=3.0)
    assert how.window is None and how.softcap == 3.0 and how.documents is not None


CHOICES = [  # capability, head, window, packed, masked, softcap, kind
    (7, 64, None, False, False, None, "efficient"),
    (7, 64, 8, False, False, None, "efficient window"),
    (7, 64, 8, True, False, None, "efficient documents"),
    (7, 256, 8, False, False, None, "plain"),
    (7, 256, None, True, False, None, "efficient documents"),
    (7, 64, None, False, False, 5.0, "plain"),
    (8, 64, None, False, False, None, "flash"),
    (8, 64, 8, False, False, None, "flash"),
    (8, 64, 8, True, False, None, "flash documents"),
    (8, 64, None, False, True, None, "efficient"),
    (8, 64, 8, True, False, 5.0, "flex"),
    (8, 8, None, False, False, 5.0, "plain"),
    (9, 64, None, False, True, 5.0, "plain"),
    (9, 68, None, False, False, None, "plain"),
    (9, 256, None, False, False, None, "flash"),
    (9, 64, None, False, False, None, "cudnn"),
]


@pytest.mark.parametrize("case", CHOICES, ids=lambda c: "-".join(map(str, c)))
def test_the_choice_by_capability(case, monkeypatch):
    major, head, window, packed, masked, softcap, kind = case
    monkeypatch.setattr(attention, "capability_of", lambda x: (major, 0))
    like, shapes = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16), Shapes()
    for _ in range(2):
        shapes.begin()
        how = choose(
            (1, 4, 32, head), like, scale=1.0, mask=torch.ones(1) if masked else None, window=window, shapes=shapes,
            documents=pack(12, 20) if packed else None, softcap=softcap,
        )  # fmt: skip
    assert how.kind == kind and how.why and how.softcap == softcap and how.window == (None if masked else window)


def test_a_shape_gets_a_plan_in_its_second_forward(monkeypatch):
    monkeypatch.setattr(attention, "capability_of", lambda x: (9, 0))
    like, shapes = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16), Shapes()
    kinds = []
    for t in (64, 64, 80, 64):
        shapes.begin()
        layers = [choose((1, 4, t, 64), like, scale=1.0, mask=None, window=None, shapes=shapes) for _ in range(3)]
        assert layers[0] is layers[1] is layers[2]
        kinds.append(layers[0].kind)
    assert kinds == ["flash", "cudnn", "flash", "cudnn"]


def test_deterministic_algorithms_leave_cudnn_out(monkeypatch):
    monkeypatch.setattr(attention, "capability_of", lambda x: (9, 0))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    like, shapes = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16), Shapes()
    for _ in range(2):
        shapes.begin()
        assert choose((1, 4, 64, 64), like, scale=1.0, mask=None, window=None, shapes=shapes).kind == "flash"


# -- on a GPU ---------------------------------------------------------------------------------------------------------------


def tolerance(dtype):
    return 2e-2 if dtype == torch.bfloat16 else 3e-3


def assert_repeats(how, q, k, v, do):
    """Holds a second run to the bits of the first, gradients included."""

    def run():
        out, kept, numbers = forward(how, q, k, v, None)
        return out, *backward(how, do, q, k, v, out, None, kept, numbers)

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 8, 2, 77, 64), (1, 4, 4, 256, 128), (3, 6, 2, 1, 64)])
def test_implementations_of_a_gpu(sizes, dtype):
    q, k, v, do = tensors(*sizes, dtype=dtype, device="cuda")
    scale, t = sizes[-1] ** -0.5, sizes[3]
    with_cudnn = torch.cuda.get_device_capability()[0] >= 9 and t > 1
    for kind in ("cudnn", "flash", "efficient", "plain") if with_cudnn else ("flash", "efficient", "plain"):
        check(Attend(kind, scale), None, q, k, v, do, tolerance(dtype))
    if t > 1:
        check(Attend("flash", scale, 30), None, q, k, v, do, tolerance(dtype))
        masked = visible(Attend("", 1.0), sizes[0], t, "cuda").clone()
        masked[0, :, 5:, :5] = False
        check(Attend("efficient", scale), masked, q, k, v, do, tolerance(dtype))


WINDOWED = {"short": (2, 8, 2, 77, 64, 30), "long": (1, 8, 2, 1111, 128, 256), "of one": (2, 4, 1, 200, 64, 1)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", WINDOWED.values(), ids=WINDOWED)
def test_windows_of_the_memory_efficient_kernel(sizes, dtype):
    inputs = tensors(*sizes[:5], dtype=dtype, device="cuda")
    check(Attend("efficient window", sizes[4] ** -0.5, sizes[5]), None, *inputs, tolerance(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("kind", ["efficient documents", "flash documents", "flex", "plain"])
def test_documents_on_a_gpu(kind, window):
    documents = pack(130, 1, 300, 0, 269, device="cuda")
    inputs = tensors(1, 8, 2, 700, 64, dtype=torch.float16, device="cuda")
    how = Attend(kind, 0.125, window, documents=documents)
    out, kept, numbers, grads = check(how, None, *inputs, 3e-3)
    q, k, v, do = inputs
    mine, kv = slice(4, 8), slice(1, 2)
    parts = backward(how, do[:, mine], q[:, mine], k[:, kv], v[:, kv], out[:, mine], None, of_heads(how, kept, mine), numbers)
    for part, whole in zip(parts, (grads[0][:, mine], grads[1][:, kv], grads[2][:, kv]), strict=True):
        assert torch.allclose(part, whole, atol=2e-3, rtol=2e-2)


FLEX = {  # few, since each costs two compilations
    "causal": (2, 8, 2, 77, 64, None, 30.0, torch.bfloat16),
    "window, odd heads": (2, 3, 1, 333, 80, 100, 3.0, torch.float16),
    "wide heads": (1, 4, 2, 256, 256, None, 50.0, torch.bfloat16),
    "one token, no softcap": (1, 4, 4, 1, 128, None, None, torch.float16),
}


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", FLEX.values(), ids=FLEX)
def test_flex_compiled(sizes):
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("FlexAttention is chosen on Ampere and newer")
    *shape, window, softcap, dtype = sizes
    how = Attend("flex", shape[-1] ** -0.5, window, softcap=softcap)
    inputs = tensors(*shape, dtype=dtype, device="cuda")
    inputs[0].mul_(4)  # so that the softcap is felt
    given = check(how, None, *inputs, tolerance(dtype))
    assert attention_flex.trouble() is None and given[2] != ()
    assert_repeats(how, *inputs)
    plain = Attend("plain", how.scale, window, softcap=softcap)
    check(plain, None, *inputs, tolerance(dtype))
    assert_repeats(plain, *inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind", ["flash", "cudnn", "efficient window", "flash documents", "efficient documents", "flex", "plain"]
)
def test_every_kind_can_be_recorded(kind):
    """Forward and backward within a CUDA graph, replayed on other inputs and other documents of the same number."""
    if kind == "cudnn" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("cuDNN attention is chosen on Hopper and newer")
    packed = "documents" in kind or kind == "flex"
    starts = torch.tensor([0, 100, 300, 400], dtype=torch.int32, device="cuda")
    softcap = 3.0 if kind in ("flex", "plain") else None
    window = None if kind == "cudnn" else 64

    def attend():
        return Attend(kind, 0.125, window, documents=Documents(starts, 400) if packed else None, softcap=softcap)

    def step(q, k, v, do):
        how = attend()
        out, kept, numbers = forward(how, q, k, v, None)
        return out, *backward(how, do, q, k, v, out, None, kept, numbers)

    inputs = tensors(1, 4, 2, 400, 64, torch.float16, "cuda")
    step(*inputs)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = step(*inputs)
    for x in inputs:
        x.copy_(x.flip(2))
    if packed:
        starts.copy_(torch.tensor([0, 30, 310, 400]))
    graph.replay()
    for name, mine, right in zip(("out", "dq", "dk", "dv"), found, truth(attend(), *inputs), strict=True):
        error = float((mine.double() - right).norm() / right.norm())
        assert error < 3e-3, f"{name} of {kind}: {error:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["flash", "efficient window", "flash documents", "efficient documents"])
def test_deterministic_algorithms_give_the_same_bits(kind):
    how = Attend(kind, 0.125, 100, documents=pack(300, 700, device="cuda") if "documents" in kind else None)
    inputs = tensors(1, 8, 2, 1000, 64, torch.float16, "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        assert_repeats(how, *inputs)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_plain_memory_on_a_gpu_is_bounded():
    q, k, v, do = tensors(1, 8, 2, 8192, 64, torch.float16, "cuda")
    how = Attend("plain", 0.125, 1024)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, kept, numbers = forward(how, q, k, v, None)
    backward(how, do, q, k, v, out, None, kept, numbers)
    assert torch.cuda.max_memory_allocated() - before < 6 * attention_plain.TILE_BYTES  # all scores: 2 GiB


@pytest.mark.gpu
def test_a_shape_gets_a_plan_when_it_comes_again():
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("cuDNN attention is chosen on Hopper and newer")
    like, shapes, kinds = torch.zeros(1, device="cuda", dtype=torch.bfloat16), Shapes(), []
    for _ in range(2):
        shapes.begin()
        kinds.append(choose((1, 4, 64, 64), like, scale=1.0, mask=None, window=None, shapes=shapes).kind)
    assert kinds == ["flash", "cudnn"]
