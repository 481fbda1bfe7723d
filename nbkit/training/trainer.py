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
from transformers import Trainer, TrainerCallback

from nbkit.config import RunConfig
from nbkit.data.collate import Collator
from nbkit.errors import TrainingError
from nbkit.events import CheckpointEvent, Event, MemoryEvent, MessageEvent, StepEvent
from nbkit.families import find
from nbkit.hardware.meter import Meter
from nbkit.models import overflow, running
from nbkit.training import checkpoints, loader, state
from nbkit.training.keep import ModelState, require_finite
from nbkit.training.optim import AdamW8bit, unwrapped
from nbkit.training.watch import Guard, Liveness, Norms

# Progress is told by events alone; these would print a second table.
_PRINTERS = {"NotebookProgressCallback", "ProgressCallback", "PrinterCallback"}
METER_SECONDS = 0.25  # between two readings of memory: on a GPU one takes half a millisecond
GRAPHS_AFTER = 6  # steps: by then it is clear whether they are recorded
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
    if self.right_padded:  # nothing that bears a label sees the padding, and without a mask nobody waits to look at it
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
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
        self.loss_is_whole = type(self).compute_loss is token_mean_loss
        if self.loss_is_whole:
            # The loss is divided by the tokens of the whole step: nothing is left to scale. The three spellings are
            # those of transformers 5.15 to 5.18, of 5.19 on, and of TRL's workaround between them.
            self.model_accepts_loss_kwargs = True
            self.loss_is_scaled_for_ga = True
            self.compute_loss_func = None
        for callback in [c for c in self.callback_handler.callbacks if type(c).__name__ in _PRINTERS]:
            self.remove_callback(callback)
        self.add_callback(_Boundaries(self))
        # Rows padded on the right by a decoder that looks back alone: that is what every declared family is.
        self.right_padded = isinstance(self.data_collator, Collator) and find(self.model.config.model_type) is not None
        self._begin()

    def _begin(self) -> None:
        """What a run starts with."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self._norms, self._watch, self._meter = Norms(named), Liveness(self.model), Meter()
        self._guard: Guard | None = None
        self._entered = False
        self._micro_losses: list[torch.Tensor] = []
        self._last_inputs: dict[str, Any] = {}
        self._figures: torch.Tensor | None = None  # (loss, gradient norm) on the device, until they are read
        self._tokens = (0, 0)
        self._rate, self._told = 0.0, 0
        self._skips_in_a_row = 0
        self._boundary = self._read_at = time.perf_counter()
        self.last_loss: float | None = None
        self.last_norm: float | None = None
        self.skipped = 0  # float16 steps that overflowed
        self.peak_bytes = 0

    def close(self) -> None:
        """Puts the model back as it was, adapters apart, and lets go of optimizer and gradients."""
        self.model.zero_grad()
        self._kept.restore()
        if self._guard is not None:
            self._guard.release()
        self._last_inputs = {}
        if self.optimizer is not None:
            self.optimizer.state.clear()  # accelerate keeps the optimizer itself until the trainer is collected

    # -- what transformers' loop asks --------------------------------------------------------------

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """ "adamw_8bit" is nbkit's, one launch a step; transformers would take bitsandbytes', a launch for each tensor."""
        if args.optim != "adamw_8bit":
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        return AdamW8bit, {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}

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
        return max(trained, 1)  # a number, not a tensor: a copy to the device would wait for it

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a micro-batch. transformers' own walks all modules each time, which a LoRA model has
        thousands of; here that is done once, and nothing waits for the device."""
        if not self._entered:
            self._enter(model)
        if not self.loss_is_whole:  # TRL's own way, which may make its batches here
            loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        else:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            if self.accelerator.scaler is None:
                loss.backward()
            else:
                self.accelerator.backward(loss)
                self._last_inputs = inputs
        self._micro_losses.append(loss.detach())
        return self._micro_losses[-1]

    def _enter(self, model: Any) -> None:
        """Before the first micro-batch."""
        model.train()
        vars(self.model)["zero_grad"] = self._clear_gradients  # ModelState takes it off again
        self._guard = Guard(self.optimizer) if self.accelerator.scaler is None else None
        self._entered = True

    def _clear_gradients(self, set_to_none: bool = True) -> None:
        for _, p in self._norms.named:
            p.grad = None

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        return self._measure(self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> torch.Tensor:
        return self._measure(None) if grad_norm is None else grad_norm

    def _measure(self, max_norm: float | None) -> torch.Tensor:
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
        norm = self._norms.measure(max_norm)
        loss = torch.stack(self._micro_losses).sum().float()
        self._figures = torch.stack([loss, norm.to(loss.device)])
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it walks all modules at every micro-step and nothing reads it."""
        return 0

    def _send_telemetry(self) -> None:
        """TRL reports its use to its makers; nbkit sends nothing."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing: what transformers and TRL would print at the end is said by events."""

    # -- before and after an optimizer step --------------------------------------------------------

    def before_step(self) -> None:
        """Between backward and optimizer step. Where the optimizer skips a step that is not finite by itself, the figures
        are read after it; while tensors are still watched for their first gradient, and elsewhere, before it.

        Raises: TrainingError for a loss or gradient that is not finite, or an adapter tensor that gets no gradient.
        """
        self._rate = self._get_learning_rate()
        assert self._figures is not None
        if self._guard is None or not self._watch.done or not self._guard.arm(self._figures):
            self._read()

    def after_step(self) -> None:
        """Right after the optimizer's step, with the gradients still there. Raises: as `before_step`."""
        if self._figures is not None:
            self._read()

    def _read(self) -> None:
        """The one place of a step where the device is waited for."""
        assert self._figures is not None
        self.last_loss, self.last_norm = self._figures.tolist()
        self._figures = None
        self._micro_losses.clear()
        step = self.state.global_step + 1
        if math.isfinite(self.last_loss) and math.isfinite(self.last_norm):
            self._skips_in_a_row = 0
            self._watch.look(step, self._rate)
            return
        self._skips_in_a_row += 1
        self.skipped += 1
        bad_loss = not math.isfinite(self.last_loss)
        what = (f"the loss is {self.last_loss}" if bad_loss else f"the gradient norm is {self.last_norm}") + self._where(bad_loss)
        if self.accelerator.scaler is None:
            raise TrainingError(
                f"Step {step}: {what}; the weights are as after step {step - 1}. Try a learning rate below "
                f"{self.args.learning_rate:g} or max_grad_norm=1.0, and look at the rows of this step."
            )
        if self._skips_in_a_row > SKIPS_ALLOWED:
            raise TrainingError(
                f"Step {step}: {what} in float16, {self._skips_in_a_row} steps in a row; the weights are as before them. "
                'This model does not fit float16: load it with dtype="float32", or on a GPU of capability 8.0 with "bfloat16".'
            )
        text = f"float16: step {step} was skipped, {what}; the loss scale is halved."
        self.link.emit(MessageEvent(step=step, level="warning", text=text))

    def _where(self, bad_loss: bool) -> str:
        """ ", first in model.layers.7.mlp.down_proj", if that can be told."""
        place = None
        if bad_loss and self._last_inputs:
            with self.compute_loss_context_manager():
                place = overflow.first_bad_output(self.model, {k: v for k, v in self._last_inputs.items() if k != "labels"})
        if place is None and not bad_loss and self._norms.each is not None:
            place = overflow.highest_bad_gradient(self._norms.names, self._norms.each)
        return "" if place is None else f", first in {place}"

    def tell(self, last: bool) -> None:
        """The events of a step: its figures, memory where the last reading is some time ago, and what the engine chose."""
        now, step = time.perf_counter(), self.state.global_step
        self._told += 1
        if self._told == 1:
            self._checkpoint_bytes()  # raises where the optimizer's state cannot be kept: now rather than at the first save
            self._tell_choices(step)
        if self._told == GRAPHS_AFTER or (last and self._told < GRAPHS_AFTER):
            said = running.recorded(self.model)
            if said:
                self.link.emit(MessageEvent(step=step, text=said))
        self.link.emit(
            StepEvent(
                step=step,
                loss=self.last_loss if self.last_loss is not None else math.nan,
                learning_rate=self._rate,
                grad_norm=self.last_norm,
                trained_tokens=self._tokens[0],
                total_tokens=self._tokens[1],
                seconds=now - self._boundary,
            )
        )
        self._boundary = now
        if not last and self.peak_bytes and now - self._read_at < METER_SECONDS:
            return
        self._read_at, reading = now, self._meter.read()
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

    def _tell_choices(self, step: int) -> None:
        """After the first step: the plan, and every reason for which something runs stock."""
        for text in running.choices(self.model):
            self.link.emit(MessageEvent(step=step, text=text))
        for reason in running.stock_reasons(self.model):
            self.link.emit(MessageEvent(step=step, level="warning", text=f"Slower than it could be: {reason}."))

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
            state.save(staging, self._state())
            self.state.save_to_json(str(staging / "trainer_state.json"))
        checkpoints.prune(folder)
        self.link.emit(CheckpointEvent(step=step, path=str(folder / checkpoints.name_of(step))))
        self._boundary = time.perf_counter()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Into the adapter that is there: PEFT's `load_adapter` may dispatch the whole model anew."""
        checkpoints.load_adapter(self.model, Path(resume_from_checkpoint))

    def _state(self) -> dict[str, Any]:
        """What a resume needs beside weights and transformers' own counters."""
        scaler = self.accelerator.scaler
        return {
            "optimizer": state.of_optimizer(unwrapped(self.optimizer)),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": state.of_random(),
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.restore_optimizer(state.load(Path(checkpoint), "optimizer"), unwrapped(self.optimizer), Path(checkpoint))
            self.lr_scheduler.load_state_dict(state.load(Path(checkpoint), "scheduler"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """The loss scale of float16; where only one of checkpoint and run has one, it begins anew, and that is said."""
        saved = None if checkpoint is None else state.load(Path(checkpoint), "scaler")
        scaler = self.accelerator.scaler
        if saved is not None and scaler is not None:
            scaler.load_state_dict(saved)
        elif checkpoint is not None and (saved is None) != (scaler is None):
            was, now = ("another dtype", "float16") if saved is None else ("float16", "another dtype")
            text = f"The checkpoint was trained in {was}, this run goes on in {now}: losses will differ a little."
            self.link.emit(MessageEvent(step=self.state.global_step, level="warning", text=text))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            said = state.restore_random(state.load(Path(checkpoint), "random"), Path(checkpoint))
            if said:
                self.link.emit(MessageEvent(step=self.state.global_step, level="warning", text=said))

    def _checkpoint_bytes(self) -> int:
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        return weights + state.bytes_of(unwrapped(self.optimizer)) + 2_000_000  # manifest, random states, headers


class _Boundaries(TrainerCallback):
    """Serves what waits for a step boundary: checks before the weights change, saves and stops after."""

    def __init__(self, trainer: TrainerMixin) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        stopping = self._trainer.link.stop_requested()
        self._trainer.tell(last=stopping or state.global_step >= state.max_steps)
        control.should_training_stop = control.should_training_stop or stopping
        control.should_save = self._trainer.wants_save(stopping)
        return control
