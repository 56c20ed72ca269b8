"""Updates of an engine's replicas, one of which stands still: it is replaced, and all get them."""

import os
import signal
from contextlib import closing

import pytest
from serving import SETTINGS
from shard_ends import source_of

from samebit.rollout.engine_pool import EnginePool
from samebit.rollout.remote import RemoteEngine
from samebit.weight_sync.transports.remote import GlooTransport
from samebit.weight_sync.transports.shards import ShardSender
from samebit.weight_sync.types import WeightVersion

LONG = pytest.mark.long
MOMENTS = ["_meet", pytest.param("begin", marks=LONG), "send", pytest.param("commit", marks=LONG)]


@pytest.mark.parametrize("moment", MOMENTS)
def test_who_stands_still_in_an_update_is_replaced(old, new, monkeypatch, moment):
    """Whatever the transport is at; those that do not stand still are not killed."""

    def start(_):
        return RemoteEngine(old.folder, waits=False, **SETTINGS)

    with closing(EnginePool(start, 2, 4, max_restarts=1)) as pool:
        victim, other = pool.replicas
        owner = GlooTransport if moment == "_meet" else ShardSender
        inner, calls = getattr(owner, moment), []

        def stopping(self, *args):
            if not calls:
                os.kill(victim._ranks.processes[0].pid, signal.SIGSTOP)
            calls.append(moment)
            return inner(self, *args)

        monkeypatch.setattr(owner, moment, stopping)
        transport = GlooTransport(source_of(new), pool, timeout_s=2.0)
        transport.update(new.params, new.digest)
        assert len(calls) == 2
        assert not victim.is_alive
        successor, still_there = pool.living
        assert still_there is other
        version = WeightVersion(source_of(new).step, new.digest)
        assert [each.weight_version for each in (successor, other)] == [version, version]
        transport.close()
