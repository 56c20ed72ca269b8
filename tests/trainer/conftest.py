"""Megatron trainers on the random models, and samples to train them on."""

import random
from dataclasses import replace

import pytest
import torch

from samebit.recipes.data.samples import drawn_sample
from samebit.recipes.models.tiny_model import write_config, write_weights
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_safetensors
from samebit.rollout.types import SamplingParams
from samebit.trainer.config import OptimizerConfig
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.types import Sample

CPU = torch.device("cpu")


@pytest.fixture(scope="session", params=["qwen3", "llama", "qwen2"])
def model_path(request):
    """Qwen3 with an output layer of its own, Llama and Qwen2 with tied embeddings."""
    return request.getfixturevalue(f"{request.param}_path")


@pytest.fixture
def make_trainer(qwen3_path):
    """make_trainer(path, num_steps=..., lr=...) -> a trainer that holds the folder's weights."""

    def make(
        path=qwen3_path, num_steps=100, filled=True, parallel=None, releasable=False,
        grad_segments=0, **optimizer,
    ):  # fmt: skip
        settings = OptimizerConfig(**({"lr": 1e-2} | optimizer))
        own = {"releasable": releasable, "grad_segments": grad_segments}
        model = load_model_config(path)
        trainer = MegatronTrainer(model, settings, num_steps, CPU, parallel, **own)
        if filled:
            trainer.fill(lambda specs, params: load_safetensors(path, specs, params))
        return trainer

    return make


@pytest.fixture(scope="session")
def random_samples():
    """random_samples(count, seed) -> samples of very different lengths."""
    return _random_samples


def _random_samples(count, seed, with_logprobs=False):
    """The log-probs and advantages are made up."""
    rng = random.Random(seed)
    samples = []
    for i in range(count):
        prompt_len, response_len = rng.randint(1, 20), rng.randint(1, 24)
        ids = [rng.randrange(331) for _ in range(prompt_len + response_len)]
        logprobs = [-rng.uniform(0.1, 12.0) for _ in range(response_len)] if with_logprobs else []
        samples.append(
            Sample.of_response(
                sample_id=100 + i,
                token_ids=tuple(ids),
                prompt_len=prompt_len,
                logprobs=tuple(logprobs),
                advantage=rng.uniform(-2, 2),
            )
        )
    return samples


@pytest.fixture
def folder(tmp_path):
    """A qwen3 of eight million parameters, with an output layer of its own."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 64, "vocab_size": 2000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2}
    write_config(tmp_path, "qwen3", **shape, **heads, tie_word_embeddings=False)
    write_weights(tmp_path, seed=7)
    return tmp_path


@pytest.fixture(scope="session")
def rollout_samples():
    """rollout_samples(path, temperature) -> samples drawn by an engine, with its log-probs."""
    drawn = {}

    def draw(path, temperature=1.0):
        if (path, temperature) not in drawn:
            drawn[path, temperature] = _draw(path, temperature)
        return drawn[path, temperature]

    return draw


def _draw(path, temperature):
    engine = Engine(path, device="cpu", kv_cache_tokens=4096, seed=5)
    rng = random.Random(3)
    prompts = [[rng.randrange(331) for _ in range(n)] for n in (1, 15, 16, 17, 40, 63, 64, 65)]
    params = SamplingParams(n=3, temperature=temperature, max_new_tokens=25, ignore_eos=True)
    return [
        replace(drawn_sample(prompt, c), advantages=rng.uniform(-1, 1))
        for prompt, group in zip(prompts, engine.generate(prompts, params), strict=True)
        for c in group
    ]
