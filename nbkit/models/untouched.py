"""Looking at a model without leaving traces: stock while it is patched, patched while it is not, in training mode, with
gradients, random states, levels and recorded steps put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nbkit.models.forwards import GRAPHS, MARK
from nbkit.models.graphs import Graphs
from nbkit.models.layer.bind import MARK as LAYER_MARK
from nbkit.models.patch import PatchReport, base_model, patch, unpatch

FILL = 0.02  # standard deviation of a B that is still zero


@contextmanager
def stock(model: Any) -> Iterator[None]:
    """Within: the model runs stock, whatever is bound to it; nothing is moved, and all is back afterwards."""
    taken = []
    for module in model.modules():
        for mark in (MARK, LAYER_MARK, GRAPHS):
            if mark in vars(module):
                taken.append((module, mark, vars(module).pop(mark)))
    try:
        yield
    finally:
        for module, mark, value in taken:
            vars(module)[mark] = value


@contextmanager
def ready(model: Any) -> Iterator[PatchReport]:
    """Within: the model is patched and in training mode. A model that was not patched is stock again afterwards."""
    base = base_model(model)
    there = any(MARK in vars(m) or LAYER_MARK in vars(m) for m in base.modules())
    graphs = not there or GRAPHS in vars(base)
    held = vars(base).get(GRAPHS)
    report = patch(model, graphs=graphs)
    if held is not None:
        vars(base)[GRAPHS] = held  # with what it has recorded
    try:
        with training_mode(model):
            yield report
    finally:
        if not there:
            unpatch(model)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Training mode with every dropout off: its masks differ between precisions."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def as_it_was(model: Any, device: torch.device) -> Iterator[None]:
    """Within: no gradients, a B that is zero filled with small random numbers, a random state of its own."""
    grads = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    for p, _ in grads:
        p.grad = None
    zero = [p for name, p in model.named_parameters() if "lora_B" in name and not p.detach().any()]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            for p in zero:
                p.data.normal_(0, FILL)
            yield
    finally:
        for p in zero:
            p.data.zero_()
        for p in model.parameters():
            p.grad = None
        for p, grad in grads:
            p.grad = grad
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def levels_kept(binding: Any, graphs: Graphs | None) -> Iterator[None]:
    """Puts back the level that was set, forgets the graphs that were recorded meanwhile and gives buffers of eager steps back."""
    keep, how, asides = binding.keep, set(binding.how), dict(binding.asides)
    known = dict(graphs.recorded) if graphs is not None else {}
    recent, failed = (list(graphs.recent), graphs.failed) if graphs is not None else ([], "")
    binding.how.clear()
    binding.asides.clear()
    try:
        yield
    finally:
        binding.keep = keep
        binding.stacks.drop()  # made for the batch that is compared; the next step makes those of its own shape anyway
        binding.how |= how
        binding.asides = asides | binding.asides
        if graphs is not None:
            for key in [k for k in graphs.recorded if k not in known]:
                del graphs.recorded[key]
            if not graphs.recorded:
                graphs.drop()  # memory of graphs that are all gone is not to be recorded into again
            graphs.recent.clear()
            graphs.recent.extend(recent)
            if graphs.failed != failed:  # training has the memory that a twin of the model took here
                graphs.failed, binding.planner.plan = failed, None
