"""Many callers of one engine at once: who drives, who goes away, and what fails."""

import asyncio
import itertools
import threading
from contextlib import aclosing

import pytest
from callers import loop_threads, parts_of, put_together, wait_until
from conservation import check_books
from helpers import make_prompts, outcomes, run_python
from late_runner import FaultError, assert_idle, assert_same

from samebit.rollout.runtime.call import Call
from samebit.rollout.runtime.sampler import NonFiniteError
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.types import WeightSyncError

PROMPTS = make_prompts(5, 70, 1, 33)
PARAMS = SamplingParams(n=2, max_new_tokens=12, ignore_eos=True)
IDS = [[2 * i, 2 * i + 1] for i in range(len(PROMPTS))]
LONG = SamplingParams(max_new_tokens=900, ignore_eos=True)


@pytest.fixture(scope="module")
def truth(engine):
    return engine.generate(PROMPTS, PARAMS, IDS)


# -- threads ---------------------------------------------------------------------------------------


def test_all_ways_at_once(make_engine, truth):
    """generate and score in threads, agenerate and streams, add_request and step."""
    own, found = make_engine(max_num_seqs=5, overlap=True), {}
    contexts = [[*p, *c.token_ids] for p, [c, _] in zip(PROMPTS, truth, strict=True)]
    expected = own.score(contexts)

    def generate(i):
        seen = []
        found[i] = own.generate(
            PROMPTS[i : i + 1], PARAMS, IDS[i : i + 1], progress=lambda *now: seen.append(now)
        )
        assert seen[-1][0] == 2

    def score():
        found["score"] = own.score(contexts)

    async def streamed():
        return await asyncio.gather(
            *(parts_of(own.stream([p], PARAMS, [i])) for p, i in zip(PROMPTS, IDS, strict=True)),
            own.agenerate(PROMPTS, PARAMS, IDS),
        )

    def steps():
        request = own.add_request(PROMPTS[0], PARAMS, IDS[0])
        done = []
        while not done:
            done = [g for g in own.step() if g[0].request_id == request]
        found["steps"] = done

    threads = [threading.Thread(target=generate, args=(i,)) for i in range(len(PROMPTS))]
    threads += [threading.Thread(target=work) for work in (score, steps)]
    for thread in threads:
        thread.start()
    *parts, groups = asyncio.run(streamed())
    for thread in threads:
        thread.join()
    assert outcomes(groups) == outcomes(truth)
    assert outcomes(found["steps"]) == outcomes(truth[:1])
    assert found["score"] == expected
    for i, group in enumerate(truth):
        assert outcomes(found[i]) == outcomes([group])
        for completion in group:
            put_together(parts[i][completion.sample_id], completion)
    wait_until(lambda: not loop_threads())
    check_books(own)
    assert not own.has_unfinished_requests


def test_a_thread_drives_only_while_somebody_waits(make_engine):
    """Not for generate, nor for requests that step reports."""
    wait_until(lambda: not loop_threads())  # those of other tests
    own = make_engine()
    own.add_request(PROMPTS[0], PARAMS)
    own.generate(PROMPTS, PARAMS, progress=lambda *_: check_no_thread())
    check_no_thread()
    asyncio.run(own.agenerate(PROMPTS, PARAMS))
    wait_until(lambda: not loop_threads())
    assert own.loop._driver is None


def check_no_thread():
    assert not loop_threads()


