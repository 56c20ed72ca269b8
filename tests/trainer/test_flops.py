"""Operations of a training step, counted by hand and against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from samebit.rollout.models.registry import load_model_config
from samebit.trainer.flops import num_matmul_weights, peak_flops, train_flops


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
    attention = train_flops(config, [40]) - 6 * 40 * num_matmul_weights(config)
    counted = counter.get_total_flops()
    # What torch does not need: the gradient of the embeddings that enter the first layer's qkv.
    assert counted == pytest.approx(train_flops(config, [40]) + attention, rel=0.02)


def test_long_samples_cost_more_than_their_tokens(llama_path):
    config = load_model_config(llama_path)
    assert train_flops(config, [64]) > train_flops(config, [32, 32])
    assert train_flops(config, []) == 0
    assert peak_flops(torch.device("cpu")) is None
