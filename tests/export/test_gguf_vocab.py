"""Tokenizers as GGUF fields: the right name for how text is split, right types and scores, and refusals."""

import json

import pytest

from nbkit.errors import ExportError
from nbkit.export.gguf_vocab import SPLITS, _scores, _space_prefix, vocabulary_fields
from tests.tiny import VOCAB, tiny_tokenizer

LLAMA3 = next(pattern for pattern, name in SPLITS.items() if name == "llama-bpe")
QWEN2 = next(pattern for pattern, name in SPLITS.items() if name == "qwen2")


def with_splitter(splitter, normalizer=None):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = splitter
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def splitters():
    from tokenizers import Regex, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    plain, after = ByteLevel(add_prefix_space=False), ByteLevel(add_prefix_space=False, use_regex=False)
    return {
        "gpt-2": (plain, None),
        "smollm": (Sequence([Digits(individual_digits=True), plain]), None),
        "llama-bpe": (Sequence([Split(Regex(LLAMA3), "isolated"), after]), None),
        "qwen2": (Sequence([Split(Regex(QWEN2), "isolated"), after]), normalizers.NFC()),
        "": (Sequence([Split(Regex(r"\p{L}+"), "isolated"), after]), None),
        "lower": (plain, normalizers.Lowercase()),
        "grouped digits": (Sequence([Digits(individual_digits=False), plain]), None),
        "prefix": (ByteLevel(add_prefix_space=True), None),
    }


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_the_splitter_is_named_after_what_it_does(name):
    fields = vocabulary_fields(with_splitter(*splitters()[name]), VOCAB)
    assert fields["tokenizer.ggml.pre"] == name
    assert fields["tokenizer.ggml.model"] == "gpt2"


@pytest.mark.parametrize("name", ["", "lower", "grouped digits", "prefix"])
def test_what_llama_cpp_cannot_do_is_refused(name):
    with pytest.raises(ExportError, match="no tokenizer that splits"):
        vocabulary_fields(with_splitter(*splitters()[name]), VOCAB)


def test_the_patterns_are_those_of_the_checkpoints():
    # As in the tokenizer.json of Llama 3, Qwen2 and Mistral NeMo.
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    assert r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + rest in SPLITS
    assert r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + rest in SPLITS
    tekken = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert SPLITS[tekken] == "tekken"


def test_every_merge_and_every_token_is_there_in_order():
    tokenizer = tiny_tokenizer()
    fields = vocabulary_fields(tokenizer, VOCAB + 4)
    facts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(m) if isinstance(m, list) else m for m in facts["merges"]]
    own = tokenizer.convert_ids_to_tokens(list(range(VOCAB)))
    assert fields["tokenizer.ggml.tokens"] == [*own, "[PAD320]", "[PAD321]", "[PAD322]", "[PAD323]"]
    assert fields["tokenizer.ggml.token_type"][-5:] == [1, 5, 5, 5, 5]


def test_added_tokens_keep_their_kind():
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    fields = vocabulary_fields(tokenizer, VOCAB + 1)
    assert (fields["tokenizer.ggml.tokens"][-1], fields["tokenizer.ggml.token_type"][-1]) == ("<tool>", 4)
    with pytest.raises(ExportError, match="ids up to 320, the embedding 320 rows"):
        vocabulary_fields(tokenizer, VOCAB)


def test_bos_is_added_where_the_tokenizer_adds_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    start = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 1)])
    fields = vocabulary_fields(tokenizer, VOCAB)
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_eos_token"] is False


def sentencepiece_like():
    """A BPE with byte fallback whose merges are ordered as SentencePiece orders pieces."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "c", "▁a", "ab", "▁ab", "abc"]
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab"), ("▁a", "b"), ("ab", "c")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"), pieces


def test_a_sentencepiece_tokenizer_gets_scores_in_the_order_of_its_merges():
    tokenizer, pieces = sentencepiece_like()
    fields = vocabulary_fields(tokenizer, len(pieces))
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6] and fields["tokenizer.ggml.token_type"][-1] == 1
    scores = dict(zip(pieces, fields["tokenizer.ggml.scores"], strict=True))
    assert scores["▁a"] > scores["ab"] > scores["▁ab"] > scores["abc"] > scores["c"]
    assert "tokenizer.ggml.merges" not in fields


def test_merges_that_are_no_sentencepiece_are_refused():
    vocab = {piece: i for i, piece in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    with pytest.raises(ExportError, match="made twice"):
        _scores(list(vocab), vocab, [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")])
    with pytest.raises(ExportError, match="lacks 'a' \\+ 'bc'"):
        _scores(list(vocab), vocab, [("a", "b"), ("b", "c"), ("ab", "c")])


def test_spaces_are_prefixed_as_the_tokenizer_does():
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    meta = {"type": "Metaspace", "replacement": "▁", "split": False}
    legacy = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    assert _space_prefix({"normalizer": legacy, "pre_tokenizer": None})
    assert not _space_prefix({"normalizer": replace, "pre_tokenizer": None})
    assert _space_prefix({"normalizer": None, "pre_tokenizer": {**meta, "prepend_scheme": "always"}})
    assert not _space_prefix({"normalizer": None, "pre_tokenizer": {**meta, "prepend_scheme": "first"}})
    with pytest.raises(ExportError, match="treats spaces"):
        _space_prefix({"normalizer": {"type": "NFKC"}, "pre_tokenizer": None})


def test_other_tokenizers_are_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))
    with pytest.raises(ExportError, match="Unigram"):
        vocabulary_fields(unigram, 8)

    class Slow:
        is_fast = False

    with pytest.raises(ExportError, match=r"tokenizer\.json"):
        vocabulary_fields(Slow(), 8)
