"""The process of one arm of bench_training: a model, an optimizer, and steps on command, one JSON line a command and a reply.

usage: python -m benchmarks._worker PROCESS DEVICE      (bench_training.py starts it; PROCESS as in _arms.ARMS)
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from benchmarks._arms import Wanted

PASSES = {
    "nbkit": 3,
    "eager": 3,
}  # after a first step: the second takes the attention of a repeated shape, the third may be a graph
RATE = 1e-4


class Worker:
    """Takes the commands below; what they return goes back. Losses, norms and bytes are of the arm entered last."""

    def __init__(self, device: str) -> None:
        from benchmarks._device import Device

        self.device = Device(device)
        self.model: Any = None
        self.optimizer: Any = None
        self.wanted: Wanted | None = None
        self.arms: dict[str, Any] = {}  # made so far
        self.lean: dict[str, bool] = {}  # the mode each takes
        self.entered = ""
        self.loaded = 0  # bytes of the bare model
        self.kind = "adamw"
        self.given: Any = None  # draws the batches of the rounds

    def load(self, wanted: dict[str, Any], arm: str, optimizer: str) -> dict[str, Any]:
        """The model of the row, made anew or, where the row before had the same, with its adapter as it was made."""
        from benchmarks._arms import UNSLOTH_LENGTH, Wanted
        from benchmarks._models import fill_lora

        new, old = Wanted(**wanted), self.wanted
        start = time.perf_counter()
        self.leave()
        same = old is not None and (new.name, new.weights, new.rank) == (old.name, old.weights, old.rank)
        if self.model is None or not same or (arm.startswith("unsloth") and new.tokens > max(UNSLOTH_LENGTH, old.tokens)):
            self.drop()
            self.device.limit(None)
            self.model = self.arm(arm).load(new, self.device.name)
        fill_lora(self.model)
        self.wanted, self.kind = new, optimizer
        self.device.limit(new.limit)
        self.device.wait()
        return {"seconds": time.perf_counter() - start, "bytes": self.device.allocated()}

    def arm(self, name: str) -> Any:
        from benchmarks._arms import ARMS

        if name not in self.arms:
            self.arms[name] = ARMS[name].make()
        return self.arms[name]

    def begin(self, arm: str, grads: str) -> dict[str, Any]:
        """Enter an arm for a row and take the row's first batch: loss, gradient norm, and the gradients in a file."""
        import torch

        tried = []
        for lean in self.arm(arm).modes(self.wanted):
            self.leave()
            self.device.reset_peak()
            self.lean[arm] = lean
            try:
                self.enter(arm)
                found = self.parity(PASSES.get(arm, 1) if self.wanted.rows <= 16384 else 1, grads)
            except torch.cuda.OutOfMemoryError as error:
                tried.append(" ".join(str(error).split())[:400])  # with the bytes that were asked for, free and lying idle
                self.model.zero_grad(set_to_none=True)
                del error
                continue
            found |= {"recorded": self.arm(arm).recorded(self.model), "note": "; ".join(tried), "peak": self.device.peak()}
            self.device.clean()
            return found
        raise torch.cuda.OutOfMemoryError("; ".join(tried))

    def enter(self, name: str) -> None:
        """Bind the arm and give it a new optimizer, unless it is the one that is bound."""
        if self.entered == name:
            return
        self.leave()
        arm, wanted = self.arm(name), self.wanted
        arm.enter(self.model, wanted, self.lean[name], self.kind)
        self.entered = name
        self.loaded = self.device.allocated()
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = optimizer_of(params, self.kind)
        self.device.reset_peak()

    def leave(self) -> None:
        if self.entered:
            self.model.zero_grad(set_to_none=True)
            self.optimizer = None
            self.arm(self.entered).leave(self.model)
            self.entered = ""
        self.device.clean()

    def drop(self) -> dict[str, Any]:
        """Give the model's memory back."""
        self.leave()
        self.model = self.wanted = None
        self.arms.clear()
        self.device.clean()
        return {"bytes": self.device.allocated()}

    def ids(self, make: Any) -> Any:
        """A batch of random tokens."""
        import torch

        shape = (self.wanted.batch, self.wanted.tokens)
        return torch.randint(3, 128256 - 1, shape, device=self.device.name, generator=make)

    def parity(self, passes: int, grads: str) -> dict[str, Any]:
        """A step at learning rate 0, so that the optimizer's state is there before anything is recorded; then the passes."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        step(self.model, self.optimizer, self.ids(self.device.generator(1)))
        for group in self.optimizer.param_groups:
            group["lr"] = RATE
        loss, flat = 0.0, None
        for _ in range(passes):
            del flat
            loss, flat = gradients(self.model, self.ids(self.device.generator(1)))
        save(flat, grads)
        return {"loss": loss, "grad_norm": float(flat.norm()), "passes": 1 + passes}

    def truth(self, grads: str) -> dict[str, Any]:
        """The gradients of a float32 copy of the model on the row's first batch, through stock code."""
        self.leave()
        twin = float32_twin(self.model)
        _, flat = gradients(twin, self.ids(self.device.generator(1)))
        save(flat, grads)
        del twin
        self.device.clean()
        return {"grad_norm": float(flat.norm())}

    def round(self, arm: str, number: int, warm: int, steps: int, seconds: float) -> dict[str, Any]:
        """Warm-up steps, then timed ones: `steps`, fewer where `seconds` are over, one at least."""
        self.enter(arm)
        self.device.reset_peak()
        make = self.device.generator(100 + number)
        for _ in range(warm):
            step(self.model, self.optimizer, self.ids(make))
        found, start = [], time.perf_counter()
        while len(found) < steps and (not found or time.perf_counter() - start < seconds):
            ids = self.ids(make)
            self.device.wait()
            before = time.perf_counter()
            loss, norm = step(self.model, self.optimizer, ids)
            self.device.wait()
            found.append(time.perf_counter() - before)
        peak, static = self.device.peak(), self.device.allocated()
        needed, how = self.arm(arm).needed(self.model), self.arm(arm).how(self.model, self.lean[arm])
        self.device.clean()
        result = {"seconds": found, "peak": peak, "static": static, "how": how, "last_loss": float(loss)}
        return result | {"forecast": None if needed is None else self.loaded + needed}

    def once(self, arm: str) -> dict[str, Any]:
        """One full optimizer step, the first of the process: compiling is in its time; planning and pinning beside it."""
        start = time.perf_counter()
        self.lean[arm] = self.arm(arm).modes(self.wanted)[-1]
        self.enter(arm)
        if hasattr(self.arm(arm), "prepare"):
            self.arm(arm).prepare(self.model, self.wanted.rows)
        self.device.wait()
        prepared = time.perf_counter() - start
        ids = self.ids(self.device.generator(1))
        self.device.wait()
        self.device.reset_peak()
        start = time.perf_counter()
        loss, norm = step(self.model, self.optimizer, ids)
        self.device.wait()
        seconds = time.perf_counter() - start
        needed, how = self.arm(arm).needed(self.model), self.arm(arm).how(self.model, self.lean[arm])
        found = {"seconds": [seconds], "prepared": prepared, "loss": float(loss), "grad_norm": float(norm), "how": how}
        found |= {"peak": self.device.peak(), "static": self.device.allocated(), "in_use": self.device.in_use()}
        return found | {"forecast": None if needed is None else self.loaded + needed}

    def profile(self, arm: str, title: str) -> dict[str, Any]:
        from benchmarks._profile import show

        self.enter(arm)
        batch = self.ids(self.device.generator(1))
        show(lambda: step(self.model, self.optimizer, batch), title)
        self.device.clean()
        return {}


