"""Training steps per second of a whole model: nbkit against transformers + PEFT, same weights, same batches, interleaved.

usage: python benchmarks/bench_training.py ROW... [--out FILE.csv] [--arms nbkit,stock,liger,eager] [--rounds 3] [--profile]
ROW is MODEL:WEIGHTS:BATCHxTOKENS[:OPTION...], for example 8b:nf4:2x2048 or 1b:bf16:2x512:r32:L4. Options:
    r32         LoRA's rank, 16 if not said                  L4       keep level of nbkit; checkpointing for stock from L1 up
    within6.8   GiB that torch may allocate                   cap16    GB of the whole process (0.9 of them for CUDA itself)
    save        nbkit saves memory as checkpointing asks      once     one optimizer step, nothing before it; for steps of minutes

Weights are random at the true shapes of Llama-3.1-8B and Llama-3.2-1B. A timed step has a fresh batch of random tokens, all
labelled, and includes clipping and the optimizer (torch's fused AdamW), in the same plain loop for every arm. Before timing, both
arms take the same batch from the same adapter: their losses and gradient norms stand beside the speeds. Peaks are
torch.cuda.max_memory_allocated over an arm's round, its warm-up (where steps are recorded) included.
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

SHAPES = {
    "8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, tie_word_embeddings=False
    ),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, tie_word_embeddings=True),
    "toy": dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8, tie_word_embeddings=False),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(name: str, weights: str, rank: int) -> torch.nn.Module:
    """A random model on the GPU, NF4 (double quantisation) or bf16, with LoRA in float32 on all seven linears, B not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    config = LlamaConfig(
        vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5, num_key_value_heads=8, pad_token_id=2,
        rope_parameters=dict(rope, original_max_position_embeddings=8192), **SHAPES[name],
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    if weights == "nf4":
        to_nf4(model.model)
    model.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, task_type="CAUSAL_LM"))
    for n, p in model.named_parameters():
        if "lora_B" in n:
            p.data.normal_(0, 0.01)
    return model.train()


def to_nf4(module: torch.nn.Module) -> None:
    import bitsandbytes as bnb

    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.Linear):
            with torch.device("meta"):
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
            data, state = bnb.functional.quantize_4bit(child.weight.data, quant_type="nf4", compress_statistics=True)
            new.weight = bnb.nn.Params4bit(
                data,
                requires_grad=False,
                quant_state=state,
                quant_type="nf4",
                compress_statistics=True,
                bnb_quantized=True,
                module=new,
            )
            new.quant_state = state
            child.weight = None
            setattr(module, name, new)
        else:
            to_nf4(child)


class Nbkit:
    """The patched model, as `nbkit.patch` leaves it."""

    name = "nbkit"
    graphs = True
    optimizer_bytes = 8  # what a trainer would say of its optimizer

    def __init__(self, level: int | None, save: bool = False) -> None:
        self.level, self.save = level, save

    def enter(self, model: torch.nn.Module) -> None:
        import nbkit
        from nbkit.models.layer import Keep, binding_of

        nbkit.patch(model, graphs=self.graphs)  # the planner decides where the row names no level
        binding_of(model).checkpoint = "nbkit" if self.save else None
        binding_of(model).optimizer_bytes = self.optimizer_bytes
        if self.level is not None:
            binding_of(model).keep = Keep(self.level)

    def prepare(self, model: torch.nn.Module, tokens: int) -> None:
        """Plan and pin host memory, which a first step would do by itself."""
        from nbkit.models.layer import binding_of

        binding_of(model).prepare(tokens)

    def leave(self, model: torch.nn.Module) -> None:
        import nbkit
        from nbkit.models.forwards import GRAPHS
        from nbkit.models.layer import binding_of

        graphs, binding = vars(model.get_base_model()).get(GRAPHS), binding_of(model)
        plan = binding.planner.plan
        print(f"  {self.name}: {plan}; {sorted(binding.how)}; {graphs.note if graphs else 'no graphs'}; stock {binding.reasons}")
        nbkit.unpatch(model)


class Eager(Nbkit):
    """The patched model without CUDA graphs."""

    name = "eager"
    graphs = False


class Liger:
    """transformers + PEFT with Liger's kernels on a model of its own: what it binds is not taken off again."""

    name = "liger"

    def __init__(self, level: int | None, save: bool = False) -> None:
        self.stock = Stock(level, save)

    def own(self, name: str, weights: str, rank: int) -> torch.nn.Module:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        model = build(name, weights, rank)
        apply_liger_kernel_to_llama(model=model.get_base_model())
        return model

    def enter(self, model: torch.nn.Module) -> None:
        self.stock.enter(model)

    def leave(self, model: torch.nn.Module) -> None:
        self.stock.leave(model)

    def prepare(self, model: torch.nn.Module, tokens: int) -> None:
        """Nothing."""


