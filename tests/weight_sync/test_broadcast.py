"""The broadcast transport: refusals, deaths and silence reach the other end as clear errors."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import outcomes

from samebit.rollout.engine import Engine
from samebit.rollout.remote import RemoteEngine, RemoteEngineError
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.meeting import loopback_listener
from samebit.weight_sync.transports.broadcast import BroadcastTransport, GlooGroup
from samebit.weight_sync.transports.planes import UpdateReceiver, UpdateSender
from samebit.weight_sync.types import WeightSyncError, WeightVersion

PROMPTS = [[5, 9, 200, 31], [7]]
PARAMS = SamplingParams(n=2, max_new_tokens=8, ignore_eos=True)
CPU = torch.device("cpu")


def make_sender(address, port, size=2, bucket_bytes=512 << 20, **settings):
    group = GlooGroup(address, port, 0, size, **settings)
    return UpdateSender(group, group, bucket_bytes)


def make_receiver(address, port, rank=1, size=2, **settings):
    group = GlooGroup(address, port, rank, size, **settings)
    return UpdateReceiver(group, group)


def make_group(pool, num_receivers=1, bucket_bytes=512 << 20, timeout_s=60.0):
    """A sender and its receivers, all in this process."""
    listener, size = loopback_listener(), num_receivers + 1
    address, port = listener.getsockname()
    receivers = [
        pool.submit(make_receiver, address, port, rank, size, timeout_s=timeout_s)
        for rank in range(1, size)
    ]
    sender = make_sender(
        *(address, port, size), bucket_bytes=bucket_bytes, timeout_s=timeout_s, listener=listener
    )
    return sender, [r.result() for r in receivers]


@pytest.fixture
def engine(old):
    return Engine(old.folder, device="cpu", kv_cache_tokens=1024)


@pytest.fixture(scope="module")
def expected(old, new):
    """Outcomes of both versions."""
    return {
        v.digest: outcomes(
            Engine(v.folder, device="cpu", kv_cache_tokens=1024).generate(PROMPTS, PARAMS)
        )
        for v in (old, new)
    }


def send(sender, params, digest, step):
    sender.begin(step)
    sender.send(params)
    return sender.commit(digest)


def recovers(pool, sender, receiver, engine, version, expected):
    """A full update over the same group makes the engine serve again."""
    receiving = pool.submit(receiver.receive, engine.sink, CPU)
    send(sender, version.params, version.digest, 9)
    receiving.result()
    assert engine.weight_version == WeightVersion(9, version.digest)
    assert outcomes(engine.generate(PROMPTS, PARAMS)) == expected[version.digest]


@pytest.mark.parametrize("bucket_bytes", [1, 5000, 1 << 30])
def test_the_size_of_buckets_does_not_matter(pool, engine, new, expected, bucket_bytes):
    """One tensor a bucket, a few, or all in one: the same weights arrive."""
    sender, [receiver] = make_group(pool, bucket_bytes=bucket_bytes)
    recovers(pool, sender, receiver, engine, new, expected)


def faults(new):
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    return {
        "missing": (new.without(name), new.digest, f"1 tensors never arrived: {name}"),
        "unknown": ({**new.params, "x": torch.zeros(2)}, new.digest, "unknown tensor x"),
        "unknown first": ({"x": torch.zeros(2), **new.params}, new.digest, "unknown tensor x"),
        "misshapen": ({**new.params, name: torch.zeros(3)}, new.digest, rf"{name} is \(208, 48\)"),
        "NaN": (new.changed(name, torch.nan), new.digest, f"NaN or Inf in 1 tensors: {name}"),
        "digest": (new.params, "0" * 16, f"digest {new.digest} here, 0000000000000000 at"),
    }


@pytest.mark.parametrize(
    "fault", ["missing", "unknown", "unknown first", "misshapen", "NaN", "digest"]
)
def test_a_refusal_reaches_the_sender_and_the_group_goes_on(pool, engine, new, expected, fault):
    """The sender must stop with the receiver's reason, and its next full update must heal it."""
    params, digest, reason = faults(new)[fault]
    sender, [receiver] = make_group(pool, bucket_bytes=4096)
    receiving = pool.submit(receiver.receive, engine.sink, CPU)
    with pytest.raises(WeightSyncError, match=f"rank 1: .*{reason}"):
        send(sender, params, digest, 4)
    with pytest.raises(WeightSyncError, match=reason):
        receiving.result()
    with pytest.raises(WeightSyncError, match=f"step 4 broke off: .*{reason}"):
        engine.generate(PROMPTS, PARAMS)
    recovers(pool, sender, receiver, engine, new, expected)


