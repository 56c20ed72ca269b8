"""What to compare output tokens per second with: the hardware's bound, and other engines.

Both on one H200. The bound counts weights and keys once a step, a prompt's keys once for all of its
samples, and every product at the fastest rate measured; the figures of others are of the same
workloads (random weights, bf16, temperature 1, log-probs, end-of-sequence ignored), best of two.
"""

import math

import torch

from samebit.recipes.bench.config import Workload
from samebit.recipes.bench.timing import FLOPS_S, MEMORY_BYTES_S
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import EMBEDDING, param_specs
from samebit.rollout.runtime.kv_cache import kv_bytes_per_token
from samebit.trainer.flops import attention_flops

CARD = "H200"
ENGINES = (
    "vLLM",  # 0.22.1
    "SGLang",  # 0.5.13, fa3
    "vLLM invariant",  # VLLM_BATCH_INVARIANT=1
    "SGLang deterministic",  # --enable-deterministic-inference
)
# (name of the model's folder, workload): output tokens per second, in the order of ENGINES.
_MEASURED: dict[tuple[str, str], tuple[float, ...]] = {
    ("qwen3-8b", "64x8x512x512"): (16877, 15818, 14976, 13612),
    ("qwen3-8b", "1x1x512x256"): (185, 188, 52, 143),
    ("qwen3-8b", "8x1x512x256"): (1314, 1315, 417, 1044),
    ("qwen3-8b", "64x1x512x256"): (6249, 6156, 3125, 4964),
    ("qwen3-8b", "1x8x512x4096"): (1285, 1308),
    ("qwen3-8b", "16x16x8192x512"): (3839, 3915),
    ("qwen3-8b", "32x1x8192x1"): (4.56, 4.50),
    ("qwen3-0.6b", "1x1x512x512"): (538, 563),
    ("qwen3-0.6b", "64x8x512x512"): (37612, 32931),
}


def peers_tokens_s(model_name: str, workload: Workload) -> dict[str, float]:
    """By engine; empty where nothing was measured."""
    found = _MEASURED.get((model_name, str(workload)), ())
    return dict(zip(ENGINES, found, strict=False))


def roofline_tokens_s(config: ModelConfig, workload: Workload) -> float:
    """Output tokens per second of a perfect engine."""
    shapes = {s.name: s.shape for s in param_specs(config) if len(s.shape) == 2}
    head = math.prod(shapes[EMBEDDING])
    every = sum(map(math.prod, shapes.values()))
    read = every if config.tie_embeddings else every - head  # an embedding is only looked up
    per_prompt = 2 * (read - head) * workload.input_len
    per_prompt += attention_flops(config, workload.input_len)
    prefill_s = workload.num_prompts * per_prompt / FLOPS_S
    weights_s = max(2 * read / MEMORY_BYTES_S, 2 * read * workload.num_seqs / FLOPS_S)
    context = workload.num_prompts * workload.input_len
    context += workload.num_seqs * workload.output_len // 2
    keys_s = context * kv_bytes_per_token(config, torch.bfloat16) / MEMORY_BYTES_S
    decode_s = (workload.output_len - 1) * (weights_s + keys_s)
    return workload.output_tokens / (prefill_s + decode_s)