def beside(work):
    """What another thread's call returns."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_what_comes_as_the_last_driver_leaves_is_done(make_engine):
    own, posted = make_engine(), []

    def progress(done, tokens):
        if done == 1:
            posted.append(beside(lambda: own.loop.post(lambda: "it is done")))

    own.generate(PROMPTS[:1], SamplingParams(max_new_tokens=3), progress=progress)
    assert posted[0].result(timeout=60) == "it is done"


def test_who_waits_beside_a_driver_may_give_up(make_engine):
    """generate while the loop's thread drives: its progress raises, the stream goes on."""
    own, started = make_engine(), threading.Event()
    parts = []

    async def read():
        async with aclosing(own.stream(PROMPTS[:1], LONG, [[7]])) as stream:
            async for part in stream:
                parts.append(part)
                if len(parts) == 3:
                    started.set()
                if len(parts) == 200:
                    return

    def interrupt(done, tokens):
        raise KeyboardInterrupt

    reader = threading.Thread(target=asyncio.run, args=(read(),))
    reader.start()
    assert started.wait(60)
    with pytest.raises(KeyboardInterrupt):
        own.generate(PROMPTS[1:2], LONG, progress=interrupt)
    assert len(own.loop.book.calls) <= 1  # the stream's
    reader.join()
    [whole] = own.generate(PROMPTS[:1], SamplingParams(max_new_tokens=200, ignore_eos=True), [[7]])
    assert tuple(itertools.chain(*(p.token_ids for p in parts))) == whole[0].token_ids
    wait_until(lambda: not loop_threads())
    assert not own.has_unfinished_requests


