"""The update protocol: only a whole, finite, matching update makes an engine serve again."""

from dataclasses import replace

import pytest
import torch

from samebit.weight_sync.buckets import cut_buckets, pack
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.mapping import plain
from samebit.weight_sync.session import SessionState, UpdateSession
from samebit.weight_sync.types import Bucket, ParamMeta, WeightSyncError, WeightVersion

NOTHING = torch.empty(0, dtype=torch.uint8)
SPECS = [plain("a", "hf.a", (3, 4)), plain("b", "hf.b", (5,))]


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in SPECS}


def bucket(params):
    [metas] = cut_buckets(params, 1 << 20)
    return pack(metas, params)


@pytest.fixture
def session():
    params = weights(0)
    return UpdateSession(SPECS, params, WeightVersion(3, weights_digest(SPECS, params)))


def update(session, params, step):
    session.begin(step)
    session.receive(bucket(params))
    return session.commit(weights_digest(SPECS, params))


def make_dirty(session):
    session.begin(4)
    session.abort("the cable was pulled")


def test_a_full_update_changes_version_and_weights_in_place(session):
    """The engine's views must see the new weights, under the new version."""
    memory = {name: p.data_ptr() for name, p in session.params.items()}
    new = weights(1)
    version = update(session, new, 4)
    assert version == session.version == WeightVersion(4, weights_digest(SPECS, new))
    session.require_ready()
    for name, p in session.params.items():
        assert p.data_ptr() == memory[name]
        assert torch.equal(p, new[name])


def test_buckets_may_come_in_any_order_and_number(session):
    """Shard-to-shard transports do not keep the sender's order."""
    new = weights(1)
    session.begin(4)
    for name in ("b", "a"):
        session.receive(bucket({name: new[name]}))
    session.commit(weights_digest(SPECS, new))
    session.require_ready()


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.receive(bucket(weights(1))),
        lambda s: s.bucket_for([ParamMeta("b", (5,), "torch.float32", 0)]),
        lambda s: s.receive_in_place(),
        lambda s: s.commit("0" * 16),
        lambda s: s.abort("why"),
    ],
    ids=["receive", "bucket_for", "receive_in_place", "commit", "abort"],
)
@pytest.mark.parametrize("state", ["ready", "dirty"])
def test_nothing_but_begin_is_allowed_outside_an_update(session, call, state):
    """A stray bucket or commit outside an update would change weights that are being served."""
    if state == "dirty":
        make_dirty(session)
    before = {name: p.clone() for name, p in session.params.items()}
    with pytest.raises(WeightSyncError, match=rf"no update is under way \(state: {state}\)"):
        call(session)
    assert session.state is SessionState(state)
    assert all(torch.equal(p, before[name]) for name, p in session.params.items())


def test_begin_during_an_update_is_refused_and_the_update_goes_on(session):
    """Two senders at a time would mix two versions."""
    new = weights(1)
    session.begin(4)
    with pytest.raises(WeightSyncError, match="update to step 5 begun during that to step 4"):
        session.begin(5)
    session.receive(bucket(new))
    assert session.commit(weights_digest(SPECS, new)).step == 4


def test_an_update_under_way_is_not_served(session):
    """Between begin and commit the weights are a mixture."""
    session.begin(4)
    with pytest.raises(WeightSyncError, match="an update to step 4 is under way"):
        session.require_ready()


def meta(start, shape, offset=0):
    return ParamMeta("a", shape, "torch.float32", offset, start)


LEFT, RIGHT = meta((0, 0), (3, 1)), meta((0, 1), (3, 3), 64)  # of the columns of a
TOP, BOTTOM = meta((0, 0), (1, 4)), meta((1, 0), (2, 4), 64)  # of its rows


@pytest.mark.parametrize("regions", [(LEFT, RIGHT), (TOP, BOTTOM)], ids=["columns", "rows"])
@pytest.mark.parametrize("is_alone", [True, False])
def test_a_tensor_may_come_in_regions(session, regions, is_alone):
    """As shards of another size bring it: each at its place, rows straight into the parameter."""
    new = weights(1)
    session.begin(4)
    for metas in [[part] for part in regions] if is_alone else [regions]:
        metas = [replace(part, offset=0 if is_alone else part.offset) for part in metas]
        target = session.bucket_for(metas)
        for part in metas:
            target.tensor(part).copy_(part.region_of(new["a"]))
        in_place = target.buffer.untyped_storage().data_ptr() == session.params["a"].data_ptr()
        assert in_place == (is_alone and regions == (TOP, BOTTOM))
        session.receive(target)
    session.receive(bucket({"b": new["b"]}))
    assert session.commit(weights_digest(SPECS, new)).step == 4
    assert torch.equal(session.params["a"], new["a"])


