"""What the worker of a run does, from the first event to the saved adapter."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbkit.config import RunConfig
from nbkit.errors import TrainingError
from nbkit.events import EvalEvent, Event, MessageEvent, RunFinished, RunStarted, StepEvent, read_events
from nbkit.training import checkpoints
from nbkit.training.evaluate import held_out_loss
from nbkit.training.folder import ADAPTER_NAME
from nbkit.training.methods import steps_of

if TYPE_CHECKING:
    from nbkit.data.report import DataReport
    from nbkit.training.checkpoints import Checkpoint

LOSS_RULE = "mean over the trained tokens of the step"  # in every manifest: a resume must mean the same by "loss"
# Settings of TrainConfig that a resumed run may change; the others would not be the same training.
MAY_CHANGE = {"max_steps", "epochs", "save_steps", "gradient_checkpointing"}


class Job:
    """One run's work on the thread that owns the model. `run` is called once."""

    def __init__(
        self,
        config: RunConfig,
        model: Any,
        tokenizer: Any,
        data: DataReport,
        folder: Path,
        checkpoint: Checkpoint | None,
        emit: Callable[[Event], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        self._config, self._folder, self._checkpoint = config, folder, checkpoint
        self._model, self._tokenizer, self._data = model, tokenizer, data
        self._emit, self._stop_requested = emit, stop_requested
        self._total = steps_of(config, data.examples)
        self._first = checkpoint.step if checkpoint is not None else 0
        self._peak = 0  # bytes, as the memory events have it; 0 if nothing was trained

    def run(self) -> RunFinished:
        """Held-out loss, training, held-out loss, adapter; the model is in this thread's hand until then.

        Raises: TrainingError, or whatever the libraries raise.
        """
        from nbkit.models.busy import in_hand
        from nbkit.models.patch import base_model

        with in_hand(base_model(self._model), "being trained"):
            return self._run()

    def _run(self) -> RunFinished:
        began = time.monotonic()
        device = self._model.get_input_embeddings().weight.device
        self._enter(device)
        self._emit(
            RunStarted(
                step=self._first,
                total_steps=self._total,
                device=_device_name(device),
                trainable_parameters=sum(p.numel() for p in self._model.parameters() if p.requires_grad),
                resumed_from=self._first,
                message=f"from {self._checkpoint.path.name}" if self._checkpoint is not None else "",
            )
        )
        before = self._before()
        step, loss = self._train() if self._first < self._total else self._take_up_finished()
        stopped = self._stop_requested() and step < self._total
        after = None if stopped or before is None else self._held_out(step)
        adapter = self._save_adapter(step) if step > 0 else ""
        return RunFinished(
            step=step,
            stopped=stopped,
            loss=loss,
            held_out_before=before,
            held_out_after=after,
            seconds=time.monotonic() - began,
            peak_bytes=self._peak,
            adapter_path=adapter,
        )

    def _enter(self, device: Any) -> None:
        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)  # the current device is a thread's own

    def _before(self) -> float | None:
        """The loss before step 1: measured, or read back from the log of the part that ran before."""
        if self._first == 0:
            return self._held_out(0)
        losses = [e.loss for e in read_events(self._folder) if isinstance(e, EvalEvent) and e.step == 0]
        return losses[-1] if losses else None

    def _held_out(self, step: int) -> float | None:
        examples = self._data.held_out_examples
        if not examples:
            return None
        # A stop need not wait for the rows before step 1; after the last step there is nothing left to stop.
        should_stop = self._stop_requested if step == 0 else None
        loss = held_out_loss(self._model, examples, pad_token_id(self._tokenizer), should_stop=should_stop)
        if math.isnan(loss) and self._stop_requested():
            return None
        self._emit(EvalEvent(step=step, loss=loss, rows=len(examples)))
        return loss

    def _train(self) -> tuple[int, float | None]:
        """(steps done, loss of the last step). The trainer lives no longer than this call."""
        from nbkit.models.checkpointing import set_checkpointing
        from nbkit.training import methods
        from nbkit.training.keep import tell_optimizer_bytes
        from nbkit.training.trainer import Link

        train = self._config.train
        if self._stop_requested():
            return self._first, None
        link = Link(self._config, self._folder, facts(self._config, self._data), self._emit, self._stop_requested)
        trainer = methods.build(link, self._model, self._tokenizer, self._data.examples)
        try:
            tell_optimizer_bytes(self._model, str(trainer.args.optim))
            said = set_checkpointing(self._model, train.gradient_checkpointing)
            if said:
                self._emit(MessageEvent(step=self._first, text=said))
            trainer.train(resume_from_checkpoint=str(self._checkpoint.path) if self._checkpoint is not None else None)
            return trainer.state.global_step, trainer.last_loss
        finally:
            if trainer.skipped:
                self._emit(_overflowed(trainer))
            self._peak = trainer.peak_bytes
            trainer.close()

    def _take_up_finished(self) -> tuple[int, float | None]:
        assert self._checkpoint is not None
        checkpoints.load_adapter(self._model, self._checkpoint.path)
        self._emit(MessageEvent(step=self._first, text=f"All {self._total} steps were done already; nothing was trained."))
        losses = [e.loss for e in read_events(self._folder) if isinstance(e, StepEvent) and e.step == self._first]
        return self._first, losses[-1] if losses else None

    def _save_adapter(self, step: int) -> str:
        """Writes `<run folder>/adapter` whole, in place of an older one."""
        from nbkit.models.positions import save_beside
        from nbkit.training.keep import require_finite

        require_finite(self._model, step)
        size = sum(p.numel() * p.element_size() for p in self._model.parameters() if p.requires_grad)
        checkpoints.require_space(self._folder, size + 1_000_000, "The adapter")
        target = self._folder / ADAPTER_NAME
        staging = self._folder / f".{ADAPTER_NAME}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            self._model.save_pretrained(staging, save_embedding_layers=False)
            save_beside(self._model, staging)
            checkpoints.replace_folder(staging, target)
        except BaseException:
            checkpoints.remove(staging)
            raise
        return str(target)


def _overflowed(trainer: Any) -> MessageEvent:
    done = trainer.state.global_step
    text = f"float16: {trainer.skipped} of {done} steps overflowed and were skipped; their rows were not learned from."
    return MessageEvent(step=done, level="warning", text=text)


def facts(config: RunConfig, data: DataReport) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run it belongs to."""
    return {
        "loss_rule": LOSS_RULE,
        "data": {"fingerprint": data.fingerprint, "rows": len(data.examples), "trained_tokens": data.trained_tokens},
        "config": json.loads(config.to_json()),
    }


def require_same_run(checkpoint: Checkpoint, config: RunConfig, data: DataReport) -> None:
    """Raises: TrainingError naming the first thing in which the checkpoint's run differs from this one."""
    was, now = checkpoint.manifest, facts(config, data)
    if was.get("loss_rule") != LOSS_RULE:
        rule = was.get("loss_rule")
        raise TrainingError(f"{checkpoint.path} counts loss as {rule!r}, this nbkit as {LOSS_RULE!r}; start a new run.")
    if was["data"] != now["data"]:
        raise TrainingError(
            f"{checkpoint.path} was trained on other rows ({_rows(was['data'])}, now {_rows(now['data'])}); "
            "resume with the same data, or start a new run in another run_dir."
        )
    for part in ("model", "lora", "train"):
        for key, value in now["config"][part].items():
            old = was["config"][part].get(key)
            if old != value and not (part == "train" and key in MAY_CHANGE):
                raise TrainingError(
                    f"{checkpoint.path} belongs to a run with {part}.{key} = {old!r}, this one has {value!r}; "
                    "resume with the run.json of that run, or start a new run in another run_dir."
                )


def pad_token_id(tokenizer: Any) -> int:
    """The padding id; any id does where there is none, since padding is masked and bears no label."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


def _rows(data: Mapping[str, Any]) -> str:
    return f"{data['rows']} rows with {data['trained_tokens']} trained tokens, fingerprint {str(data['fingerprint'])[:12]}"


def _device_name(device: Any) -> str:
    if device.type != "cuda":
        return str(device)
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"
