"""The arms of bench_training: how each makes its model, and what it binds to it. One process holds one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

UNSLOTH_LENGTH = 8192  # what it is loaded for at the least, so that rows of other lengths take the same model


@dataclass(frozen=True)
class Wanted:
    """A row's model and what it asks of an arm."""

    name: str
    weights: str
    rank: int
    batch: int
    tokens: int
    level: int | None = None  # nbkit's keep level; the peers checkpoint from 1 up
    save: bool = False  # memory is to be saved: checkpointing
    limit: int | None = None  # bytes that torch may allocate
    once: bool = False

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def lean(self) -> bool:
        """Whether a peer has to save memory: asked to, or at lengths where its whole logits fit nowhere without."""
        return self.save or bool(self.level) or self.limit is not None or self.rows > 16384


class Stock:
    """transformers + PEFT with sdpa."""

    def load(self, wanted: Wanted, device: str) -> Any:
        from benchmarks._models import build

        return build(wanted.name, wanted.weights, wanted.rank, device)

    def modes(self, wanted: Wanted) -> list[bool]:
        """Whether memory is saved, in the order to try: the next one where memory runs out."""
        return [True] if wanted.lean else [False, True]

    def enter(self, model: Any, wanted: Wanted, lean: bool, optimizer: str) -> None:
        model.gradient_checkpointing_disable()
        if lean:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()

    def leave(self, model: Any) -> None:
        model.gradient_checkpointing_disable()

    def how(self, model: Any, lean: bool) -> str:
        return "sdpa, gradient checkpointing" if lean else "sdpa"

    def needed(self, model: Any) -> int | None:
        """Bytes that the arm itself forecasts for its step, beyond the model that is there."""
        return None

    def recorded(self, model: Any) -> bool:
        """Whether steps are replayed from a CUDA graph."""
        return False


class Liger(Stock):
    """The same with Liger's kernels as it binds them by default."""

    def load(self, wanted: Wanted, device: str) -> Any:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        model = super().load(wanted, device)
        apply_liger_kernel_to_llama(model=model.get_base_model())
        return model

    def how(self, model: Any, lean: bool) -> str:
        return "apply_liger_kernel_to_llama" + (", gradient checkpointing" if lean else "")


class Unsloth(Stock):
    """Unsloth's FastLanguageModel on the same weights, read from a checkpoint folder, with its own checkpointing or without."""

    def __init__(self, lean: bool) -> None:
        self.lean = lean

    def load(self, wanted: Wanted, device: str) -> Any:
        import torch
        from unsloth import FastLanguageModel

        from benchmarks._models import TARGETS, fill_lora, written

        folder = written(wanted.name, wanted.weights, device)
        model, _ = FastLanguageModel.from_pretrained(
            str(folder),
            max_seq_length=max(UNSLOTH_LENGTH, wanted.tokens),
            dtype=torch.bfloat16,
            load_in_4bit=wanted.weights == "nf4",
        )
        model = FastLanguageModel.get_peft_model(
            model, r=wanted.rank, target_modules=TARGETS, lora_alpha=wanted.rank, lora_dropout=0, bias="none",
            use_gradient_checkpointing="unsloth", random_state=0,
        )  # fmt: skip
        fill_lora(model)
        return model

    def modes(self, wanted: Wanted) -> list[bool]:
        return [self.lean]

    def enter(self, model: Any, wanted: Wanted, lean: bool, optimizer: str) -> None:
        from unsloth import FastLanguageModel

        FastLanguageModel.for_training(model, use_gradient_checkpointing=lean)

    def leave(self, model: Any) -> None:
        """Nothing: the next one enters over it."""

    def how(self, model: Any, lean: bool) -> str:
        lora = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
        mode = '"unsloth"' if lean else "False"
        return f"use_gradient_checkpointing={mode}, LoRA in {', '.join(sorted(lora))}"


class Nbkit(Stock):
    """The patched model, as `nbkit.patch` leaves it; `graphs` False: without CUDA graphs."""

    def __init__(self, graphs: bool) -> None:
        self.graphs = graphs

    def modes(self, wanted: Wanted) -> list[bool]:
        return [wanted.save]

    def enter(self, model: Any, wanted: Wanted, lean: bool, optimizer: str) -> None:
        import nbkit
        from nbkit.families import find
        from nbkit.models.layer import Keep, bind, binding_of
        from nbkit.training.keep import tell_optimizer_bytes

        nbkit.patch(model, graphs=self.graphs)  # the planner decides where the row names no level
        binding = binding_of(model)
        if binding is None:  # a CPU takes the parts one by one: there the layer is bound for the look
            family = find("llama")
            assert family is not None
            binding = bind(model.get_base_model(), family)
        binding.checkpoint = "nbkit" if lean else None
        tell_optimizer_bytes(model, optimizer)  # as nbkit's trainer does
        if wanted.level is not None:
            binding.keep = Keep(wanted.level)

    def leave(self, model: Any) -> None:
        import nbkit

        nbkit.unpatch(model)

    def how(self, model: Any, lean: bool) -> str:
        from nbkit.models.forwards import GRAPHS
        from nbkit.models.layer import binding_of

        binding, graphs = binding_of(model), vars(model.get_base_model()).get(GRAPHS)
        assert binding is not None
        chosen = [str(binding.planner.plan or f"keep {binding.chosen}"), *sorted(map(str, binding.how))]
        chosen += [graphs.note if graphs else "no graphs", *(f"stock: {reason}" for reason in binding.reasons)]
        return "; ".join(chosen)

    def needed(self, model: Any) -> int | None:
        from nbkit.models.layer import binding_of

        binding = binding_of(model)
        return binding.planner.plan.needed if binding is not None and binding.planner.plan is not None else None

    def recorded(self, model: Any) -> bool:
        from nbkit.models.forwards import GRAPHS

        graphs = vars(model.get_base_model()).get(GRAPHS)
        return graphs is not None and bool(graphs.recorded)

    def prepare(self, model: Any, rows: int) -> None:
        """Plan and pin host memory, which a first step would do by itself."""
        from nbkit.models.layer import binding_of

        binding = binding_of(model)
        assert binding is not None
        binding.prepare(rows)


@dataclass(frozen=True)
class Arm:
    """One line of a row's table: in which process it runs, and what that needs installed."""

    process: str
    make: Callable[[], Stock]
    needs: str = "transformers"


ARMS = {
    "stock": Arm("stock", Stock),
    "liger": Arm("liger", Liger, "liger_kernel"),
    "unsloth": Arm("unsloth", lambda: Unsloth(lean=True), "unsloth"),
    "unsloth-free": Arm("unsloth", lambda: Unsloth(lean=False), "unsloth"),
    "eager": Arm("eager", lambda: Nbkit(graphs=False)),
    "nbkit": Arm("nbkit", lambda: Nbkit(graphs=True)),
}
