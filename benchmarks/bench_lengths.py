"""Real lengths instead of full rows: non-pad tokens per second of LoRA training, each arm packed as its makers document it.

usage: python -m benchmarks.bench_lengths ARM[,ARM] WORKLOAD... [--model 8b] [--steps 24] [--budget SECONDS] [--out FILE.csv]
ARM: nbkit (packs of a fixed token budget), stock (transformers + PEFT, padded, as its users run it), unsloth-packed and
unsloth-padding-free (its SFTTrainer; needs unsloth, and runs in a process of its own).
WORKLOAD: alpaca (log-normal, mean 210 tokens, 8 rows a step) or sharegpt (mean 950, 4 rows a step); a pack holds 2,048 and
4,096 tokens, so that all arms take steps of about the same size. Rows are the same in all arms, every token but a row's first
is labelled, a step includes clipping and the optimizer: AdamW in 8 bits, nbkit's own in its arm and bitsandbytes' in the
others, as the column `optimizer` says. Random weights, true shapes, NF4, rank 16.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks._results import ROOT, append, stamp

WORKLOADS = {"alpaca": (210, 0.8, 16, 2048, 8), "sharegpt": (950, 0.9, 32, 4096, 4)}  # mean, sigma, least, pack and most, rows
VOCAB = 128256
WARM_UP = 6
OWN, BNB = "nbkit adamw8bit", "bitsandbytes adamw8bit"  # as the CSV names them


def rows_of(name: str, count: int) -> list[list[int]]:
    """`count` rows of random ids whose lengths are log-normal; the same in every process."""
    import math

    mean, sigma, least, most, _ = WORKLOADS[name]
    make = random.Random(7)
    mu = math.log(mean) - sigma**2 / 2
    lengths = [min(most, max(least, round(make.lognormvariate(mu, sigma)))) for _ in range(count)]
    return [[make.randrange(3, VOCAB - 1) for _ in range(n)] for n in lengths]


def report(workload: str, arm: str, optimizer: str, seconds: list[float], tokens: list[int], **more: Any) -> dict[str, Any]:
    """Medians would hide that steps differ in size: the speed is all tokens over all seconds after the warm-up."""
    import torch

    found = dict(
        workload=workload, arm=arm, optimizer=optimizer, steps=len(seconds), tokens_a_step=round(statistics.mean(tokens))
    )
    found |= dict(tok_s=round(sum(tokens) / sum(seconds)), ms=round(1e3 * statistics.mean(seconds), 1))
    found |= dict(peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2), **more)
    print("RESULT", json.dumps(found), flush=True)
    return found


def optimizer_of(params: list[Any], name: str) -> Any:
    """AdamW with states of 8 bits: nbkit's own, or bitsandbytes'."""
    if name == OWN:
        from nbkit.training import AdamW8bit

        return AdamW8bit(params, lr=1e-4)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-4)


def loop(model: Any, batches: list[dict[str, Any]], real: list[int], adamw: str) -> tuple[list[float], list[int], float]:
    """(seconds, non-pad tokens, last loss) of the steps after the warm-up."""
    import torch

    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(params, adamw)
    seconds, loss = [], torch.zeros(())
    torch.cuda.reset_peak_memory_stats()
    for batch in batches:
        on_gpu = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(**on_gpu).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:], real[WARM_UP:], float(loss.detach())


def packs(rows: list[list[int]], budget: int) -> list[tuple[dict[str, Any], int]]:
    """Best-fit-decreasing packs as nbkit's loader makes them, each with its tokens."""
    from nbkit.data.collate import PackCollator
    from nbkit.data.packing import pack

    found = pack([len(r) for r in rows], budget, seed=0)
    collate = PackCollator(pad_token_id=0, width=found.width)
    return [
        (collate([{"input_ids": rows[i], "labels": rows[i]} for i in one]), sum(len(rows[i]) for i in one)) for one in found.packs
    ]


def nbkit_arm(workload: str, model_name: str, steps: int) -> dict[str, Any]:
    import torch

    import nbkit
    from benchmarks._models import build
    from nbkit.models.forwards import GRAPHS
    from nbkit.models.layer import binding_of

    _, _, _, budget, per_step = WORKLOADS[workload]
    model = build(model_name, "nf4", 16)
    nbkit.patch(model)
    binding_of(model).optimizer_bytes = 2
    rows = rows_of(workload, (steps + WARM_UP) * per_step)
    made = packs(rows, budget)[: steps + WARM_UP]
    batches, real = [batch for batch, _ in made], [tokens for _, tokens in made]
    seconds, tokens, loss = loop(model, batches, real, OWN)
    graphs = vars(model.get_base_model()).get(GRAPHS)
    print(f"  {binding_of(model).planner.plan}; {sorted(binding_of(model).how)}; {graphs.note if graphs else ''}")
    # The same documents in transformers' own code: the loss of the last pack, the adapter as it is now.
    last = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batches[-1].items()}
    mine = float(model(**last).loss.detach())
    nbkit.unpatch(model)
    plain = {k: last[k] for k in ("input_ids", "position_ids", "labels")}
    stock = float(model(**plain, use_cache=False).loss.detach())
    more = dict(loss=round(loss, 4), loss_now=round(mine, 5), stock_loss=round(stock, 5))
    return report(workload, "nbkit", OWN, seconds, tokens, **more)


