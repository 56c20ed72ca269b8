"""The promise on the card, in bf16: every property of `samebit verify` on two small models."""

import pytest
import torch

from samebit.recipes.verification.properties import PROPERTIES
from samebit.recipes.verification.subject import make_subject

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["qwen3-untied", "llama-tied"])
def subject(request, qwen3_path, llama_path):
    paths = {"qwen3-untied": qwen3_path, "llama-tied": llama_path}
    return make_subject(paths[request.param], torch.device("cuda"))


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_property_on_the_gpu(subject, check):
    """Not one token or log-prob may differ."""
    result = check(subject)
    assert result.mismatches == 0, result.notes
    assert result.tokens > 0
