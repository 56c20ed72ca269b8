"""What to compare output tokens per second with: the hardware's bound.

It counts weights and keys once a step, a prompt's keys once for all of its samples, and everything
at the rates that the card reached in the same run.
"""

import math
from typing import NamedTuple

import torch

from samebit.recipes.bench.config import Workload
from samebit.recipes.bench.timing import CardRates
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import EMBEDDING


class Bounds(NamedTuple):
    """Seconds of a perfect engine: prompts, weights in all steps of decode, keys and values."""

    prefill_s: float
    weights_s: float
    keys_s: float


def roofline_bounds(config: ModelConfig, workload: Workload, rates: CardRates) -> Bounds:
    """What a workload takes at least on a card of these rates."""
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
    steps = workload.output_len - 1
    return Bounds(prefill_s, steps * weights_s, steps * keys_s)


def roofline_tokens_s(config: ModelConfig, workload: Workload, rates: CardRates) -> float:
    """Output tokens per second of a perfect engine on a card of these rates."""
    return workload.output_tokens / sum(roofline_bounds(config, workload, rates))
