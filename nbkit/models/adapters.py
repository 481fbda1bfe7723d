"""LoRA adapters through PEFT: what PEFT would pass over in silence is refused here.

Adapter weights are float32 whatever the base is: they are the optimizer's masters, and on float16 GPUs the
gradient scaler needs them so. Their initial values depend on the seed alone (a ~ Kaiming uniform, b = 0).
"""

from __future__ import annotations

import math
from typing import Any

from nbkit.config import LoraConfig
from nbkit.errors import ModelError, nearest
from nbkit.models.files import size_text
from nbkit.models.quiet import quiet_libraries

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")


def add_lora(model: Any, lora: LoraConfig) -> Any:
    """Wrap a causal LM in PEFT with a fresh adapter named "default"; all other weights are frozen.

    A model that already has an adapter gets this one in its place; the old one is dropped.

    Returns: the PeftModel.
    Raises: ModelError for a target that matches no linear module.
    """
    import torch

    with quiet_libraries():
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model

    check_targets(model, lora.targets)  # first, so that a refusal leaves an adapter that is there as it was
    model = _bare(model)
    alpha = lora.rank if lora.alpha is None else lora.alpha
    # PEFT declares alpha as int and takes any number: the scale is alpha / r.
    numbers: Any = {"r": lora.rank, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha, "bias": lora.bias}
    config = PeftLoraConfig(
        **numbers,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with quiet_libraries(), torch.random.fork_rng(devices=devices):  # the caller's random state stays as it was
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
        torch.manual_seed(lora.seed)
        _initialise(adapted)
    if not any("lora_" in name and p.requires_grad for name, p in adapted.named_parameters()):
        raise ModelError("PEFT made no trainable adapter weights for this model; check the targets of LoRA.")
    return adapted


def _initialise(adapted: Any) -> None:
    """a ~ Kaiming uniform as in PEFT, drawn on the CPU in float32: PEFT's own has passed through the base's dtype. b is 0."""
    import torch

    for module in adapted.modules():
        if "default" not in getattr(module, "lora_A", ()):
            continue
        weight = module.lora_A["default"].weight
        fresh = torch.empty(weight.shape, dtype=torch.float32)
        torch.nn.init.kaiming_uniform_(fresh, a=math.sqrt(5))
        weight.data.copy_(fresh)


def _bare(model: Any) -> Any:
    """The model without an adapter that an earlier call put on it."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    if any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values()):
        raise ModelError("The adapter on this model may have trained the base's biases, so it cannot be replaced; load it again.")
    from nbkit.models.patch import unpatch

    unpatch(model)
    bare = model.unload()
    # PEFT leaves its mark behind, which would make the next adapter warn about a second one.
    if hasattr(bare, "peft_config"):
        del bare.peft_config
    return bare


def check_targets(model: Any, targets: tuple[str, ...]) -> None:
    """Raises: ModelError naming the first target that is no linear module of the model, and those there are."""
    import torch

    linear: dict[str, list[str]] = {}
    others: dict[str, str] = {}
    for path, module in model.named_modules():
        if ".lora_" in path:
            continue
        path = path.removesuffix(".base_layer")  # of a module that has an adapter already
        last = path.rpartition(".")[2]
        if isinstance(module, torch.nn.Linear):
            linear.setdefault(last, []).append(path)
        elif path:
            others[last] = type(module).__name__
    names = [name for name in linear if name != "lm_head"]
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    for target in targets:
        last = target.rpartition(".")[2]
        matches = [path for path in linear.get(last, ()) if path == target or path.endswith("." + target)]
        if tied and last in ("lm_head", *EMBEDDINGS):
            raise ModelError(
                f"LoRA target {target!r} shares its weight with {'the embeddings' if last == 'lm_head' else 'the head'} "
                "in this model, so it could not be merged; leave it out."
            )
        if matches:
            continue
        kind = f" (it is a {others[last]})" if last in others else ""
        raise ModelError(
            f"LoRA target {target!r} matches no linear module of this model{kind}; there are {', '.join(names)}."
            f"{nearest(target, linear)}"
        )


def adapter_report(model: Any) -> str:
    """'4,884,480 of 139,399,488 parameters train (3.50 %), adapter 18.6 MiB.'"""
    trained, total = count_parameters(model)
    adapter = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if p.requires_grad)
    return f"{trained:,} of {total:,} parameters train ({100 * trained / total:.2f} %), adapter {size_text(adapter)}."


def count_parameters(model: Any) -> tuple[int, int]:
    """(trainable, all) parameters. A packed 4-bit weight counts as the weights it stands for."""
    trained = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            count = state.shape.numel()
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total
