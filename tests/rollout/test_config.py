"""Settings: what a machine without a GPU cannot try, and numbers of the wrong kind."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from samebit.kernels.reduce import RankGroup
from samebit.rollout import config
from samebit.rollout.config import EngineConfig, own_device
from samebit.rollout.types import SamplingParams


@pytest.mark.parametrize(
    ("device", "ranks", "message"),
    [
        ("cpu", RankGroup(), "cuda_graphs=True needs a CUDA device, not 'cpu'"),
        ("cuda", RankGroup(0, 2, object()), "with 2 tensor parallel ranks needs GPUs that can"),
    ],
)
def test_decode_graphs_where_there_can_be_none(device, ranks, message, monkeypatch):
    monkeypatch.setattr(config, "peers_of", lambda ranks, device: None)
    with pytest.raises(ValueError, match=message):
        EngineConfig(
            model_path=Path(),
            device=torch.device(device),
            dtype=torch.float32,
            cuda_graphs=True,
            ranks=ranks,
        )


@pytest.mark.parametrize("field", ["n", "top_k", "max_new_tokens", "min_new_tokens", "seed"])
def test_what_is_counted_is_an_integer(field):
    """A part of a token would be cut off, or found out in the midst of a step."""
    with pytest.raises(
        ValueError, match=rf"SamplingParams\.{field} is 1\.5; it must be an integer"
    ):
        SamplingParams(**{field: 1.5})
    assert getattr(SamplingParams(**{field: np.int64(1)}), field) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 1e-38), ("temperature", 1e39), ("top_p", 1e-50)]
)
def test_numbers_that_fp32_cannot_hold(field, value):
    """They would be 0 or infinite where the logits are."""
    with pytest.raises(ValueError, match=rf"SamplingParams\.{field} is {re.escape(str(value))}"):
        SamplingParams(**{field: value})


def test_an_engine_lives_on_the_current_device(monkeypatch):
    """Kernels are launched there; another GPU's memory would be read by the wrong one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert own_device("cuda") == own_device("cuda:1") == torch.device("cuda", 1)
    assert own_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device is 'cuda:0'; it must be the current .*'cuda:1'"):
        own_device("cuda:0")
