"""Replicas of an engine as one client: what is drawn, by whom, and what a death changes."""

import asyncio
import os
import signal
from contextlib import aclosing, closing
from dataclasses import replace

import pytest
from helpers import make_prompts, outcomes

from samebit.rollout.engine import Engine
from samebit.rollout.engine_pool import EnginePool
from samebit.rollout.remote import RemoteEngine
from samebit.rollout.remote_ranks import RemoteEngineError, launch_here
from samebit.rollout.types import SamplingParams

PROMPTS = make_prompts(5, 16, 70, 1, 33) * 2
PARAMS = SamplingParams(n=2, max_new_tokens=12, ignore_eos=True)
LONG = SamplingParams(n=2, max_new_tokens=300, ignore_eos=True)
SETTINGS = {"device": "cpu", "kv_cache_tokens": 1024, "max_num_seqs": 4}
IDS = [[2 * i, 2 * i + 1] for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def truth(qwen3_path):
    return Engine(qwen3_path).generate(PROMPTS, PARAMS, IDS)


def start_pool(folder, num_replicas=2, launch=launch_here, **limits):
    settings = SETTINGS | {"launch": launch, "waits": False}
    return EnginePool(lambda _: RemoteEngine(folder, **settings), num_replicas, 4, **limits)


def stop(engine):
    os.kill(engine._ranks.processes[0].pid, signal.SIGSTOP)


@pytest.fixture(scope="module")
def pool(qwen3_path):
    """Two replicas, one of which may be replaced: the last test has them die."""
    with closing(start_pool(qwen3_path, timeout_s=3.0, max_restarts=1)) as pool:
        yield pool


def test_replicas_draw_what_one_engine_draws(pool, truth):
    """In every way to ask, for several callers at once; and progress is told."""
    seen = []
    drawn = pool.generate(PROMPTS, PARAMS, IDS, progress=lambda *counts: seen.append(counts))
    assert outcomes(drawn) == outcomes(truth)
    assert seen[-1] == (20, 20 * 12)
    assert seen == sorted(seen)

    async def ask():
        return await asyncio.gather(
            *(pool.agenerate([p], PARAMS, [ids]) for p, ids in zip(PROMPTS, IDS, strict=True))
        )

    assert outcomes([group for [group] in asyncio.run(ask())]) == outcomes(truth)
    engine = pool.living[0]
    scored = [p for p in PROMPTS if len(p) > 1]
    assert pool.score(scored) == engine.score(scored)
    assert [logprobs for logprobs, _ in pool.score_top(scored, 3)] == engine.score(scored)
    assert len({group[0].request_id for group in drawn}) == len(PROMPTS)


def test_increments_of_a_stream_are_whole_samples(pool, truth):
    async def read():
        return [increment async for increment in pool.stream(PROMPTS, PARAMS, IDS)]

    found = sorted(asyncio.run(read()), key=lambda increment: increment.sample_id)
    expected = [(c.token_ids, c.logprobs, c.finish_reason) for group in truth for c in group]
    assert [(i.token_ids, i.logprobs, i.finish_reason) for i in found] == expected


def test_a_sample_that_goes_on_keeps_no_room_for_those_that_ended(qwen3_path):
    """One of four ends long after the others: another prompt is begun meanwhile, and ends first."""
    endless = SamplingParams(n=4, max_new_tokens=200, ignore_eos=True)
    [group] = Engine(qwen3_path, device="cpu").generate(PROMPTS[:1], endless, [[0, 1, 2, 3]])
    longest, *others = (completion.token_ids for completion in group)
    stops = {next(t for t in token_ids if t not in longest) for token_ids in others}
    params = [replace(endless, stop_token_ids=tuple(stops)), SamplingParams(max_new_tokens=2)]
    with closing(start_pool(qwen3_path, 1)) as pool:
        [unfinished] = pool.generate(PROMPTS[:1], params[0], [[0, 1, 2, 3]])
        assert [len(c.token_ids) == 200 for c in unfinished] == [True, False, False, False]

        async def first():
            stream = pool.stream(PROMPTS[:2], params, [[0, 1, 2, 3], [4]])
            async with aclosing(stream):
                return (await anext(stream)).sample_id

        assert asyncio.run(first()) == 4


def test_bad_input_is_refused_before_anything_runs(pool):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        pool.generate([[1], []], PARAMS)
    with pytest.raises(KeyError):
        pool.abort_request("no such request")
    assert pool.generate([]) == []


def test_fresh_ids_are_never_given_twice(pool):
    async def ask():
        return [await pool.agenerate([[5, 6]], SamplingParams(n=3)) for _ in range(2)]

    groups = [group for [group] in asyncio.run(ask())]
    assert len({c.sample_id for group in groups for c in group}) == 6


def test_who_gives_up_has_its_requests_abandoned(pool, truth):
    """By an exception of progress, and by a cancelled task: the pool is of use after it."""

    class Enough(Exception):
        pass

    def stop(*_):
        raise Enough

    with pytest.raises(Enough):
        pool.generate([[1, 2]] * 40, LONG, progress=stop)

    async def cancel():
        task = asyncio.create_task(pool.agenerate([[1, 2]] * 40, LONG))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert outcomes(pool.generate(PROMPTS, PARAMS, IDS)) == outcomes(truth)


def test_requests_are_aborted_where_they_are(pool):
    """Those that are drawn, and one that waits for room."""
    requests = pool._requests.generation([[1, 2]] * 5, LONG, None, ())
    result, _ = pool._begin(requests)
    for request in reversed(requests):
        group = pool.abort_request(request.request_id)
        assert [c.finish_reason for c in group] == ["abort", "abort"]
    *drawn, waited = result.result()
    assert [c.token_ids for c in waited] == [(), ()]
    assert all(len(c.token_ids) < 300 for group in drawn for c in group)


def test_samples_of_the_dead_are_drawn_by_the_others(pool, truth):
    """A successor draws nothing before an update, which asks for `replicas`, has brought it the
    weights. One that stands still is killed; when nobody is left, it is said why."""
    victim, other = pool.living

    def kill(num_done, _tokens):
        if num_done >= 6:
            victim.kill()

    assert outcomes(pool.generate(PROMPTS, PARAMS, IDS, progress=kill)) == outcomes(truth)
    assert pool.living == (other,)
    assert outcomes(pool.generate(PROMPTS, PARAMS, IDS)) == outcomes(truth)
    successor, _ = pool.replicas
    assert successor is not victim
    assert outcomes(pool.generate(PROMPTS, PARAMS, IDS)) == outcomes(truth)

    stop(other)
    assert outcomes(pool.generate(PROMPTS, PARAMS, IDS)) == outcomes(truth)
    assert not other.is_alive
    assert pool.living == (successor,)
    assert pool.num_restarts == 2
    lost = "2 replicas of the engine have died, and at most 1 may be replaced; .* code -9"
    with pytest.raises(RemoteEngineError, match=lost):
        _ = pool.replicas
    with pytest.raises(RemoteEngineError, match=lost.replace("2 replicas", "3 replicas")):
        pool.generate([[1, 2]] * 8, LONG, progress=lambda *_: successor.kill())
    with pytest.raises(RemoteEngineError, match="3 replicas of the engine have died"):
        pool.generate([[1, 2]])
    pool.close()
    with pytest.raises(RemoteEngineError, match="the engine is closed"):
        pool.generate([[1, 2]])


def test_who_does_not_answer_between_draws_is_killed(qwen3_path):
    """What is asked between draws waits for no replica that stands still: another one answers."""
    with closing(start_pool(qwen3_path, 2, timeout_s=2.0, max_restarts=0)) as pool:
        victim, other = pool.living
        version = other.weight_version
        stop(victim)
        assert pool.weight_version == version
        assert pool.living == (other,)
        assert not victim.is_alive
        assert pool.memory_occupation().keys() == other.memory_occupation().keys()
        stop(other)
        assert pool.accept_lengths is None
        assert pool.living == ()
        assert pool.num_restarts == 2
        for ask in (lambda: pool.weight_version, pool.release_memory_occupation):
            with pytest.raises(RemoteEngineError, match="2 replicas of the engine have died"):
                ask()


def test_a_closed_pool_answers_nothing(qwen3_path):
    """Though its replicas lived to the end."""
    pool = start_pool(qwen3_path, 1)
    pool.close()
    with pytest.raises(RemoteEngineError, match="the engine is closed"):
        _ = pool.weight_version
    with pytest.raises(RemoteEngineError, match="the engine is closed"):
        pool.memory_occupation()


def standing_still(*arguments):
    """Launch a process that does not come to making its engine."""
    [launched] = launch_here(*arguments)
    os.kill(launched.process.pid, signal.SIGSTOP)
    return [launched]


def test_one_that_stands_still_as_it_starts_is_replaced(qwen3_path, truth):
    """Once its time is up; and nobody waits for it who closes the pool before."""
    starts = iter([(False, standing_still), (True, launch_here), (False, standing_still)])
    made = []

    def start(_):
        waits, launch = next(starts)
        made.append(RemoteEngine(qwen3_path, 1, launch, waits=waits, **SETTINGS))
        return made[-1]

    with closing(EnginePool(start, 1, 4, max_restarts=3, start_timeout_s=1.0)) as pool:
        assert pool.num_restarts == 1
        stopped, engine = made
        assert not stopped.is_alive
        assert pool.living == (engine,)
        assert outcomes(pool.generate(PROMPTS, PARAMS, IDS)) == outcomes(truth)
        pool._replicas._start_timeout_s = 1e6
        engine.kill()
        engine.death()  # once it has ended
        assert pool.living == ()  # and its successor is being started
    assert len(made) == 3
    made[-1].death()
    assert not made[-1].is_alive


def test_one_that_dies_as_it_starts_is_replaced(qwen3_path, truth):
    """And counted like any other."""
    lives = iter([False, True, False, False])

    def launch(*arguments):
        [launched] = launch_here(*arguments)
        if not next(lives):
            launched.process.kill()
        return [launched]

    with closing(start_pool(qwen3_path, 1, launch, max_restarts=2)) as pool:
        assert pool.num_restarts == 1
        assert outcomes(pool.generate(PROMPTS, PARAMS, IDS)) == outcomes(truth)
        [engine] = pool.living
        engine.kill()
        engine.death()  # once it has ended
        lost = "3 replicas of the engine have died, and at most 2 may be replaced; .* code -9"
        with pytest.raises(RemoteEngineError, match=lost):
            _ = pool.replicas