class Stock:
    """transformers + PEFT, sdpa; without checkpointing, or with it where the row names a level from 1 up."""

    name = "stock"

    def __init__(self, level: int | None, save: bool = False) -> None:
        self.checkpointed = bool(level) or save

    def enter(self, model: torch.nn.Module) -> None:
        if self.checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()

    def prepare(self, model: torch.nn.Module, tokens: int) -> None:
        """Nothing."""

    def leave(self, model: torch.nn.Module) -> None:
        if self.checkpointed:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()


def step(model, optimizer, ids) -> tuple[torch.Tensor, torch.Tensor]:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), norm


def timed(model, optimizer, make, steps: int, vocab: int, shape: tuple[int, int]) -> list[float]:
    seconds = []
    for _ in range(steps):
        ids = torch.randint(3, vocab - 1, shape, device="cuda", generator=make)
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(model, optimizer, ids)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def parity(model, ids) -> tuple[float, float, torch.Tensor]:
    """Loss, gradient norm and the gradients in one vector, on the CPU."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    flat = torch.cat([p.grad.float().reshape(-1) for p in model.parameters() if p.requires_grad]).cpu()
    model.zero_grad(set_to_none=True)
    return float(loss), float(flat.norm()), flat


def float32_gradients(model, ids) -> torch.Tensor:
    """The gradients of a float32 copy of the model (NF4 dequantised exactly), with checkpointing."""
    import copy

    import bitsandbytes as bnb

    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                full = torch.nn.Linear(child.in_features, child.out_features, False, device="meta")
                full.weight = torch.nn.Parameter(
                    bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state).float(), False
                )
                if hasattr(parent, "base_layer") and name == "base_layer":
                    parent.base_layer = full
                else:
                    setattr(parent, name, full)
    twin = twin.float()
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    twin.enable_input_require_grads()
    flat = parity(twin, ids)[2]
    del twin
    gc.collect()
    torch.cuda.empty_cache()
    return flat


def limit(options: list[str]) -> None:
    """Set what torch may allocate, as the row says."""
    total = torch.cuda.mem_get_info()[1]
    within = next((float(o[6:]) * 2**30 for o in options if o.startswith("within")), None)
    cap = next(((float(o[3:]) - 0.9) * 1e9 for o in options if o.startswith("cap")), None)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (within or cap or total) / total))


def optimizer_of(model, eight_bit: bool) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    if eight_bit:
        from nbkit.training.optim import AdamW8bit

        return AdamW8bit(params, lr=1e-4)
    return torch.optim.AdamW(params, lr=1e-4, fused=True)


def run_once(row: str, model, arms: list, shape: tuple[int, int], eight_bit: bool) -> list[dict]:
    """One full optimizer step of each arm, the first of its process: compiling is in its time; planning and pinning beside it."""
    found = []
    for arm in arms:
        make = torch.Generator("cuda").manual_seed(1)
        optimizer = optimizer_of(model, eight_bit)
        ids = torch.randint(3, model.config.vocab_size - 1, shape, device="cuda", generator=make)
        with entered(arm, model):
            start = time.perf_counter()
            arm.prepare(model, shape[0] * shape[1])
            torch.cuda.synchronize()
            prepared = time.perf_counter() - start
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            loss, norm = step(model, optimizer, ids)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            free, total = torch.cuda.mem_get_info()
            result = dict(row=row, arm=arm.name, loss=round(float(loss), 5), grad_norm=round(float(norm), 6), steps=1)
            result |= dict(ms=round(seconds * 1e3), prepared_s=round(prepared, 1), tok_s=round(shape[0] * shape[1] / seconds))
            result |= dict(
                peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2), process_gb=round((total - free) / 1e9, 2)
            )
            found.append(result)
    return found


def run_row(row: str, arms: list[str], rounds: int, steps: int, profile: bool, truth_wanted: bool, eight_bit: bool) -> list[dict]:
    name, weights, sizes, *options = row.split(":")
    batch, tokens = (int(n) for n in sizes.split("x"))
    rank = next((int(o[1:]) for o in options if o[0] == "r"), 16)
    level = next((int(o[1:]) for o in options if o[0] == "L"), None)
    torch.cuda.set_per_process_memory_fraction(1.0)
    model = build(name, weights, rank)
    vocab = model.config.vocab_size
    chosen = [arm(level, "save" in options) for arm in (Stock, Liger, Eager, Nbkit) if arm.name in arms]
    limit(options)
    if "once" in options:
        return run_once(row, model, chosen, (batch, tokens), eight_bit)
    models = {arm.name: arm.own(name, weights, rank) if isinstance(arm, Liger) else model for arm in chosen}
    make = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(3, vocab - 1, (batch, tokens), device="cuda", generator=make)
    results, truth = {}, float32_gradients(model, ids) if truth_wanted else None
    for arm in chosen:
        with entered(arm, models[arm.name]):
            for _ in range(4):  # the second takes the attention of a repeated shape, the third may be a graph
                loss, norm, flat = parity(models[arm.name], ids)
        truth = flat if truth is None else truth
        difference = float((flat - truth).norm() / truth.norm())
        results[arm.name] = dict(
            row=row, arm=arm.name, loss=round(loss, 5), grad_norm=round(norm, 6), grad_difference=round(difference, 5)
        )
        del flat
    optimizers = {id(m): optimizer_of(m, eight_bit) for m in models.values()}
    seconds: dict[str, list[float]] = {arm.name: [] for arm in chosen}
    for round_ in range(rounds):
        for arm in chosen:
            gc.collect()
            torch.cuda.empty_cache()
            own = models[arm.name]
            optimizer = optimizers[id(own)]
            others = sum(bytes_of(m) for m in {id(m): m for m in models.values()}.values() if m is not own)
            with entered(arm, own):
                torch.cuda.reset_peak_memory_stats()  # before the warm-up: a recorded step allocates while it is recorded only
                timed(own, optimizer, make, 4, vocab, (batch, tokens))
                seconds[arm.name] += timed(own, optimizer, make, steps, vocab, (batch, tokens))
                results[arm.name]["peak_gib"] = round((torch.cuda.max_memory_allocated() - others) / 2**30, 2)
                results[arm.name]["static_gib"] = round((torch.cuda.memory_allocated() - others) / 2**30, 2)  # between steps
                if profile and round_ == rounds - 1:
                    show_profile(own, optimizer, ids, f"{row} {arm.name}")
    for arm in chosen:
        t = statistics.median(seconds[arm.name])
        results[arm.name].update(ms=round(t * 1e3, 2), tok_s=round(batch * tokens / t), steps=len(seconds[arm.name]))
        spread = sorted(seconds[arm.name])
        results[arm.name]["p90_ms"] = round(spread[int(0.9 * (len(spread) - 1))] * 1e3, 2)
    return list(results.values())


def bytes_of(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


class entered:  # in lower case: it reads as a keyword
    def __init__(self, arm, model) -> None:
        self.arm, self.model = arm, model

    def __enter__(self) -> None:
        self.arm.enter(self.model)

    def __exit__(self, *_) -> None:
        self.arm.leave(self.model)


def show_profile(model, optimizer, ids, title: str) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with profiled(activities=[ProfilerActivity.CUDA]) as seen:
        step(model, optimizer, ids)
        torch.cuda.synchronize()
    table = [e for e in seen.key_averages() if e.self_device_time_total > 0]
    total = sum(e.self_device_time_total for e in table)
    print(f"PROFILE {title}: {total / 1e3:.1f} ms of device time, {sum(e.count for e in table)} launches")
    if sum(e.count for e in table):
        show_host(model, optimizer, ids)
    for e in sorted(table, key=lambda e: -e.self_device_time_total)[:30]:
        print(f"  {e.self_device_time_total / 1e3:8.2f} ms {e.count:5d} x {e.key[:110]}")


def show_host(model, optimizer, ids) -> None:
    """Where the host's time of three steps goes."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    torch.cuda.synchronize()
    profiler.enable()
    for _ in range(3):
        step(model, optimizer, ids)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(28)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--arms", default="stock,eager,nbkit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--profile", action="store_true", help="device time by kernel, and host time by function")
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="torch's fused, or nbkit's 8-bit")
    parser.add_argument("--truth", action="store_true", help="gradient errors against a float32 copy of the model")
    given = parser.parse_args()
    Nbkit.optimizer_bytes = 8 if given.optimizer == "adamw" else 2
    where = dict(commit=given.commit or commit(), gpu=torch.cuda.get_device_name(), date=time.strftime("%Y-%m-%d"), **versions())
    rows = []
    for row in given.rows:
        start = time.perf_counter()
        with nullcontext():
            try:
                found = run_row(
                    row,
                    given.arms.split(","),
                    given.rounds,
                    given.steps,
                    given.profile,
                    given.truth,
                    given.optimizer == "adamw8bit",
                )
            except torch.cuda.OutOfMemoryError as error:
                found = [dict(row=row, arm=given.arms, error=str(error)[:160])]
        for result in found:
            print("RESULT", result, flush=True)
            rows.append({**result, "optimizer": given.optimizer, **where})
        print(f"({row}: {time.perf_counter() - start:.0f} s)", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        if given.out:
            write(given.out, rows)


def write(path: Path, rows: list[dict]) -> None:
    fields = list(dict.fromkeys(k for row in rows for k in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fields)
        table.writeheader()
        table.writerows(rows)


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        **{n: version(n) for n in ("torch", "triton", "transformers", "peft", "bitsandbytes")},
    }


if __name__ == "__main__":
    sys.exit(main())
