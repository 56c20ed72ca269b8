"""Both ends of a weight group in this process, over gloo."""

from types import SimpleNamespace

from serving import serves

from samebit.weight_sync.meeting import loopback_listener
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.peers import GlooPeers
from samebit.weight_sync.transports.shards import Held, ShardReceiver, ShardSender
from samebit.weight_sync.types import WeightVersion

BUCKET_BYTES = 512 << 20


def make_sender(
    version, address, port, size=2, bucket_bytes=BUCKET_BYTES, peers=GlooPeers, **settings
):
    group = WeightGroup(address, port, 0, size, **settings)
    return ShardSender(group, peers(), Held(version.specs, version.params), bucket_bytes)


def make_receiver(version, address, port, rank=1, size=2, peers=GlooPeers, **settings):
    group = WeightGroup(address, port, rank, size, **settings)
    return ShardReceiver(group, peers(), Held(version.specs, version.params))


def make_group(pool, version, num_receivers=1, bucket_bytes=BUCKET_BYTES, **settings):
    """A sender and its receivers, all in this process."""
    listener, size = loopback_listener(), num_receivers + 1
    place, settings = listener.getsockname(), {"timeout_s": 60.0, **settings}
    receivers = [
        pool.submit(make_receiver, version, *place, rank, size, **settings)
        for rank in range(1, size)
    ]
    sender = make_sender(version, *place, size, bucket_bytes, listener=listener, **settings)
    return sender, [r.result() for r in receivers]


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
    assert serves(engine, version, expected)
