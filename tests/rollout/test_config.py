"""Settings of the engine that no machine without a GPU can try."""

from pathlib import Path

import pytest
import torch

from samebit.kernels.reduce import TensorRanks
from samebit.rollout.config import EngineConfig, own_device


@pytest.mark.parametrize(
    ("device", "ranks", "message"),
    [
        ("cpu", TensorRanks(), "cuda_graphs=True needs a CUDA device, not 'cpu'"),
        ("cuda", TensorRanks(0, 2, object()), "with 2 tensor parallel ranks is not supported yet"),
    ],
)
def test_decode_graphs_where_there_can_be_none(device, ranks, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(
            model_path=Path(),
            device=torch.device(device),
            dtype=torch.float32,
            cuda_graphs=True,
            ranks=ranks,
        )


def test_an_engine_lives_on_the_current_device(monkeypatch):
    """Kernels are launched there; another GPU's memory would be read by the wrong one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert own_device("cuda") == own_device("cuda:1") == torch.device("cuda", 1)
    assert own_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device is 'cuda:0'; it must be the current .*'cuda:1'"):
        own_device("cuda:0")
