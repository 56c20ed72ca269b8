"""Updates to other processes: refusals, deaths and silence reach the other end as clear errors."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import outcomes

from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.remote import RemoteEngine, RemoteEngineError
from samebit.rollout.runtime.weights import load_safetensors
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.meeting import loopback_listener
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.peers import GlooPeers
from samebit.weight_sync.transports.remote import GlooTransport, NcclTransport
from samebit.weight_sync.transports.shards import Held, ShardReceiver, ShardSender
from samebit.weight_sync.types import WeightSyncError, WeightVersion

PROMPTS = [[5, 9, 200, 31], [7]]
PARAMS = SamplingParams(n=2, max_new_tokens=8, ignore_eos=True)


def make_sender(version, address, port, size=2, bucket_bytes=512 << 20, **settings):
    group = WeightGroup(address, port, 0, size, **settings)
    return ShardSender(group, GlooPeers(), Held(version.specs, version.params), bucket_bytes)


def make_receiver(version, address, port, rank=1, size=2, **settings):
    group = WeightGroup(address, port, rank, size, **settings)
    return ShardReceiver(group, GlooPeers(), Held(version.specs, version.params))


def make_group(pool, version, num_receivers=1, bucket_bytes=512 << 20, timeout_s=60.0):
    """A sender and its receivers, all in this process."""
    listener, size = loopback_listener(), num_receivers + 1
    address, port = listener.getsockname()
    receivers = [
        pool.submit(make_receiver, version, address, port, rank, size, timeout_s=timeout_s)
        for rank in range(1, size)
    ]
    sender = make_sender(
        *(version, address, port, size),
        bucket_bytes=bucket_bytes,
        timeout_s=timeout_s,
        listener=listener,
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


def source_of(version):
    """A trainer's end, as transports see it."""
    return SimpleNamespace(step=0, params=version.params, specs=version.specs)


def send(sender, params, digest, step):
    sender.begin(step)
    sender.send(params)
    return sender.commit(digest)


def recovers(pool, sender, receiver, engine, version, expected):
    """A full update over the same group makes the engine serve again."""
    receiving = pool.submit(receiver.receive, engine.sink)
    send(sender, version.params, version.digest, 9)
    receiving.result()
    assert engine.weight_version == WeightVersion(9, version.digest)
    assert outcomes(engine.generate(PROMPTS, PARAMS)) == expected[version.digest]


@pytest.mark.parametrize("bucket_bytes", [64, 5000, 1 << 30])
def test_the_size_of_buckets_does_not_matter(pool, engine, new, expected, bucket_bytes):
    """One tensor a bucket, a few, or all in one: the same weights arrive."""
    sender, [receiver] = make_group(pool, new, bucket_bytes=bucket_bytes)
    recovers(pool, sender, receiver, engine, new, expected)


def test_two_trainer_ranks_fill_one_engine(pool, engine, new, expected):
    """Each sends its shards; the engine's digest is that of the whole."""
    config = load_model_config(new.folder)
    sides = []
    for rank in range(2):
        specs = config.param_specs((rank, 2))
        params = {spec.name: torch.empty(spec.shape) for spec in specs}
        load_safetensors(new.folder, specs, params, new.specs)
        sides.append(SimpleNamespace(specs=specs, params=params))
    listener = loopback_listener()
    address, port = listener.getsockname()

    def update(rank):
        settings = {"listener": listener} if rank == 0 else {}
        group = WeightGroup(address, port, rank, 3, timeout_s=60.0, **settings)
        side = sides[rank]
        sender = ShardSender(group, GlooPeers(), Held(side.specs, side.params), bucket_bytes=9000)
        return [send(sender, side.params, new.digest, step) for step in (4, 5)]

    updates = [pool.submit(update, rank) for rank in range(2)]
    receiver = make_receiver(new, address, port, 2, 3, timeout_s=60.0)
    for step in (4, 5):
        receiver.receive(engine.sink)
        assert engine.weight_version == WeightVersion(step, new.digest)
    assert outcomes(engine.generate(PROMPTS, PARAMS)) == expected[new.digest]
    assert all(u.result() == [WeightVersion(n, new.digest) for n in (4, 5)] for u in updates)


