"""Where kernels run; that the folder is the list of ops; that all of it works where there is no triton."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbkit import kernels
from nbkit.kernels import _launch, all_ops

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as on native Windows: importing it raises ImportError
import torch
from nbkit.kernels import _launch, all_ops
assert _launch.triton is None and not _launch.runs_on(torch.device("cpu")) and not _launch.runs_on(torch.device("cuda"))
for op in all_ops():
    case = op.cases[0]
    inputs = op.inputs(case, torch.float32, "cpu", 0)
    leaves = {k: v.detach().requires_grad_() if k in op.gradients else v for k, v in inputs.items()}
    out = op.fn(**leaves, **case.options)
    if op.gradients:
        out.sum().backward()
        assert all(leaves[name].grad is not None for name in op.gradients)
    assert torch.allclose(out, op.reference(**inputs, **case.options), atol=1e-5)
    print(op.name)
"""


def test_every_op_works_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [op.name for op in all_ops()]


def test_the_folder_is_the_list() -> None:
    files = sorted(m.name for m in pkgutil.iter_modules(kernels.__path__) if not m.name.startswith("_"))
    assert [op.name for op in all_ops()] == files
    for op in all_ops():
        assert op.fn.__module__ == f"nbkit.kernels.{op.name}" and callable(importlib.import_module(op.fn.__module__).OP.fn)
        assert op.cases and op.benchmark
        assert len({case.reason for case in op.cases}) == len(op.cases), f"{op.name}: two cases give the same reason"
        inputs = op.inputs(op.cases[0], torch.float32, "cpu", 0)
        assert set(op.gradients) <= set(inputs)


@pytest.mark.skipif(_launch.INTERPRETED, reason="CPU tensors take the kernels here")
def test_the_cpu_and_float64_take_the_plain_path() -> None:
    assert not _launch.use_triton(torch.ones(2))
    assert not _launch.use_triton(torch.ones(2, dtype=torch.float64))


def test_old_gpus_take_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for capability, runs in (((6, 1), False), ((7, 0), True), ((7, 5), True), ((12, 0), True)):
        monkeypatch.setattr(_launch, "_capability", lambda index, c=capability: c)
        assert _launch.runs_on(torch.device("cuda", 0)) is runs


def test_rows_are_views_where_they_can_be() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert _launch.as_rows(x).data_ptr() == x.data_ptr()
    part = x[..., :2]
    assert _launch.as_rows(part).shape == (6, 2) and _launch.as_rows(part).data_ptr() == x.data_ptr()
    turned = x.transpose(1, 2)
    assert torch.equal(_launch.as_rows(turned), turned.reshape(-1, 3)) and _launch.as_rows(turned).stride(1) == 1
    assert _launch.as_rows(torch.ones(3, 1).expand(3, 5)).stride(1) == 1
    assert [_launch.power_of_two(n) for n in (1, 2, 3, 576, 1024)] == [1, 2, 4, 1024, 1024]


# -- the lean launcher -----------------------------------------------------------------------------


class Compiled:
    """Stands for a compiled kernel: says in `calls` what its launch was given."""

    packed_metadata, function = ("packed",), "function"

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def run(self, *args: Any) -> None:
        self.calls.append(("lean", *args))


class Jitted:
    """Stands for a `triton.jit` function of X, Y, n, eps, flag and two constants."""

    __name__ = "fake"
    params = tuple(
        SimpleNamespace(name=n, is_constexpr=n.isupper() and len(n) > 1) for n in ("X", "Y", "n", "eps", "ADD", "BLOCK")
    )
    arg_names = tuple(p.name for p in params)

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **keywords: Any) -> Compiled:
            self.calls.append(("ordinary", grid, args, keywords))
            return Compiled(self.calls)

        return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> _launch.Launcher:
    """A launcher of a kernel that only records; CPU tensors are its device's (-1), whose stream is 77."""
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=None)
    monkeypatch.setattr(_launch, "_driver", lambda: (lambda: -1, lambda device: 77, hooks))
    made = _launch.Launcher(Jitted())
    made.hooks = hooks  # type: ignore[attr-defined]
    return made


def how(launcher: _launch.Launcher, *args: Any, **keywords: Any) -> str:
    launcher[(3,)](*args, **({"ADD": True, "BLOCK": 8, "num_warps": 4} | keywords))
    return launcher.jit.calls[-1][0]


