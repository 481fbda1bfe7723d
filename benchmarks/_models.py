"""Random models at true shapes, the same numbers in every process; as a script it writes one as a checkpoint folder.

usage: python -m benchmarks._models MODEL WEIGHTS FOLDER [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

SHAPES = {
    "8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, tie_word_embeddings=False
    ),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, tie_word_embeddings=True),
    "toy": dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8, tie_word_embeddings=False),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARD = 2 * 2**30  # bytes a file of a written checkpoint: they are written side by side


def base(name: str, weights: str, device: str = "cuda") -> Any:
    """A random, frozen Llama made on the device: 16-bit, or NF4 with double quantisation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    config = LlamaConfig(
        vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5, num_key_value_heads=8, pad_token_id=2,
        rope_parameters=dict(rope, original_max_position_embeddings=8192), use_cache=False, **SHAPES[name],
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    if weights == "nf4":
        to_nf4(model.model)
    return model.requires_grad_(False)


def to_nf4(module: torch.nn.Module) -> None:
    """Every linear below `module` in NF4, one at a time, so that one at a time is held twice."""
    import bitsandbytes as bnb

    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.Linear):
            with torch.device("meta"):
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
            data, state = bnb.functional.quantize_4bit(child.weight.data, quant_type="nf4", compress_statistics=True)
            new.weight = bnb.nn.Params4bit(
                data, requires_grad=False, quant_state=state, quant_type="nf4", compress_statistics=True, bnb_quantized=True,
                module=new,
            )  # fmt: skip
            new.quant_state = state
            child.weight = None
            setattr(module, name, new)
        else:
            to_nf4(child)


def fill_lora(model: torch.nn.Module) -> None:
    """The same numbers in every adapter, whichever library made it; B not zero, so that every gradient is there."""
    for name, p in sorted((n, p) for n, p in model.named_parameters() if "lora_" in n):
        make = torch.Generator(p.device).manual_seed(sum(name.encode()))
        new = torch.empty(p.shape, dtype=torch.float32, device=p.device)
        if "lora_A" in name:
            new.uniform_(-1 / math.sqrt(p.shape[1]), 1 / math.sqrt(p.shape[1]), generator=make)
        else:
            new.normal_(0, 0.01, generator=make)
        p.data.copy_(new)


def build(name: str, weights: str, rank: int, device: str = "cuda") -> Any:
    """A random model with PEFT's LoRA in float32 on all seven linears, ready to train."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base(name, weights, device), lora)
    fill_lora(model)
    return model.train()


def save(name: str, weights: str, folder: Path, device: str = "cuda") -> None:
    """The model of `base` as a checkpoint folder, NF4 weights as they are packed, with a tokenizer of a word per id."""
    from safetensors.torch import save_file

    model = base(name, weights, device)
    config = model.config.to_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    config["dtype"] = "bfloat16"
    if weights == "nf4":
        config["quantization_config"] = dict(
            quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False, bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16", bnb_4bit_quant_storage="uint8",
        )  # fmt: skip
    tensors = dict(model.state_dict())
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = SHARD
    for key, tensor in tensors.items():
        if tensor.nbytes > room:
            shards.append({})
            room = SHARD
        shards[-1][key] = tensor
        room -= tensor.nbytes
    folder.mkdir(parents=True)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]

    def write(place: int) -> None:
        save_file({k: t.cpu().contiguous() for k, t in shards[place].items()}, folder / names[place], {"format": "pt"})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(len(shards))))
    index = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
    sizes = {"total_size": sum(t.nbytes for t in tensors.values())}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": sizes, "weight_map": index}))
    save_tokenizer(folder, config["vocab_size"])
    (folder / "config.json").write_text(json.dumps(config, default=str))  # the last one: it says that the folder is whole


def save_tokenizer(folder: Path, vocab: int) -> None:
    """A word-level tokenizer in which the word "w17" is the id 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, vocab)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def folder_for(name: str, weights: str) -> Path:
    """Where a checkpoint of this model lies or shall lie: in memory where there is room, else among the temporary files."""
    memory = Path("/dev/shm")
    known = [place / f"nbkit-bench-{name}-{weights}" for place in (memory, Path(tempfile.gettempdir()))]
    written = [folder for folder in known if (folder / "config.json").is_file()]
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 48 * 2**30
    return written[0] if written else known[0 if roomy else 1]


def written(name: str, weights: str, device: str = "cuda") -> Path:
    """The checkpoint folder of this model; written by a process of its own if it is not there yet."""
    folder = folder_for(name, weights)
    if not (folder / "config.json").is_file():
        command = [sys.executable, "-m", "benchmarks._models", name, weights, str(folder), "--device", device]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, cwd=Path(__file__).resolve().parents[1])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("weights", choices=("nf4", "bf16"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    save(given.model, given.weights, given.folder, given.device)


if __name__ == "__main__":
    main()
