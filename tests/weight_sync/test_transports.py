"""One contract for all transports: they deliver what a direct update delivers, to the bit."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import outcomes
from serving import PARAMS, PROMPTS, local_engine, serves

from samebit.recipes.launch.placement import load_transport
from samebit.rollout.engine import Engine
from samebit.weight_sync.transports.base import Lease
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.registry import TRANSPORTS
from samebit.weight_sync.types import WeightSyncError, WeightVersion

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"


class Sender:
    """A trainer's end of one way to an engine, which another updater may know too."""

    def __init__(self, name, source, engine, folder, **settings):
        self.name, self.engine, self.memory = name, engine, source.params
        self.way = load_transport(name).between(source, engine, folder, **settings)
        self.shares = isinstance(self.way, Lease)
        self.abort = self.way.give_up if self.shares else self.way.abort

    def begin(self, step):
        (self.way.lease if self.shares else self.way.begin)(step)

    def send(self, params):
        """Move them; or write them to the shared memory, as an optimizer does."""
        self._sent = self.written(params) if self.shares else params
        if not self.shares:
            self.way.send(params)

    def commit(self, digest):
        return self.way.update(self._sent, digest) if self.shares else self.way.commit(digest)

    def update(self, params, digest, step):
        """As a recipe does it."""
        self.way.lease(step)
        return self.way.update(self.written(params) if self.shares else params, digest)

    def written(self, params):
        """The shared memory with these values; what does not fit there is memory of its own."""
        found = dict(params)
        for name, param in params.items():
            own = self.memory.get(name)
            if own is not None and (own.shape, own.dtype) == (param.shape, param.dtype):
                found[name] = own.copy_(param)
        return found

    def another_updater(self, step):
        """Begins an update; returns how it gives it up. An engine apart has no other end."""
        if isinstance(self.engine, Engine):
            self.engine.sink.begin(step)
            return self.engine.sink.abort
        self.way.begin(step)
        return self.way.abort


@pytest.fixture(scope="module")
def alone():
    """A group of this process, as a trainer of one process has it."""
    if dist.is_initialized():
        yield dist.group.WORLD
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


ANYWHERE = {name: entry for name, entry in TRANSPORTS.items() if not entry.gpus}
DELTAS = [
    pytest.param((n, {"delta": True}), id=f"{n} delta")
    for n, e in ANYWHERE.items()
    if "delta" in e.settings
]


@pytest.fixture(params=[*(pytest.param((n, {}), id=n) for n in ANYWHERE), *DELTAS])
def sender(request, old, alone, tmp_path):
    """One of each that there is: a line in the registry is all that a new one needs."""
    name, settings = request.param
    params = {name: p.clone() for name, p in old.params.items()}
    source = SimpleNamespace(step=0, params=params, specs=old.specs, pipeline_group=alone)
    is_apart = "colocated" not in TRANSPORTS[name].engines
    engine = request.getfixturevalue("remote") if is_apart else local_engine(old.folder)
    sender = Sender(name, source, engine, tmp_path / "weights", **settings)
    yield sender
    sender.way.close()


def send(sender, version, step):
    sender.begin(step)
    sender.send(version.params)
    return sender.commit(version.digest)


def test_every_transport_gives_the_bits_of_a_direct_update(sender, old, new, expected):
    """Tokens and log-probs after a sync must not tell which way the weights came."""
    for step, version in enumerate((new, old, new), start=1):
        assert send(sender, version, step) == WeightVersion(step, version.digest)
        now = sender.engine.weight_version
        assert now == WeightVersion(step, version.digest)
        assert serves(sender.engine, version, expected)
        [[completion, _]] = sender.engine.generate(PROMPTS[:1], PARAMS)
        assert [span.version for span in completion.version_spans] == [now]


def test_a_fresh_engine_on_the_same_weights_agrees(new, expected):
    """Loading a folder and receiving an update must be the same thing."""
    engine = local_engine(new.folder)
    assert engine.weight_version == WeightVersion(0, new.digest)
    assert serves(engine, new, expected)


def test_a_wrong_digest_is_refused_with_both_values_and_a_full_update_recovers(
    sender, old, new, expected
):
    """The sender must learn that the receiver does not hold its weights."""
    sender.begin(8)
    sender.send(new.params)
    with pytest.raises(WeightSyncError, match=f"digest {new.digest} here, {old.digest} at"):
        sender.commit(old.digest)
    with pytest.raises(WeightSyncError, match=f"step 8 broke off: digest {new.digest} here"):
        sender.engine.generate(PROMPTS, PARAMS)
    with pytest.raises(WeightSyncError, match="broke off"):
        sender.engine.score(PROMPTS[::2])
    send(sender, new, 9)
    assert serves(sender.engine, new, expected)


