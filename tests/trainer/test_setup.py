"""Which processes may meet where: one machine, or several that share a secret."""

import pytest
import torch

from samebit.trainer.config import ParallelConfig
from samebit.trainer.megatron import setup

CPU = torch.device("cpu")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SAMEBIT_SECRET")


@pytest.fixture
def env(monkeypatch):
    """env(NAME=value, ...): of what a launcher sets, these alone."""

    def set_all(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("values", "on_one"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "node-0"}, True),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1"}, False),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, True),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, True),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "node-0"}, False),
        ({"WORLD_SIZE": "2"}, False),
    ],
    ids=str,
)
def test_one_machine_or_several(env, values, on_one):
    env(**values)
    assert setup.is_on_one_machine() is on_one


def test_several_machines_need_a_secret(env):
    """Told at once, before anything is sent or listens."""
    env(RANK="0", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", MASTER_ADDR="192.0.2.1", MASTER_PORT="1")
    with pytest.raises(ValueError, match="on several machines, and SAMEBIT_SECRET is not set; set"):
        setup._join_group(CPU, "")
    with pytest.raises(ValueError, match="SAMEBIT_SECRET has 6 characters; it must have at least"):
        setup._join_group(CPU, "letmein"[:6])


def test_processes_must_be_as_many_as_are_asked_for(make_trainer):
    """One process is one layout's, for its whole life."""
    make_trainer(filled=False)
    two = ParallelConfig(data=2)
    with pytest.raises(ValueError, match=r"1 x 1 x 1 x 2 = 2 processes; there are 1$"):
        setup.start_processes(CPU, two)
    with pytest.raises(ValueError, match=r"this process runs with \(1, 1, 1, 1, 1\)$"):
        make_trainer(parallel=two)
