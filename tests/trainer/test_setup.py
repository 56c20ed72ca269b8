"""Which processes may meet where: one machine, or several that share a secret."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from megatron.core import parallel_state

from samebit.trainer.config import ParallelConfig
from samebit.trainer.megatron import setup
from samebit.weight_sync.meeting import prove_secret

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


@pytest.mark.parametrize("knows", [True, False])
def test_processes_prove_their_secret_before_they_join(env, monkeypatch, knows):
    """One that knows another secret is met at the store, and no group is made with it. In a group
    all wait for hours: the first of them may score or write for long."""
    secret, store, joined = "sixteen or more letters", torch.distributed.HashStore(), []
    env(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for name, value in setup.DETERMINISTIC.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(setup, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(setup.dist, "init_process_group", lambda *x, **y: joined.append((x, y)))
    with ThreadPoolExecutor(1) as pool:
        known, patience = secret if knows else secret.upper(), timedelta(seconds=10)
        other = pool.submit(prove_secret, store, 1, 2, known, patience)
        if not knows:
            with pytest.raises(ValueError, match="rank 1 has another SAMEBIT_SECRET than rank 0"):
                setup._join_group(CPU, secret)
            assert "rank 0 has another SAMEBIT_SECRET" in str(other.exception())
            assert joined == []
            return
        setup._join_group(CPU, secret)
        other.result()
    place = {"store": store, "rank": 0, "world_size": 2, "timeout": timedelta(hours=4)}
    assert joined == [(("gloo",), place)]


class Runs:
    """What a pickle of it would run."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


def test_megatron_tells_no_pickles(make_trainer):
    """They would run what another process has sent."""
    make_trainer(filled=False)
    found, value = [None], Runs()
    torch.distributed.all_gather_object(found, value)
    assert found[0] is value


def test_processes_must_be_as_many_as_are_asked_for(make_trainer):
    """However many layouts one process is of."""
    make_trainer(filled=False)
    two = ParallelConfig(data=2)
    message = r"trainer.parallel asks for .* = 1 x 1 x 1 x 2 = 2 processes; there are 1$"
    with pytest.raises(ValueError, match=message):
        setup.start_processes(CPU, two)
    with pytest.raises(ValueError, match=message):
        make_trainer(parallel=two)


def test_groups_are_made_once_for_a_layout(make_trainer):
    """Models of one layout share them; nobody finds them, nor ranks of theirs, in Megatron's global
    state."""
    trainer, other = (make_trainer(filled=False) for _ in range(2))
    recomputed = ParallelConfig(recompute="full")
    assert trainer.groups is other.groups is setup.process_groups(CPU, recomputed)
    state = {k: v for k, v in vars(parallel_state).items() if k[:1] == "_" and k[1:].isupper()}
    assert len(state) > 20
    assert not any(state.values()), state
    with pytest.raises(AssertionError, match="tensor model parallel group is not initialized"):
        parallel_state.get_tensor_model_parallel_group()
