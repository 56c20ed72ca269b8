"""Operations of a training step, counted by hand and against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from samebit.rollout.models.registry import load_model_config
from samebit.trainer.flops import PEAK_FLOPS, peak_flops, train_flops


def test_operations_are_those_that_torch_counts(llama_path):
    """transformers' eager model multiplies the whole square of queries and keys: twice as much."""
    from transformers import AutoModelForCausalLM

    config = load_model_config(llama_path)
    model = AutoModelForCausalLM.from_pretrained(
        llama_path, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.arange(40)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    attention = train_flops(config, [40]) - 6 * 40 * config.num_matmul_weights
    counted = counter.get_total_flops()
    # What torch does not need: the gradient of the embeddings that enter the first layer's qkv.
    assert counted == pytest.approx(train_flops(config, [40]) + attention, rel=0.02)


def test_long_samples_cost_more_than_their_tokens(llama_path):
    config = load_model_config(llama_path)
    assert train_flops(config, [64]) > train_flops(config, [32, 32])
    assert train_flops(config, []) == 0
    assert peak_flops(torch.device("cpu")) is None


def test_operations_by_hand(llama_path, qwen3_path):
    """D = 48, F = 104, V = 331, three layers, heads of 16: 6 and 2 of kv in Llama, 4 in Qwen3."""
    for path, num_heads in ((llama_path, 6), (qwen3_path, 4)):
        config = load_model_config(path)
        projections = 48 * num_heads * 16 + 2 * 48 * 2 * 16 + num_heads * 16 * 48
        weights = 3 * (projections + 48 * 104 + 48 * 104 + 104 * 48) + 48 * 331
        assert config.num_matmul_weights == weights
        # q @ k and p @ v over half the square, each a multiplication and an addition.
        for length in (1, 5, 40):
            attention = 3 * num_heads * 2 * (2 * length * length * 16) // 2
            assert config.attention_flops(length) == attention
            assert train_flops(config, [length]) == 3 * (2 * weights * length + attention)
        assert train_flops(config, iter([5, 40])) == sum(train_flops(config, [n]) for n in (5, 40))


def test_peaks_are_those_of_the_data_sheets():
    assert PEAK_FLOPS["NVIDIA H100 80GB HBM3"] == PEAK_FLOPS["NVIDIA H200"] == 989e12
    assert "NVIDIA H100 PCIe" not in PEAK_FLOPS
