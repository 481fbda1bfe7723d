"""The one mixin that nbkit puts before TRL's trainers.

transformers' loop stays as it is; the mixin changes what nbkit promises differently:
the loss of a step is one mean over its trained tokens, the order of rows follows from the seed alone,
checkpoints are published whole, a stop is served between steps, what is not finite never reaches the
weights, and every adapter tensor must be seen to train. TRL and accelerate rewrite parts of the model
(the head's forward, the adapter's dtype, an autocast wrapper); all of it is put back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from nbkit.config import RunConfig
from nbkit.errors import TrainingError
from nbkit.events import CheckpointEvent, Event, MemoryEvent, MessageEvent, StepEvent
from nbkit.hardware.meter import Meter
from nbkit.training import checkpoints, loader
from nbkit.training.keep import ModelState, require_finite

# Progress is told by events alone; these would print a second table.
_PRINTERS = {"NotebookProgressCallback", "ProgressCallback", "PrinterCallback"}
SKIPS_ALLOWED = 4  # fp16 steps in a row that the loss scaler may skip while it looks for a scale


@dataclass(frozen=True)
class Link:
    """What a trainer needs of its run."""

    config: RunConfig
    folder: Path
    facts: Mapping[str, Any]  # put into every checkpoint's manifest
    emit: Callable[[Event], None]
    stop_requested: Callable[[], bool]


def token_mean_loss(
    self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
) -> Any:
    """`compute_loss` of next-token methods: the model's own loss, summed over labels and divided by the trained
    tokens of the whole step (`num_items_in_batch`). TRL's own adds metrics that need logits or a second head."""
    outputs = model(**inputs, num_items_in_batch=num_items_in_batch, use_cache=False)
    return (outputs.loss, outputs) if return_outputs else outputs.loss


