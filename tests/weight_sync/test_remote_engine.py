"""An engine in another process: called like a local one, by several callers at once."""

import asyncio
import itertools
import os
import pickle
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from functools import partial

import pytest
from callers import parts_of, put_together
from helpers import assert_same_bits, outcomes
from serving import SETTINGS, SIZES, fail_on, local_engine

from samebit.rollout import engine_process
from samebit.rollout.client import stream_of
from samebit.rollout.messages import Ask, Score
from samebit.rollout.remote import RemoteEngine
from samebit.rollout.remote_ranks import RemoteEngineError, _Pipe
from samebit.rollout.runtime.requests import scores_of
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.types import WeightSyncError, WeightVersion

PROMPTS = [[5, 9, 200, 31], [7]]
PARAMS = SamplingParams(n=2, max_new_tokens=8, ignore_eos=True)
ENDLESS = SamplingParams(max_new_tokens=1000, ignore_eos=True)


@pytest.fixture(scope="module")
def remote(remote_of_any_size):
    return remote_of_any_size


@pytest.fixture(scope="module")
def engine(old):
    return local_engine(old.folder)


def kill(engine):
    """Its last rank; the first of several stands still meanwhile, as GPUs do in a sum."""
    first, process = engine._ranks.processes[0], engine._ranks.processes[-1]
    if first is not process:
        os.kill(first.pid, signal.SIGSTOP)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_errors_of_a_remote_engine_are_those_of_a_local_one(remote):
    """Bad input to an engine in another process keeps its type and message."""
    with pytest.raises(ValueError, match="prompt 0"):
        remote.generate([[]], PARAMS)
    with pytest.raises(ValueError, match="331|vocabulary"):
        remote.generate([[331]], PARAMS)
    assert len(remote.generate(PROMPTS, PARAMS)) == 2


def test_signals_to_a_group_are_the_parents_to_judge(remote):
    """Ctrl-C reaches every process of a terminal; the engine's ends when it is told to."""
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(remote._ranks.processes[0].pid, number)
    assert remote.score(PROMPTS[:1]) == remote.score(PROMPTS[:1])


def test_a_remote_engine_is_given_all_that_it_is_asked(remote, old, engine):
    """Parameters and ids of each prompt, layers, temperatures, steps; and progress at the end."""
    params = [
        SamplingParams(n=2, max_new_tokens=5, ignore_eos=True, top_k=9),
        SamplingParams(max_new_tokens=3, ignore_eos=True, temperature=0.5, seed=4),
    ]
    ids, seen = [[7, 1 << 63], [5]], []
    version = remote.update_weights_from_disk(old.folder, 21)
    assert version == remote.weight_version == WeightVersion(21, old.digest)
    assert remote.update_weights_from_disk(old.folder) == WeightVersion(22, old.digest)
    found = remote.generate(
        PROMPTS, params, ids, return_hidden_states=[0, 2], progress=lambda *now: seen.append(now)
    )
    truth = engine.generate(PROMPTS, params, ids, return_hidden_states=[0, 2])
    assert outcomes(found) == outcomes(truth)
    assert [[c.sample_id for c in group] for group in found] == ids
    for a, b in zip(sum(found, []), sum(truth, []), strict=True):
        assert [span.version for span in a.version_spans] == [remote.weight_version]
        assert set(a.hidden_states) == {0, 2}
        for layer, states in b.hidden_states.items():
            assert_same_bits(a.hidden_states[layer], states, layer)
    assert set(seen[:-1]) <= {(0, 0)}
    assert seen[-1] == (3, 2 * 5 + 3)
    assert remote.score(PROMPTS[:1], 0.3) == engine.score(PROMPTS[:1], 0.3)
    [(scores, top)] = remote.score_top(PROMPTS[:1], 3, 0.3)
    [(expected, own)] = engine.score_top(PROMPTS[:1], 3, 0.3)
    assert scores == expected
    assert top.logprobs.tolist() == own.logprobs.tolist()


def assert_idle(remote, old):
    """Nothing is left unfinished: else the engine would refuse this."""
    assert remote.update_weights_from_disk(old.folder).digest == old.digest


