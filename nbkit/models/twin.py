"""A stock copy of a model in float32 or float64, NF4 weights dequantised: the truth that other results are measured against."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from nbkit.models.forwards import is_bound

SLACK = 2**29  # bytes for activations, gradients of adapters and the head's logits of a small batch


def is_quantised(base: nn.Module) -> bool:
    """Whether any linear holds its weight in another form than floating point."""
    return any(_packed(module) for module in base.modules())


def weights_text(base: nn.Module) -> str:
    """ "NF4 weights, double quantisation", "bfloat16 weights" or the like."""
    for module in base.modules():
        if _packed(module):
            state = getattr(module.weight, "quant_state", None)
            if state is None:
                return f"{type(module).__name__} weights"
            return f"{str(state.quant_type).upper()} weights" + (", double quantisation" if state.nested else "")
    return f"{str(next(base.parameters()).dtype).removeprefix('torch.')} weights"


def wide(model: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, str]:
    """A copy in `dtype`: (copy, "") on the model's device; (copy on the CPU, why) where only RAM has room; else (None, why).

    The model is to be stock while it is copied. The copy is in the same mode, with the same parameters trainable.
    """
    unknown = sorted({type(m).__name__ for m in model.modules() if _unknown(m)})
    if unknown:
        return None, f"there is no float32 form of {', '.join(unknown)} weights"
    device = model.get_input_embeddings().weight.device
    need, why, name = needed(model) * dtype.itemsize // 4, "", str(dtype).removeprefix("torch.")
    for target in dict.fromkeys((device, torch.device("cpu"))):
        free = _free(target)
        if need <= free:
            return _converted(model, target, dtype), why
        why += f"{' and ' if why else ''}a {name} copy needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {target}"
    return None, why


def needed(model: nn.Module) -> int:
    """Bytes of the float32 copy, of gradients of what is trained, and of a small step."""
    total = SLACK
    for module in model.modules():
        for p in module.parameters(recurse=False):
            count = p.numel()
            if isinstance(module, nn.Linear) and _packed(module) and p is module.weight:
                count = int(module.in_features) * int(module.out_features)
            total += count * (8 if p.requires_grad else 4)
    return total


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        from nbkit.hardware.probe import ram

        return ram()[1]
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _packed(module: nn.Module) -> bool:
    weight = vars(module).get("_parameters", {}).get("weight")
    return isinstance(module, nn.Linear) and weight is not None and not weight.is_floating_point()


def _unknown(module: nn.Module) -> bool:
    four_bit = _packed(module) and getattr(module.weight, "quant_state", None) is not None
    return (_packed(module) and not four_bit) or "qweight" in module._buffers or "qweight" in module._parameters


def _converted(model: Any, device: torch.device, wanted: torch.dtype) -> Any:
    """The copy, made weight by weight in `wanted` and never whole in the model's own dtype."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is None or id(p) in memo:
                continue
            full = _dequantised(p) if _packed(module) and p is module.weight else p.detach()
            dtype = wanted if full.is_floating_point() else full.dtype
            memo[id(p)] = nn.Parameter(full.to(device, dtype, copy=True), requires_grad=p.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = buffer.detach().to(device, copy=True)
    found = copy.deepcopy(model, memo)
    for parent in list(found.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear and isinstance(child, nn.Linear) and hasattr(child, "quant_state"):
                setattr(parent, name, _plain_linear(child))
    for module in found.modules():
        _forget_bindings(module)
    return found


def _dequantised(weight: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def _plain_linear(child: Any) -> nn.Linear:
    plain = nn.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
    plain.weight, plain.bias = child.weight, child.bias
    return plain.train(child.training)


def _forget_bindings(module: nn.Module) -> None:
    """What `patch` had bound to the original: forwards of instances and hooks, which run stock in a copy anyway."""
    bound = vars(module).get("forward")
    if is_bound(module) or getattr(getattr(bound, "__func__", None), "__module__", "").startswith("nbkit.models.layer"):
        del vars(module)["forward"]
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [k for k, hook in hooks.items() if getattr(hook, "__module__", "").startswith("nbkit.")]:
            del hooks[key]
