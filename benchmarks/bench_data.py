"""The data room on generated conversations: seconds and peak memory, the first time, and the second with the set kept.

usage: python -m benchmarks.bench_data [--rows 20000] [--tokens 1500] [--template NAME] [--out FILE.csv]

The conversations have 2 to 16 turns with prose (words by Zipf's law, one in twelve made up), lists, code and other scripts;
about a tenth have a system message, and the lengths are spread as in chat sets (log-normal). The tokenizer is that of
SmolLM2-135M where `python -m nbkit fetch` has been run, else a byte-level BPE of 49,152 trained on the same text.
Each pass is a process of its own. Its base is the memory with libraries and tokenizer loaded; "over base" is the largest
resident memory above it, read fifty times a second. Packing is that of `TrainConfig(packing=True, pack_tokens=8192)`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks._results import ROOT, append, commit, versions

RESULTS = ROOT / "benchmarks" / "results" / "data.csv"
PACK_TOKENS = 8192
LIMITS = {"first": 90.0, "second": 3.0}
LIMIT_BYTES = 2 * 2**30


# -- conversations ---------------------------------------------------------------------------------


def words(count: int, draw: Any) -> list[str]:
    """A vocabulary: pronounceable words, the short ones first, as the common ones of a language are."""
    heads = ["", "b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr", "pl", "ch", "th", "sh"]
    tails = ["", "n", "r", "s", "t", "l", "m", "ng", "ck", "nd", "st"]
    found: dict[str, None] = dict.fromkeys(["the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with"])
    while len(found) < count:
        parts = 1 if len(found) < 600 else 2 if len(found) < 8_000 else 3
        found[
            "".join(str(draw.choice(heads)) + str(draw.choice(list("aeiou"))) + str(draw.choice(tails)) for _ in range(parts))
        ] = None
    return list(found)


def conversations(rows: int, words_a_row: int, seed: int = 0) -> Any:
    """Rows {"messages": [...]}, one at a time."""
    import numpy as np

    draw = np.random.default_rng(seed)
    known = np.asarray(words(20_000, draw), dtype=object)
    share = 1 / np.arange(1, len(known) + 1)
    edges = np.cumsum(share / share.sum())
    odd = [
        "```python\ndef solve(n: int) -> list[int]:\n    return [i * i for i in range(n) if i % 3]\n```",
        "1. First, 2.5 %\n2. Second: https://example.org/a?b=c\n",
        "Привет, как дела?", "日本語のテキスト", "naïve café — “quoted”", "🙂👍",
    ]  # fmt: skip

    def prose(count: int) -> str:
        chosen = known[np.minimum(np.searchsorted(edges, draw.random(count)), len(known) - 1)].tolist()
        for at in draw.integers(0, count, count // 12).tolist():
            chosen[at] = f"{chosen[at]}{draw.integers(10_000)}"
        for at in draw.integers(0, count, count // 14 + 1).tolist():
            chosen[at] = chosen[at].capitalize() + (".\n\n" if at % 5 == 0 else ",")
        if count > 40 and draw.random() < 0.3:
            chosen.append("\n" + odd[int(draw.integers(len(odd)))])
        return " ".join(chosen)

    lengths = np.maximum(30, draw.lognormal(0, 0.5, rows) * words_a_row / np.exp(0.125)).astype(int)
    for length in lengths.tolist():
        turns = 2 * int(draw.integers(1, 9))
        weights = draw.random(turns) * np.where(np.arange(turns) % 2, 4, 1) + 0.05
        sizes = np.maximum(3, length * weights / weights.sum()).astype(int).tolist()
        messages = [{"role": ("user", "assistant")[i % 2], "content": prose(size)} for i, size in enumerate(sizes)]
        if draw.random() < 0.1:
            messages.insert(0, {"role": "system", "content": "You are a helpful assistant who answers in full sentences."})
        yield {"messages": messages}


def write_rows(path: Path, rows: int, words_a_row: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in conversations(rows, words_a_row):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def find_tokenizer(folder: Path) -> tuple[Path, str]:
    """(folder of a saved tokenizer, what it is)."""
    from nbkit.models.embedded import cached_folder

    if (found := cached_folder()) is not None:
        return found, "SmolLM2-135M-Instruct"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=49_152, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = (m["content"] for row in conversations(2_000, 1_000, seed=1) for m in row["messages"])
    core.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    made.save_pretrained(folder)
    return folder, "byte-level BPE of 49,152"


# -- one pass, in a process of its own -------------------------------------------------------------


class Peak(threading.Thread):
    """Reads the resident memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        import psutil

        self._process, self._stop_now = psutil.Process(), threading.Event()
        self.base = self.peak = self._process.memory_info().rss

    def run(self) -> None:
        while not self._stop_now.wait(0.02):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def stop(self) -> int:
        """Bytes over the base at the highest."""
        self._stop_now.set()
        self.join()
        return self.peak - self.base