def test_ranks_that_train_and_serve_change_the_layout_among_themselves(pool, old, new, expected):
    """Two trainer ranks hold halves, and each has an engine of the whole: what a rank has for
    itself it copies, the other half comes; a refusal of one engine is known to both ranks."""
    config = load_model_config(new.folder)
    listener = loopback_listener()
    address, port = listener.getsockname()
    engines = [Engine(old.folder, device="cpu", kv_cache_tokens=1024) for _ in range(2)]

    def make(rank):
        specs = config.param_specs((rank, 2))
        params = {spec.name: torch.empty(spec.shape) for spec in specs}
        load_safetensors(new.folder, specs, params, new.specs)
        settings = {"listener": listener} if rank == 0 else {}
        group = WeightGroup(address, port, rank, 2, timeout_s=60.0, **settings)
        engine = engines[rank]
        both = engine.sink, Held(engine.specs, engine.weights)
        sender = ShardSender(group, GlooPeers(), Held(specs, params), 9000, engine=both)
        return sender, params

    def together(work):
        return [future.result() for future in [pool.submit(work, *pair) for pair in pairs]]

    def update(sender, params, step=4):
        return send(sender, params, new.digest, step)

    pairs = [future.result() for future in [pool.submit(make, rank) for rank in range(2)]]
    request_id = engines[1].add_request(PROMPTS[0], PARAMS)
    refused = [pool.submit(update, *pair) for pair in pairs]
    for future in refused:
        with pytest.raises(WeightSyncError, match="^rank 1: .* 1 requests are unfinished"):
            future.result()
    assert outcomes(engines[0].generate(PROMPTS, PARAMS)) == expected[old.digest]
    engines[1].abort_request(request_id)
    assert together(update) == [WeightVersion(4, new.digest)] * 2
    for engine in engines:
        assert engine.weight_version == WeightVersion(4, new.digest)
        assert outcomes(engine.generate(PROMPTS, PARAMS)) == expected[new.digest]


def faults(new):
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    return {
        "missing": (new.without(name), new.digest, f"rank 0: {name} is missing", True),
        "unknown": ({**new.params, "x": torch.zeros(2)}, new.digest, "unknown tensor x", True),
        "misshapen": (
            *({**new.params, name: torch.zeros(3)}, new.digest),
            *(rf"\(208, 48\) is wanted, not \(3,\), of {name}", True),
        ),
        "dtype": (
            *({**new.params, name: new.params[name].bfloat16()}, new.digest),
            *(f"{name} is torch.bfloat16; it must be torch.float32", True),
        ),
        "NaN": (
            *(new.changed(name, torch.nan), new.digest),
            *(f"rank 1: .*NaN or Inf in 1 tensors: {name}", False),
        ),
        "digest": (
            *(new.params, "0" * 16),
            *(f"rank 1: .*digest {new.digest} here, 0000000000000000 at", False),
        ),
    }


@pytest.mark.parametrize("fault", ["missing", "unknown", "misshapen", "dtype", "NaN", "digest"])
def test_a_refusal_reaches_the_other_end_and_the_group_goes_on(pool, engine, new, expected, fault):
    """Whoever refuses, both ends stop with the reason; the next full update heals the engine."""
    params, digest, reason, here = faults(new)[fault]
    sender, [receiver] = make_group(pool, new, bucket_bytes=4096)
    receiving = pool.submit(receiver.receive, engine.sink)
    with pytest.raises(WeightSyncError, match=reason.removeprefix("rank 0: ")):
        send(sender, params, digest, 4)
    if here:  # the engine has ended its update with the sender's reason
        receiving.result()
    else:
        with pytest.raises(WeightSyncError, match=reason.removeprefix("rank 1: ")):
            receiving.result()
    with pytest.raises(
        WeightSyncError, match=f"step 4 broke off: .*{reason.removeprefix('rank 1: ')}"
    ):
        engine.generate(PROMPTS, PARAMS)
    recovers(pool, sender, receiver, engine, new, expected)


def test_an_engine_that_cannot_begin_refuses_through_the_protocol(pool, engine, new, expected):
    """A busy engine must not leave the sender alone until the timeout."""
    request_id = engine.add_request(PROMPTS[0], PARAMS)
    sender, [receiver] = make_group(pool, new)
    receiving = pool.submit(receiver.receive, engine.sink)
    with pytest.raises(WeightSyncError, match="rank 1: .*1 requests are unfinished"):
        send(sender, new.params, new.digest, 4)
    with pytest.raises(WeightSyncError, match="1 requests are unfinished"):
        receiving.result()
    engine.abort_request(request_id)
    recovers(pool, sender, receiver, engine, new, expected)


def test_one_of_two_receivers_refuses(pool, old, new, expected):
    """All receivers get the version or none: the one that refuses is named, the others serve on."""
    engines = [Engine(old.folder, device="cpu", kv_cache_tokens=1024) for _ in range(2)]
    request_id = engines[1].add_request(PROMPTS[0], PARAMS)
    sender, receivers = make_group(pool, new, num_receivers=2)

    def receive():
        pairs = zip(receivers, engines, strict=True)
        return [pool.submit(receiver.receive, engine.sink) for receiver, engine in pairs]

    receiving = receive()
    with pytest.raises(WeightSyncError, match="^rank 2: .*unfinished"):
        send(sender, new.params, new.digest, 4)
    receiving[0].result()
    assert outcomes(engines[0].generate(PROMPTS, PARAMS)) == expected[old.digest]
    assert isinstance(receiving[1].exception(), WeightSyncError)
    engines[1].abort_request(request_id)
    receiving = receive()
    send(sender, new.params, new.digest, 5)
    for future, engine in zip(receiving, engines, strict=True):
        future.result()
        assert outcomes(engine.generate(PROMPTS, PARAMS)) == expected[new.digest]


