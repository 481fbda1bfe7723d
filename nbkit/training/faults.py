"""What went wrong in a run, as one sentence with a remedy."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

from nbkit.config import RunConfig
from nbkit.errors import NbkitError, TrainingError

_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")
_DISK_WORDS = ("no space left", "os error 28", "inline_container", "disk quota exceeded")


def explained(error: BaseException, config: RunConfig, folder: Path, step: int) -> BaseException:
    """The error to show: a TrainingError chained to `error` for a known cause, else `error` itself."""
    if isinstance(error, NbkitError):
        return error
    if is_out_of_memory(error):
        shown: BaseException = TrainingError(f"Out of memory in step {step + 1}; {memory_remedy(config)}")
    elif is_disk_full(error):
        shown = TrainingError(disk_sentence(folder))
    else:
        return error
    shown.__cause__ = error
    return shown


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in text for w in _MEMORY_WORDS))


def is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return True
    return any(word in str(error).lower() for word in _DISK_WORDS)


def memory_remedy(config: RunConfig) -> str:
    """The next smaller setting that trains the same way, else the next that needs less."""
    train, model = config.train, config.model
    if train.batch_size > 1:
        half = train.batch_size // 2
        more = -(-train.batch_size * train.gradient_accumulation // half)
        return f"try batch_size={half} with gradient_accumulation={more}, the same step in less memory."
    if train.gradient_checkpointing in (False, "auto"):
        return "try gradient_checkpointing=True, the same training in less memory."
    if not model.load_in_4bit:
        return f"try load_in_4bit=True, or rows shorter than max_seq_length={model.max_seq_length // 2}."
    return f"try rows shorter than max_seq_length={model.max_seq_length // 2}, or a smaller model."


def disk_sentence(folder: Path) -> str:
    import shutil

    from nbkit.training.checkpoints import size_text

    free = shutil.disk_usage(folder).free
    return f"Disk full: writing in {folder} failed with {size_text(free)} free; make room and resume, or choose another run_dir."


def free_frames(error: BaseException) -> None:
    """Drops the local variables that a traceback keeps alive (model, batch, activations); its lines stay readable."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        waiting += [one.__cause__, one.__context__]
