"""Every kernel, with the arguments its op really launches it with, is compiled ahead of time for the GPUs nbkit names.

No GPU is needed: launches are recorded instead of made, and Triton compiles what was recorded.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch

from nbkit.kernels import KernelOp, _launch, all_ops

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="needs a process that compiles")
CAPABILITIES = (70, 75, 80, 86, 89, 90, 100, 120)
QUICK = (75, 90)  # Turing without bfloat16, Hopper; the others take three times as long again
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32",
         torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1"}  # fmt: skip


class Recorder:
    """Stands for a kernel: `kernel[grid](...)` is written down as (kernel, signature, constants, compiler options)."""

    def __init__(self, kernel: Any, launches: dict[Any, Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(isinstance(size, int) and size >= 0 for size in grid) and len(grid) <= 3
        return self.launch

    def launch(self, *args: Any, **keywords: Any) -> None:
        names = self.kernel.arg_names
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in keywords.items() if k in names}
        options = {k: v for k, v in keywords.items() if k not in names}  # num_warps and what else the compiler takes
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        assert given.keys() == set(names), f"{self.kernel.fn.__name__} lacks {set(names) - given.keys()}"
        signature = {name: "constexpr" if name in constants else self.type_of(given[name]) for name in names}
        fixed = {name: given[name] for name in names if name in constants}
        key = repr((self.kernel.fn.__module__, self.kernel.fn.__name__, signature, fixed, options))
        self.launches[key] = (self.kernel, signature, fixed, options)

    @staticmethod
    def type_of(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"*{TYPES[value.dtype]}"
        return "fp32" if isinstance(value, float) else "i32"


def record(op: KernelOp, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, capability: int = 90) -> list[Any]:
    """What the op launches for its cases, forward and backward; one launch for each distinct signature and set of constants."""
    launches: dict[Any, Any] = {}
    module = importlib.import_module(op.fn.__module__)
    with monkeypatch.context() as patched:
        for name, value in list(vars(module).items()):
            if isinstance(value, _launch.Launcher):
                patched.setattr(module, name, Recorder(value.jit, launches))
            elif isinstance(value, triton.JITFunction):  # under a Triton whose launches nbkit does not know
                patched.setattr(module, name, Recorder(value, launches))
            elif name in ("use_triton", "runs_on"):
                patched.setattr(module, name, lambda *tensors: True)
            elif name == "_on_tensor_cores":
                patched.setattr(module, name, lambda x: capability >= 80)
        for case in op.cases:
            inputs = op.inputs(case, dtype, "cpu", 0)
            leaves = {k: v.detach().requires_grad_() if k in op.gradients else v for k, v in inputs.items()}
            out = op.fn(**leaves, **case.options)
            if op.gradients:
                out.backward(torch.ones_like(out))
    return list(launches.values())


def thinned(launches: list[Any]) -> list[Any]:
    """One launch for each kernel and set of switches: sizes are left out, they change no line of what is compiled."""
    kinds = {}
    for kernel, signature, fixed, options in launches:
        switches = tuple((k, v) for k, v in fixed.items() if isinstance(v, bool | float))
        kinds[kernel.fn.__name__, tuple(signature.items()), switches] = (kernel, signature, fixed, options)
    return list(kinds.values())


def compile_for(launch: Any, capability: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, fixed, options = launch
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CAPABILITIES])
@pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
def test_kernels_compile(op: KernelOp, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))  # nothing compiled earlier counts
    dtype = torch.float16 if capability < 80 else torch.bfloat16
    launches = thinned(record(op, dtype, monkeypatch, capability))
    assert launches, "the op launches no kernel"
    for launch in launches:
        made = compile_for(launch, capability)
        assert made.asm["cubin"] and ".version" in made.asm["ptx"]
        assert made.metadata.shared <= 48 * 1024, f"{launch[0].fn.__name__} wants {made.metadata.shared} bytes of shared memory"
        # Triton 3.6 sums over the wrong lanes where those of a reduced axis are not neighbours, which only such layouts can have.
        reduced = re.findall(r"^ *}\) : \(tensor<[^>]*#linear.*", made.asm["ttgir"], re.MULTILINE)
        assert not reduced, f"{launch[0].fn.__name__} reduces what tl.reshape left in a layout of its own: {reduced}"


def test_a_kernel_that_does_not_compile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbkit.kernels import swiglu

    kernel, signature, fixed, options = record(swiglu.OP, torch.float16, monkeypatch)[0]
    with pytest.raises(Exception, match=r"(?i)constexpr|block|power|arange|int"):
        compile_for((kernel, signature, {**fixed, "BLOCK": 37}, options), 90)  # tl.arange wants a power of two
