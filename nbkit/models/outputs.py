"""What a patched causal LM returns when it is given labels: a loss, and logits that are made when they are read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

# The way to the logits travels on the loss tensor: accelerate rebuilds outputs from their items, under autocast.
_MAKE, _LISTED = "_nbkit_make_logits", "_nbkit_list_logits"


@dataclass
class LossOutput(CausalLMOutputWithPast):
    """As transformers' own output. `.logits` (B, T, V) are projected at the first reading, with the autograd of the forward.

    While training they are no item of the mapping, so that walking over it (accelerate, distributed wrappers) makes none;
    in eval mode they are, as `Trainer.evaluate` expects, and are made when the mapping is walked over. By name or by place
    (outputs["logits"], outputs[1]) they are there in both, as in transformers' own.
    """

    def attach(self, make: Callable[[], torch.Tensor], *, listed: bool) -> None:
        """Say how logits are made, and whether they count as an item."""
        setattr(self.loss, _MAKE, make)
        setattr(self.loss, _LISTED, listed)

    def __reduce__(self) -> Any:
        """A copy or a pickle is transformers' own output, with the logits made and no way to them on the loss."""
        given = {field.name: getattr(self, field.name) for field in fields(CausalLMOutputWithPast)}
        if self.loss is not None:
            given["loss"] = self.loss.view_as(self.loss)
        return CausalLMOutputWithPast, tuple(given.values())

    @property
    def logits(self) -> torch.Tensor | None:  # type: ignore[override]
        made, loss = vars(self).get("logits"), vars(self).get("loss")
        make = getattr(loss, _MAKE, None)
        # Those that a metric has read without gradients are made anew for whoever trains on them.
        blind = (
            made is not None and torch.is_grad_enabled() and not made.requires_grad and loss is not None and loss.requires_grad
        )
        if make is not None and (made is None or blind):
            made = vars(self)["logits"] = make()
        return made

    @logits.setter
    def logits(self, value: torch.Tensor | None) -> None:
        vars(self)["logits"] = value

    def _list(self, asked: bool = False) -> None:
        """Make the logits an item if they count as one or are `asked` for, in their place after the loss."""
        counts = asked or getattr(vars(self).get("loss"), _LISTED, False)
        if counts and not OrderedDict.__contains__(self, "logits") and self.logits is not None:
            self["logits"] = self.logits
            for name in [n for n in OrderedDict.__iter__(self) if n not in ("loss", "logits")]:
                self.move_to_end(name)

    def __getitem__(self, key: Any) -> Any:
        if key in ("loss", 0):
            return self.loss
        self._list(asked=key == "logits" or not isinstance(key, str))
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __contains__(self, key: object) -> bool:
        if key == "logits" and getattr(vars(self).get("loss"), _MAKE, None) is not None:
            return True
        if key != "loss":
            self._list()
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._list()
        return super().__iter__()

    def keys(self) -> Any:
        self._list()
        return super().keys()

    def values(self) -> Any:
        self._list()
        return super().values()

    def items(self) -> Any:
        self._list()
        return super().items()
