"""Updates to other processes: deaths, silence and errors end at both ends, and are told clearly."""

import os
import signal
import subprocess
import sys
import time

import pytest
from serving import PARAMS, PROMPTS, serves
from shard_ends import make_group, make_receiver, make_sender, recovers, send, source_of

from samebit.rollout.remote import RemoteEngine
from samebit.rollout.remote_ranks import RemoteEngineError
from samebit.weight_sync.buckets import cut_buckets, pack
from samebit.weight_sync.meeting import loopback_listener
from samebit.weight_sync.transports.peers import GlooPeers
from samebit.weight_sync.transports.remote import GlooTransport
from samebit.weight_sync.types import WeightSyncError, WeightVersion


def test_a_silent_sender_is_given_up_after_the_timeout(pool, engine, new, expected):
    """A sender that hangs in mid-update must not hang the engine for ever."""
    sender, [receiver] = make_group(pool, new, timeout_s=2.0)
    receiving = pool.submit(receiver.receive, engine.sink)
    sender.begin(4)
    with pytest.raises(WeightSyncError, match="the weight group lost a member"):
        receiving.result()
    with pytest.raises(WeightSyncError, match="step 4 broke off: the weight group lost a member"):
        engine.generate(PROMPTS, PARAMS)
    engine.copy_weights(new.params, step=5, digest=new.digest)
    assert serves(engine, new, expected)


class BlindPeers(GlooPeers):
    """As nccl: bytes that do not come are awaited for ever, but for what `watch` raises."""

    sees_deaths, fails = False, "outgoing"

    def move(self, rounds, watch):
        if any(getattr(round_, self.fails) for round_ in rounds):
            raise OSError("the cable was pulled")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            watch()
            time.sleep(0.001)
        raise AssertionError("nobody said that nothing will come")


def test_an_abort_ends_the_wait_for_bytes(pool, engine, new, expected):
    """A sender that fails between two bytes says so; the engine must not wait for the rest."""
    sender, [receiver] = make_group(pool, new, peers=BlindPeers)
    receiving = pool.submit(receiver.receive, engine.sink)
    sender.begin(4)
    with pytest.raises(OSError, match="the cable was pulled") as caught:
        sender.send(new.params)
    sender.abort(str(caught.value))
    with pytest.raises(WeightSyncError, match="the cable was pulled"):
        receiving.result()
    with pytest.raises(WeightSyncError, match="step 4 broke off: the cable was pulled"):
        engine.generate(PROMPTS, PARAMS)
    sender, [receiver] = make_group(pool, new)
    recovers(pool, sender, receiver, engine, new, expected)


class BlindReceivers(BlindPeers):
    fails = "incoming"


def test_a_receiver_that_fails_ends_the_wait_for_it(pool, engine, new, expected):
    """It lets go of the group at once, and whoever waits for its bytes hears why they stay away."""
    sender, [receiver] = make_group(pool, new, peers=BlindReceivers, timeout_s=500.0)
    receiving = pool.submit(receiver.receive, engine.sink)
    sender.begin(4)
    with pytest.raises(WeightSyncError, match="the cable was pulled"):
        sender.send(new.params)
    with pytest.raises(OSError, match="the cable was pulled"):
        receiving.result()
    sender, [receiver] = make_group(pool, new)
    recovers(pool, sender, receiver, engine, new, expected)


class FullPeers(GlooPeers):
    """A receiver without room for what comes, once."""

    room = 0

    def move(self, rounds, watch):
        rounds = list(rounds)
        if any(round_.incoming for round_ in rounds) and not type(self).room:
            type(self).room = 1
            raise MemoryError("no room for a buffer")
        super().move(rounds, watch)


def test_an_engine_that_fails_in_mid_transfer_takes_the_next_update(
    engine, new, expected, monkeypatch
):
    """Its error is told, and the next update makes a new group: not a run that is stuck."""
    monkeypatch.setattr(FullPeers, "room", 0)
    for module in ("samebit.rollout.engine_weights", "samebit.weight_sync.transports.remote"):
        monkeypatch.setattr(f"{module}.make_data_plane", lambda name, device: FullPeers())
    transport = GlooTransport(source_of(new), engine, timeout_s=60)
    with pytest.raises(MemoryError, match="no room for a buffer"):
        send(transport, new.params, new.digest, 4)
    with pytest.raises(WeightSyncError, match="step 4 broke off: no room for a buffer"):
        engine.generate(PROMPTS, PARAMS)
    assert send(transport, new.params, new.digest, 5) == WeightVersion(5, new.digest)
    assert serves(engine, new, expected)
    transport.close()


