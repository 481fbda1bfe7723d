"""What a trainer costs: nbkit's own run and TRL's SFTTrainer against the plain loop, same model, same rows, in one process.

usage: python -m benchmarks.bench_trainer ROW... [--arms plain,run,run-8bit,sft-patched,sft] [--steps 40] [--out FILE.csv]
ROW is MODEL:WEIGHTS:BATCHxTOKENS[:rRANK] as in bench_training.py, or tiny:f32:2x64 for a look on a CPU.

    plain        patched model, plain loop: forward, backward, clip_grad_norm_, fused AdamW, zero_grad, the loss read once
    run          patched model, nbkit's Run: worker thread, mixin on TRL, events in a file and to a subscriber
    run-8bit     the same with nbkit's 8-bit AdamW
    sft-patched  patched model in an unmodified SFTTrainer (its default checkpointing off, its metrics as they come)
    sft          stock model in an unmodified SFTTrainer

Rows are full length, random, all labelled. The first WARM steps of each arm are not counted (kernels, cuDNN plans, recorded
graphs); of the others the median is given. "over" is the arm's step by the plain loop's. An arm whose libraries are missing
is left out and named.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._models import build
from benchmarks._results import stamp, write
from tests.tiny import tiny_model, tiny_tokenizer

WARM = 10
ARMS = ("plain", "run", "run-8bit", "sft-patched", "sft")


@dataclass
class Rows:
    """What a Run reads of a data report."""

    examples: list[dict[str, list[int]]]
    held_out_examples: list[Any] = field(default_factory=list)
    fingerprint: str = "random"

    @property
    def rows_in(self) -> int:
        return len(self.examples)

    @property
    def trained_tokens(self) -> int:
        return sum(len(row["labels"]) - 1 for row in self.examples)


def make(name: str, weights: str, rank: int) -> Any:
    if name != "tiny":
        return build(name, weights, rank)
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_model(num_hidden_layers=8), LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))


def plain(model: Any, rows: Rows, batch: int, steps: int) -> list[float]:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)
    device = params[0].device
    model.train()
    stamps = []
    for step in range(steps):
        some = rows.examples[step * batch : (step + 1) * batch]
        ids = torch.tensor([row["input_ids"] for row in some]).to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss)
        stamps.append(time.perf_counter())
    return stamps


def run(model: Any, rows: Rows, batch: int, steps: int, optimizer: str = "adamw") -> list[float]:
    from nbkit.config import DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
    from nbkit.events import MessageEvent, StepEvent
    from nbkit.training.runner import Run

    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            model=ModelConfig(name="random", max_seq_length=max(len(r["input_ids"]) for r in rows.examples)),
            lora=LoraConfig(rank=16),
            data=DataConfig(source="random"),
            train=TrainConfig(
                max_steps=steps, batch_size=batch, learning_rate=1e-4, optimizer=optimizer, gradient_checkpointing=False
            ),
            run_dir=folder + "/run",
        )
        going = Run(config, model, tiny_tokenizer(), rows)  # type: ignore[arg-type]
        going.subscribe(lambda events: None)
        going.wait(progress=False)
        for event in going.events:
            if isinstance(event, MessageEvent):
                print("   run says:", event.text)
        seconds = [event.seconds for event in going.events if isinstance(event, StepEvent)]
    stamps, now = [], 0.0
    for each in seconds:
        now += each
        stamps.append(now)
    return stamps


def sft(model: Any, rows: Rows, batch: int, steps: int) -> list[float]:
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stamps.append(time.perf_counter())

    def collate(some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in some])
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}

    off = {"activation_checkpointing": False} if "activation_checkpointing" in SFTConfig.__dataclass_fields__ else {}
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-4, optim="adamw_torch_fused",
            logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, max_length=None, packing=False,
            gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(), **off,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(rows.examples), data_collator=collate,
            processing_class=tiny_tokenizer(), callbacks=[Clock()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return stamps


def measure(row: str, arms: list[str], steps: int) -> list[dict[str, Any]]:
    import nbkit

    name, weights, sizes, *options = row.split(":")
    batch, tokens = (int(n) for n in sizes.split("x"))
    rank = next((int(o[1:]) for o in options if o[0] == "r"), 16)
    found: list[dict[str, Any]] = []
    for arm in arms:
        missing = [need for need in ("trl", "datasets") if arm != "plain" and importlib.util.find_spec(need) is None]
        if missing:
            print(f"LEFT OUT {arm}: {', '.join(missing)} not installed")
            continue
        model = make(name, weights, rank)  # anew for each: a trainer may leave its wrappers on a model
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(3, model.config.vocab_size - 1, (steps * batch, tokens), generator=draw).tolist()
        rows = Rows([{"input_ids": one, "labels": list(one)} for one in ids])
        if arm != "sft":
            nbkit.patch(model)
        eight = partial(run, optimizer="adamw_8bit")
        way = {"plain": plain, "run": run, "run-8bit": eight, "sft": sft, "sft-patched": sft}[arm]
        stamps = way(model, rows, batch, steps)
        gaps = [b - a for a, b in zip(stamps[WARM - 1 :], stamps[WARM:], strict=False)]
        middle = statistics.median(gaps)
        first = next((r["ms"] for r in found if r["arm"] == "plain"), None)
        over = None if first is None else round(middle * 1e3 / first, 3)
        result = {"row": row, "arm": arm, "ms": round(middle * 1e3, 2), "tok_s": round(batch * tokens / middle), "over": over}
        found.append({**result, "steps": len(gaps)})
        print("RESULT", found[-1], flush=True)
        del model, rows
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    given = parser.parse_args()
    where = stamp(given.commit, ("trl",))
    results = [{**one, **where} for row in given.rows for one in measure(row, given.arms.split(","), given.steps)]
    if given.out:
        write(given.out, results)


if __name__ == "__main__":
    sys.exit(main())
