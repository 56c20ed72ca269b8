"""Deltas: only what has changed travels, and what arrives is the sender's to the bit."""

from types import SimpleNamespace

import pytest
import torch
from helpers import outcomes
from serving import local_engine

from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_safetensors
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.meeting import loopback_listener
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.peers import GlooPeers
from samebit.weight_sync.transports.remote import GlooTransport
from samebit.weight_sync.transports.shards import Held, ShardReceiver, ShardSender
from samebit.weight_sync.types import ParamMeta, WeightSyncError, WeightVersion

LARGE = "decoder.layers.0.mlp.linear_fc1.weight"
COLUMNS = "decoder.layers.0.mlp.linear_fc2.weight"
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize])


class CountingPeers(GlooPeers):
    """Counts the bytes that are put onto sockets."""

    sent = 0

    def _send(self, parts):
        work, memory = super()._send(parts)
        self.sent += memory.numel()
        return work, memory


class Ends:
    """Trainer ranks and engines, all in this process; `senders` are the trainers' sides."""

    def __init__(self, pool, senders, engines, bucket_bytes=512 << 20, delta=True):
        self.pool, self.engines = pool, engines
        listener, size = loopback_listener(), len(senders) + len(engines)
        place = listener.getsockname()

        def make(rank):
            settings = {"listener": listener} if rank == 0 else {}
            group = WeightGroup(*place, rank, size, timeout_s=60.0, **settings)
            if rank < len(senders):
                side = senders[rank]
                held = Held(side.specs, side.params)
                return ShardSender(group, CountingPeers(), held, bucket_bytes, delta=delta)
            engine = engines[rank - len(senders)]
            return ShardReceiver(group, GlooPeers(), Held(engine.specs, engine.weights))

        made = list(pool.map(make, range(size)))
        self.senders, self.receivers = made[: len(senders)], made[len(senders) :]

    def receive(self):
        """The engines take part in an update; what they raise is for the sender to say."""
        pairs = zip(self.receivers, self.engines, strict=True)
        return [self.pool.submit(receiver.receive, engine.sink) for receiver, engine in pairs]

    def update(self, step, digest, *sides):
        """A whole update; returns what every sender says that it sent."""
        receiving = self.receive()

        def send(sender, params):
            before = sender._member.data.sent
            sender.begin(step)
            sender.send(params)
            sender.commit(digest)
            gaps = 2 * 64 * len(list(sender._member.plan.transfers))
            on_sockets = sender._member.data.sent - before
            assert sender.sent_bytes <= on_sockets <= sender.sent_bytes + gaps
            return sender.sent_bytes

        found = list(self.pool.map(send, self.senders, sides))
        for future in receiving:
            future.result()
        return found


def flipped(version, params, *, every, name=None):
    """Other values in every so many elements, of one parameter or of all; and how many."""
    found, count = dict(params), 0
    for spec in version.specs:
        if name in (None, spec.name):
            changed = bits(params[spec.name]).clone()
            chosen = changed[: spec.num_rows].view(-1)[::every]  # padding does not travel
            chosen ^= 1
            found[spec.name] = changed.view(params[spec.name].dtype)
            count += len(chosen)
    return found, count


def all_bytes(version):
    """Of all that travels in full."""
    return sum(version.params[s.name][: s.num_rows].nbytes for s in version.specs)


def holds(engine, params):
    """Whether the engine's weights are these, bit by bit."""
    return all(torch.equal(bits(engine.weights[n]), bits(p)) for n, p in params.items())


def digest_of(version, params):
    return weights_digest(version.specs, params)


@pytest.fixture(scope="module")
def remote(remote_of_any_size):
    return remote_of_any_size


@pytest.fixture
def engine(old):
    return local_engine(old.folder)


@pytest.mark.parametrize("bucket_bytes", [1000, 1 << 30])
def test_only_changed_elements_travel(pool, engine, new, bucket_bytes):
    """Few, none, many and all: the bytes are those of the changes, and the bits the sender's."""
    ends, params = Ends(pool, [new], [engine], bucket_bytes), new.params
    assert ends.update(1, new.digest, params) == [all_bytes(new)], "nothing is known yet"
    few, count = flipped(new, params, every=97, name=LARGE)
    for step, version in enumerate((few, params, few), start=2):
        assert ends.update(step, digest_of(new, version), version) == [8 * count]
        assert holds(engine, version)
    assert ends.update(6, digest_of(new, few), few) == [0]
    assert engine.weight_version.step == 6
    third, count = flipped(new, few, every=3, name=LARGE)
    assert ends.update(7, digest_of(new, third), third) == [8 * count]
    half, _ = flipped(new, third, every=2, name=LARGE)
    assert ends.update(8, digest_of(new, half), half) == [half[LARGE].nbytes], "no more than that"
    every, _ = flipped(new, half, every=1)
    assert ends.update(9, digest_of(new, every), every) == [all_bytes(new)]
    assert holds(engine, every)
    assert ends.update(10, digest_of(new, every), every) == [0]


