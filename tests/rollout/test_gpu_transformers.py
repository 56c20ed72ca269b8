"""On the card, in bf16, the engine is no farther from the exact model than transformers is."""

import pytest
import torch
from programs.transformers_error import measure, random_lens, random_texts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("model", ["qwen3_path", "llama_path"])
def test_errors_are_no_larger_than_those_of_transformers(model, request):
    """Mean and RMS over thousands of tokens, against transformers in fp32 on the same weights."""
    texts = random_texts(331, random_lens(900))
    report = measure(request.getfixturevalue(model), torch.device("cuda"), texts)
    assert report["tokens"] > 2000
    engine, bf16 = report["engine"], report["transformers_bf16"]
    assert engine["rms"] <= bf16["rms"]
    assert engine["mean"] <= bf16["mean"]
    assert engine["greedy_agreement"] > 0.9