NO_REGIONS = {
    "too low": (meta((2, 0), (2, 4)), r"\(2, 4\) torch.float32, from \(2, 0\) on, in the update"),
    "too wide": (meta((0, 2), (3, 3)), r"a is \(3, 4\) torch.float32 here and \(3, 3\)"),
    "before the first": (meta((-2, 0), (1, 4)), "a is"),
    "of a vector": (meta((0,), (3,)), "a is"),
    "of a cube": (meta((0, 0, 0), (1, 1, 1)), "a is"),
    "twice": (meta((0, 2), (1, 1)), "a arrived twice"),
}


@pytest.mark.parametrize("fault", NO_REGIONS)
def test_a_region_that_does_not_fit_is_refused_before_a_byte_is_written(session, fault):
    """Else it would be written over its neighbours, or over what has come already."""
    wrong, reason = NO_REGIONS[fault]
    session.begin(4)
    session.receive(session.bucket_for([TOP]))
    before = session.params["a"].clone()
    for take in (session.bucket_for, lambda metas: session.receive(Bucket(tuple(metas), NOTHING))):
        with pytest.raises(WeightSyncError, match=f"update to step 4 refused: .*{reason}"):
            take([wrong])
        assert session.state is SessionState.DIRTY
        session.begin(4)
        session.receive(session.bucket_for([TOP]))
    assert torch.equal(session.params["a"], before)


def test_a_tensor_of_which_a_region_is_missing_never_arrived(session):
    """The rows that did not come are those of the old version."""
    session.begin(4)
    session.receive(session.bucket_for([BOTTOM]))
    session.receive(bucket({"b": weights(1)["b"]}))
    with pytest.raises(WeightSyncError, match="1 tensors never arrived: a"):
        session.commit(weights_digest(SPECS, session.params))


def misshapen():
    return {**weights(1), "a": torch.zeros(4, 3)}


def wrong_dtype():
    return {**weights(1), "a": torch.zeros(3, 4, dtype=torch.bfloat16)}


def not_finite(value):
    params = weights(1)
    params["b"][2] = value
    return params


FAULTS = {
    "incomplete": ([{"a": weights(1)["a"]}], "1 tensors never arrived: b"),
    "nothing": ([], "2 tensors never arrived: a, b"),
    "unknown": ([{**weights(1), "c": torch.zeros(2)}], "unknown tensor c"),
    "misshapen": ([misshapen()], r"a is \(3, 4\) torch.float32 here and \(4, 3\)"),
    "wrong dtype": ([wrong_dtype()], r"\(3, 4\) torch.bfloat16 in the update"),
    "twice": ([weights(1), {"b": weights(1)["b"]}], "b arrived twice"),
    "NaN": ([not_finite(torch.nan)], "NaN or Inf in 1 tensors: b"),
    "Inf": ([not_finite(-torch.inf)], "NaN or Inf in 1 tensors: b"),
    "other weights": ([weights(2)], "digest [0-9a-f]{16} here, [0-9a-f]{16} at the sender"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_update_is_refused_with_the_reason_until_a_full_one(session, fault):
    """Anything less than the sender's weights must not be served, and must not be final either."""
    buckets, reason = FAULTS[fault]
    digest = weights_digest(SPECS, weights(1))

    def faulty():
        session.begin(4)
        for params in buckets:
            session.receive(bucket(params))
        session.commit(digest)

    with pytest.raises(WeightSyncError, match=f"update to step 4 refused: .*{reason}"):
        faulty()
    assert session.state is SessionState.DIRTY
    assert session.version.step == 3
    with pytest.raises(WeightSyncError, match=f"step 4 broke off: .*{reason}.*full update"):
        session.require_ready()
    update(session, weights(1), 5)
    session.require_ready()
    assert session.version == WeightVersion(5, digest)


def test_what_an_aborted_update_brought_does_not_count_for_the_next(session):
    """The second update must be full on its own."""
    new = weights(1)
    session.begin(4)
    session.receive(bucket({"a": new["a"]}))
    session.abort("lost")
    session.begin(5)
    session.receive(bucket({"b": new["b"]}))
    with pytest.raises(WeightSyncError, match="1 tensors never arrived: a"):
        session.commit(weights_digest(SPECS, new))


def test_an_update_in_place_is_checked_like_any_other(session):
    """Shared memory does not excuse NaN or another digest."""
    session.begin(4)
    session.receive_in_place()
    session.params["a"][0, 0] = torch.nan
    with pytest.raises(WeightSyncError, match="NaN or Inf in 1 tensors: a"):
        session.commit(weights_digest(SPECS, session.params))
    session.params["a"].zero_()
    session.begin(5)
    session.receive_in_place()
    version = session.commit(weights_digest(SPECS, session.params))
    assert version.step == 5


def test_a_bucket_meta_survives_the_wire():
    """Metas travel as JSON; dtype and shape must come back."""
    meta = ParamMeta("a", (2, 3), str(torch.bfloat16), 64)
    view = Bucket((meta,), torch.zeros(64 + 12, dtype=torch.uint8)).tensor(meta)
    assert (view.dtype, view.shape) == (torch.bfloat16, (2, 3))