def test_an_engine_that_cannot_begin_refuses_through_the_protocol(pool, engine, new, expected):
    """A busy engine must not leave the sender alone in a broadcast until the timeout."""
    request_id = engine.add_request(PROMPTS[0], PARAMS)
    sender, [receiver] = make_group(pool)
    receiving = pool.submit(receiver.receive, engine.sink, CPU)
    with pytest.raises(WeightSyncError, match="rank 1: .*1 requests are unfinished"):
        send(sender, new.params, new.digest, 4)
    with pytest.raises(WeightSyncError, match="1 requests are unfinished"):
        receiving.result()
    engine.abort_request(request_id)
    recovers(pool, sender, receiver, engine, new, expected)


def test_one_of_two_receivers_refuses(pool, old, new, expected):
    """A commit means that all receivers serve the version; the one that does not is named."""
    engines = [Engine(old.folder, device="cpu", kv_cache_tokens=1024) for _ in range(2)]
    request_id = engines[1].add_request(PROMPTS[0], PARAMS)
    sender, receivers = make_group(pool, num_receivers=2)

    def receive():
        pairs = zip(receivers, engines, strict=True)
        return [pool.submit(receiver.receive, engine.sink, CPU) for receiver, engine in pairs]

    receiving = receive()
    with pytest.raises(WeightSyncError, match="^rank 2: .*unfinished"):
        send(sender, new.params, new.digest, 4)
    receiving[0].result()
    assert outcomes(engines[0].generate(PROMPTS, PARAMS)) == expected[new.digest]
    assert isinstance(receiving[1].exception(), WeightSyncError)
    engines[1].abort_request(request_id)
    receiving = receive()
    send(sender, new.params, new.digest, 5)
    for future, engine in zip(receiving, engines, strict=True):
        future.result()
        assert outcomes(engine.generate(PROMPTS, PARAMS)) == expected[new.digest]


def test_an_abort_reaches_the_receiver_with_its_reason(pool, engine, new, expected):
    """A trainer that fails in mid-update says so; the engine must not serve a mixture."""
    sender, [receiver] = make_group(pool)
    receiving = pool.submit(receiver.receive, engine.sink, CPU)
    sender.begin(4)
    sender.send(dict(list(new.params.items())[:3]))
    sender.abort("out of disk")
    receiving.result()
    with pytest.raises(WeightSyncError, match="step 4 broke off: out of disk"):
        engine.generate(PROMPTS, PARAMS)
    recovers(pool, sender, receiver, engine, new, expected)


def test_a_silent_sender_is_given_up_after_the_timeout(pool, engine, new, expected):
    """A sender that hangs in mid-update must not hang the engine for ever."""
    sender, [receiver] = make_group(pool, timeout_s=5.0)
    receiving = pool.submit(receiver.receive, engine.sink, CPU)
    sender.begin(4)
    with pytest.raises(WeightSyncError, match="the weight group lost a member"):
        receiving.result()
    with pytest.raises(WeightSyncError, match="step 4 broke off: the weight group lost a member"):
        engine.generate(PROMPTS, PARAMS)
    engine.copy_weights(new.params, step=5, digest=new.digest)
    assert outcomes(engine.generate(PROMPTS, PARAMS)) == expected[new.digest]


@pytest.mark.parametrize("method", ["receive", "commit"])
def test_any_error_of_the_receiver_breaks_the_update(
    pool, engine, new, expected, monkeypatch, method
):
    """An engine left in the update for ever would refuse the next one too."""

    def full(_):
        raise MemoryError("out of memory")

    sender, [receiver] = make_group(pool, timeout_s=5.0)
    with monkeypatch.context() as patch:
        patch.setattr(engine.sink, method, full)
        receiving = pool.submit(receiver.receive, engine.sink, CPU)
        with pytest.raises(WeightSyncError, match="the weight group lost a member"):
            send(sender, new.params, new.digest, 4)
        with pytest.raises(MemoryError):
            receiving.result()
    with pytest.raises(WeightSyncError, match="step 4 broke off: out of memory"):
        engine.generate(PROMPTS, PARAMS)
    sender, [receiver] = make_group(pool)
    recovers(pool, sender, receiver, engine, new, expected)


def test_a_silent_receiver_is_given_up_after_the_timeout(pool, new):
    """A receiver that never answers a commit is an error of the sync, not a foreign one."""
    sender, _ = make_group(pool, timeout_s=5.0)
    with pytest.raises(WeightSyncError):
        send(sender, new.params, new.digest, 4)


def test_a_group_of_an_unknown_backend_is_refused():
    """A misspelled backend names the ones there are."""
    with pytest.raises(ValueError, match=r"backend 'glo' is unknown; use one of \['gloo'\]"):
        make_sender("127.0.0.1", 0, backend="glo")


