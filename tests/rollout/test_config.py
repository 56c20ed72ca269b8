"""Settings: what a machine without a GPU cannot try, and numbers of the wrong kind."""

import re

import numpy as np
import pytest
import torch
from helpers import run_python

from samebit.kernels.reduce import RankGroup
from samebit.rollout.config import EngineConfig
from samebit.rollout.device import own_device, settled
from samebit.rollout.types import SamplingParams


@pytest.mark.parametrize(
    ("device", "ranks", "message"),
    [
        ("cpu", RankGroup(), "cuda_graphs=True needs a CUDA device, not 'cpu'"),
        ("cuda", RankGroup(0, 2, object()), "with 2 tensor parallel ranks needs GPUs that can"),
    ],
)
def test_decode_graphs_where_there_can_be_none(device, ranks, message, monkeypatch):
    monkeypatch.setattr("samebit.rollout.device.peers_of", lambda ranks, device: None)
    with pytest.raises(ValueError, match=message):
        settled(EngineConfig(cuda_graphs=True), torch.device(device), ranks)


def test_the_device_decides_what_is_unset(monkeypatch):
    """And what is given stays as it is."""
    monkeypatch.setattr("samebit.rollout.device.peers_of", lambda ranks, device: None)
    for device, ranks, expected in (
        ("cpu", RankGroup(), (False, False)),
        ("cuda", RankGroup(), (True, True)),
        ("cuda", RankGroup(0, 2, object()), (False, True)),
    ):
        found = settled(EngineConfig(), torch.device(device), ranks)
        assert (found.cuda_graphs, found.overlap) == expected
    found = settled(EngineConfig(cuda_graphs=False, overlap=True), torch.device("cpu"), RankGroup())
    assert (found.cuda_graphs, found.overlap) == (False, True)


@pytest.mark.parametrize(("why_not", "unset"), [("", True), ("there is no compiler", False)])
def test_memory_is_releasable_where_the_allocator_can_be_made(monkeypatch, caplog, why_not, unset):
    """Unset: what the device allows, and a word about it; asked for in vain: an error."""
    monkeypatch.setattr("samebit.rollout.device.why_not_releasable", lambda device: why_not)

    def found(asked):
        return settled(EngineConfig(releasable=asked), torch.device("cuda"), RankGroup()).releasable

    assert (found(None), found(False)) == (unset, False)
    assert bool(caplog.records) is not unset
    assert why_not in caplog.text
    if unset:
        assert found(True)
    else:
        with pytest.raises(ValueError, match="engine.releasable=True cannot be: there is no comp"):
            found(True)


def test_settings_are_given_as_one_and_by_name(make_engine):
    """A name wins; what was given is left as it was."""
    given = EngineConfig(page_size=16, kv_cache_tokens=np.int64(64))
    engine = make_engine(config=given, page_size=32, prefix_cache=np.False_)
    assert engine.config == EngineConfig(
        page_size=32,
        kv_cache_tokens=64,
        prefix_cache=False,
        cuda_graphs=False,
        overlap=False,
        releasable=True,
    )
    assert given == EngineConfig(page_size=16, kv_cache_tokens=64)
    assert type(given.kv_cache_tokens) is int


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_sizes": 4}, "Engine has no setting 'page_sizes'; the nearest is 'page_size'"),
        ({"devise": "cpu"}, "Engine has no setting 'devise'; the nearest is 'device'"),
        ({"config": "cpu"}, "Engine config is 'cpu'; it must be an EngineConfig"),
    ],
)
def test_unknown_settings(make_engine, settings, message):
    with pytest.raises(TypeError, match=message):
        make_engine(**settings)


def test_settings_need_no_torch():
    """Recipes read them before anything else is imported."""
    code = "import sys\nimport samebit.rollout.config\nprint({'torch', 'numpy'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


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
