"""The element-wise steps of the layer, by the names the layer uses: kernels on a GPU, their plain-torch paths elsewhere."""

from __future__ import annotations

import torch

from nbkit.kernels.lora_gradients import Product, thin_products
from nbkit.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from nbkit.kernels.rope import rope_rotate_
from nbkit.kernels.rope_pack import rotate_pack
from nbkit.kernels.swiglu import swiglu_backward, swiglu_forward
from nbkit.kernels.swiglu_lora import fits, swiglu_lora_backward, swiglu_lora_forward

__all__ = [
    "Product",
    "fits",
    "rms_norm_backward",
    "rms_norm_forward",
    "rope_rotate_",
    "rotate_pack",
    "swiglu_backward",
    "swiglu_forward",
    "swiglu_lora_backward",
    "swiglu_lora_forward",
    "thin_products",
    "wide",
]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Float32 for 16 bits, else the dtype itself: what sums and statistics are held in."""
    return torch.promote_types(dtype, torch.float32)
