"""Frequencies and tables against transformers' own, for every kind of rope and several configs of each."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from nbkit.kernels import rope as rp
from nbkit.kernels._rope_tables import KINDS

HEAD = 64
OLD = {"original_max_position_embeddings": 2048}
BOTH = {"short_factor": [1.0 + i / 50 for i in range(HEAD // 2)], "long_factor": [1.5 + i / 3 for i in range(HEAD // 2)]}
CASES: list[tuple[dict[str, Any], int]] = [
    ({"rope_type": "default", "rope_theta": 1e4}, 2048),
    ({"rope_type": "default", "rope_theta": 5e5}, 8192),
    ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 4096),
    ({"rope_type": "linear", "rope_theta": 1e6, "factor": 2.5, "partial_rotary_factor": 0.5}, 4096),
    ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 512),
    ({"rope_type": "dynamic", "rope_theta": 1e5, "factor": 8.0, "partial_rotary_factor": 0.75}, 256),
    ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, **OLD}, 32768),
    ({"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "beta_fast": 64, "beta_slow": 2, "truncate": False, **OLD}, 8192),
    ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707, **OLD}, 8192),
    ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 1.0, "attention_factor": 1.25, **OLD}, 2048),
    ({"rope_type": "longrope", "rope_theta": 1e4, **BOTH, **OLD}, 65536),
    ({"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.1, **BOTH, **OLD}, 8192),
    ({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **OLD}, 16384),
    ({"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0, **OLD}, 65536),
    ({"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}, 4096),
    ({"rope_type": "proportional", "rope_theta": 1e4, "factor": 8.0}, 4096),
]  # fmt: skip
LENGTHS = (7, 300, 600, 400, 3000, 2500, 5, 9000)


def stock(parameters: dict[str, Any], positions: int) -> Any:
    """transformers' own rotary module of a small Llama with these parameters."""
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    if parameters["rope_type"] != "default" and parameters["rope_type"] not in utils.ROPE_INIT_FUNCTIONS:
        pytest.skip(f"this transformers knows no {parameters['rope_type']} rope")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.LlamaConfig(
            hidden_size=4 * HEAD, num_attention_heads=4, head_dim=HEAD, max_position_embeddings=positions,
            rope_parameters=dict(parameters)
        )  # fmt: skip
        return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize(("parameters", "positions"), CASES, ids=[f"{c['rope_type']}-{i}" for i, (c, _) in enumerate(CASES)])
def test_tables_equal_transformers_at_every_length(parameters: dict[str, Any], positions: int) -> None:
    """One module and one `Rotary` are taken through lengths that grow, shrink and fall back, as generation does."""
    theirs, ours = stock(parameters, positions), rp.Rotary(parameters, HEAD, positions)
    for length in LENGTHS:
        where = torch.stack([torch.arange(length - 5, length), torch.arange(5)])
        cos, sin = theirs(torch.zeros(1), where)
        half = cos.shape[-1] // 2
        found = ours.tables(where)
        assert found[0].shape == (2, 5, half), (found[0].shape, cos.shape)
        torch.testing.assert_close(ours.frequencies, theirs.inv_freq, rtol=3e-7, atol=0)
        assert ours.scaling == pytest.approx(theirs.attention_scaling, rel=1e-12)
        for mine, other in zip(found, (cos, sin), strict=True):
            torch.testing.assert_close(mine, other[..., :half], rtol=0, atol=3e-7 * length)
            assert torch.equal(other[..., :half], other[..., half:])


def test_every_kind_of_transformers_is_known_and_tried() -> None:
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    assert set(utils.ROPE_INIT_FUNCTIONS) <= set(KINDS)
    assert {parameters["rope_type"] for parameters, _ in CASES} == set(KINDS)


def test_tables_come_in_the_dtype_and_turn_a_part_of_the_head() -> None:
    parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.5}
    cos, sin = rp.Rotary(parameters, HEAD, 4096).tables(torch.arange(6), torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.bfloat16 and cos.shape == (6, HEAD // 4)
    x = torch.randn(1, 6, 2, HEAD, dtype=torch.bfloat16)
    assert torch.equal(rp.rope(x, cos, sin, rotary=HEAD // 2)[..., HEAD // 2 :], x[..., HEAD // 2 :])


def test_what_is_missing_or_unknown_is_said() -> None:
    with pytest.raises(ValueError, match="rope_type is 'spiral'; known are default, linear"):
        rp.rope_frequencies({"rope_type": "spiral", "rope_theta": 1e4}, HEAD, 2048)
    with pytest.raises(ValueError, match="type 'llama3' lack low_freq_factor, original_max"):
        rp.rope_frequencies({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "high_freq_factor": 4.0}, HEAD, 2048)
    with pytest.raises(ValueError, match="short_factor of rope_parameters has 3 values; 32 pairs"):
        short = {"rope_type": "longrope", "rope_theta": 1e4, **BOTH, **OLD, "short_factor": [1.0] * 3}
        rp.rope_frequencies(short, HEAD, 2048)
    with pytest.raises(ValueError, match="lack rope_theta"):
        rp.rope_frequencies({}, HEAD, 2048)


@pytest.mark.parametrize("name", ["glm", "cohere"])
def test_interleaved_rotation_is_transformers_own(name: str) -> None:
    """GLM turns half of each head; Cohere's tables hold each angle twice side by side, of which every second is ours."""
    module = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    q, angle = torch.randn(2, 5, 3, 16), torch.rand(2, 5, 8 if name == "cohere" else 4) * 6
    whole = angle.repeat_interleave(2, dim=-1) if name == "cohere" else torch.cat((angle, angle), dim=-1)
    theirs, _ = module.apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), whole.cos(), whole.sin())
    ours = rp.rope(q, angle.cos(), angle.sin(), interleaved=True, rotary=2 * angle.shape[-1])
    torch.testing.assert_close(ours, theirs.transpose(1, 2), rtol=0, atol=1e-6)
