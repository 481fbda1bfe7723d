"""What a small training step costs the host, without a GPU: a tiny Llama through the patched path, every Triton launch a no-op.

usage: python benchmarks/bench_host.py [--layers 16] [--steps 300] [--one-by-one] [--counts] [--profile]

A step of few tokens waits for the host: Python, autograd, torch's dispatch. All of that is here as it is on a GPU, at widths
where the CPU's own products take some microseconds. Attention's two calls only allocate what cuDNN's do. Times are the least of
all steps, in process time, with 16 layers and with 2: what a layer takes, and what a step takes besides. The machine decides
the microseconds; ratios between two commits, run in turn on an idle one, carry over. --one-by-one: a hook on a layer has them
run one by one. --counts: torch's calls by name. --profile: Python's functions by their own time.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nbkit.families import find
from nbkit.kernels import _launch, lora_border, lora_gradients, swiglu_lora
from nbkit.models import attention
from nbkit.models.layer import Keep, ops
from nbkit.models.layer import bind as bind_layers

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARTS = ("forward", "backward", "clear gradients")


def launch_nothing() -> None:
    """Have CPU tensors take the kernels' way up to the launch itself."""
    hooks = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    _launch._driver = lambda: (lambda: -1, lambda device: 0, hooks)
    _launch.runs_on = lora_border.runs_on = lambda device: True
    ops.fits = swiglu_lora.fits = lora_gradients.fits = lambda *_: True

    def make(self: Any, key: Any, grid: Any, args: Any, constants: Any) -> None:
        fixed = self.jit.arg_names[len(args) :]
        self.made[key] = _launch.Found(lambda *_: None, (), tuple(constants[name] for name in fixed))

    _launch.Launcher._make = make
    real = attention._kind
    attention._kind = lambda *about: (real(*about), ("cudnn", "allocates only"))[1]

    class Attention:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch.ops.aten, name)

        @staticmethod
        def _scaled_dot_product_cudnn_attention(q: Any, *_: Any, scale: float) -> tuple[Any, ...]:
            b, h, t, k = q.shape
            out, none = torch.empty(b, t, h, k).transpose(1, 2), torch.empty(0)
            return out, torch.empty(b, h, t, 1), None, None, t, t, none, none, None

        @staticmethod
        def _scaled_dot_product_cudnn_attention_backward(
            do: Any, q: Any, k: Any, v: Any, *_: Any, scale: float
        ) -> tuple[Any, ...]:
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    attention.aten = Attention()


def build(layers: int, one_by_one: bool) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import nbkit

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model.requires_grad_(False), adapter).train()
    nbkit.patch(model, graphs=False)
    family = find("llama")
    assert family is not None
    binding = bind_layers(model.get_base_model(), family)
    binding.keep = Keep(0, normed=True)
    if one_by_one:
        binding.bound[0].parts.layer.register_forward_hook(lambda *_: None)
    return model


def step(model: Any, params: list[Any], ids: Any) -> tuple[float, float, float]:
    """Seconds of its parts. A clip and an optimizer cost the same on any path, and on a CPU other than on a GPU: not here."""
    begin = time.process_time()
    loss = model(input_ids=ids, labels=ids).loss
    middle = time.process_time()
    loss.backward()
    end = time.process_time()
    for p in params:
        p.grad = None
    return middle - begin, end - middle, time.process_time() - end


def measure(layers: int, steps: int, one_by_one: bool) -> tuple[list[float], Any, list[Any], Any]:
    """The least microseconds of each part, and what a step takes."""
    model = build(layers, one_by_one)
    params = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(3, 127, (2, 8))
    for _ in range(4):
        step(model, params, ids)
    seen = [step(model, params, ids) for _ in range(steps)]
    return [min(part) * 1e6 for part in zip(*seen, strict=True)], model, params, ids


class Calls(TorchDispatchMode):
    """Counts torch's calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def counted(model: Any, params: list[Any], ids: Any) -> Counter[str]:
    with Calls() as calls:
        step(model, params, ids)
    return calls.seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--one-by-one", action="store_true")
    parser.add_argument("--counts", action="store_true")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    launch_nothing()
    many, *large = measure(given.layers, given.steps, given.one_by_one)
    few, *small = measure(2, given.steps, given.one_by_one)
    for name, a, b in zip((*PARTS, "all"), (*many, sum(many)), (*few, sum(few)), strict=True):
        each = (a - b) / (given.layers - 2)
        print(f"{name:16}{a:8.0f} us with {given.layers} layers{each:8.1f} us a layer{b - 2 * each:8.1f} us besides")
    if given.counts:
        one, two = counted(*large), counted(*small)
        for name, n in one.most_common():
            each = (n - two[name]) / (given.layers - 2)
            print(f"  {each:6.2f} a layer {two[name] - 2 * each:6.1f} besides  {name}")
    if given.profile:
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(50):
            step(*large)
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