@pytest.mark.parametrize("method", ["arrived", "commit"])
def test_any_error_of_the_receiver_breaks_the_update(
    pool, engine, new, expected, monkeypatch, method
):
    """An engine left in the update for ever would refuse the next one too."""

    def full(_):
        raise MemoryError("out of memory")

    sender, [receiver] = make_group(pool, new, timeout_s=2.0)
    with monkeypatch.context() as patch:
        patch.setattr(engine.sink, method, full)
        receiving = pool.submit(receiver.receive, engine.sink)
        with pytest.raises(WeightSyncError, match="the weight group lost a member"):
            send(sender, new.params, new.digest, 4)
        with pytest.raises(MemoryError):
            receiving.result()
    with pytest.raises(WeightSyncError, match="step 4 broke off: out of memory"):
        engine.generate(PROMPTS, PARAMS)
    sender, [receiver] = make_group(pool, new)
    recovers(pool, sender, receiver, engine, new, expected)


def test_a_silent_receiver_is_given_up_after_the_timeout(pool, new):
    """A receiver that never answers a commit is an error of the sync, not a foreign one."""
    sender, _ = make_group(pool, new, timeout_s=2.0)
    with pytest.raises(WeightSyncError):
        send(sender, new.params, new.digest, 4)


DYING_SENDERS = """
import os, signal, sys
from pathlib import Path
import torch
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_safetensors
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.meeting import loopback_listener
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.peers import GlooPeers
from samebit.weight_sync.transports.shards import Held, ShardSender
folder = Path(sys.argv[1])
specs = load_model_config(folder).param_specs()
params = {spec.name: torch.empty(spec.shape) for spec in specs}
load_safetensors(folder, specs, params)
digest = weights_digest(specs, params)

def update(listener, fatal):
    group = WeightGroup(*listener.getsockname(), 0, 2, timeout_s=60.0, listener=listener)
    sender = ShardSender(group, GlooPeers(), Held(specs, params), bucket_bytes=10_000)
    points = iter(range(1000))
    def counted(call):
        def counting(*args):
            if next(points) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)
        return counting
    for owner, name in ((group, "tell"), (group, "exchange"), (sender._member.data, "_send")):
        setattr(owner, name, counted(getattr(owner, name)))
    sender.begin(4)
    sender.send(params)
    sender.commit(digest)
    os._exit(next(points))

for line in sys.stdin:
    listener = loopback_listener()
    print(listener.getsockname()[1], flush=True)
    child = os.fork()
    if child == 0:
        update(listener, int(line))
    listener.close()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def dying_sender(new):
    """Updates from another process, which is killed at a given one of its steps."""
    command = [sys.executable, "-P", "-c", DYING_SENDERS, str(new.folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def begin(fatal):
            print(fatal, file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield begin, lambda: int(process.stdout.readline())
        process.stdin.close()


def test_a_sender_that_dies_at_any_point_breaks_the_update(
    pool, engine, old, new, expected, dying_sender
):
    """The trainer's process is killed in mid-update: the engine notices, refuses and recovers.

    Before it begins the old version is served, and once the engine has checked the whole new one
    that is.
    """
    begin, exit_code = dying_sender
    receiver = make_receiver(new, "127.0.0.1", begin(-1), timeout_s=60.0)
    receiver.receive(engine.sink)
    num_points = exit_code()
    assert num_points >= 16
    first, last = 0, num_points - 1  # the begin is not told; the answer to the commit not heard
    for point in (*range(5), *range(7, num_points - 4, 4), *range(num_points - 4, num_points)):
        engine.copy_weights(old.params, step=3, digest=old.digest)
        receiver = make_receiver(new, "127.0.0.1", begin(point), timeout_s=60.0)
        with pytest.raises(WeightSyncError, match="the weight group lost a member"):
            receiver.receive(engine.sink)
        assert exit_code() == -signal.SIGKILL
        if point in (first, last):
            served = old if point == first else new
            assert serves(engine, served, expected)
            continue
        refusal = "step 4 broke off: the weight group lost a member"
        with pytest.raises(WeightSyncError, match=refusal):
            engine.generate(PROMPTS, PARAMS)
    sender, [receiver] = make_group(pool, new)  # the restarted trainer makes a new group
    recovers(pool, sender, receiver, engine, new, expected)


def test_another_update_is_not_broken_by_a_sender_that_leaves(pool, engine, new, expected):
    """A receiver waits for its trainer, and breaks only what it has begun itself."""
    sender, [receiver] = make_group(pool, new)
    receiving = pool.submit(receiver.receive, engine.sink)
    engine.sink.begin(4)
    sender.close()
    with pytest.raises(WeightSyncError, match="the weight group lost a member"):
        receiving.result()
    for metas in cut_buckets(new.params, 1 << 20):
        engine.sink.receive(pack(metas, new.params))
    engine.sink.commit(new.digest)
    assert serves(engine, new, expected)


def test_a_frozen_engine_is_given_up_after_the_timeout(old, new):
    """In whatever it is asked, and as it is let go of."""
    engine = RemoteEngine(old.folder, device="cpu", kv_cache_tokens=1024)
    transport = GlooTransport(source_of(new), engine, timeout_s=2.0)
    transport.begin(1)
    transport._timeout_s = transport._last_words_s = 1.0  # now that they have met
    os.kill(engine._ranks.processes[0].pid, signal.SIGSTOP)
    with pytest.raises(WeightSyncError, match="the engine said nothing for 1 s"):
        transport.abort("no more")
    with pytest.raises(ValueError, match="rank 1 has not come within 1 s"):
        transport.begin(2)
    transport.close()
    os.kill(engine._ranks.processes[0].pid, signal.SIGCONT)
    kill(engine)
    engine.close()


def kill(engine):
    os.kill(engine._ranks.processes[0].pid, signal.SIGKILL)
    engine._ranks.processes[0].join()


def test_an_engine_process_that_dies_is_reported(old, new):
    """A killed engine must not look like a hang, at rest and in mid-update."""
    engine = RemoteEngine(old.folder, device="cpu", kv_cache_tokens=1024)
    transport = GlooTransport(source_of(new), engine, timeout_s=60)
    transport.begin(1)
    transport.send(new.params)
    kill(engine)
    message = f"the engine's process {engine._ranks.processes[0].pid} ended with code -9"
    with pytest.raises(RemoteEngineError, match=message):
        transport.commit(new.digest)
    with pytest.raises(RemoteEngineError, match=message):
        engine.generate(PROMPTS, PARAMS)
    with pytest.raises(RemoteEngineError, match=message):
        send(transport, new.params, new.digest, 2)
    with pytest.raises(RemoteEngineError, match=message):
        _ = engine.weight_version
    engine.close()


DYING_RECEIVER = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from samebit.rollout.models.registry import load_model_config
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.peers import GlooPeers
from samebit.weight_sync.transports.shards import Held, ShardReceiver
specs = load_model_config(Path(sys.argv[2])).param_specs()
params = {spec.name: torch.empty(spec.shape) for spec in specs}
sink = SimpleNamespace(
    begin=lambda step: None,
    expect=lambda metas: [meta.region_of(params[meta.name]) for meta in metas],
    arrived=lambda metas: None,
    commit=lambda digest: os._exit(7),
)
group = WeightGroup("127.0.0.1", int(sys.argv[1]), 1, 2, timeout_s=60.0)
ShardReceiver(group, GlooPeers(), Held(specs, params)).receive(sink)
"""


def test_a_receiver_that_dies_while_it_checks_is_noticed_at_once(new):
    """The sender waits for the answer to its commit: a death must end the wait."""
    listener = loopback_listener()
    address, port = listener.getsockname()
    command = [sys.executable, "-P", "-c", DYING_RECEIVER, str(port), str(new.folder)]
    with subprocess.Popen(command) as child:
        sender = make_sender(new, address, port, timeout_s=60.0, listener=listener)
        with pytest.raises(WeightSyncError, match="the weight group lost a member"):
            send(sender, new.params, new.digest, 4)
        assert child.wait() == 7