def test_a_group_beyond_this_machine_needs_a_secret(pool, monkeypatch):
    """Told before anything listens or calls; and a receiver with another secret gets no weights."""
    monkeypatch.delenv("SAMEBIT_SECRET", raising=False)
    for end in (make_sender, make_receiver):
        with pytest.raises(ValueError, match="meets at 192.0.2.1, and SAMEBIT_SECRET is not set"):
            end("192.0.2.1", 1, timeout_s=30.0)
    listener = loopback_listener()
    place, other_secret = listener.getsockname(), "another secret of the two"
    other = pool.submit(make_receiver, *place, timeout_s=30.0, secret=other_secret)
    with pytest.raises(ValueError, match="rank 1 has another SAMEBIT_SECRET than rank 0; set"):
        make_sender(*place, secret="one secret of the two", listener=listener)
    assert "rank 0 has another SAMEBIT_SECRET than rank 1" in str(other.exception())


def test_an_update_without_a_group_is_refused(engine):
    """Calls out of order say what is missing."""
    with pytest.raises(WeightSyncError, match="call join_weight_transport first"):
        engine.receive_weight_update()


DYING_SENDER = """
import os, signal, sys
import torch
from samebit.weight_sync.meeting import loopback_listener
from samebit.weight_sync.transports.broadcast import GlooGroup
from samebit.weight_sync.transports.planes import UpdateSender
listener = loopback_listener()
address, port = listener.getsockname()
print(port, flush=True)
group = GlooGroup(address, port, 0, 2, timeout_s=60.0, listener=listener)
sender = UpdateSender(group, group)
sender.begin(4)
if sys.argv[1] == "in a bucket":
    meta = "decoder.final_layernorm.weight", (48,), "torch.float32", 0, None
    sender._control.tell({"op": "bucket", "metas": [meta]})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["between messages", "in a bucket"])
def test_a_sender_that_dies_breaks_the_update(pool, engine, new, expected, moment):
    """The trainer's process is killed in mid-update: the engine must notice, refuse and recover."""
    command = [sys.executable, "-P", "-c", DYING_SENDER, moment]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        port = int(child.stdout.readline())
        receiver = make_receiver("127.0.0.1", port, timeout_s=60.0)
        with pytest.raises(WeightSyncError, match="the weight group lost a member"):
            receiver.receive(engine.sink, CPU)
        assert child.wait() == -signal.SIGKILL
    with pytest.raises(WeightSyncError, match="step 4 broke off: the weight group lost a member"):
        engine.generate(PROMPTS, PARAMS)
    sender, [receiver] = make_group(pool)  # the restarted trainer makes a new group
    recovers(pool, sender, receiver, engine, new, expected)


def kill(engine):
    os.kill(engine._process.pid, signal.SIGKILL)
    engine._process.join()


def test_an_engine_process_that_dies_is_reported(old, new):
    """A killed engine must not look like a hang, at rest and in mid-update."""
    engine = RemoteEngine(old.folder, device="cpu", kv_cache_tokens=1024)
    transport = BroadcastTransport(engine, timeout_s=60)
    transport.begin(1)
    transport.send(new.params)
    kill(engine)
    message = f"the engine's process {engine._process.pid} ended with code -9"
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
import torch
from samebit.weight_sync.buckets import empty_bucket
from samebit.weight_sync.transports.broadcast import GlooGroup
from samebit.weight_sync.transports.planes import UpdateReceiver
class Sink:
    def begin(self, step): pass
    def bucket_for(self, metas): return empty_bucket(metas, torch.device("cpu"))
    def receive(self, bucket): pass
    def commit(self, digest): os._exit(0)
group = GlooGroup("127.0.0.1", int(sys.argv[1]), 1, 2, timeout_s=60.0)
UpdateReceiver(group, group).receive(Sink(), torch.device("cpu"))
"""


def test_a_receiver_that_dies_while_it_checks_is_noticed_at_once(new):
    """The sender waits for the answer to its commit: a death must end the wait."""
    listener = loopback_listener()
    address, port = listener.getsockname()
    command = [sys.executable, "-P", "-c", DYING_RECEIVER, str(port)]
    with subprocess.Popen(command) as child:
        sender = make_sender(address, port, timeout_s=60.0, listener=listener)
        with pytest.raises(WeightSyncError, match="the weight group lost a member"):
            send(sender, new.params, new.digest, 4)
        assert child.wait() == 0


def test_a_reply_to_a_failed_call_is_not_taken_for_another(remote):
    """The engine's process refuses too; the next call must get its own answer."""
    version = remote.weight_version
    with pytest.raises(ValueError, match="backend 'nccl' is unknown"):
        BroadcastTransport(remote, "nccl")
    assert remote.weight_version == version
    assert len(remote.generate(PROMPTS, PARAMS)) == 2
