"""What a receiver tells of itself: its tensors after a break-off, stale steps, released memory."""

import pytest
import torch

from samebit.weight_sync.buckets import cut_buckets, pack
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.mapping import plain, vocab
from samebit.weight_sync.session import SessionState, UpdateSession
from samebit.weight_sync.types import ParamMeta, WeightSyncError, WeightVersion

SPECS = [
    plain("a", "hf.a", (3, 4)),
    plain("b", "hf.b", (5,)),
    vocab("padded", "hf.v", (5, 2), 8, (0, 1)),
    vocab("empty", "hf.v", (5, 2), 8, (7, 8)),
]
SHAPES = {spec.name: spec.shape for spec in SPECS}


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found["padded"][5:] = found["empty"][:] = 0
    return found


def make(step=3, **settings):
    params = weights(0)
    version = WeightVersion(step, weights_digest(SPECS, params))
    return UpdateSession(SPECS, params, version, **settings)


@pytest.fixture
def session():
    return make()


def region(name, start=None, shape=None):
    return ParamMeta(name, shape or SHAPES[name], "torch.float32", 0, start)


TOP = region("a", (0, 0), (1, 4))
REST = region("a", (1, 0), (2, 4))


def write(session, *metas, seed=1):
    new = weights(seed)
    for meta, place in zip(metas, session.expect(metas), strict=True):
        place.copy_(meta.region_of(new[meta.name]))


def fill(session, *metas):
    write(session, *metas)
    session.arrived(metas)


def heal(session, step=9):
    session.begin(step)
    fill(session, *session.metas())
    session.commit(weights_digest(SPECS, weights(1)))
    session.require_ready()


def report(session):
    return "".join(content[0] for content in session.report().values())


def test_a_ready_receiver_holds_nothing_new(session):
    assert report(session) == "oooo"
    heal(session)
    assert report(session) == "oooo"


def test_what_a_broken_update_left_is_told_by_tensor(session):
    """Old: untouched; new: all of it came; unknown: a part, or handed out to be written."""
    session.begin(4)
    fill(session, TOP, region("b"))
    write(session, region("padded"))
    session.abort("the cable was pulled")
    assert report(session) == "unuo"
    told = "pulled; 1 tensors are new, 2 unknown, 1 old; a full update"
    with pytest.raises(WeightSyncError, match=told):
        session.require_ready()
    heal(session)


def test_what_an_earlier_broken_update_brought_is_unknown(session):
    """It is of a version that was never whole, and not of the last update's."""
    session.begin(4)
    fill(session, region("b"))
    session.abort("once")
    session.begin(5)
    fill(session, TOP, REST)
    session.abort("twice")
    assert report(session) == "nuoo"
    session.begin(6)
    fill(session, region("b"))
    session.abort("thrice")
    assert report(session) == "unoo"
    heal(session)


def test_a_bucket_that_was_handed_out_may_have_been_written(session):
    """A transfer into the parameter's own memory may have ended anywhere."""
    session.begin(4)
    session.bucket_for([region("b")])
    session.abort("lost")
    assert report(session) == "ouoo"


def test_shared_memory_may_be_written_from_the_lease_on():
    """The optimizer steps where the engine reads."""
    session = make(shared=True)
    session.begin(4)
    session.abort("the optimizer failed")
    assert report(session) == "uuuu"
    session.begin(4)
    session.receive_in_place()
    session.params["a"][0, 0] = torch.nan
    with pytest.raises(WeightSyncError, match="NaN"):
        session.commit(None)
    assert report(session) == "nnnn"