def one_pass(rows: Path, tokenizer_folder: Path, workspace: Path, template: str | None) -> dict[str, Any]:
    import torch  # noqa: F401  a session has it loaded
    from transformers import AutoTokenizer

    from nbkit.config import DataRecipe
    from nbkit.data.pipeline import prepare
    from nbkit.training.loader import PackedBatches

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer("warm")
    peak = Peak()
    peak.start()
    start, processor = time.perf_counter(), time.process_time()
    recipe = DataRecipe(template=template)
    report = prepare(str(rows), tokenizer, recipe, max_seq_length=PACK_TOKENS, cache=workspace / "cache")
    prepared = time.perf_counter()
    packs = PackedBatches(report.lengths, PACK_TOKENS, 3407)
    packed = time.perf_counter()
    over = peak.stop()
    began = time.perf_counter()
    report.preview(len(report.examples) - 1)
    return {
        "seconds": round(packed - start, 2),
        "prepare_s": round(prepared - start, 2),
        "pack_s": round(packed - prepared, 3),
        "cpu_s": round(time.process_time() - processor, 1),
        "over_base_mib": round(over / 2**20),
        "base_mib": round(peak.base / 2**20),
        "rows_in": report.rows_in,
        "used": report.used,
        "tokens": report.total_tokens,
        "tokens_a_row": round(report.total_tokens / report.used),
        "trained_share": round(report.trained_share, 4),
        "packs": len(packs),
        "fill": round(packs.first.fill, 4),
        "preview_last_s": round(time.perf_counter() - began, 2),
        "fingerprint": report.fingerprint[:12],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=1_500, help="about how many a row")
    parser.add_argument("--template", help="a template's name; the tokenizer's own if left out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="written to the CSV; found from git if not given")
    parser.add_argument("--pass", dest="paths", nargs=3, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.paths:
        print("PASS", json.dumps(one_pass(given.paths[0], given.paths[1], given.paths[2], given.template)))
        return 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer, name = find_tokenizer(folder / "tokenizer")
        rows = folder / "rows.jsonl"
        write_rows(rows, given.rows, round(given.tokens * 0.411))
        print(f"{given.rows:,} conversations, {rows.stat().st_size / 2**20:.0f} MiB; tokenizer: {name}; {os.cpu_count()} cores")
        found = []
        for which in ("first", "second"):
            command = [
                sys.executable,
                "-m",
                "benchmarks.bench_data",
                "--pass",
                str(rows),
                str(tokenizer),
                str(folder / "workspace"),
            ]
            command += ["--template", given.template] if given.template else []
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
            if done.returncode:
                print(done.stderr[-2000:])
                return 1
            line = next(line for line in done.stdout.splitlines() if line.startswith("PASS "))
            found.append({"time": which, "template": given.template or "own", **json.loads(line.removeprefix("PASS "))})
    show(found)
    about = {"date": time.strftime("%Y-%m-%d"), "commit": given.commit or commit(), "tokenizer": name, "cores": os.cpu_count()}
    about |= versions(("transformers", "tokenizers", "numpy", "torch"))
    append(given.out, [about | one for one in found])
    print(f"{len(found)} rows added to {given.out}")
    same = len({one["fingerprint"] for one in found}) == 1
    within = all(one["seconds"] <= LIMITS[one["time"]] and one["over_base_mib"] * 2**20 <= LIMIT_BYTES for one in found)
    print(
        "within the limits" if same and within else "NOT within the limits (90 s and 3 s, 2 GiB over the base, one fingerprint)"
    )
    return 0 if same and within else 1


def show(found: list[dict[str, Any]]) -> None:
    for name in found[0]:
        print(f"{name:15}" + "".join(f"{one[name]:>16,}" if isinstance(one[name], int) else f"{one[name]:>16}" for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