def test_an_abort_reaches_the_receiver_with_its_reason(pool, engine, new, expected):
    """A trainer that fails in mid-update says so; the engine must not serve a mixture."""
    sender, [receiver] = make_group(pool, new)
    receiving = pool.submit(receiver.receive, engine.sink)
    sender.begin(4)
    sender.send(new.params)
    sender.abort("out of disk")
    receiving.result()
    with pytest.raises(WeightSyncError, match="step 4 broke off: out of disk"):
        engine.generate(PROMPTS, PARAMS)
    recovers(pool, sender, receiver, engine, new, expected)


def test_a_silent_sender_is_given_up_after_the_timeout(pool, engine, new, expected):
    """A sender that hangs in mid-update must not hang the engine for ever."""
    sender, [receiver] = make_group(pool, new, timeout_s=5.0)
    receiving = pool.submit(receiver.receive, engine.sink)
    sender.begin(4)
    with pytest.raises(WeightSyncError, match="the weight group lost a member"):
        receiving.result()
    with pytest.raises(WeightSyncError, match="step 4 broke off: the weight group lost a member"):
        engine.generate(PROMPTS, PARAMS)
    engine.copy_weights(new.params, step=5, digest=new.digest)
    assert outcomes(engine.generate(PROMPTS, PARAMS)) == expected[new.digest]


@pytest.mark.parametrize("method", ["arrived", "commit"])
def test_any_error_of_the_receiver_breaks_the_update(
    pool, engine, new, expected, monkeypatch, method
):
    """An engine left in the update for ever would refuse the next one too."""

    def full(_):
        raise MemoryError("out of memory")

    sender, [receiver] = make_group(pool, new, timeout_s=5.0)
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
    sender, _ = make_group(pool, new, timeout_s=5.0)
    with pytest.raises(WeightSyncError):
        send(sender, new.params, new.digest, 4)


def test_a_group_beyond_this_machine_needs_a_secret(pool, new, monkeypatch):
    """Told before anything listens or calls; and a receiver with another secret gets no weights."""
    monkeypatch.delenv("SAMEBIT_SECRET", raising=False)
    for end in (make_sender, make_receiver):
        with pytest.raises(ValueError, match="meets at 192.0.2.1, and SAMEBIT_SECRET is not set"):
            end(new, "192.0.2.1", 1, timeout_s=30.0)
    listener = loopback_listener()
    place, other_secret = listener.getsockname(), "another secret of the two"
    other = pool.submit(make_receiver, new, *place, timeout_s=30.0, secret=other_secret)
    with pytest.raises(ValueError, match="rank 1 has another SAMEBIT_SECRET than rank 0; set"):
        make_sender(new, *place, secret="one secret of the two", listener=listener)
    assert "rank 0 has another SAMEBIT_SECRET than rank 1" in str(other.exception())


def test_an_update_without_a_group_is_refused(engine):
    """Calls out of order say what is missing."""
    with pytest.raises(WeightSyncError, match="call join_weight_transport first"):
        engine.receive_weight_update()


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
            assert outcomes(engine.generate(PROMPTS, PARAMS)) == expected[served.digest]
            continue
        refusal = "step 4 broke off: the weight group lost a member"
        with pytest.raises(WeightSyncError, match=refusal):
            engine.generate(PROMPTS, PARAMS)
    sender, [receiver] = make_group(pool, new)  # the restarted trainer makes a new group
    recovers(pool, sender, receiver, engine, new, expected)


def kill(engine):
    os.kill(engine._process.pid, signal.SIGKILL)
    engine._process.join()


def test_an_engine_process_that_dies_is_reported(old, new):
    """A killed engine must not look like a hang, at rest and in mid-update."""
    engine = RemoteEngine(old.folder, device="cpu", kv_cache_tokens=1024)
    transport = GlooTransport(source_of(new), engine, timeout_s=60)
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


def test_a_reply_to_a_failed_call_is_not_taken_for_another(remote, new):
    """The engine's process refuses too; the next call must get its own answer."""
    version = remote.weight_version
    with pytest.raises(ValueError, match="backend 'nccl' needs weights on a GPU, not on 'cpu'"):
        NcclTransport(source_of(new), remote)
    assert remote.weight_version == version
    assert len(remote.generate(PROMPTS, PARAMS)) == 2


def test_an_unknown_backend_is_refused(engine):
    """A misspelled backend names the ones there are."""
    with pytest.raises(ValueError, match=r"backend 'glo' is unknown; use one of \['gloo', 'ipc'"):
        engine.join_weight_transport("127.0.0.1", 1, 1, 2, "glo")
