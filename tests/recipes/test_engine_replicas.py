"""Several engines apart, some of which die: a run ends as one does that had a single engine."""

import os
import random
import signal
from collections import Counter

import pytest

from samebit.recipes.run.phase_ledger import PhaseLedger
from samebit.rollout.engine_pool import EnginePool
from samebit.rollout.messages import Ended
from samebit.rollout.remote_ranks import RemoteEngineError
from samebit.weight_sync.transports.shards import ShardSender

INVARIANT = ("numerics.tp_invariant=true", "trainer.num_steps=3")
REPLICAS = ("placement=process", "placement.replicas=2")


def dying(monkeypatch, moments, signal_number=signal.SIGKILL, rank=0):
    """Send a replica's process a signal each time that one of `moments` comes: the count-th time
    that a pool takes what was drawn ("_take"), that weights are about to move ("send"), or that a
    phase begins ("enter"). Those that came."""
    pools, deaths, counts = [], [], Counter()

    def watch(owner, name):
        inner = getattr(owner, name)

        def wrapped(self, *args):
            if isinstance(args[-1], Ended):  # of a request that goes on
                return inner(self, *args)
            counts[name] += 1
            pools.extend([self] if isinstance(self, EnginePool) and not pools else [])
            if (name, counts[name]) in moments:
                living = pools[0].living
                victim = living[counts[name] % len(living)]
                process = victim._ranks.processes[rank]
                os.kill(process.pid, signal_number)
                if signal_number == signal.SIGKILL:
                    process.join()
                deaths.append(name)
            return inner(self, *args)

        monkeypatch.setattr(owner, name, wrapped)

    watch(EnginePool, "_take")
    watch(ShardSender, "send")
    watch(PhaseLedger, "enter")
    return deaths


def random_moments(seed):
    """An early and a late one: two that die in one rollout would leave nobody."""
    rng = random.Random(seed)
    late = [("send", 5), ("send", 6), *(("_take", i) for i in range(20, 29))]
    return [("_take", rng.randrange(1, 13)), rng.choice(late)]


SOON, RAY = "placement.replica_timeout_s=10", "placement.launcher=ray"
MEET = "placement.timeout_s=10"
LONG, param = pytest.mark.long, pytest.param
TWO = (*REPLICAS, *INVARIANT, "placement.engine_tensor=2")


@pytest.fixture(scope="module")
def invariant(make_runs, tmp_path_factory):
    """What one process gives that trains and draws under tp_invariant; all is compared."""
    result = make_runs(tmp_path_factory.mktemp("invariant")).train("colocated", *INVARIANT)
    assert result[0]["logprob_mismatches"] == 0
    assert result[0]["logprob_tokens_compared"] > 100
    return result


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
    ("moments", "number"),
    [
        ([("enter", 1), ("send", 3), ("enter", 6)], signal.SIGKILL),
        param([("enter", 2), ("send", 4)], signal.SIGSTOP, marks=LONG),
    ],
    ids=["dies", "stands still"],
)
def test_a_single_engine_apart_is_replaced_too(runs, base, monkeypatch, moments, number):
    """Wherever it is not drawing: as training begins or ends, and in an update."""
    came = dying(monkeypatch, moments, number)
    assert runs.train("one", "placement=process", MEET, SOON) == base.result
    assert len(came) == len(moments)


def test_a_single_engine_that_dies_in_a_rollout_ends_the_run(runs, base, monkeypatch):
    """Nobody is left to draw. What is saved goes on."""
    with monkeypatch.context() as patch:
        dying(patch, [("_take", 14)])
        with pytest.raises(RemoteEngineError, match="1 replica of the engine has died, and none"):
            runs.train("alone", "placement=process")
    assert runs.train("alone", "placement=process", "resume=true") == base.result


@pytest.mark.parametrize(
    ("words", "moments", "number"),
    [
        (REPLICAS, [("_take", 7), ("send", 3)], signal.SIGKILL),
        param(("placement=process",), [], signal.SIGKILL, marks=LONG),
        param(("placement=process", "placement.delta=true"), [], signal.SIGKILL, marks=LONG),
        param((*REPLICAS, SOON), [("_take", 7)], signal.SIGSTOP, marks=LONG),
        param((*REPLICAS, MEET), [("send", 3)], signal.SIGSTOP, marks=LONG),
        param((*REPLICAS, RAY), [("_take", 7), ("send", 3)], signal.SIGKILL, marks=LONG),
    ],
    ids=["two die", "one", "delta", "one stands still", "in an update", "ray, two die"],
)
def test_engines_of_two_processes(runs, invariant, monkeypatch, words, moments, number):
    """To the bit what one process trains and draws; a replica is lost with any of its ranks."""
    came = dying(monkeypatch, moments, number, rank=1)
    own = *INVARIANT, *words, "placement.engine_tensor=2"
    assert runs.train("ranks", *own) == invariant
    assert sorted(came) == sorted(name for name, _ in moments)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["placement.replicas=0"], "placement.replicas is 0; it must be positive"),
        (["placement.replicas=2"], "1 with placement.transport 'alias'"),
        (["placement=process", "placement.transport=file", "placement.replicas=2"], "'file', or"),
        ([*REPLICAS, "placement.transport=nccl"], "nccl needs CUDA devices: 3, there are 0"),
        ([*TWO, "placement.transport=nccl"], "nccl needs CUDA devices: 5, there are 0"),
        (
            [*REPLICAS, "placement.engine_tensor=2"],
            "engine_tensor is 2; it must be 1 with placement.e",
        ),
        ([*TWO[:-1], "placement.engine_tensor=3"], "engine_tensor is 3; it must be 1, 2, 4 or 8"),
        ([*TWO[:-1], "placement.engine_tensor=8"], "engine_tensor is 8: .* kv heads = 2 does not"),
        ([*TWO[:-1], "placement.engine_tensor=0"], "engine_tensor is 0; it must be positive"),
        (["placement.engine_tensor=2"], "1 with placement.transport 'alias', or the transport one"),
        (
            [*TWO, "placement.transport=ipc", "placement.replicas=1"],
            "1 with placement.transport 'ipc",
        ),
        ([*REPLICAS, "placement.replica_timeout_s=0"], "replica_timeout_s is 0"),
        ([*REPLICAS, "placement.start_timeout_s=-1"], "start_timeout_s is -1.*; it must be posi"),
        (["placement.start_timeout_s=60"], "start_timeout_s is 60.*; it must be 1800.0 with pla"),
        ([*REPLICAS, "placement.max_restarts=-1"], "max_restarts is -1; it must be 0 or more"),
        (["placement.max_restarts=5"], "max_restarts is 5; it must be 3 with placement.tr"),
    ],
)
def test_refusals(runs, words, reason):
    with pytest.raises(ValueError, match=reason):
        runs.train("refused", *words)
    assert not (runs.folder / "refused").exists()