def stock_arm(workload: str, model_name: str, steps: int) -> dict[str, Any]:
    import torch

    from benchmarks._models import build

    per_step = WORKLOADS[workload][4]
    rows = rows_of(workload, (steps + WARM_UP) * per_step)
    model = build(model_name, "nf4", 16)
    batches = []
    for at in range(0, len(rows), per_step):
        some = rows[at : at + per_step]
        width = max(map(len, some))
        ids = torch.zeros(len(some), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(some):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels = ids.masked_fill(mask == 0, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    real = [int(b["attention_mask"].sum()) for b in batches]
    seconds, tokens, loss = loop(model, batches, real, BNB)
    return report(workload, "stock", BNB, seconds, tokens, loss=round(loss, 4))


def unsloth_arm(workload: str, model_name: str, steps: int, packed: bool) -> dict[str, Any]:
    """In its own trainer, which is where its packing and padding-free batches are made."""
    import unsloth  # noqa: F401  # isort: skip  # it asks to be the first
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    from benchmarks._models import TARGETS, fill_lora, written

    _, _, _, budget, per_step = WORKLOADS[workload]
    folder = written(model_name, "nf4")
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=budget, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, target_modules=TARGETS, lora_alpha=16, lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth"
    )
    fill_lora(model)
    rows = rows_of(workload, (steps + WARM_UP) * per_step * 2)
    words = [" ".join(f"w{i}" for i in row) for row in rows]
    seen: dict[str, list] = {"tokens": [], "seconds": [], "start": [0.0]}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            seen["start"][0] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            seen["seconds"].append(time.perf_counter() - seen["start"][0])

    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_dict({"text": words}), callbacks=[Clock()],
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(), max_steps=steps + WARM_UP, per_device_train_batch_size=1 if packed else per_step,
            gradient_accumulation_steps=1, packing=packed, max_length=budget, optim="adamw_8bit", report_to="none",
            logging_steps=1, save_strategy="no", dataset_text_field="text", dataset_num_proc=1, learning_rate=1e-4, bf16=True,
        ),
    )  # fmt: skip
    inner = trainer.training_step

    def counted(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        labels, mask = inputs["labels"], inputs.get("attention_mask")
        seen["tokens"].append(int(mask.sum()) if mask is not None and mask.shape == labels.shape else labels.numel())
        return inner(model, inputs, *rest, **more)

    trainer.training_step = counted
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    name = "unsloth-packed" if packed else "unsloth-padding-free"
    return report(
        workload, name, BNB, seen["seconds"][WARM_UP:], seen["tokens"][WARM_UP:], loss=trainer.state.log_history[-2].get("loss")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms")
    parser.add_argument("workloads", nargs="+", choices=list(WORKLOADS))
    parser.add_argument("--model", default="8b")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float, default=180, help="seconds one arm may take for one workload")
    parser.add_argument("--commit", default="", help="written to the CSV; found from git if not given")
    given = parser.parse_args()
    arms = given.arms.split(",")
    for arm in arms:
        if arm not in ARMS:
            parser.error(f"there is no arm {arm!r}; there are {', '.join(ARMS)}")
    if len(arms) > 1 or len(given.workloads) > 1:  # a process each: unsloth changes other libraries
        for workload, arm in product(given.workloads, arms):
            alone(arm, workload, given)
        return
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    found = ARMS[arms[0]](given.workloads[0], given.model, given.steps)
    if given.out:
        append(given.out, [{**found, **stamp(given.commit, ("unsloth", "trl"))}])


def alone(arm: str, workload: str, given: argparse.Namespace) -> None:
    """One arm in a process of its own; one that fails, or takes too long, is said and does not end the others."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_lengths",
        arm,
        workload,
        "--model",
        given.model,
        "--steps",
        str(given.steps),
    ]
    command += [*(["--out", str(given.out.resolve())] if given.out else []), "--commit", given.commit]
    try:
        code = subprocess.run(command, check=False, timeout=given.budget, cwd=ROOT).returncode
        note = f"ended with code {code}" if code else ""
    except subprocess.TimeoutExpired:
        note = f"given up after {given.budget:.0f} s"
    if note:
        print(f"{workload}, {arm}: {note}", flush=True)
    if note and given.out:
        append(given.out, [{"workload": workload, "arm": arm, "note": note, **stamp(given.commit, ("unsloth", "trl"))}])


ARMS = {
    "nbkit": nbkit_arm,
    "stock": stock_arm,
    "unsloth-packed": partial(unsloth_arm, packed=True),
    "unsloth-padding-free": partial(unsloth_arm, packed=False),
}


if __name__ == "__main__":
    main()