def test_progress_that_raises_ends_its_requests(remote, old, engine):
    """An engine that works on for nobody would keep its memory and its CPU; others go on."""

    def interrupt(done, tokens):
        assert (done, tokens) == (0, 0)
        raise KeyboardInterrupt

    async def beside():
        drawn = asyncio.create_task(remote.agenerate(PROMPTS, PARAMS, [[0, 1], [2, 3]]))
        await asyncio.sleep(0)
        with pytest.raises(KeyboardInterrupt):
            remote.generate(PROMPTS[:1], ENDLESS, progress=interrupt)
        return await drawn

    assert outcomes(asyncio.run(beside())) == outcomes(engine.generate(PROMPTS, PARAMS))
    assert_idle(remote, old)


def test_a_call_that_is_interrupted_is_aborted(remote, old, monkeypatch):
    """Its late answer is not taken for the next call's."""

    def interrupted(future, timeout=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remote.generate(PROMPTS[:1], ENDLESS)
    assert remote.score(PROMPTS[:1]) == remote.score(PROMPTS[:1])
    assert_idle(remote, old)


def test_a_call_that_is_interrupted_as_it_goes_out(remote, monkeypatch):
    """Its answer, which nobody waits for, is no end of the answers."""
    wire = remote._ranks._pipes[0]._wire
    send = wire.send

    def interrupted(message):
        send(message)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wire, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remote.score(PROMPTS[:1])
    waiting = remote._ranks.call(Score(PROMPTS[:1], 1.0))[1]
    assert scores_of(waiting.result(timeout=60)) == remote.score(PROMPTS[:1])


def test_calls_to_a_remote_engine_overlap(remote, old, engine):
    """Streams, scores and calls at once: each has its own answer, to the bit."""
    truth = engine.generate(PROMPTS, PARAMS, [[7, 8], [9, 10]])
    context = [*PROMPTS[0], *truth[0][0].token_ids]

    async def together():
        endless = asyncio.create_task(remote.agenerate(PROMPTS[:1], ENDLESS))
        await asyncio.sleep(0.05)
        found = await asyncio.gather(
            parts_of(remote.stream(PROMPTS, PARAMS, [[7, 8], [9, 10]])),
            remote.agenerate(PROMPTS, PARAMS, [[7, 8], [9, 10]]),
            asyncio.to_thread(remote.score, [context]),
            parts_of(remote.stream(PROMPTS[:1], ENDLESS), take=5),
        )
        assert not endless.done()
        with pytest.raises(WeightSyncError, match="needs an idle engine: [12] requests"):
            remote.update_weights_from_disk(old.folder)
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        return found

    parts, drawn, scores, _ = asyncio.run(together())
    assert outcomes(drawn) == outcomes(truth)
    for completion in itertools.chain(*drawn):
        put_together(parts[completion.sample_id], completion)
    assert scores == engine.score([context])
    assert_idle(remote, old)


def test_a_remote_request_is_aborted_by_name(remote, old):
    """Whoever waits for it gets what there is."""

    async def aborted():
        parts = []
        async for part in remote.stream(PROMPTS[:1], ENDLESS):
            parts.append(part)
            if len(parts) == 3:
                [completion] = await asyncio.to_thread(remote.abort_request, part.request_id)
        put_together(parts, completion)
        assert completion.finish_reason == "abort"
        return completion.request_id

    request_id = asyncio.run(aborted())
    with pytest.raises(KeyError, match=f"no unfinished request '{request_id}'"):
        remote.abort_request(request_id)
    remote.flush_cache()
    assert_idle(remote, old)


def test_errors_reach_the_call_that_they_are_of(remote, engine):
    """With where they were raised; the calls beside them go on."""

    async def together():
        return await asyncio.gather(
            remote.agenerate([[331]], PARAMS),
            remote.agenerate(PROMPTS, PARAMS, [[0, 1], [2, 3]]),
            parts_of(remote.stream([[]], PARAMS)),
            return_exceptions=True,
        )

    outside, drawn, empty = asyncio.run(together())
    assert "outside the vocabulary" in str(outside)
    assert "in the engine's process:\nTraceback" in outside.__notes__[0]
    assert isinstance(empty, ValueError)
    assert outcomes(drawn) == outcomes(engine.generate(PROMPTS, PARAMS))
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        remote.generate(PROMPTS, lambda: None)
    assert len(remote.generate(PROMPTS, PARAMS)) == 2


@SIZES
def test_a_death_reaches_all_who_wait(old, size):
    """Calls, streams and whoever comes later; no process is left."""
    engine = RemoteEngine(old.folder, num_ranks=size, **SETTINGS)

    async def together():
        calls = [
            asyncio.create_task(engine.agenerate(PROMPTS[:1], ENDLESS)),
            asyncio.create_task(parts_of(engine.stream(PROMPTS[:1], ENDLESS))),
        ]
        await asyncio.sleep(0.1)
        kill(engine)
        return await asyncio.gather(*calls, return_exceptions=True)

    errors = asyncio.run(together())
    left = [process.is_alive() for process in engine._ranks.processes]
    engine.kill()
    assert left == [False] * size
    assert [type(error) for error in errors] == [RemoteEngineError] * 2
    assert "ended with code -9" in str(errors[0])
    for call in (partial(engine.score, [[1, 2, 3]]), engine.flush_cache):
        with pytest.raises(RemoteEngineError, match="ended with code -9"):
            call()
    engine.close()
    engine.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_fails_on_some_ranks_alone_is_a_death(old, rank):
    """What it raised is no answer: another engine could draw. On all ranks it is one, as ever."""
    for ranks, error in (((0, 1), "a card fell off"), ((rank,), "ended with code 70")):
        engine = RemoteEngine(old.folder, num_ranks=2, **SETTINGS)
        engine._call(Ask(fail_on, ranks, {}))
        with pytest.raises(RuntimeError, match=error) as raised:
            engine.generate(PROMPTS, PARAMS)
        has_died = isinstance(raised.value, RemoteEngineError)
        assert has_died == (len(ranks) == 1) != engine.is_alive
        engine.close()


def test_who_stops_reading_as_the_engine_dies_is_not_told():
    """The stream's end is asked for; there is nothing to abort any more."""
    ended = []

    def start(tell):
        def abandon():
            ended.append(True)
            raise RemoteEngineError("the engine's process 7 ended with code -9")

        tell([1, 2])
        return Future(), abandon

    async def read():
        async with aclosing(stream_of(start)) as stream:
            async for part in stream:
                return part
        return None

    assert asyncio.run(read()) == 1
    assert ended == [True]


@pytest.mark.parametrize("name", ["cpu_threads", "num_ranks"])
@pytest.mark.parametrize("count", [0, "two", True])
def test_bad_counts_of_a_remote_engine(old, name, count):
    message = f"RemoteEngine {name} is .*; it must be (an integer|positive)"
    with pytest.raises(ValueError, match=message):
        RemoteEngine(old.folder, device="cpu", **{name: count})


def test_ranks_that_cannot_be_say_so(old):
    with pytest.raises(ValueError, match="tensor size is 3; with tp_invariant it must divide 8"):
        RemoteEngine(old.folder, num_ranks=3, **SETTINGS)


def test_an_answer_that_cannot_be_read_reaches_all_who_wait(old, monkeypatch):
    """Such as an exception whose class this process lacks: nobody may wait for ever."""
    take = _Pipe._take

    def unreadable(pipe, number, answer):
        if number > engine_process.START:
            raise ModuleNotFoundError("No module named 'plugin'")
        take(pipe, number, answer)

    monkeypatch.setattr(_Pipe, "_take", unreadable)
    engine = RemoteEngine(old.folder, device="cpu", kv_cache_tokens=1024)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.generate, PROMPTS[:1], ENDLESS)
        with pytest.raises(RemoteEngineError, match="ended with code -9") as raised:
            engine.score([[1, 2, 3]])
        assert "plugin" in str(raised.value.__cause__)
        assert isinstance(waiting.exception(timeout=60), RemoteEngineError)
    engine.close()


def test_close_does_not_wait_for_what_is_unfinished(old):
    engine = RemoteEngine(old.folder, device="cpu", kv_cache_tokens=1024)
    waiting = threading.Thread(target=engine.generate, args=(PROMPTS[:1], ENDLESS))
    waiting.start()
    time.sleep(0.1)
    engine.close()
    waiting.join(timeout=60)
    assert not waiting.is_alive()
    assert engine._ranks.processes[0].exitcode == 0


def test_a_remote_engine_of_a_missing_model_says_so(tmp_path):
    """A wrong path must come back from the other process as FileNotFoundError."""
    with pytest.raises(FileNotFoundError, match="does not exist"):
        RemoteEngine(tmp_path / "missing", device="cpu")
