"""What to compare output tokens per second with: the hardware's bound.

It counts weights and keys once a step, a prompt's keys once for all of its samples, and everything
at the rates that the card reached in the same run.
"""

import math

import torch

from samebit.recipes.bench.config import Workload
from samebit.recipes.bench.timing import CardRates
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import EMBEDDING


def roofline_tokens_s(config: ModelConfig, workload: Workload, rates: CardRates) -> float:
    """Output tokens per second of a perfect engine on a card of these rates."""
    shapes = {s.name: s.shape for s in config.param_specs() if len(s.shape) == 2}
    head = math.prod(shapes[EMBEDDING])
    every = sum(map(math.prod, shapes.values()))
    read = every if config.tie_embeddings else every - head  # an embedding is only looked up
    per_prompt = 2 * (read - head) * workload.input_len
    per_prompt += config.attention_flops(workload.input_len)
    prefill_s = workload.num_prompts * per_prompt / rates.flops_s
    weights_s = max(2 * read / rates.memory_bytes_s, 2 * read * workload.num_seqs / rates.flops_s)
    context = workload.num_prompts * workload.input_len
    context += workload.num_seqs * workload.output_len // 2
    keys_s = context * config.kv_layout.bytes_per_token(torch.bfloat16) / rates.memory_bytes_s
    decode_s = (workload.output_len - 1) * (weights_s + keys_s)
    return workload.output_tokens / (prefill_s + decode_s)