def test_a_second_launch_calls_the_compiled_kernel(fake: _launch.Launcher) -> None:
    x, y = torch.zeros(64), torch.zeros(64)
    fake[(3, 2)](x, y, 5, 0.5, ADD=True, BLOCK=8, num_warps=4)
    fake[(7, 2)](y, x, 9, 0.25, ADD=True, BLOCK=8, num_warps=4)
    ordinary, lean = fake.jit.calls
    assert ordinary == ("ordinary", (3, 2), (x, y, 5, 0.5), {"ADD": True, "BLOCK": 8, "num_warps": 4})
    addresses = (y.data_ptr(), x.data_ptr())
    assert lean == ("lean", 7, 2, 1, 77, "function", ("packed",), None, None, None, *addresses, 9, 0.25, True, 8)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (5, 6, True), (5, 1, False), (1, 1, True), (16, 5, False), (16, 0, True), (16, -32, True), (5, -3, True),
        (5, 2**31, False), (2**31 + 16, 2**31, True), (2**31, 2**31 + 1, False), (2**31, 2**63, False), (16, 2**31, False),
        (1, True, False), (1, 1.0, False), (True, False, True), (5, 5.0, False), (None, 5, False),
    ],
)  # fmt: skip
def test_numbers_are_told_apart_as_triton_does(fake: _launch.Launcher, first: Any, second: Any, same: bool) -> None:
    x = torch.zeros(64)
    assert how(fake, x, x, first, 0.5) == "ordinary" and how(fake, x, x, first, 0.5) == "lean"
    assert how(fake, x, x, second, 0.5) == ("lean" if same else "ordinary")


def test_the_key_tells_apart_what_triton_compiles_apart(fake: _launch.Launcher) -> None:
    """Triton's own specialisation, asked for the same values: equal there exactly where the key is equal."""
    specialize = pytest.importorskip("triton.runtime.jit").native_specialize_impl
    backend = pytest.importorskip("triton.backends.nvidia.compiler").CUDABackend
    values = [0, 1, 2, -1, 15, 16, -16, 48, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 16]
    floats, buffer = [0.0, 1.0, 0.5, -3e38], torch.zeros(64)
    tensors = [
        t for d in (torch.float32, torch.float16, torch.uint8) for t in (buffer.to(d), buffer.to(d)[1:], buffer.to(d)[16:])
    ]
    every = [*values, *floats, True, False, None, *tensors]
    theirs = [specialize(backend, value, False, True, True) for value in every]
    ours = []
    for value in every:
        fake.made.clear()
        fake[(1,)](buffer, value, 3, 0.5, ADD=True, BLOCK=8)
        ours.append(next(iter(fake.made)))
    for i, a in enumerate(every):
        for j, b in enumerate(every):
            if theirs[i] != theirs[j]:
                assert ours[i] != ours[j], f"{a!r} and {b!r} need kernels of their own"
            else:
                assert ours[i] == ours[j], f"{a!r} and {b!r} can share a kernel"


def test_tensors_are_told_apart_by_dtype_and_alignment(fake: _launch.Launcher) -> None:
    x = torch.zeros(64)
    assert how(fake, x, x, 5, 0.5) == "ordinary"
    assert how(fake, x[4:], x[8:], 5, 0.5) == "lean"
    assert how(fake, x[1:], x, 5, 0.5) == "ordinary" and how(fake, x, x[1:], 5, 0.5) == "ordinary"
    assert how(fake, x[3:], x, 5, 0.5) == "lean"
    assert how(fake, x.half(), x, 5, 0.5) == "ordinary"
    assert how(fake, torch.nn.Parameter(x), x, 5, 0.5) == "lean"


