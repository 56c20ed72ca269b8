"""The promise on the card, in bf16: every property of `samebit verify` on two small models."""

import pytest
import torch

from samebit.recipes.verification.properties import PROPERTIES
from samebit.recipes.verification.subject import make_subject
from samebit.recipes.verify import TINY_MODELS, make_tiny_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=TINY_MODELS)
def subject(request, tmp_path_factory):
    path, device = tmp_path_factory.mktemp("models") / request.param, torch.device("cuda")
    make_tiny_model(path, request.param, 1, device)
    return make_subject(path, device)


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_property_on_the_gpu(subject, check):
    """Not one token or log-prob may differ."""
    result = check(subject)
    assert result.mismatches == 0, result.notes
    assert result.tokens > 0
