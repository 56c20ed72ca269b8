"""Several engines apart, some of which die: a run ends as one does that had a single engine."""

import os
import random
import signal
from collections import Counter

import pytest

from samebit.rollout.engine_pool import EnginePool
from samebit.weight_sync.transports.shards import ShardSender

REPLICAS = ("placement=process", "placement.replicas=2")


def dying(monkeypatch, moments, signal_number=signal.SIGKILL):
    """Send a replica a signal each time that one of `moments` comes: the count-th time that a pool
    takes what was drawn ("_take"), or that weights are about to move ("send"). Those that came."""
    pools, deaths, counts = [], [], Counter()

    def watch(owner, name):
        inner = getattr(owner, name)

        def wrapped(self, *args):
            counts[name] += 1
            pools.extend([self] if isinstance(self, EnginePool) and not pools else [])
            if (name, counts[name]) in moments:
                victim = pools[0].living[counts[name] % 2]
                os.kill(victim._ranks.processes[0].pid, signal_number)
                if signal_number == signal.SIGKILL:
                    victim._ranks.processes[0].join()
                deaths.append(name)
            return inner(self, *args)

        monkeypatch.setattr(owner, name, wrapped)

    watch(EnginePool, "_take")
    watch(ShardSender, "send")
    return deaths


def random_moments(seed):
    """An early and a late one: two that die in one rollout would leave nobody."""
    rng = random.Random(seed)
    late = [("send", 5), ("send", 6), *(("_take", i) for i in range(20, 29))]
    return [("_take", rng.randrange(1, 13)), rng.choice(late)]


@pytest.mark.parametrize(
    "moments",
    [
        [("_take", 7), ("send", 3)],
        *(pytest.param(random_moments(seed), marks=pytest.mark.long) for seed in range(5)),
    ],
    ids=str,
)
def test_deaths_change_no_bit(runs, base, monkeypatch, moments):
    """No sample is lost or drawn twice; weights that were moving move again, to a successor too."""
    deaths = dying(monkeypatch, moments)
    assert runs.train("replicas", *REPLICAS) == base.result
    assert sorted(deaths) == sorted(name for name, _ in moments)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["placement.replicas=0"], "placement.replicas is 0; it must be positive"),
        (["placement.replicas=2"], "1 with placement.transport 'alias'"),
        (["placement=process", "placement.transport=file", "placement.replicas=2"], "'file', or"),
        ([*REPLICAS, "placement.transport=nccl"], "nccl needs CUDA devices: 3, there are 0"),
        ([*REPLICAS, "placement.replica_timeout_s=0"], "replica_timeout_s is 0"),
        ([*REPLICAS, "placement.max_restarts=-1"], "max_restarts is -1; it must be 0 or more"),
        (["placement.max_restarts=5"], "max_restarts is 5; it must be 3 with one replica"),
    ],
)
def test_refusals(runs, words, reason):
    with pytest.raises(ValueError, match=reason):
        runs.train("refused", *words)
    assert not (runs.folder / "refused").exists()