class TrainerMixin:
    """Placed before a TRL trainer in the MRO, as `methods.build` does; takes its arguments and these:

    Args:
        link: the run that the trainer reports to and is stopped by.
        examples: the training rows; the trainer's own `train_dataset` only serves TRL's checks.
    """

    def __init__(self, *args: Any, link: Link, examples: Sequence[Any], **kwargs: Any) -> None:
        self.link = link
        self._kept = ModelState(kwargs["model"])
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            self._kept.restore()
            raise
        self._kept.restore_weights_and_forwards()  # before training: TRL's head and its bf16 adapter are not wanted
        self.train_dataset = examples
        # Trainer.train would rewrite the model's special tokens to the tokenizer's, and save the tokenizer with each checkpoint.
        self.processing_class = None
        if type(self).compute_loss is token_mean_loss:
            # The loss is divided by the tokens of the whole step: nothing is left to scale. The three spellings are
            # those of transformers 5.15 to 5.18, of 5.19 on, and of TRL's workaround between them.
            self.model_accepts_loss_kwargs = True
            self.loss_is_scaled_for_ga = True
            self.compute_loss_func = None
        for callback in [c for c in self.callback_handler.callbacks if type(c).__name__ in _PRINTERS]:
            self.remove_callback(callback)
        self.add_callback(_Boundaries(self))
        self._watch = _Liveness(self.model)
        self._meter = Meter()
        self._micro_losses: list[torch.Tensor] = []
        self._tokens = (0, 0)
        self._norm: torch.Tensor | float | None = None
        self._skips = 0
        self._boundary = time.perf_counter()
        self.last_loss: float | None = None
        self.peak_bytes = 0

    def close(self) -> None:
        """Puts the model back as it was, adapters apart, and lets go of optimizer and gradients."""
        self.model.zero_grad(set_to_none=True)
        self._kept.restore()
        if self.optimizer is not None:
            self.optimizer.state.clear()  # accelerate keeps the optimizer itself until the trainer is collected

    # -- what transformers' loop asks --------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Batches of the examples in seeded order, collated and on the device."""
        self._boundary = time.perf_counter()  # the loop asks once, just before the first step
        config = self.link.config
        if config.train.packing:
            loader.require_separation(self.model)
        pin = self.args.dataloader_pin_memory
        return self.accelerator.prepare(loader.train_loader(config, self.train_dataset, self.data_collator, pin))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Trained tokens of the whole optimizer step; transformers 5.15 to 5.18 would count a label at position 0 too."""
        counts = [batch.pop(loader.COUNTS, None) for batch in batch_samples]
        if not counts or None in counts:
            return super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        trained, total = (sum(count[kind] for count in counts) for kind in (0, 1))
        self._tokens = (trained, total)
        return torch.tensor(max(trained, 1), device=device)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self._micro_losses.append(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self._norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        return self._norm

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it walks all modules at every micro-step and nothing reads it."""
        return 0

    def _send_telemetry(self) -> None:
        """TRL reports its use to its makers; nbkit sends nothing."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One StepEvent and one MemoryEvent a step; the summary that transformers logs at the end is not one."""
        if "loss" not in logs:
            return
        now = time.perf_counter()
        step, (trained, total) = self.state.global_step, self._tokens
        norm = None if self._norm is None else float(self._norm)
        self.link.emit(
            StepEvent(
                step=step,
                loss=self.last_loss if self.last_loss is not None else math.nan,
                learning_rate=logs["learning_rate"],
                grad_norm=norm,
                trained_tokens=trained,
                total_tokens=total,
                seconds=now - self._boundary,
            )
        )
        self._boundary = now
        reading = self._meter.read()
        self.peak_bytes = max(self.peak_bytes, reading.peak_bytes)
        self.link.emit(
            MemoryEvent(
                step=step,
                memory=reading.memory,
                used_bytes=reading.used_bytes,
                peak_bytes=reading.peak_bytes,
                total_bytes=reading.total_bytes,
            )
        )

    # -- before and after an optimizer step --------------------------------------------------------

    def check_step(self) -> None:
        """Runs between backward and optimizer step, so that a fault leaves the weights as they were.

        Raises: TrainingError for a loss or gradient that is not finite, or an adapter tensor that gets no gradient.
        """
        self.last_loss = float(torch.stack(self._micro_losses).sum())
        self._micro_losses.clear()
        finite = math.isfinite(self.last_loss) and (self._norm is None or math.isfinite(self._norm))
        scaler = getattr(self.accelerator, "scaler", None)
        step = self.state.global_step + 1
        if finite:
            self._skips = 0
            self._watch.look(step, self._get_learning_rate())
            return
        self._skips += 1
        bad_loss = not math.isfinite(self.last_loss)
        what = f"the loss is {self.last_loss}" if bad_loss else f"the gradient norm is {float(self._norm or 0)}"
        if scaler is None:
            raise TrainingError(
                f"Step {step}: {what}; the weights are as after step {step - 1}. Try a learning rate below "
                f"{self.args.learning_rate:g} or max_grad_norm=1.0, and look at the rows of this step."
            )
        if self._skips > SKIPS_ALLOWED:
            raise TrainingError(
                f"Step {step}: {what} in float16, {self._skips} steps in a row; the weights are as before them. "
                'This model does not fit float16: load it with dtype="float32", or on a GPU of capability 8.0 with "bfloat16".'
            )
        text = f"float16: step {step} was skipped, {what}; the loss scale is halved."
        self.link.emit(MessageEvent(step=step, level="warning", text=text))

    def wants_save(self, stopping: bool) -> bool:
        step, every = self.state.global_step, self.link.config.train.save_steps
        return stopping or step >= self.state.max_steps or (every > 0 and step % every == 0)

    # -- checkpoints -------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Publishes `checkpoint-000040` whole; transformers' own order of writing leaves torn ones after a kill."""
        step, folder = self.state.global_step, self.link.folder
        require_finite(self.model, step)
        with checkpoints.staged(folder, step, self.link.facts, self._checkpoint_bytes()) as staging:
            self.model.save_pretrained(staging, save_embedding_layers=False)  # "auto" would ask the hub for the base config
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
            self.state.save_to_json(str(staging / "trainer_state.json"))
        checkpoints.prune(folder)
        self.link.emit(CheckpointEvent(step=step, path=str(folder / checkpoints.name_of(step))))
        self._boundary = time.perf_counter()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Into the adapter that is there: PEFT's `load_adapter` may dispatch the whole model anew."""
        checkpoints.load_adapter(self.model, Path(resume_from_checkpoint))

    def _checkpoint_bytes(self) -> int:
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        moments = sum(v.numel() * v.element_size() for s in states for v in s.values() if isinstance(v, torch.Tensor))
        return weights + moments + 2_000_000  # manifest, random states, headers


class _Liveness:
    """Every trainable LoRA tensor must have had a gradient that is not zero once lora_B has moved.

    lora_B starts at zero, so lora_A's gradient is exactly zero until the first step that changes lora_B.
    """

    def __init__(self, model: Any) -> None:
        self._waiting = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}
        self._moved = False

    def look(self, step: int, learning_rate: float) -> None:
        if not self._waiting:
            return
        present = {n: p.grad for n, p in self._waiting.items() if p.grad is not None}
        if present:
            norms = torch.stack([n.float().cpu() for n in torch._foreach_norm(list(present.values()), ord=math.inf)])
            for name in [n for n, alive in zip(present, (norms > 0).tolist(), strict=True) if alive]:
                del self._waiting[name]
        if self._moved and self._waiting:
            names = sorted({n.split(".lora_")[0].removeprefix("base_model.model.") for n in self._waiting})
            raise TrainingError(
                f"Step {step}: {len(self._waiting)} adapter tensors get no gradient, in {', '.join(names[:4])}"
                f"{f' and {len(names) - 4} more' if len(names) > 4 else ''}; nothing would be learned there. "
                "Leave these modules out of the LoRA targets, or run nbkit.unpatch(model) and report it."
            )
        self._moved = self._moved or learning_rate > 0


class _Boundaries(TrainerCallback):
    """Serves what waits for a step boundary: checks before the weights change, saves and stops after."""

    def __init__(self, trainer: TrainerMixin) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        stopping = self._trainer.link.stop_requested()
        control.should_training_stop = control.should_training_stop or stopping
        control.should_save = self._trainer.wants_save(stopping)
        return control
