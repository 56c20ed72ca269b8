"""The promise for the families that `samebit verify` does not make by itself."""

import pytest
import torch

from samebit.recipes.verification.properties import (
    PROPERTIES,
    batch_size,
    decode_batch,
    group,
    prefill_chunk,
    prefix_cache,
    score,
    trainer,
)
from samebit.recipes.verification.subject import make_subject

ON_CPU = (batch_size, decode_batch, group, prefill_chunk, prefix_cache, score, trainer)


def holds(subject, check):
    """Not one token or log-prob may differ."""
    result = check(subject)
    assert result.mismatches == 0, result.notes
    assert result.tokens > 0


@pytest.fixture(scope="module")
def subject(qwen2_path):
    """Qwen2 with biases, tied embeddings and yarn."""
    return make_subject(qwen2_path, torch.device("cpu"), num_new_tokens=16)


@pytest.mark.parametrize("check", ON_CPU, ids=lambda check: check.__name__)
def test_property(subject, check):
    holds(subject, check)


@pytest.fixture(scope="module")
def gpu_subject(qwen2_path):
    return make_subject(qwen2_path, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_property_on_the_gpu(gpu_subject, check):
    """Trainer against engine among them."""
    holds(gpu_subject, check)
