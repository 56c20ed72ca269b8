"""The ranks of an engine in other processes: what all are asked, and whose failure is told."""

import multiprocessing
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from samebit.kernels.reduce import ALONE
from samebit.recipes.launch.placement import require_transport
from samebit.rollout.messages import Done, Score
from samebit.rollout.remote_ranks import (
    Launched,
    RemoteEngineError,
    _OfAll,
    _Pipe,
    settings_of,
)
from samebit.rollout.runtime.call import uncancelled
from samebit.rollout.runtime.lockstep import Lockstep
from samebit.rollout.wire import packed
from samebit.weight_sync.types import LostMemberError, WeightSyncError


@pytest.fixture(scope="module")
def remote(remote_of_any_size):
    return remote_of_any_size


def test_a_call_may_be_longer_than_a_sockets_memory(remote):
    """A megabyte of a name: all ranks are asked before rank 0 has them take it up."""
    named = [("name" * (1 << 18), torch.zeros(4))]
    with pytest.raises(WeightSyncError, match="no update is under way"):
        remote.update_weights_from_tensor(named)
    assert remote.weight_version.step == 0


@pytest.fixture
def pipe(monkeypatch):
    """A pipe to nobody, and the other end of its connection."""
    monkeypatch.setattr("samebit.rollout.remote_ranks._EXIT_CODE_S", 0.05)
    ours, theirs = multiprocessing.Pipe()
    process = SimpleNamespace(kill=lambda: None)
    pipe = _Pipe(Launched(process, ours), lambda: RemoteEngineError("a process ended"))
    yield pipe, theirs
    pipe.close()
    theirs.close()


def test_an_answer_to_nobody_is_no_end(pipe):
    pipe, theirs = pipe
    result = pipe.call(7, Score([[1, 2]], 1.0))
    assert theirs.recv()[0] == 7
    theirs.send((99, Done(1)))
    theirs.send((7, Done(2)))
    assert result.result(timeout=60) == 2
    theirs.send((7, Done(3)))
    result = pipe.call(8, Score([[1, 2]], 1.0))
    theirs.send((8, Done(4)))
    assert result.result(timeout=60) == 4


@pytest.mark.parametrize("how", ["closed here", "closed there"])
def test_all_who_wait_are_told_of_the_end(pipe, how):
    """Though nothing was heard of it, or one of them cannot be told."""
    pipe, theirs = pipe
    pipe.begin([5], packed((5, Score([[1, 2]], 1.0))), lambda *_: 1 / 0)
    result = pipe.call(7, Score([[1, 2]], 1.0))
    theirs.close() if how == "closed there" else pipe.close()
    assert isinstance(result.exception(timeout=60), RemoteEngineError)
    with pytest.raises(RemoteEngineError, match="a process ended"):
        pipe.call(8, Score([[1, 2]], 1.0))


def test_results_of_ranks_are_the_first_ones():
    """Once all have theirs."""
    results = [uncancelled() for _ in range(3)]
    whole = _OfAll(results).result
    for i in (2, 0, 1):
        assert not whole.done()
        results[i].set_result(i)
    assert whole.result() == 0


@pytest.mark.parametrize("loss_first", [True, False])
def test_who_ended_is_told_and_not_who_saw_it(loss_first):
    """The rank that stays sees a lost member, maybe before its process is known to have ended."""
    results = [uncancelled() for _ in range(2)]
    whole = _OfAll(results).result
    loss, death = LostMemberError("a member is lost"), RemoteEngineError("a process ended")
    for i, error in enumerate([loss, death] if loss_first else [death, loss]):
        results[i].set_exception(error)
    assert whole.exception(timeout=10) is death


def test_a_lost_member_is_told_where_nothing_else_is_known(monkeypatch):
    """By all ranks at once; by one alone after a while."""
    losses = [LostMemberError(str(i)) for i in range(2)]
    results = [uncancelled() for _ in range(2)]
    whole = _OfAll(results).result
    for result, error in zip(results, losses, strict=True):
        result.set_exception(error)
    assert whole.exception(timeout=10) in losses
    monkeypatch.setattr("samebit.rollout.remote_ranks._EXIT_CODE_S", 0.05)
    results = [uncancelled() for _ in range(2)]
    whole = _OfAll(results).result
    results[1].set_exception(losses[1])
    assert whole.exception(timeout=60) is losses[1]
    results[0].set_result(None)  # too late


def test_what_a_step_raised_is_untold_until_the_ranks_meet(monkeypatch):
    """So long its process is watched: on a GPU the others may wait in the step without end."""
    lockstep = Lockstep(ALONE)
    lockstep.begin(leads=True)
    lockstep.leads = True  # as if there were others
    met, waits = threading.Event(), threading.Event()

    def gather(own, group):
        waits.set()
        met.wait()
        return [own]

    monkeypatch.setattr("samebit.rollout.runtime.lockstep.gather_objects", gather)
    assert lockstep.untold_s == 0
    lockstep.failed(MemoryError("of a step"))
    since = time.monotonic()
    thread = threading.Thread(target=lockstep.meet)
    thread.start()
    waits.wait()
    assert 0 < lockstep.untold_s <= time.monotonic() - since + 1
    met.set()
    thread.join()
    assert lockstep.untold_s == 0


@pytest.mark.parametrize(
    ("given", "has_gpu", "devices"),
    [
        ("cuda", True, ["cuda", "cuda:1", "cuda:2"]),
        ("cuda:2", True, ["cuda:2", "cuda:3", "cuda:4"]),
        (None, True, [None, "cuda:1", "cuda:2"]),
        (None, False, [None] * 3),
        ("cpu", True, ["cpu"] * 3),
    ],
)
def test_ranks_have_gpus_of_their_own(monkeypatch, given, has_gpu, devices):
    """Behind that of rank 0, also where none is named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    found = [settings_of(rank, {"device": given}).get("device") for rank in range(3)]
    assert [None if x is None else str(x) for x in found] == devices


def test_gloo_is_for_engines_of_one_gpu(monkeypatch):
    """It would have them on the trainer's."""
    from samebit.recipes.cli.compose import resolve

    words = ["model.path=m", "placement=process", "numerics.tp_invariant=true"]
    run = resolve("grpo", [*words, "placement.engine_tensor=2", "placement.transport=gloo"])
    require_transport(run)
    monkeypatch.setattr(
        "samebit.recipes.launch.placement.resolve_device", lambda device: torch.device("cuda", 0)
    )
    with pytest.raises(ValueError, match="placement.transport is 'gloo'; on GPUs it must be nccl"):
        require_transport(run)
