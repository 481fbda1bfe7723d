"""A fast tokenizer as the header fields of a GGUF file, so that llama.cpp gives the same ids for the same text.

llama.cpp has its own tokenizers and splits words by a pattern that the field `tokenizer.ggml.pre` names. The name is
found here from what tokenizer.json really does, never guessed from the model: a tokenizer that does something llama.cpp
has no name for is refused, since its text would turn into other tokens without anybody being told.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from nbkit.errors import ExportError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types

NO_SCORES = "The tokenizer's merges cannot be written as scores"

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
# The pattern in tokenizer.json, and llama.cpp's name for it (llama-vocab.cpp).
SPLITS = {
    _CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _REST: "llama-bpe",  # Llama 3
    _CONTRACTIONS + _WORDS + r"|\p{N}" + _REST: "qwen2",
    f"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _REST.replace(r"[\r\n]*", r"[\r\n/]*"): "tekken",  # NeMo
}


def vocabulary_fields(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """`tokenizer.*` fields by key: model, pre, tokens, types, merges or scores, special ids, chat template.

    Args:
        vocab_size: rows of the embedding; ids that the tokenizer lacks become unused tokens.
    Raises: ExportError for a tokenizer that is not fast, is larger than the embedding, or works in a way llama.cpp lacks.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ExportError("GGUF needs the tokenizer's tokenizer.json, which this checkpoint lacks; export merged_16bit instead.")
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = facts["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"GGUF has no place for a tokenizer of type {model.get('type')}; export merged_16bit instead.")
    tokens, types = _tokens(tokenizer, model, vocab_size)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    fields: dict[str, Any]
    if model.get("byte_fallback"):
        fields = {"model": "llama", "pre": "default", "tokens": tokens, "scores": _scores(tokens, model["vocab"], merges)}
        fields |= {"token_type": types, "add_space_prefix": _space_prefix(facts)}
    else:
        # llama.cpp keeps each merge as one string, parted by its first space after the first character.
        fields = {"model": "gpt2", "pre": _split_name(facts), "tokens": tokens, "token_type": types}
        fields |= {"merges": [f"{a} {b}" for a, b in merges]}
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            fields["unknown_token_id" if name == "unk" else "padding_token_id" if name == "pad" else f"{name}_token_id"] = number
    fields |= dict(zip(("add_bos_token", "add_eos_token"), _added(tokenizer), strict=True))
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    if template := chat_template(tokenizer):
        fields["tokenizer.chat_template"] = template
    return fields


def chat_template(tokenizer: Any) -> str | None:
    """The template used when none is named."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _tokens(tokenizer: Any, model: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    by_id = {number: (token, NORMAL) for token, number in model["vocab"].items()}
    if model.get("byte_fallback"):
        by_id |= {n: (t, BYTE) for n, (t, _) in by_id.items() if len(t) == 6 and t.startswith("<0x") and t.endswith(">")}
    for number, token in tokenizer.added_tokens_decoder.items():
        by_id[number] = (token.content, CONTROL if token.special else USER_DEFINED)
    if tokenizer.unk_token_id is not None and model.get("byte_fallback"):
        by_id[tokenizer.unk_token_id] = (tokenizer.unk_token, UNKNOWN)
    if max(by_id) >= vocab_size:
        raise ExportError(
            f"The tokenizer has ids up to {max(by_id)}, the embedding {vocab_size} rows; resize the embedding before training."
        )
    present = {token for token, _ in by_id.values()}
    found = []
    for number in range(vocab_size):
        filler = f"[PAD{number}]"
        found.append(by_id.get(number, (filler if filler not in present else f"[UNUSED{number}]", UNUSED)))
    return [token for token, _ in found], [kind for _, kind in found]


def _split_name(facts: dict[str, Any]) -> str:
    """llama.cpp's name of the way this byte-level BPE splits text into words. Raises: ExportError if it has none."""
    steps = _steps(facts["pre_tokenizer"], "pretokenizers")
    normalizers = [step["type"] for step in _steps(facts["normalizer"], "normalizers")]
    kinds = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    name = None
    if kinds[-1:] == ["ByteLevel"] and not last["add_prefix_space"]:
        if kinds == ["ByteLevel"] and last["use_regex"]:
            name = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last["use_regex"]:
            name = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
            plain = steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
            name = SPLITS.get(steps[0]["pattern"].get("Regex", "")) if plain else None
    # NFC, which Qwen applies, is left out by llama.cpp too; it matters only for text that is not composed already.
    if name is None or not set(normalizers) <= {"NFC"}:
        what = " + ".join([*normalizers, *kinds]) or "no splitting"
        raise ExportError(f"llama.cpp has no tokenizer that splits text as this one does ({what}); export merged_16bit instead.")
    return name


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [part for one in step[key] for part in _steps(one, key)] if step["type"] == "Sequence" else [step]


def _scores(tokens: list[str], vocab: dict[str, int], merges: Iterable[tuple[str, ...]]) -> list[float]:
    """SentencePiece scores whose order gives the merges' order: the k-th token that a merge makes has score -k.

    llama.cpp joins the pair whose token scores highest. tokenizer.json joins the pair that is first in its list. Both are the
    same only if the merges that make one token stand together and are all there, as in what SentencePiece made.

    Raises: ExportError if they are not.
    """
    order: dict[str, int] = {}
    last, pairs = "", set()
    for a, b in merges:
        token = a + b
        if token != last and token in order:
            raise ExportError(f"{NO_SCORES} ({token!r} is made twice); export merged_16bit instead.")
        order.setdefault(token, len(order))
        last = token
        pairs.add((a, b))
    for token in order:
        for cut in range(1, len(token)):
            a, b = token[:cut], token[cut:]
            if a in vocab and b in vocab and (a, b) not in pairs and _reachable(a, order) and _reachable(b, order):
                raise ExportError(f"{NO_SCORES} ({token!r} lacks {a!r} + {b!r}); export merged_16bit instead.")
    return [-float(order.get(token, len(order))) for token in tokens]


def _reachable(piece: str, order: dict[str, int]) -> bool:
    """Whether text can ever become this piece: a single character, or what a merge makes."""
    return len(piece) == 1 or piece in order


def _space_prefix(facts: dict[str, Any]) -> bool:
    """Whether a space is put before text that does not begin with one. Raises: ExportError for another way of splitting."""
    normal, split = _steps(facts["normalizer"], "normalizers"), _steps(facts["pre_tokenizer"], "pretokenizers")
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if not split and normal == [{"type": "Prepend", "prepend": "▁"}, spaces]:
        return True
    if not split and normal == [spaces]:
        return False
    if not normal and [s["type"] for s in split] == ["Metaspace"]:
        meta = split[0]
        if meta["replacement"] == "▁" and not meta.get("split", True):
            # "first" puts it before text that no special token precedes; in a chat one always does.
            return meta["prepend_scheme"] == "always"
    what = " + ".join(step["type"] for step in [*normal, *split]) or "no splitting"
    raise ExportError(f"llama.cpp has no tokenizer that treats spaces as this one does ({what}); export merged_16bit instead.")


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS after plain text."""
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    extra = len(full) > len(plain)
    return extra and full[0] == tokenizer.bos_token_id, extra and full[-1] == tokenizer.eos_token_id
