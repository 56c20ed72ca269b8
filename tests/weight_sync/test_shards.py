"""Updates shard to shard: what arrives, and how a refusal reaches every rank."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from serving import PARAMS, PROMPTS, local_engine, serves
from shard_ends import make_group, make_receiver, make_sender, recovers, send, source_of

from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_safetensors
from samebit.weight_sync.meeting import loopback_listener
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.peers import GlooPeers
from samebit.weight_sync.transports.remote import NcclTransport
from samebit.weight_sync.transports.shards import Held, ShardSender
from samebit.weight_sync.types import WeightSyncError, WeightVersion


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
    assert serves(engine, new, expected)
    assert all(u.result() == [WeightVersion(n, new.digest) for n in (4, 5)] for u in updates)


def test_ranks_that_train_and_serve_change_the_layout_among_themselves(pool, old, new, expected):
    """Two trainer ranks hold halves, and each has an engine of the whole: what a rank has for
    itself it copies, the other half comes; a refusal of one engine is known to both ranks."""
    config = load_model_config(new.folder)
    listener = loopback_listener()
    address, port = listener.getsockname()
    engines = [local_engine(old.folder) for _ in range(2)]

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
    assert serves(engines[0], old, expected)
    engines[1].abort_request(request_id)
    assert together(update) == [WeightVersion(4, new.digest)] * 2
    for engine in engines:
        assert engine.weight_version == WeightVersion(4, new.digest)
        assert serves(engine, new, expected)


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
    engines = [local_engine(old.folder) for _ in range(2)]
    request_id = engines[1].add_request(PROMPTS[0], PARAMS)
    sender, receivers = make_group(pool, new, num_receivers=2)

    def receive():
        pairs = zip(receivers, engines, strict=True)
        return [pool.submit(receiver.receive, engine.sink) for receiver, engine in pairs]

    receiving = receive()
    with pytest.raises(WeightSyncError, match="^rank 2: .*unfinished"):
        send(sender, new.params, new.digest, 4)
    receiving[0].result()
    assert serves(engines[0], old, expected)
    assert isinstance(receiving[1].exception(), WeightSyncError)
    engines[1].abort_request(request_id)
    receiving = receive()
    send(sender, new.params, new.digest, 5)
    for future, engine in zip(receiving, engines, strict=True):
        future.result()
        assert serves(engine, new, expected)


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


def test_a_reply_to_a_failed_call_is_not_taken_for_another(remote, new):
    """The engine's process refuses too; the next call must get its own answer."""
    version = remote.weight_version
    with pytest.raises(ValueError, match="backend 'nccl' needs weights on a GPU, not on 'cpu'"):
        NcclTransport(source_of(new), remote)
    assert remote.weight_version == version
    assert len(remote.generate(PROMPTS, PARAMS)) == len(PROMPTS)


def test_an_unknown_backend_is_refused(engine):
    """A misspelled backend names the ones there are."""
    with pytest.raises(ValueError, match=r"backend 'glo' is unknown; use one of \['gloo', 'ipc'"):
        engine.join_weight_transport("127.0.0.1", 1, 1, 2, "glo")


def test_ranks_that_planned_otherwise_move_nothing(pool, engine, old, new, expected):
    """Bytes of one plan in the places of another are weights of no version."""
    sender, [receiver] = make_group(pool, new)
    planned, member = receiver._member.plan, receiver._member
    member.plan = replace(planned, digest="0" * 16)
    receiving = pool.submit(receiver.receive, engine.sink)
    refusal = f"the plan is {'0' * 16} here and {planned.digest} at rank 0"
    with pytest.raises(WeightSyncError, match=f"rank 1: {refusal}"):
        sender.begin(4)
    with pytest.raises(WeightSyncError, match=refusal):
        receiving.result()
    assert serves(engine, old, expected)
    member.plan = planned
    recovers(pool, sender, receiver, engine, new, expected)


def test_ranks_that_would_move_bytes_by_different_ways_do_not_meet(pool, new):
    """They would wait for each other's bytes until the timeout."""

    class OtherPeers(GlooPeers):
        name = "pigeons"

    listener = loopback_listener()
    place = listener.getsockname()
    joining = pool.submit(make_receiver, new, *place, peers=OtherPeers, timeout_s=60.0)
    message = r"move bytes by different ways: \['gloo', 'pigeons'\]"
    with pytest.raises(WeightSyncError, match=message):
        make_sender(new, *place, timeout_s=60.0, listener=listener)
    with pytest.raises(WeightSyncError, match=message):
        joining.result()


def test_a_group_that_nobody_makes_is_given_up(engine):
    """A trainer that never started, or another port: bounded, and in words that name the place."""
    with loopback_listener() as listener:
        address, port = listener.getsockname()
    with pytest.raises(WeightSyncError, match=f"no weight group at {address}:{port}: "):
        engine.join_weight_transport(address, port, 1, 2, timeout_s=1.0)
