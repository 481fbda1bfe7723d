"""AdamW with 8-bit states over one flat buffer a parameter group: one launch a step, however many tensors an adapter has.

Other 8-bit optimizers launch a kernel for each tensor; with the 448 matrices of LoRA on an 8B model that is 10 to 17 ms of
host time a step. Source: 8-bit optimizers by block-wise quantisation (Dettmers et al., arXiv 2110.02861), blocks of 256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nbkit.kernels.adamw8bit import BLOCK, Moments8, adamw8bit_


class _Flat:
    """One group's parameters side by side, each from a multiple of BLOCK on, so that any run of them has blocks of its own."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.starts, end = [], 0
        for p in params:
            self.starts.append(end)
            end += -(-p.numel() // BLOCK) * BLOCK
        like = params[0]
        self.values = torch.zeros(end, dtype=like.dtype, device=like.device)
        self.grads = torch.zeros_like(self.values)
        self.moments = Moments8.zeros(end, like.device)
        self.step = torch.zeros((), dtype=torch.float32, device=like.device)
        self.grad_views = [self._view(self.grads, i) for i in range(len(params))]
        for i, p in enumerate(params):
            view = self._view(self.values, i)
            view.copy_(p.detach())
            p.data = view

    def _view(self, flat: Tensor, index: int) -> Tensor:
        p, start = self.params[index], self.starts[index]
        return flat[start : start + p.numel()].view(p.shape)

    def runs(self) -> list[tuple[int, int]]:
        """(first, last + 1) of the parameters next to each other that have a gradient; the others are left as they are."""
        found: list[tuple[int, int]] = []
        for i, p in enumerate(self.params):
            if p.grad is not None:
                if found and found[-1][1] == i:
                    found[-1] = (found[-1][0], i + 1)
                else:
                    found.append((i, i + 1))
        return found

    def slice(self, first: int, last: int) -> tuple[slice, slice]:
        """The elements, and the blocks, of parameters first to last - 1."""
        start = self.starts[first]
        stop = self.starts[last] if last < len(self.starts) else self.values.numel()
        return slice(start, stop), slice(start // BLOCK, stop // BLOCK)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose moments take 2 bytes a parameter in place of 8.

    The parameters' storage becomes one buffer of the group; the tensors themselves stay. Works with schedulers, gradient
    clipping, accumulation, and `state_dict`.

    Args:
        params: of one dtype and device a group; float32, bfloat16 or float16.
    Raises: ValueError for parameters that differ, for a negative rate, or a state that belongs to other parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(
                f"lr {lr}, betas {betas}, eps {eps} and weight_decay {weight_decay} must not be negative, betas below 1."
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self._flats: list[_Flat] = []
        for group in self.param_groups:
            kinds = {(p.dtype, p.device) for p in group["params"]}
            if len(kinds) != 1:
                raise ValueError(f"The parameters of a group must be of one dtype and device, not of {len(kinds)} kinds.")
            self._flats.append(_Flat(group["params"]))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, flat in zip(self.param_groups, self._flats, strict=True):
            runs = flat.runs()
            if not runs:
                continue
            given = [(view, p.grad) for view, p in zip(flat.grad_views, flat.params, strict=True) if p.grad is not None]
            torch._foreach_copy_([view for view, _ in given], [grad for _, grad in given])
            flat.step += 1
            m = flat.moments
            for first, last in runs:
                some, blocks = flat.slice(first, last)
                state = Moments8(m.m[some], m.m_max[blocks], m.v[some], m.v_max[blocks])
                adamw8bit_(
                    flat.values[some], flat.grads[some], state, flat.step,
                    lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                )  # fmt: skip
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Hyperparameters by group, and for each group its step, codes and block maxima."""
        groups = [{k: v for k, v in g.items() if k != "params"} | {"params": len(g["params"])} for g in self.param_groups]
        state = {
            i: {"step": f.step.clone(), **{k: v.clone() for k, v in f.moments._asdict().items()}}
            for i, f in enumerate(self._flats)
        }
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises: ValueError if it belongs to other parameters."""
        groups, state = state_dict["param_groups"], state_dict["state"]
        if len(groups) != len(self.param_groups):
            raise ValueError(f"The state has {len(groups)} parameter groups, this optimizer {len(self.param_groups)}.")
        for i, (group, saved, flat) in enumerate(zip(self.param_groups, groups, self._flats, strict=True)):
            if saved["params"] != len(group["params"]) or state[i]["m"].numel() != flat.values.numel():
                raise ValueError(f"The state of group {i} belongs to other parameters.")
            group.update({k: v for k, v in saved.items() if k != "params"})
            flat.step.copy_(state[i]["step"])
            for name, tensor in flat.moments._asdict().items():
                tensor.copy_(state[i][name])
