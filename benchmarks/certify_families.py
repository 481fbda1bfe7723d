"""A certificate of exactness for each declared family, on this machine.

usage: python -m benchmarks.certify_families [--weights float32 nf4 ...] [--out benchmarks/results/certificates] [FAMILY...]
Random models of each family's own config class, small on a CPU, wider on a GPU, LoRA on all linears, layers fused. Writes
FAMILY-WEIGHTS-DEVICE.json, prints each verdict, and ends with status 1 if one is not exact. The CPU's are kept in the
repository: `tests/models/test_certify.py` asks for one of each family.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nbkit  # noqa: E402
from benchmarks._models import to_nf4  # noqa: E402
from nbkit.families import Family, all_families  # noqa: E402
from nbkit.models.layer import bind  # noqa: E402
from tests.models.layer.rig import TARGETS, fill  # noqa: E402
from tests.tiny import tiny_model  # noqa: E402

WEIGHTS = ("float32", "bfloat16", "float16", "nf4")
SMALL = {"hidden_size": 64, "intermediate_size": 128}  # a block of NF4 is 64 numbers
WIDE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 64}


def model_of(family: Family, weights: str, device: str) -> Any:
    from peft import LoraConfig, get_peft_model

    model = tiny_model(family.name, **(WIDE if device == "cuda" else SMALL))
    model = model.to(device, torch.float32 if weights == "float32" else getattr(torch, weights.replace("nf4", "bfloat16")))
    if weights == "nf4":
        to_nf4(model.get_submodule(family.decoder.base))
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=12, target_modules=TARGETS))
    fill(model)
    nbkit.patch(model)
    bind(model.get_base_model(), family)  # also on a CPU, through the references
    return model.train()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="their names; all that are declared if none is given")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "certificates")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["float32", "nf4"])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    device, bad = "cuda" if torch.cuda.is_available() else "cpu", 0
    for family in all_families():
        if given.families and family.name not in given.families:
            continue
        for weights in given.weights:
            found = nbkit.certify(model_of(family, weights, device))
            found.to_json(given.out / f"{family.name}-{weights}-{device}.json")
            bad += not found.passed
            print(f"{family.name:>8} {weights:>8}: {found.verdict}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