def test_signs_of_zeros_travel(pool, engine, new):
    """They are equal as numbers, and a digest of bits would refuse them."""
    zeros = {**new.params, LARGE: torch.zeros_like(new.params[LARGE])}
    ends = Ends(pool, [new], [engine])
    ends.update(1, digest_of(new, zeros), zeros)
    signed = zeros[LARGE].clone()
    signed[3, 5] = -0.0
    negative = {**zeros, LARGE: signed}
    assert ends.update(2, digest_of(new, negative), negative) == [8]
    assert holds(engine, negative)


def test_without_the_option_everything_travels(pool, engine, new):
    ends = Ends(pool, [new], [engine], delta=False)
    for step in (1, 2):
        assert ends.update(step, new.digest, new.params) == [all_bytes(new)]


def test_a_version_of_somebody_else_is_replaced_in_full(pool, engine, old, new):
    """Whatever its step; and the same bits by another way are a base as good."""
    ends = Ends(pool, [new], [engine])
    few, count = flipped(new, new.params, every=97, name=LARGE)
    ends.update(1, new.digest, new.params)
    engine.copy_weights(old.params, step=1, digest=old.digest)
    assert ends.update(2, digest_of(new, few), few) == [all_bytes(new)]
    assert holds(engine, few)
    engine.copy_weights(few, step=2)
    assert ends.update(3, new.digest, new.params) == [8 * count]
    assert holds(engine, new.params)


def test_a_mixture_is_of_no_version(pool, engine, new):
    """Though its version is the sender's base: another update wrote some of it and broke off."""
    ends = Ends(pool, [new], [engine])
    ends.update(1, new.digest, new.params)
    few, _ = flipped(new, new.params, every=97, name=LARGE)
    engine.sink.begin(2)
    [place] = engine.sink.expect(
        [ParamMeta(COLUMNS, new.params[COLUMNS].shape, "torch.float32", 0)]
    )
    place.zero_()
    engine.sink.abort("the cable was pulled")
    assert engine.weight_version.digest == new.digest
    assert ends.update(3, digest_of(new, few), few) == [all_bytes(new)]
    assert holds(engine, few)


def test_two_trainer_ranks_send_changes_of_their_halves(pool, engine, new):
    """Columns and rows of one parameter come from different ranks."""
    config = load_model_config(new.folder)
    sides = [SimpleNamespace(specs=config.param_specs((rank, 2))) for rank in range(2)]
    for side in sides:
        side.params = {spec.name: torch.empty(spec.shape) for spec in side.specs}
        load_safetensors(new.folder, side.specs, side.params, new.specs)
    ends = Ends(pool, sides, [engine], 9000)
    halves = [side.params for side in sides]
    full = ends.update(1, new.digest, *halves)
    assert sum(full) == all_bytes(new)
    assert min(full) > 0
    for step, every in ((2, 50), (4, 1)):
        changed, count = flipped(sides[0], halves[0], every=every, name=COLUMNS)
        whole = {**new.params, COLUMNS: torch.cat([changed[COLUMNS], halves[1][COLUMNS]], dim=1)}
        sent = ends.update(step, digest_of(new, whole), changed, halves[1])
        assert holds(engine, whole)
        assert sent == [8 * count if every > 1 else halves[0][COLUMNS].nbytes, 0]
        assert ends.update(step + 1, new.digest, *halves) == sent
        assert holds(engine, new.params)


def test_ranks_that_train_and_serve_exchange_changes(pool, old, new):
    """Two trainer ranks hold halves, and each has an engine of the whole in its process."""
    config = load_model_config(new.folder)
    engines = [local_engine(old.folder) for _ in range(2)]
    listener = loopback_listener()
    place = listener.getsockname()

    def make(rank):
        specs = config.param_specs((rank, 2))
        params = {spec.name: torch.empty(spec.shape) for spec in specs}
        load_safetensors(new.folder, specs, params, new.specs)
        settings = {"listener": listener} if rank == 0 else {}
        group = WeightGroup(*place, rank, 2, timeout_s=60.0, **settings)
        both = engines[rank].sink, Held(engines[rank].specs, engines[rank].weights)
        held = Held(specs, params)
        return ShardSender(group, GlooPeers(), held, 9000, engine=both, delta=True), held

    def update(end, params, step, digest):
        sender, _ = end
        sender.begin(step)
        sender.send(params)
        sender.commit(digest)
        return sender.sent_bytes

    def together(step, digest, *sides):
        return list(pool.map(update, ends, sides, [step] * 2, [digest] * 2))

    ends = list(pool.map(make, range(2)))
    halves = [held.params for _, held in ends]
    full = together(1, new.digest, *halves)
    changed, count = flipped(ends[1][1], halves[1], every=50, name=COLUMNS)
    whole = {**new.params, COLUMNS: torch.cat([halves[0][COLUMNS], changed[COLUMNS]], dim=1)}
    assert together(2, digest_of(new, whole), halves[0], changed) == [0, 8 * count]
    assert all(holds(engine, whole) for engine in engines)
    engines[0].copy_weights(new.params, step=2)
    assert together(3, digest_of(new, whole), halves[0], changed) == full
    assert all(holds(engine, whole) for engine in engines)


