"""What TRL, transformers and accelerate change on a model object, recorded and put back.

TRL 1.x binds its own head forward to the instance and casts adapters on 4-bit weights to bfloat16;
accelerate binds an autocast wrapper; transformers sets `config.use_cache`. A model that has been trained
must chat, export and train again as if none of it had happened.
"""

from __future__ import annotations

from typing import Any

import torch

from nbkit.errors import TrainingError
from nbkit.models.checkpointing import set_checkpointing
from nbkit.models.layer import binding_of
from nbkit.training.optim import BYTES

# Instance attributes that those libraries and nbkit's trainer set.
_BOUND = ("forward", "_original_forward", "_is_accelerate_prepared", "zero_grad")
_MISSING = object()


class ModelState:
    """A record of one model, made before a trainer is."""

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._model = model
        self._bound = [(m, n, vars(m).get(n, _MISSING)) for m in dict.fromkeys((model, base)) for n in _BOUND]
        # The tensors themselves: a cast to bfloat16 and back would round them.
        self._weights = [(p, p.data) for p in model.parameters() if p.requires_grad]
        self._training = model.training
        self._use_cache = getattr(model.config, "use_cache", _MISSING)

    def restore_weights_and_forwards(self) -> None:
        """Undoes what a trainer's constructor did. Call it before a step is made: weights go back in value too."""
        for parameter, data in self._weights:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        self._weights = []
        self._restore_bound()

    def restore(self) -> None:
        """Undoes what training did to the object; trained weights stay."""
        self._restore_bound()
        self._model.train(self._training)
        if self._use_cache is not _MISSING:
            self._model.config.use_cache = self._use_cache
        set_checkpointing(self._model, False)

    def _restore_bound(self) -> None:
        for module, name, value in self._bound:
            if value is _MISSING:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value


def tell_optimizer_bytes(model: Any, name: str) -> None:
    """Tell the planner what the optimizer of that name keeps of each trained parameter: two states of 4 bytes, or of 8 bits."""
    binding = binding_of(model)
    if binding is not None:
        binding.optimizer_bytes = BYTES if "8bit" in name.lower() else 8


def require_finite(model: Any, step: int) -> None:
    """Raises: TrainingError if a trained tensor holds nan or infinity; asked before anything is saved."""
    flags = [torch.isfinite(p).all() for p in model.parameters() if p.requires_grad]
    if not bool(torch.stack([flag.cpu() for flag in flags]).all()):
        raise TrainingError(f"After step {step} the adapter is not finite and was not saved; lower the learning_rate.")