def test_constants_options_and_devices_are_told_apart(fake: _launch.Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(64)
    assert how(fake, x, x, 5, 0.5) == "ordinary"
    for change in ({"ADD": False}, {"BLOCK": 16}, {"num_warps": 8}, {"num_stages": 4}):
        assert how(fake, x, x, 5, 0.5, **change) == "ordinary" and how(fake, x, x, 5, 0.5, **change) == "lean"
    other = (lambda: 1, lambda device: 78, fake.hooks)  # type: ignore[attr-defined]
    monkeypatch.setattr(_launch, "_driver", lambda: other)
    before = len(fake.made)
    assert how(fake, x, x, 5, 0.5) == "ordinary" and how(fake, x, x, 5, 0.5) == "ordinary", "x is not on device 1"
    assert len(fake.made) == before


def test_a_profilers_hook_sees_every_launch(fake: _launch.Launcher) -> None:
    x = torch.zeros(64)
    assert how(fake, x, x, 5, 0.5) == "ordinary" and how(fake, x, x, 5, 0.5) == "lean"
    fake.hooks.launch_enter_hook.calls.append(print)  # type: ignore[attr-defined]
    assert how(fake, x, x, 5, 0.5) == "ordinary"
    fake.hooks.launch_enter_hook.calls.clear()  # type: ignore[attr-defined]
    fake.hooks.launch_exit_hook = print  # type: ignore[attr-defined]
    assert how(fake, x, x, 5, 0.5) == "ordinary"


def test_arguments_given_the_wrong_way_are_refused(fake: _launch.Launcher) -> None:
    x = torch.zeros(64)
    with pytest.raises(TypeError, match=r"fake: give eps by"):
        fake[(1,)](x, x, 5, eps=0.5, ADD=True, BLOCK=8)
    with pytest.raises(TypeError, match="give BLOCK by"):
        fake[(1,)](x, x, 5, 0.5, ADD=True)
    with pytest.raises(TypeError, match="give ADD by"):
        fake[(1,)](x, x, 5, 0.5, True, BLOCK=8)
    assert not fake.made and not fake.jit.calls


def test_unknown_versions_are_said() -> None:
    assert _launch.launch_note("3.6.0") == _launch.launch_note("3.7.1+git") == ""
    assert "3.6 and 3.7" in _launch.launch_note("3.10.0") and "3.10.0" in _launch.launch_note("3.10.0")
    if _launch.triton is not None:
        assert (_launch.launch_note() == "") == _launch.LEAN


@pytest.mark.skipif(_launch.triton is None or not _launch.LEAN or _launch.INTERPRETED, reason="launches are not lean here")
def test_the_compiled_kernel_is_called_as_triton_calls_it() -> None:
    """What `Launcher` rests on: the parameters of the launch, and that Triton hands it every argument, constants included."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    names = list(inspect.signature(driver.CudaLauncher.__call__).parameters)
    assert names[:6] == ["self", "gridX", "gridY", "gridZ", "stream", "function"] and names[-1] == "args"
    assert names[6:-1] in ([], ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"])


@pytest.mark.skipif(_launch.triton is None or not _launch.LEAN or _launch.INTERPRETED, reason="launches are not lean here")
@pytest.mark.parametrize("scratch", [0, 64])
def test_what_triton_hands_its_launch_is_handed_to_it_here(scratch: int) -> None:
    """Triton's own function in Python between the two is passed by; not where a kernel wants memory that it would take."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    names, calls = list(inspect.signature(driver.CudaLauncher.__call__).parameters), []

    class Run:
        num_ctas, launch_cooperative_grid, launch_pdl = 1, False, True
        global_scratch_size = global_scratch_align = profile_scratch_align = 0
        profile_scratch_size = scratch

        def launch(self, *args: Any) -> None:
            calls.append(args)

        def __call__(self, *args: Any) -> None:
            calls.append("in full")

    if "kernel_metadata" in names:  # from Triton 3.7 on
        Run.arg_annotations, Run.kernel_signature = ("annotations",), b"signature"  # type: ignore[attr-defined]
    run = Run()
    compiled = SimpleNamespace(run=run, function="function", packed_metadata=("packed",))
    found = _launch.Found.of(compiled, (True, 8))
    found.launch(3, 2, 1, 77, *found.before, *found.arguments([1024, 2048, 5, 0.5]))
    if scratch:
        assert calls == ["in full"]
        return
    driver.CudaLauncher.__call__(run, 3, 2, 1, 77, "function", ("packed",), None, None, None, 1024, 2048, 5, 0.5, True, 8)
    ours, theirs = calls
    assert ours == theirs


@pytest.mark.gpu
def test_lean_launches_equal_ordinary_ones() -> None:
    """Numbers that are 1, divisible by 16 or neither, pointers aligned and not, another stream, and a recorded graph."""
    from nbkit.kernels.swiglu import _swiglu_forward_kernel, reference, swiglu_forward

    assert isinstance(_swiglu_forward_kernel, _launch.Launcher), _launch.launch_note()
    for n, f, shift in ((1, 64, 0), (3, 37, 0), (16, 1, 1), (5, 48, 1), (2, 4096, 8)):
        for _ in range(3):  # the first compiles, the others are lean
            buffer = torch.randn(n, 2 * f + shift, device="cuda", dtype=torch.float16)[:, shift:]
            gate, up = buffer[:, :f], buffer[:, f:]
            torch.testing.assert_close(swiglu_forward(gate, up), reference(gate.float(), up.float()).half(), rtol=2e-3, atol=2e-3)
    assert len(_swiglu_forward_kernel.made) >= 3
    gate, up, out = (torch.randn(64, 128, device="cuda", dtype=torch.float16) for _ in range(3))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        swiglu_forward(gate, up, out)
    torch.cuda.current_stream().wait_stream(stream)
    before = len(_swiglu_forward_kernel.made)
    with torch.cuda.graph(graph):
        swiglu_forward(gate, up, out)
    assert len(_swiglu_forward_kernel.made) == before, "the recorded launch was lean"
    gate.copy_(torch.randn_like(gate))
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, reference(gate.float(), up.float()).half(), rtol=2e-3, atol=2e-3)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)cpu tensor|pointer"):
        _swiglu_forward_kernel[(1, 1)](gate.cpu(), up, out, 128, 128, 128, 128, BLOCK=128, num_warps=4)