def test_all_of_two_engines_must_hold_the_base(pool, old, new):
    """One that does not is a full update for both; one that is busy costs nothing."""
    engines = [local_engine(old.folder) for _ in range(2)]
    ends = Ends(pool, [new], engines)
    few, count = flipped(new, new.params, every=97, name=LARGE)
    assert ends.update(1, new.digest, new.params) == [2 * all_bytes(new)]
    assert ends.update(2, digest_of(new, few), few) == [2 * 8 * count]
    request = engines[1].add_request([5, 9], SamplingParams(max_new_tokens=2))
    receiving = ends.receive()
    with pytest.raises(WeightSyncError, match="^rank 2: .*unfinished"):
        ends.senders[0].begin(3)
    assert isinstance(receiving[1].exception(), WeightSyncError)
    receiving[0].result()
    engines[1].abort_request(request)
    assert ends.update(4, new.digest, new.params) == [2 * 8 * count]
    engines[0].copy_weights(old.params, step=4)
    assert ends.update(5, digest_of(new, few), few) == [2 * all_bytes(new)]
    assert all(holds(engine, few) for engine in engines)


@pytest.mark.parametrize("fault", ["NaN", "digest", "abort", "misshapen"])
def test_a_broken_delta_is_healed_in_full(pool, engine, new, fault):
    """What the receivers hold is not known then, nor is it a version."""
    ends = Ends(pool, [new], [engine])
    few, count = flipped(new, new.params, every=97, name=LARGE)
    ends.update(1, new.digest, new.params)
    [sender], [receiving] = ends.senders, ends.receive()
    sender.begin(2)
    if fault == "misshapen":
        with pytest.raises(WeightSyncError, match="is wanted"):
            sender.send({**few, LARGE: torch.zeros(3)})
    else:
        sender.send(new.changed(LARGE, torch.nan) if fault == "NaN" else few)
        assert sender.sent_bytes == (8 if fault == "NaN" else 8 * count), "it is a delta"
    if fault == "abort":
        sender.abort("out of disk")
    elif fault != "misshapen":
        with pytest.raises(WeightSyncError, match="NaN or Inf" if fault == "NaN" else "digest"):
            sender.commit(new.digest)
        assert isinstance(receiving.exception(), WeightSyncError)
    receiving.exception()
    with pytest.raises(WeightSyncError, match="step 2 broke off"):
        engine.generate([[5, 9]])
    assert ends.update(3, digest_of(new, few), few) == [all_bytes(new)]
    assert holds(engine, few)
    assert ends.update(4, new.digest, new.params) == [8 * count]
    assert holds(engine, new.params)


def test_a_refused_version_is_no_base_though_the_engine_came_to_it(pool, engine, old, new):
    """The sender's copy is of what was refused: digests alone do not tell."""
    ends = Ends(pool, [new], [engine])
    ends.update(1, new.digest, new.params)
    few, _ = flipped(new, new.params, every=97, name=LARGE)
    [sender], [receiving] = ends.senders, ends.receive()
    sender.begin(2)
    sender.send(few)
    with pytest.raises(WeightSyncError, match="digest"):
        sender.commit(old.digest)
    receiving.exception()
    engine.copy_weights(new.params, step=2, digest=new.digest)
    assert ends.update(3, digest_of(new, few), few) == [all_bytes(new)]
    assert holds(engine, few)


def test_an_engine_of_another_process_takes_deltas(remote, new):
    """And draws what an engine draws that loads them; after a new meeting all travels."""
    source = SimpleNamespace(step=0, params=new.params, specs=new.specs)
    few, count = flipped(new, new.params, every=97, name=LARGE)
    digest, prompt, drawing = digest_of(new, few), [[5, 9, 200]], SamplingParams(max_new_tokens=6)
    transport = GlooTransport(source, remote, timeout_s=60, delta=True)
    sent = []
    for step, (params, known) in enumerate([(new.params, new.digest), (few, digest)] * 2, start=1):
        transport.lease(step)
        assert transport.update(params, known) == WeightVersion(step, known)
        sent.append(transport.sent_bytes)
    of_all = sum(p.nbytes for p in new.params.values() if p.dim() == 1)  # norms, on every rank
    whole = all_bytes(new) + (remote.num_ranks - 1) * of_all
    assert sent == [whole, *[8 * count] * 3]
    fresh = local_engine(new.folder, weights=few)
    assert outcomes(remote.generate(prompt, drawing)) == outcomes(fresh.generate(prompt, drawing))
    transport.close()
    transport.lease(5)
    transport.update(new.params, new.digest)
    assert transport.sent_bytes == whole
    transport.close()
