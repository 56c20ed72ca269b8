"""The table of angles under every kind of scaling is transformers' own."""

import math

import pytest
import torch

from samebit.kernels.rope import SCALING_KEYS, rope_table

NUM_POSITIONS = 1024
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
# name -> (head dim, theta, scaling)
CASES = {
    "default": (32, 1e4, {"rope_type": "default"}),
    "linear": (20, 1e4, {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        32, 5e5,
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128, **LLAMA3},
    ),
    "yarn": (32, 1e4, YARN),
    "yarn of Qwen2.5": (128, 1e6, {**YARN, "original_max_position_embeddings": 32768}),
    "yarn, narrow heads": (6, 1e6, YARN),
    "yarn, all options": (
        64, 1e4,
        {**YARN, "beta_fast": 16, "beta_slow": 2, "mscale": 0.8, "mscale_all_dim": 0.5,
         "truncate": False},
    ),
    "yarn, mscale alone": (32, 1e4, {**YARN, "mscale": 0.8}),
    "yarn, equal mscales": (32, 1e4, {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "yarn, attention factor": (32, 1e4, {**YARN, "attention_factor": 1.5, "mscale": 2.0}),
    "yarn that shortens": (32, 1e4, {**YARN, "factor": 0.5}),
    "yarn without a ramp": (8, 1e4, {**YARN, "beta_fast": 4, "beta_slow": 4, "truncate": False}),
    "yarn of a tiny context": (16, 1e4, {**YARN, "original_max_position_embeddings": 4}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tables_are_those_of_transformers(case):
    """Cosines and sines of all positions, the attention factor in both."""
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    head_dim, theta, scaling = CASES[case]
    config = Qwen2Config(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=NUM_POSITIONS,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    positions = torch.arange(NUM_POSITIONS)[None]
    theirs = [
        x[0, :, : head_dim // 2] for x in Qwen2RotaryEmbedding(config)(torch.zeros(1), positions)
    ]
    found = rope_table(head_dim, theta, NUM_POSITIONS, scaling)
    assert found.dtype == torch.float32
    # Llama 3's ramp is one product fewer here, which shows in angles of hundreds of turns.
    atol = 1e-4 if case == "llama3" else 2e-6
    torch.testing.assert_close(found, torch.cat(theirs, -1), rtol=0, atol=atol)


def test_yarn_by_hand():
    """The fastest pair is kept, the slowest stretched by the factor; both times 1 + ln(4) / 10."""
    table = rope_table(32, 1e4, 3, YARN)
    scale = 1 + 0.1 * math.log(4.0)
    slowest = 2 * 1e4 ** (-30 / 32) / 4
    assert table[0].tolist() == pytest.approx([scale] * 16 + [0.0] * 16)
    assert table[2, 0].item() == pytest.approx(scale * math.cos(2.0), rel=1e-6)
    assert table[2, 31].item() == pytest.approx(scale * math.sin(slowest), rel=1e-5)


def test_a_table_is_the_beginning_of_a_longer_one():
    """An engine with a shorter context holds the same rows, whatever the kind."""
    for head_dim, theta, scaling in CASES.values():
        short, long = (rope_table(head_dim, theta, n, scaling) for n in (33, 700))
        assert torch.equal(short, long[:33])


def test_other_kinds_are_refused():
    message = "type 'dynamic' is unknown; use default, linear, llama3 or yarn"
    with pytest.raises(ValueError, match=message):
        rope_table(32, 1e4, 8, {"rope_type": "dynamic", "factor": 2.0})
    assert {scaling["rope_type"] for _, _, scaling in CASES.values()} == set(SCALING_KEYS)