def optimizer_of(params: list[torch.Tensor], kind: str) -> torch.optim.Optimizer:
    """torch's fused AdamW, nbkit's in 8 bits or bitsandbytes' in 8 bits."""
    import torch

    if kind == "adamw8bit":
        from nbkit.training.optim import AdamW8bit

        return AdamW8bit(params, lr=RATE)
    if kind == "bnb8bit":
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(params, lr=RATE)
    return torch.optim.AdamW(params, lr=RATE, fused=True)


def step(model: Any, optimizer: Any, ids: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The loop that every arm runs: forward, backward, clipping, optimizer."""
    import torch

    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), norm


def gradients(model: Any, ids: Any) -> tuple[float, torch.Tensor]:
    """Loss, and all gradients in one vector on the CPU, in the order of the parameters' names."""
    import torch

    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    named = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    missing = [name for name, p in named if p.grad is None]
    if missing:
        raise RuntimeError(f"{len(missing)} trained parameters got no gradient, the first is {missing[0]}")
    flat = torch.cat([p.grad.cpu().float().reshape(-1) for _, p in named])
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), flat


def save(flat: torch.Tensor, path: str) -> None:
    import numpy as np

    np.save(path, flat.numpy())


def float32_twin(model: Any) -> Any:
    """A float32 copy of the model, NF4 dequantised exactly, with checkpointing."""
    import copy

    import bitsandbytes as bnb
    import torch

    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                full = torch.nn.Linear(child.in_features, child.out_features, False, device="meta")
                wide = bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state).float()
                full.weight = torch.nn.Parameter(wide, False)
                setattr(parent, name, full)
    twin = twin.float()
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    twin.enable_input_require_grads()
    return twin


def serve(process: str, device: str) -> None:
    """Commands from stdin until it ends. What libraries print goes to stderr, so that replies stay alone on stdout."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    if process == "unsloth":
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        os.chdir(tempfile.mkdtemp())  # it writes what it compiles into the current folder
        import unsloth  # noqa: F401  # it asks to be the first of all
    import peft  # noqa: F401  # all processes import what they need at the same time, before there is work
    import transformers.models.llama.modeling_llama  # noqa: F401

    worker = Worker(device)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = getattr(worker, command.pop("do"))(**command)
        except Exception as error:  # one arm's failure must not hide the others: it is told and written into its row
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:240]}
            del error
            gc.collect()
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    serve(sys.argv[1], sys.argv[2])