def test_the_engine_goes_on_where_no_thread_can_be_started(make_engine, truth, monkeypatch):
    """Too many threads, or an interpreter that ends: the caller is told, and others may drive."""
    own = make_engine()

    def full(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            asyncio.run(own.agenerate(PROMPTS[:1], LONG))
        assert not own.has_unfinished_requests  # nobody would ask for what it began
    assert outcomes(own.generate(PROMPTS, PARAMS, IDS)) == outcomes(truth)
    own.close()
    wait_until(lambda: not loop_threads())


def test_an_interrupt_is_told_to_the_other_ranks(make_engine, monkeypatch):
    """Only this rank begins again from what has arrived: they would compute another step."""
    own = make_engine()

    def interrupted(version):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(own.step_loop, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            own.generate(PROMPTS, PARAMS)
    with pytest.raises(RuntimeError, match="have parted: KeyboardInterrupt()"):
        own.loop.book.lockstep.exchange()
    assert not own.has_unfinished_requests


def test_close_aborts_what_callers_wait_for(make_engine):
    own = make_engine()

    async def closed():
        waiting = asyncio.create_task(own.agenerate(PROMPTS[:1], LONG))
        await asyncio.sleep(0.05)
        own.close()
        return await waiting

    [[completion]] = asyncio.run(closed())
    assert completion.finish_reason == "abort"
    assert not own.has_unfinished_requests


def test_a_flush_waits_for_the_step(make_engine, truth):
    """Prefixes are forgotten between two steps, while others draw."""
    own = make_engine(page_size=16, overlap=True)

    async def together():
        drawing = asyncio.create_task(own.agenerate(PROMPTS, PARAMS, IDS))
        for _ in range(5):
            own.flush_cache()
            await asyncio.sleep(0.005)
        return await drawing

    assert outcomes(asyncio.run(together())) == outcomes(truth)
    check_books(own)


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("kind", ["launch", "wait"])
def test_a_failing_step_reaches_all_who_wait(plain, make_late, depth, kind):
    """asyncio's callers, streams and a thread; a request of add_request begins again."""
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    [truth] = plain.generate([[1, 2, 3]], params, [[5]])
    own = make_late(depth)
    kept = own.add_request([1, 2, 3], params, [5])
    own.runner.fails = {(kind, 3)}

    async def together():
        return await asyncio.gather(
            own.agenerate([[4, 5]], LONG),
            own.agenerate([[4, 6]], LONG),
            parts_of(own.stream([[4, 7]], LONG)),
            return_exceptions=True,
        )

    errors = asyncio.run(together())
    assert [type(error) for error in errors] == [FaultError] * 3
    wait_until(lambda: not loop_threads())
    check_books(own)
    found = {}
    while own.has_unfinished_requests:
        found |= {group[0].request_id: group for group in own.step()}
    assert_same(found[kept], truth)
    assert_idle(own)


def test_a_failing_step_of_generate_reaches_those_beside_it(make_late):
    own, results, steps = make_late(1), [], itertools.count()

    def progress(done, tokens):
        if next(steps) == 2:
            requests = own.requests.generation([[4, 5]], LONG, [[9]], ())
            results.append(beside(lambda: own.loop.submit(Call(requests))))
            own.runner.fails = {("wait", 6)}

    with pytest.raises(FaultError):
        own.generate([[1, 2, 3]], LONG, progress=progress)
    with pytest.raises(FaultError):
        results[0].result(timeout=60)
    assert_idle(own)


def test_a_command_that_ends_threads_reaches_all_who_wait(make_engine):
    """And leaves the driver's place free."""

    def leave():
        raise SystemExit("enough")

    own = make_engine()
    result, _ = own.loop.begin(own.requests.generation([[4, 5]], LONG, [[9]], ()))
    for future in (own.loop.post(leave), result):
        with pytest.raises(SystemExit, match="enough"):
            future.result(timeout=60)
    wait_until(lambda: not loop_threads())
    assert_idle(own)


def test_an_interrupt_is_told_though_the_step_in_flight_fails(make_late):
    """What ended the call first is its error."""
    own = make_late(1)

    def progress(done, tokens):
        if tokens == 3:
            own.runner.fails = {("wait", n) for n in range(3, 9)}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own.generate([[1, 2, 3]], LONG, progress=progress)
    assert own.runner.num_faults == 1
    assert_idle(own)


@pytest.mark.parametrize("kind", ["launch", "wait"])
def test_an_interrupted_step_ends_the_call_that_drives_alone(make_late, plain, kind):
    """The one beside it begins again from what has arrived, in the loop's thread."""
    own, results, steps = make_late(1), [], itertools.count()
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)

    def progress(done, tokens):
        if next(steps) == 2:
            requests = own.requests.generation([[4, 5]], params, [[9]], ())
            results.append(beside(lambda: own.loop.submit(Call(requests))))
            own.runner.fails, own.runner.error = {(kind, 8)}, KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own.generate([[1, 2, 3]], LONG, progress=progress)
    [group] = results[0].result(timeout=60)
    assert_same(group, plain.generate([[4, 5]], params, [[9]])[0])
    wait_until(lambda: not loop_threads())
    assert_idle(own)


def test_a_nan_ends_the_calls_and_the_next_one_is_right(make_late, plain):
    own = make_late(1)
    own.runner.nans = {4}
    calls = [own.agenerate([[4, 5]], LONG), parts_of(own.stream([[4, 6]], LONG))]

    async def together():
        return await asyncio.gather(*calls, return_exceptions=True)

    assert [type(error) for error in asyncio.run(together())] == [NonFiniteError] * 2
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    [again] = own.generate([[1, 2, 3]], params, [[5]])
    assert_same(again, plain.generate([[1, 2, 3]], params, [[5]])[0])


def test_during_an_update_nobody_is_admitted(make_engine):
    own = make_engine()
    own.sink.begin(3)
    for call in (own.agenerate(PROMPTS, PARAMS), parts_of(own.stream(PROMPTS, PARAMS))):
        with pytest.raises(WeightSyncError, match="an update to step 3 is under way"):
            asyncio.run(call)
    assert not own.has_unfinished_requests
    assert not own.loop.book.calls


def test_a_cancelled_call_is_aborted_beside_a_failing_step(make_late):
    """The step in flight fails in its abort: the one who cancels is cancelled, the other told."""
    own = make_late(1)

    async def together():
        loop = asyncio.get_running_loop()
        doomed = asyncio.create_task(own.agenerate([[4, 5]], LONG))
        other = asyncio.create_task(own.agenerate([[4, 6]], LONG))

        def cancel(number):
            if number == 5:
                own.runner.fails = {("wait", n) for n in range(5, 9)}
                loop.call_soon_threadsafe(doomed.cancel)

        own.runner.on_launch = cancel
        with pytest.raises((asyncio.CancelledError, FaultError)):
            await doomed
        with pytest.raises(FaultError):
            await other

    asyncio.run(together())
    wait_until(lambda: not loop_threads())
    assert_idle(own)


def test_a_client_is_known_without_torch():
    """What speaks to an engine elsewhere need not load one."""
    code = "import sys; import samebit.rollout.client; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"