def test_lost_weights_are_not_served_until_a_full_update(session):
    """Memory that was released without a copy comes back with anything in it."""
    session.invalidate("their memory was released")
    assert session.state is SessionState.DIRTY
    assert report(session) == "uuuu"
    with pytest.raises(WeightSyncError, match="weights are lost: their memory .* 4 unknown, 0 old"):
        session.require_ready()
    session.params["padded"][5:] = torch.nan
    session.begin(4)
    with pytest.raises(WeightSyncError, match="an update to step 4 is under way"):
        session.invalidate("again")
    fill(session, TOP, REST, region("b"), region("padded", (0, 0), (5, 2)))
    session.commit(weights_digest(SPECS, weights(1)))
    assert torch.equal(session.params["padded"], weights(1)["padded"])


@pytest.mark.parametrize("rows", [4, 5, 6, 8])
def test_rows_of_padding_need_not_arrive(session, rows):
    """Senders of whole Hugging Face tensors have none; the others' may be in a region."""
    session.begin(4)
    fill(session, TOP, REST, region("b"), region("padded", (0, 0), (rows, 2)))
    if rows < 5:
        with pytest.raises(WeightSyncError, match="1 tensors never arrived: padded"):
            session.commit(None)
        assert report(session) == "nnuo"
    else:
        assert session.commit(None) == WeightVersion(4, weights_digest(SPECS, weights(1)))


def test_places_are_written_where_they_stand(session):
    """Regions of rows and of columns, strided or not; what came twice is refused."""
    columns = region("a", (0, 1), (3, 2))
    session.begin(4)
    [place] = session.expect([columns])
    assert place.data_ptr() == session.params["a"][:, 1:].data_ptr()
    assert place.stride() == (4, 1)
    session.arrived([columns])
    for call in (session.expect, session.arrived):
        with pytest.raises(WeightSyncError, match="refused: a arrived twice"):
            call([TOP])
        session.begin(4)
        session.arrived([columns])
    with pytest.raises(WeightSyncError, match="refused: a arrived twice"):
        session.arrived([region("b"), TOP])


def test_a_refusal_stands_until_the_commit(session):
    """Who drives an update to its end gets the reason, not an error of order."""
    session.begin(4)
    for call in (
        lambda: session.arrived([region("a", (0, 0), (9, 4))]),
        lambda: session.commit(""),
    ):
        with pytest.raises(WeightSyncError, match="update to step 4 refused: a is"):
            call()
    with pytest.raises(WeightSyncError, match="no update is under way"):
        session.commit("")


def test_a_stale_step_is_refused_and_changes_nothing(session):
    """A trainer that hangs behind would have the past served as the present."""
    with pytest.raises(WeightSyncError, match="step 2 is stale: .* is of step 3"):
        session.begin(2)
    session.require_ready()
    session.begin(3)
    session.abort("of the same step")
    heal(session, 5)
    with pytest.raises(WeightSyncError, match="step 4 is stale"):
        session.begin(4)
    session.meet_sender()
    heal(session, 4)
    session.begin(1, may_go_back=True)
    assert session.version.step == 4


def test_released_memory_is_named(session):
    """Whoever asks learns what to resume; without weights there is nothing to update."""
    session.released = ("kv_cache", "cuda_graphs")
    assert session.state is SessionState.RELEASED
    with pytest.raises(WeightSyncError, match="memory of kv_cache, cuda_graphs is released"):
        session.require_ready()
    session.begin(4)
    assert session.state is SessionState.UPDATING
    fill(session, *session.metas())
    session.commit(None)
    session.released = ("weights",)
    with pytest.raises(WeightSyncError, match="step 5: the memory of weights is released"):
        session.begin(5)
    session.released = ()
    session.require_ready()


def test_an_unexpected_error_at_the_commit_ends_the_update(session, monkeypatch):
    """Else no later one could begin."""
    session.begin(4)
    fill(session, *session.metas())
    [metas] = cut_buckets({"b": weights(1)["b"]}, 1 << 20)
    assert pack(metas, weights(1)).metas == metas
    with monkeypatch.context() as patch:
        patch.setattr(session, "_gather", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.commit(None)
    assert session.state is SessionState.DIRTY
    heal(session)
