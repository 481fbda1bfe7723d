"""Every op's kernels against its reference: values and gradients, under random upstream gradients, by the tolerance rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbkit.kernels import Case, KernelOp, _launch, all_ops
from tests.closeness import assert_close

ON_GPU = torch.cuda.is_available() and not _launch.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter is wrong in bfloat16. On a GPU, where every case and dtype is a kernel to compile, float16 is tried on one case.
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]
pytestmark = [pytest.mark.gpu] if ON_GPU else []

ALL = [
    pytest.param(op, case, dtype, id=f"{op.name}-{case}-{str(dtype).removeprefix('torch.')}")
    for op in all_ops()
    for case in op.cases
    for dtype in [*DTYPES, *([torch.float16] if ON_GPU and case is op.cases[0] else [])]
]


def run(fn: Any, op: KernelOp, inputs: dict[str, Any], options: Any, upstream: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The output, and the gradient of each differentiated input, by name."""
    leaves = {k: v.detach().requires_grad_() if k in op.gradients else v for k, v in inputs.items()}
    out = fn(**leaves, **options)
    found = {"output": out}
    if upstream is not None and op.gradients:
        out.backward(upstream.to(out.dtype))
        found |= {f"d{name}": leaves[name].grad for name in op.gradients}
    return found


@pytest.mark.parametrize(("op", "case", "dtype"), ALL)
def test_kernels_equal_the_reference(op: KernelOp, case: Case, dtype: torch.dtype) -> None:
    inputs = op.inputs(case, dtype, DEVICE, 3)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    shape = op.reference(**wide, **case.options).shape
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(DEVICE)
    # Rounded to the dtype that the op's output has, so that all three get the same upstream gradient.
    upstream = upstream.to(op.reference(**inputs, **case.options).dtype).double()
    ours = run(op.fn, op, inputs, case.options, upstream)
    eager = run(op.reference, op, inputs, case.options, upstream)
    truth = run(op.reference, op, wide, case.options, upstream)
    assert ours.keys() == truth.keys()
    for name in truth:
        assert_close(f"{op.name} {case}: {name}", ours[name], eager[name], truth[name])


@pytest.mark.parametrize("op", [op for op in all_ops() if op.gradients], ids=lambda op: op.name)
def test_inputs_are_left_as_they_are(op: KernelOp) -> None:
    inputs = op.inputs(op.cases[0], torch.float32, DEVICE, 1)
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    run(op.fn, op, inputs, op.cases[0].options, torch.ones_like(op.reference(**inputs, **op.cases[0].options)))
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"{op.name} changed {name}"
