"""What rank 0 tells the others: when it is compared, and when the ranks have parted."""

from types import SimpleNamespace

import pytest
import torch

from samebit.kernels.reduce import RankGroup
from samebit.rollout.messages import Drain
from samebit.rollout.runtime import lockstep
from samebit.rollout.runtime.engine_loop import EngineLoop

PARTED = "the tensor parallel ranks have parted: "


@pytest.fixture
def others(monkeypatch):
    """Failures that rank 1 tells next; with an error in their place the exchange raises it."""
    told = []

    def gather(own, group):
        failure = told.pop(0)
        if isinstance(failure, BaseException):
            raise failure
        return [own, (failure, [])]

    monkeypatch.setattr(lockstep, "gather_objects", gather)
    return told


@pytest.fixture
def leader():
    """Rank 0 of two, which leads."""
    leader = lockstep.Lockstep(RankGroup(0, 2, object()))
    leader.begin(leads=True)
    return leader


def test_what_fails_after_a_message_is_compared_once_the_others_have_heard_it(leader, others):
    """They drain when they are told to, so that their failure comes an exchange later."""
    others += ["", "NaN", ""]
    leader.say(Drain())
    leader.failed(ValueError("NaN"))
    assert leader.exchange() == [Drain()]
    assert leader.exchange() == []
    assert leader.exchange() == []
    others += ["NaN", ""]
    leader.failed(ValueError("NaN"))
    leader.meet()
    leader.failed(ValueError("NaN"))
    with pytest.raises(RuntimeError, match="a step failed on some ranks, not on all: {0: "):
        leader.meet()


def test_an_interrupted_step_parts_the_ranks(leader, others):
    """The others are in its midst: whatever came next would be taken for a part of it."""
    leader.failed(KeyboardInterrupt())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"{PARTED}KeyboardInterrupt"):
            leader.meet()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TypeError("no plain value")])
def test_an_exchange_that_breaks_off_parts_the_ranks(leader, others, error):
    """What was said is lost, so that nothing may follow it."""
    others.append(error)
    leader.say(Drain())
    with pytest.raises(type(error)):
        leader.meet()
    with pytest.raises(RuntimeError, match=f"{PARTED}({type(error).__name__}|no plain value)"):
        leader.meet()


def test_what_ends_a_block_is_told_though_the_ranks_have_parted(leader):
    """Ctrl-C stays what it is; without another error the parting is told."""

    def stop_leading(marks):
        raise RuntimeError(PARTED)

    book = SimpleNamespace(
        lockstep=leader, stop_leading=stop_leading, calls={}, device=torch.device("cpu")
    )
    loop = EngineLoop(book)
    with pytest.raises(KeyboardInterrupt), loop.leading(lambda: (0, 0)):
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match=PARTED), loop.leading(lambda: (0, 0)):
        pass
