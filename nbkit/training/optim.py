"""AdamW with 8-bit states: one launch a step, however many tensors an adapter has.

Other 8-bit optimizers launch a kernel for each tensor; with the 448 matrices of LoRA on an 8B model that is 10 to 17 ms of
host time a step. Source: 8-bit optimizers by block-wise quantisation (Dettmers et al., arXiv 2110.02861), blocks of 256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nbkit.kernels._table import Table
from nbkit.kernels.adamw8bit import BLOCK, Rates, State8, adamw8bit_, table_of

BYTES = 2 + 8 / BLOCK  # of state for a parameter: two codes, and two float32 maxima a block


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class _Set:
    """Parameters of one group, dtype and device. Their state is the optimizer's `state[params[0]]`, a dict of State8's fields."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params, self.sizes = params, [p.numel() for p in params]
        self.table: Table | None = None

    def settle(self, state: dict[str, Tensor]) -> Table:
        """The table for where the parameters are now; their state follows them to another device.

        Raises: ValueError if they are no longer of one dtype and device.
        """
        kinds = {(p.dtype, p.device) for p in self.params}
        if len(kinds) != 1:
            raise ValueError(f"Parameters that were alike are now of {len(kinds)} dtypes or devices; make the optimizer anew.")
        _, device = next(iter(kinds))
        if state["m"].device != device:
            state.update({name: tensor.to(device) for name, tensor in state.items()})
        if self.table is None or self.table.place.device != device:
            self.table = table_of(self.sizes, device)
        return self.table


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose moments take 2 bytes and 1/32 a parameter in place of 8.

    Works with schedulers, clipping, accumulation, `GradScaler` (a step that overflowed is skipped on the device, as torch's
    fused AdamW does), `state_dict`, and CUDA graphs where gradients stay in place and lr is a tensor. A parameter without a
    gradient keeps its value, state and count of steps. The state is made in the first step; on the CPU plain torch computes it.

    Args:
        params: float32, bfloat16 or float16 tensors, or groups of them.
    Raises: ValueError for negative rates; in a step, for a sparse gradient, a dtype it does not know, parameters that have
        moved apart; in `load_state_dict`, for the state of other parameters or another optimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(
                f"lr {lr}, betas {betas}, eps {eps} and weight_decay {weight_decay} must not be negative, betas below 1."
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self._step_supports_amp_scaling = True  # GradScaler leaves `grad_scale` and `found_inf` here, on the device
        self._sets: list[list[_Set]] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient. Nothing waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale: Tensor | None = getattr(self, "grad_scale", None)
        factor = None if scale is None else scale.double().reciprocal().float()
        skip: Tensor | None = getattr(self, "found_inf", None)
        for group, sets in zip(self.param_groups, self._all_sets(), strict=True):
            rates = Rates(group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"], factor, skip)
            for one in sets:
                grads = [p.grad for p in one.params]
                if any(g is not None for g in grads):
                    self._step_of(one, grads, rates)
        return loss

    def _step_of(self, one: _Set, grads: list[Tensor | None], rates: Rates) -> None:
        state = self.state[one.params[0]]
        if not state:
            state.update(State8.zeros(one.sizes, one.params[0].device)._asdict())
        table = one.settle(state)
        dtype = one.params[0].dtype
        if any(g is not None and (g.layout != torch.strided or g.dtype != dtype) for g in grads):
            raise ValueError(f"AdamW8bit takes dense gradients of the parameters' dtype, {dtype}.")
        grads = [g if g is None else g.contiguous() for g in grads]
        values = [p.contiguous() for p in one.params]
        adamw8bit_(values, grads, State8(**state), rates, table)
        apart = [(p, value) for p, value in zip(one.params, values, strict=True) if p is not value]
        for p, value in apart:  # rows of a wider buffer, say: computed on a copy
            p.copy_(value)

    def _all_sets(self) -> list[list[_Set]]:
        """Each group's parameters by dtype and device, in their order."""
        for group in self.param_groups[len(self._sets) :]:
            kinds: dict[Any, list[Tensor]] = {}
            for p in group["params"]:
                if not p.is_floating_point():
                    raise ValueError(f"AdamW8bit takes parameters in float32, bfloat16 or float16, not {p.dtype}.")
                kinds.setdefault((p.dtype, p.device), []).append(p)
            self._sets.append([_Set(params) for params in kinds.values()])
        return self._sets

    def state_dict(self) -> dict[str, Any]:
        """Hyperparameters by group; by number of set (a group's parameters of one dtype and device) the sizes of its tensors, and
        after the first step `State8`'s. The tensors are the optimizer's own, as torch's optimizers have it."""
        groups = [{k: v for k, v in g.items() if k != "params"} | {"params": len(g["params"])} for g in self.param_groups]
        sets = [one for sets in self._all_sets() for one in sets]
        state = {i: {"sizes": list(one.sizes), **self.state.get(one.params[0], {})} for i, one in enumerate(sets)}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises: ValueError, with nothing changed, if it is of other parameters or of another
        optimizer; bitsandbytes' among them, whose small tensors have 32-bit states."""
        groups, state = state_dict["param_groups"], state_dict["state"]
        sets = [one for sets in self._all_sets() for one in sets]
        if state and not all("sizes" in each for each in state.values()):
            names = {name for each in state.values() for name in each}
            whose = "bitsandbytes' AdamW8bit" if any("bnb" in n or n == "state1" for n in names) else "another optimizer"
            raise ValueError(f"The state is of {whose}, not nbkit's AdamW8bit; go on with that one, or begin without a state.")
        counts = [g["params"] for g in groups], [len(g["params"]) for g in self.param_groups]
        sizes = [list(state[i]["sizes"]) for i in sorted(state)], [one.sizes for one in sets]
        if counts[0] != counts[1] or sizes[0] != sizes[1]:
            raise ValueError(f"The state belongs to other parameters: groups of {counts[0]} tensors, not {counts[1]}.")
        taken = [_checked(state[i], one) for i, one in enumerate(sets)]
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})
        for one, fields in zip(sets, taken, strict=True):
            if fields:
                self.state[one.params[0]] = {k: v.to(one.params[0].device, copy=True) for k, v in fields.items()}
            else:
                self.state.pop(one.params[0], None)


def _checked(saved: dict[str, Any], one: _Set) -> dict[str, Tensor]:
    """The tensors of one set's state, none before the first step. Raises: ValueError for a shape or dtype that is not `one`'s."""
    fields = {name: tensor for name, tensor in saved.items() if name != "sizes"}
    if not fields:
        return {}
    kinds = {name: (t.shape, t.dtype) for name, t in State8.zeros(one.sizes, "meta")._asdict().items()}
    if {name: (t.shape, t.dtype) for name, t in fields.items()} != kinds:
        raise ValueError(f"The state of {len(one.sizes)} tensors is damaged: it lacks what 8-bit AdamW keeps of them.")
    return fields