def test_not_a_number_is_refused_by_name(sender, old, new, expected):
    """NaN weights must be found before they are served."""
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    sender.begin(8)
    sender.send(new.changed(name, torch.nan))
    with pytest.raises((WeightSyncError, ValueError), match="NaN or Inf in"):
        sender.commit(new.digest)
    with pytest.raises(WeightSyncError, match="step 8 broke off: .*NaN or Inf in"):
        sender.engine.generate(PROMPTS, PARAMS)
    send(sender, old, 9)
    assert serves(sender.engine, old, expected)


def test_after_an_abort_nothing_half_done_is_served(sender, old, new, expected):
    """An engine either refuses with the sender's reason, or still holds the old version whole."""
    send(sender, old, 1)
    sender.way.lease(2)
    sender.way.give_up("the optimizer failed")
    if sender.shares:  # the optimizer may have written the memory
        with pytest.raises(WeightSyncError, match="step 2 broke off: the optimizer failed"):
            sender.engine.generate(PROMPTS, PARAMS)
    else:  # the engine was not reached yet
        assert serves(sender.engine, old, expected)
    sender.begin(2)
    sender.send(new.params)
    sender.abort("the optimizer failed")
    if sender.name == "file":  # nothing reaches the engine before commit
        assert serves(sender.engine, old, expected)
    else:
        with pytest.raises(WeightSyncError, match="step 2 broke off: the optimizer failed"):
            sender.engine.generate(PROMPTS, PARAMS)
    send(sender, new, 3)
    assert serves(sender.engine, new, expected)


def wrong(version, fault):
    """Parameters with one that is not the model's."""
    return {
        "missing": version.without(FC1),
        "unknown": {**version.params, "x": torch.zeros(2)},
        "misshapen": {**version.params, FC1: torch.zeros(3)},
        "dtype": {**version.params, FC1: version.params[FC1].bfloat16()},
    }[fault]


@pytest.mark.parametrize("fault", ["missing", "unknown", "misshapen", "dtype"])
def test_wrong_parameters_are_refused(sender, old, new, expected, fault):
    """The sender learns of it; the engine refuses, or holds the old version whole, until a full
    update."""
    if (sender.name, fault) == ("stages", "unknown"):
        pytest.skip("a stage may hold what engines do not: the copy of a tied embedding")
    assert sender.update(old.params, old.digest, 1) == WeightVersion(1, old.digest)
    with pytest.raises(WeightSyncError):
        sender.update(wrong(new, fault), new.digest, 2)
    try:
        found = outcomes(sender.engine.generate(PROMPTS, PARAMS))
    except WeightSyncError as error:
        assert "step 2 broke off" in str(error)  # noqa: PT017 - one of two ways
    else:
        assert found == expected[old.digest][0]
        assert not sender.shares
    assert sender.update(new.params, new.digest, 3) == WeightVersion(3, new.digest)
    assert serves(sender.engine, new, expected)


def test_a_second_updater_is_refused(sender, new, expected):
    """Two at a time would mix two versions."""
    give_up = sender.another_updater(7)
    with pytest.raises(WeightSyncError, match="update to step 8 begun during that to step 7"):
        sender.update(new.params, new.digest, 8)
    give_up("it was the other's turn")
    with pytest.raises(WeightSyncError, match="step 7 broke off: it was the other's turn"):
        sender.engine.generate(PROMPTS, PARAMS)
    assert sender.update(new.params, new.digest, 9) == WeightVersion(9, new.digest)
    assert serves(sender.engine, new, expected)


def test_a_source_that_breaks_ends_the_update(sender, old, new, expected):
    """Whatever ends the sending early: the engine refuses with the reason, or never began."""
    if sender.shares:
        pytest.skip("nothing is sent")

    class Torn(dict):
        def __getitem__(self, name):
            if name == FC1:
                raise OSError("the cable was pulled")
            return super().__getitem__(name)

    sender.update(old.params, old.digest, 1)
    with pytest.raises(OSError, match="the cable was pulled"):
        sender.update(Torn(new.params), new.digest, 2)
    if sender.name == "file":
        assert serves(sender.engine, old, expected)
    else:
        with pytest.raises(WeightSyncError, match="step 2 broke off: .*the cable was pulled"):
            sender.engine.generate(PROMPTS, PARAMS)
    sender.update(new.params, new.digest, 3)
    assert serves(sender.engine, new, expected)


def test_what_was_refused_or_given_up_may_be_given_up_again(gloo, remote, old, new, monkeypatch):
    """The engine does not listen any more: nothing is sent, or the answer would never come."""

    def abort_again(reason):
        with monkeypatch.context() as patch:
            patch.delattr(WeightGroup, "tell")
            gloo.abort(reason)

    gloo.begin(8)
    gloo.send(new.params)
    with pytest.raises(WeightSyncError, match="digest"):
        gloo.commit(old.digest)
    abort_again("it was refused")
    send(gloo, new, 9)
    gloo.begin(10)
    gloo.send(old.params)
    gloo.abort("the optimizer failed")
    abort_again("the optimizer failed")
    assert send(gloo, old, 11) == remote.weight_version == WeightVersion(11, old.digest)