def prepared(fake: _launch.Launcher, strides_of: tuple[int, ...] = ()) -> tuple[_launch.Prepared, list[str]]:
    """A prepared function of two tensors, and what it was called with in full."""
    calls: list[str] = []

    def fn(x: torch.Tensor, y: torch.Tensor) -> None:
        calls.append("in full")
        fake[(3, 2)](y, x, x.shape[0], 0.5, ADD=True, BLOCK=8, num_warps=4)

    return _launch.Prepared(fn, strides_of), calls


def test_a_prepared_function_goes_straight_to_its_launch(fake: _launch.Launcher) -> None:
    run, calls = prepared(fake)
    buffer = torch.zeros(256)
    for i in range(5):
        run(buffer[16 * i : 16 * i + 12], buffer[16 * i + 100 : 16 * i + 112])
    assert calls == ["in full"] * 2, "the first call compiles, the second shows the launch"
    for i, call in enumerate(fake.jit.calls[1:], 1):
        addresses = (buffer[16 * i + 100 :].data_ptr(), buffer[16 * i :].data_ptr())
        assert call == ("lean", 3, 2, 1, 77, "function", ("packed",), None, None, None, *addresses, 12, 0.5, True, 8)


def test_a_prepared_function_is_called_in_full_where_its_launch_would_be_another(
    fake: _launch.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = prepared(fake, strides_of=(1,))
    x, y = torch.zeros(64), torch.zeros(64, 2)
    for _ in range(3):
        run(x, y)
    assert len(calls) == 2
    run(x[1:], y)  # aligned to 4 bytes, no longer 16
    run(x, y.t())
    assert len(calls) == 4
    fake.hooks.launch_enter_hook.calls.append(print)  # type: ignore[attr-defined]
    run(x, y)
    fake.hooks.launch_enter_hook.calls.clear()  # type: ignore[attr-defined]
    assert len(calls) == 5
    other = (lambda: 1, lambda device: 78, fake.hooks)  # type: ignore[attr-defined]
    monkeypatch.setattr(_launch, "_driver", lambda: other)
    run(x, y)
    assert len(calls) == 6


def test_a_caller_that_looks_once_is_followed(fake: _launch.Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    stand = _launch.Stand()

    def fn(x: torch.Tensor, y: torch.Tensor) -> None:
        calls.append("in full")
        fake[(3, 2)](y, x, x.shape[0], 0.5, ADD=True, BLOCK=8, num_warps=4)

    run, x, y = _launch.Prepared(fn, stand=stand), torch.zeros(12), torch.zeros(12)
    for _ in range(3):
        run(x, y)
    assert len(calls) == 3, "nobody has looked where launches go"
    stand.look()
    run(x, y)
    assert len(calls) == 3 and fake.jit.calls[-1][:5] == ("lean", 3, 2, 1, 77)
    for change in ((lambda: -1, lambda device: 78, fake.hooks), (lambda: 1, lambda device: 79, fake.hooks)):  # type: ignore[attr-defined]
        monkeypatch.setattr(_launch, "_driver", lambda change=change: change)
        stand.look()
        run(x, y)
    assert len(calls) == 4 and ("lean", 3, 2, 1, 78) in [call[:5] for call in fake.jit.calls]
    fake.hooks.launch_enter_hook.calls.append(print)  # type: ignore[attr-defined]
    stand.look()
    run(x, y)
    assert len(calls) == 5


def test_addresses_of_layers_are_reckoned(fake: _launch.Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor of all layers, one a layer, one that is given; set up anew where launches go elsewhere, in full where odd."""
    calls: list[int] = []

    def fn(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> None:
        calls.append(1)
        fake[(3, 2)](y, z[4:], x.data_ptr(), 0.5, ADD=True, BLOCK=8, num_warps=4)

    stand, x, slab, given = _launch.Stand(), torch.zeros(16), torch.zeros(4, 32), torch.zeros(64)
    run = _launch.Layered(_launch.Prepared(fn, stand=stand), x, slab.unbind(0), None)
    for layer in range(4):
        run(layer, given)
    assert len(calls) == 4
    for stream in (77, 77, 78):
        monkeypatch.setattr(_launch, "_driver", lambda stream=stream: (lambda: -1, lambda device: stream, fake.hooks))  # type: ignore[attr-defined]
        stand.look()
        for layer, z in ((0, given), (3, given[32:]), (1, given[16:])):
            run(layer, z)
            addresses = (slab[layer].data_ptr(), z[4:].data_ptr(), x.data_ptr())
            assert fake.jit.calls[-1] == (
                "lean",
                3,
                2,
                1,
                stream,
                "function",
                ("packed",),
                None,
                None,
                None,
                *addresses,
                0.5,
                True,
                8,
            )
    assert len(calls) == 4 and run.launches
    run(2, given[1:])
    assert len(calls) == 5, "not aligned as when it was compiled"
    fake.hooks.launch_enter_hook.calls.append(print)  # type: ignore[attr-defined]
    stand.look()
    run(2, given)
    assert len(calls) == 6
    fake.hooks.launch_enter_hook.calls.clear()  # type: ignore[attr-defined]
    stand.look()
    run(2, given)
    assert len(calls) == 6 and fake.jit.calls[-1][10] == slab[2].data_ptr()
    uneven = _launch.Layered(run.prepared, x, torch.zeros(4, 33)[:, :32].unbind(0), None)
    uneven(1, given)
    assert len(calls) == 7, "layers that are not aligned alike"


def test_what_cannot_be_prepared_is_called_in_full_each_time(fake: _launch.Launcher) -> None:
    calls = []

    def nothing(x: torch.Tensor) -> None:
        calls.append(1)

    def copies(x: torch.Tensor) -> None:
        calls.append(1)
        fake[(3,)](x, x.clone(), 5, 0.5, ADD=True, BLOCK=8)

    def computes(x: torch.Tensor) -> None:
        calls.append(1)
        fake[(3,)](x, x, 5, 0.5, ADD=True, BLOCK=8)
        x[8:].add_(1)

    for function in (nothing, copies, computes):
        calls.clear()
        run = _launch.Prepared(function)
        for _ in range(6):
            run(torch.zeros(64))
        assert len(calls) == 6
    assert not _launch._SEEN


def test_several_launches_parts_of_a_tensor_and_tensors_of_its_own(fake: _launch.Launcher) -> None:
    calls, made = [], []

    def fn(x: torch.Tensor, y: torch.Tensor) -> None:
        calls.append(1)
        made.append(torch.empty(64))
        fake[(3,)](y[:, 8:], made[-1], 5, 0.5, ADD=True, BLOCK=8)
        fake[(2,)](made[-1], x, 5, 0.5, ADD=True, BLOCK=8)

    run = _launch.Prepared(fn, own=True)
    slabs = torch.zeros(2, 4, 6, 16)  # x and y in one memory
    for i in range(4):
        run(slabs[0, i], slabs[1, i])
    # One form serves both launches, so the first call compiles and launches it; the second shows both.
    assert len(calls) == 2
    for i in (2, 3):
        first, second = fake.jit.calls[2 * i : 2 * i + 2]
        assert first[1] == 3 and first[10:12] == (slabs[1, i, 0, 8:].data_ptr(), made[1].data_ptr())
        assert second[1] == 2 and second[10:12] == (made[1].data_ptr(), slabs[0, i].data_ptr())
