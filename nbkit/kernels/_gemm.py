"""cuBLAS where it takes a word more than `torch.mm`."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def accumulate(out: Tensor, a: Tensor, b: Tensor, alpha: float, add: bool) -> None:
    """out = alpha a @ b (+ out where `add`); a and b in 16 bits sum into a float32 out without a rounding between.

    Shapes: a (M, K), b (K, N), out (M, N), in any strides.
    """
    beta = 1.0 if add else 0.0
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif out.is_cuda and out.dtype == torch.float32:
        aten.addmm.dtype_out(out, a, b, out.dtype, beta=beta, alpha=alpha, out=out)
    elif add:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), alpha=alpha)
    else:
        torch.mul(torch.mm(a.to(out.dtype), b.to(out.dtype)), alpha, out=out)
