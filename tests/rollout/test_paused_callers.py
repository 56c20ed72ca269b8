"""Who waits in a pause, and what cannot be done in one."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
from callers import wait_until
from conservation import settle
from helpers import outcomes
from pauses import PARAMS, PROMPTS, add, changed, finish, step_until

from samebit.rollout.engine import Engine
from samebit.weight_sync.types import WeightSyncError


def test_abort_ends_everything_with_what_there_is(small_folder):
    """Callers, streams and those who step get their partial samples; later calls wait."""
    engine = Engine(small_folder)
    truth = outcomes(finish(engine, add(engine)))
    names = add(engine)
    step_until(engine, names[0], 5)
    engine.pause_generation()
    assert not engine.has_unfinished_requests or engine.is_paused
    groups = {group[0].request_id: group for group in engine.step()}
    for name, expected in zip(names, truth, strict=True):
        for found, (token_ids, *_) in zip(groups[name], expected, strict=True):
            assert found.finish_reason == "abort"
            assert list(found.token_ids) == list(token_ids)[: len(found.token_ids)]
    assert len(groups[names[0]][0].token_ids) == 5
    with pytest.raises(RuntimeError, match="generation is paused; continue_generation"):
        engine.step()
    engine.continue_generation()
    settle(engine)


def in_thread(call):
    """The call on a thread, and a list that its result comes into."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found


@pytest.mark.parametrize("mode", ["retract", "keep"])
def test_callers_wait_through_a_pause_and_an_update(small_folder, mode):
    """A thread, asyncio and a stream; new calls queue, one is aborted, weights change meanwhile."""
    engine = Engine(small_folder)
    expected = outcomes(engine.generate(PROMPTS, PARAMS))
    engine.pause_generation(mode)
    thread, found = in_thread(lambda: engine.generate(PROMPTS, PARAMS))
    wait_until(lambda: engine.loop.book.calls)
    name = engine.add_request(PROMPTS[0], PARAMS)

    async def later():
        waiting = asyncio.create_task(engine.agenerate(PROMPTS[:1], PARAMS, [[0, 1]]))
        while len(engine.loop.book.calls) < 2:
            await asyncio.sleep(0)
        assert [c.finish_reason for c in engine.abort_request(name)] == ["abort"] * 2
        engine.copy_weights({n: w.clone() for n, w in engine.weights.items()}, 3)
        assert not found
        engine.continue_generation()
        return await waiting

    assert outcomes(asyncio.run(later())) == expected[:1]
    thread.join()
    assert outcomes(found[0]) == expected
    assert {s.version.step for g in found[0] for c in g for s in c.version_spans} == {3}


def test_a_pause_in_mid_call_ends_it_or_lets_it_go_on(small_folder):
    """From another thread than the one that drives."""
    engine = Engine(small_folder)
    expected, reached, go_on = (
        engine.generate(PROMPTS, PARAMS),
        threading.Event(),
        threading.Event(),
    )

    def progress(_, drawn):
        if drawn >= 8 and not reached.is_set():
            reached.set()
            go_on.wait()

    for mode in ("keep", "retract", "abort"):
        reached.clear()
        go_on.clear()
        call = in_thread(lambda: engine.generate(PROMPTS, PARAMS, progress=progress))
        thread, found = call
        reached.wait()
        pause, _ = in_thread(lambda mode=mode: engine.pause_generation(mode))
        wait_until(lambda: engine.loop._inbox)
        go_on.set()
        pause.join()
        assert engine.is_paused
        if mode != "abort":
            assert not found
            engine.continue_generation()
        thread.join()
        reasons = {c.finish_reason for group in found[0] for c in group}
        assert reasons == ({"abort"} if mode == "abort" else {"length"})
        if mode != "abort":
            assert outcomes(found[0]) == outcomes(expected)
    engine.continue_generation()


def test_ranks_pause_at_the_same_step_or_not_at_all(small_folder, monkeypatch):
    """A thread beside the one that drives would reach each rank at another step."""
    engine, told = Engine(small_folder), []
    monkeypatch.setattr(engine.loop.book.lockstep, "_ranks", SimpleNamespace(size=2, rank=0))

    def pause():
        with pytest.raises(RuntimeError, match="2 tensor parallel ranks need Engine.leading"):
            engine.pause_generation("keep")
        told.append(True)

    def progress(_, drawn):
        if not told and not threads:
            threads.append(in_thread(pause)[0])
            wait_until(lambda: engine.loop._inbox)

    threads = []
    engine.generate(PROMPTS, PARAMS, progress=progress)
    threads[0].join()
    assert told
    assert not engine.is_paused
    engine.pause_generation("keep")  # by the thread that drives: all ranks do it alike
    engine.continue_generation()


def test_close_ends_what_waits_in_a_pause(small_folder):
    """Nobody is left behind."""
    engine = Engine(small_folder)
    engine.pause_generation("keep")
    thread, found = in_thread(lambda: engine.generate(PROMPTS, PARAMS))
    wait_until(lambda: engine.loop.book.calls)
    engine.close()
    thread.join()
    assert {c.finish_reason for group in found[0] for c in group} == {"abort"}


def test_a_mixture_is_not_gone_on_with(small_folder):
    """A broken update leaves the engine paused, with its requests; a full one heals it."""
    engine = Engine(small_folder)
    names = add(engine)
    step_until(engine, names[0], 4)
    engine.pause_generation("keep")
    new = changed(engine)
    with pytest.raises(WeightSyncError, match="digest"):
        engine.copy_weights(new, 7, "00")
    with pytest.raises(WeightSyncError, match="step 7 broke off: .* new, 0 unknown, 0 old"):
        engine.continue_generation()
    assert engine.is_paused
    late = engine.add_request(PROMPTS[2], PARAMS)
    engine.copy_weights(new, 8)
    engine.continue_generation()
    *groups, group = finish(engine, [*names, late])
    steps = [[s.version.step for s in c.version_spans] for c in groups[0]]
    assert steps == [[0, 8]] * 2
    assert {s.version.step for c in group for s in c.version_spans} == {8}


def test_an_engine_at_work_still_refuses_an_update(small_folder):
    """Without a pause nothing changes: half a step would see other weights."""
    engine = Engine(small_folder)
    add(engine)
    with pytest.raises(WeightSyncError, match="3 requests are unfinished.*pause_generation"):
        engine.copy_weights(changed(engine), 7)
    settle(engine, leaves_requests=True)


@pytest.mark.parametrize(("mode", "hint"), [("Keep", "keep$"), ("wait", "wait for the calls")])
def test_an_unknown_mode_names_the_known_ones(small_folder, mode, hint):
    engine = Engine(small_folder)
    with pytest.raises(ValueError, match=f"mode '{mode}' is unknown; use one of abort.*{hint}"):
        engine.pause_generation(mode)
    assert not engine.is_paused
    engine.continue_generation()
