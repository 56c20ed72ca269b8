"""Steps in flight, on the CPU: results that come late change nothing, one thing at a time.

The runner gives nothing before it is waited for (late_runner.py), and poison for what has ended.
"""

import asyncio
import itertools

import pytest
from late_runner import VOCAB, FaultError, assert_idle, assert_same, run_to_end

from samebit.rollout.engine import Engine
from samebit.rollout.runtime.sampler import NonFiniteError
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.types import WeightSyncError

DEPTHS = [1, 2]
PROMPT = list(range(1, 11))
LONG = SamplingParams(max_new_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("depth", [0, *DEPTHS])
def test_results_are_awaited_that_many_steps_later(make_late, depth):
    engine = make_late(depth)
    engine.generate([PROMPT], SamplingParams(max_new_tokens=4, ignore_eos=True))
    launches, waits = ([(kind, i) for i in range(4)] for kind in ("launch", "wait"))
    expected = launches[:depth]
    for pair in zip(launches[depth:], waits, strict=False):
        expected += pair
    assert engine.runner.events == [*expected, *waits[4 - depth :]]


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_way_to_end(plain, make_late, depth):
    """With forks that go on, and sequences that take the place of those that have ended."""
    few = tuple(range(2, VOCAB))  # tokens 0 and 1 go on
    kinds = [
        {"temperature": 3.0, "max_new_tokens": 40},  # by the model's own token
        {"stop_token_ids": range(20)},
        {"stop_token_ids": few, "ignore_eos": True},
        {"stop_token_ids": few, "ignore_eos": True, "min_new_tokens": 1},
        {"stop_token_ids": few, "ignore_eos": True, "min_new_tokens": 5},
        {"stop_token_ids": few, "ignore_eos": True, "min_new_tokens": 12},
        {"ignore_eos": True, "max_new_tokens": 1},
        {"ignore_eos": True},
    ]
    params = [SamplingParams(n=3, **{"max_new_tokens": 12, **kind}) for kind in kinds]
    prompts = [[*PROMPT[i:], *PROMPT] for i in range(len(kinds))]
    truth = plain.generate(prompts, params, return_hidden_states=[1])
    lens = [[len(c.token_ids) for c in group] for group in truth]
    assert lens[3:] == [[2] * 3, [6] * 3, [12] * 3, [1] * 3, [12] * 3]
    assert [{c.finish_reason for c in truth[i]} for i in (0, 3, 5)] == [
        {"stop"},
        {"stop"},
        {"length"},
    ]
    seen = []
    for settings in ({}, {"max_num_seqs": 4, "page_size": 4, "kv_cache_tokens": 100}):
        engine = make_late(depth, **settings)
        found = engine.generate(
            prompts, params, return_hidden_states=[1], progress=lambda *now: seen.append(now)
        )
        for a, b in zip(found, truth, strict=True):
            assert_same(a, b, [1])
        assert seen == sorted(seen)
        assert seen[-1] == (24, sum(map(sum, lens)))
        seen.clear()
        assert_idle(engine)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_nan_in_flight_names_its_sample(plain, make_late, depth):
    """Only that of a sequence that goes on; afterwards everything begins again."""
    params = SamplingParams(n=2, max_new_tokens=8, ignore_eos=True)
    [truth] = plain.generate([PROMPT], params, [[70, 71]])
    engine = make_late(depth)
    engine.runner.nans = {3}
    request = engine.add_request(PROMPT, params, [70, 71])
    said = f"NaN log-prob in request {request}, sample 70, at position {len(PROMPT) + 3}"
    with pytest.raises(NonFiniteError, match=said):
        run_to_end(engine)
    assert engine.step_loop.num_drawn == 2 * 3
    assert_same(run_to_end(engine)[request], truth)
    assert_idle(engine)


def assert_all_reported(engine, names, truth):
    """The requests end as `truth` has them, and leave nothing."""
    found = run_to_end(engine)
    for name, group in zip(names, truth, strict=True):
        assert_same(found[name], group)
    assert_idle(engine)


@pytest.mark.parametrize("depth", [0, *DEPTHS])
@pytest.mark.parametrize("kind", ["launch", "wait"])
@pytest.mark.parametrize("error", [FaultError, KeyboardInterrupt])
def test_samples_without_a_slot_outlive_a_failing_step(plain, make_late, depth, kind, error):
    """More samples than slots, and samples that need none: their prompt's step never ends."""
    params = [SamplingParams(n=4, max_new_tokens=new, ignore_eos=True) for new in (1, 3)]
    truth = plain.generate([PROMPT, PROMPT[:3]], params)
    engine = make_late(depth, max_num_seqs=2)
    engine.runner.fails, engine.runner.error = {(kind, 0)}, error
    names = [
        engine.add_request(prompt, p, [c.sample_id for c in group])
        for prompt, p, group in zip((PROMPT, PROMPT[:3]), params, truth, strict=True)
    ]
    with pytest.raises(error):
        run_to_end(engine)
    assert_all_reported(engine, names, truth)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("error", [FaultError, KeyboardInterrupt])
def test_an_abort_that_finds_a_failing_step_can_be_repeated(plain, make_late, depth, error):
    """Nothing of that step is left; the neighbour begins again from what has arrived."""
    [truth] = plain.generate([PROMPT], LONG, [[4]])
    engine = make_late(depth)
    kept, doomed = (engine.add_request(PROMPT, LONG, [i]) for i in (4, 5))
    for _ in range(4):
        engine.step()
    engine.runner.fails, engine.runner.error = {("wait", 4 - depth)}, error
    with pytest.raises(error):
        engine.abort_request(doomed)
    assert [len(c.token_ids) for c in engine.abort_request(doomed)] == [4 - depth]
    assert_same(run_to_end(engine)[kept], truth)
    assert_idle(engine)


@pytest.mark.parametrize("depth", [0, *DEPTHS])
def test_a_slot_knows_nothing_of_its_last_owner(plain, make_late, depth):
    """Every parameter is another one's, in the only slot that there is."""
    first = SamplingParams(
        temperature=0.0, top_k=2, max_new_tokens=9, min_new_tokens=9, stop_token_ids=range(1, 6),
        ignore_eos=True, seed=9,
    )  # fmt: skip
    params = SamplingParams(n=4, temperature=3.0, max_new_tokens=40)
    [truth] = plain.generate([PROMPT], params)
    assert "stop" in {c.finish_reason for c in truth}
    engine = make_late(depth, max_num_seqs=1)
    for _ in range(2):
        engine.generate([PROMPT], first, return_hidden_states=[0])
        assert_same(engine.generate([PROMPT], params)[0], truth)


def test_what_ended_before_a_failing_step_is_still_reported(plain, make_late):
    """Two steps are taken in together: the first ends a request, the second fails."""
    shorter = SamplingParams(max_new_tokens=2, ignore_eos=True)
    truth = [plain.generate([PROMPT], p, [[9]])[0] for p in (shorter, LONG)]
    engine = make_late(2, page_size=4, kv_cache_tokens=24, prefix_cache=False)
    engine.runner.fails = {("wait", 2)}
    names = [engine.add_request(PROMPT, p, [9]) for p in (shorter, LONG)]
    for _ in range(3):  # the second request has no page for its third token before the first ends
        engine.step()
    assert ("wait", 1) not in engine.runner.events
    with pytest.raises(FaultError, match="wait 2"):
        engine.step()
    assert_all_reported(engine, names, truth)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("failing", [False, True])
def test_an_error_in_progress_ends_what_is_in_flight(plain, make_late, depth, failing):
    """Also where the step that it finds in flight fails: the first error is told."""
    truth = plain.generate([PROMPT, PROMPT[:3]], LONG)
    for moment in (1, 3, 8):
        engine, calls = make_late(depth, prefix_cache=False), itertools.count(1)

        def interrupt(done, tokens):
            if next(calls) == moment:  # noqa: B023
                if failing:
                    engine.runner.fails = {("wait", moment - 1)}  # noqa: B023
                raise KeyboardInterrupt

        neighbour = engine.add_request(PROMPT, LONG, [0])
        with pytest.raises(KeyboardInterrupt):
            engine.generate([PROMPT[:3], PROMPT], LONG, [[1], [2]], progress=interrupt)
        engine.runner.fails = set()
        assert engine.scheduler.num_unfinished <= 1
        assert_same(run_to_end(engine)[neighbour], truth[0])
        for found, group in zip(engine.generate([PROMPT, PROMPT[:3]], LONG), truth, strict=True):
            assert_same(found, group)
        assert_idle(engine)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_cancelled_call_leaves_the_others(plain, make_late, depth):
    """Cancelled while its steps are in flight; the call beside it gets its bits."""
    longer = SamplingParams(max_new_tokens=900, ignore_eos=True)
    [truth] = plain.generate([PROMPT], LONG, [[4]])
    engine = make_late(depth)

    async def together():
        loop = asyncio.get_running_loop()
        doomed = asyncio.create_task(engine.agenerate([PROMPT, PROMPT[:3]], longer))
        kept = asyncio.create_task(engine.agenerate([PROMPT], LONG, [[4]]))

        def cancel(number):
            if number == 3:
                loop.call_soon_threadsafe(doomed.cancel)

        engine.runner.on_launch = cancel
        with pytest.raises(asyncio.CancelledError):
            await doomed
        assert engine.scheduler.num_unfinished <= 1  # the other call's
        return await kept

    [found] = asyncio.run(together())
    assert_same(found, truth)
    assert_idle(engine)


@pytest.mark.parametrize("depth", DEPTHS)
def test_weights_change_only_with_nothing_in_flight(late_folder, make_late, depth):
    """Refused while anything is; afterwards as a plain engine on the new weights."""
    fresh, engine = Engine(late_folder, overlap=False), make_late(depth, page_size=4)
    params = SamplingParams(n=2, max_new_tokens=9, stop_token_ids=range(9))
    for step, ways in enumerate((Engine.copy_weights, Engine.bind_weights), start=1):
        new = {name: p * 1.25 for name, p in engine.weights.items()}
        request = engine.add_request(PROMPT, LONG)
        engine.step()
        with pytest.raises(WeightSyncError, match="needs an idle engine: 1 requests"):
            ways(engine, new, step)
        assert len(engine.abort_request(request)[0].token_ids) == 1
        version = ways(engine, new, step)
        assert fresh.copy_weights(new, step) == version
        for _ in range(2):
            found = engine.generate([PROMPT, PROMPT[:7]], params)
            for group, truth in zip(
                found, fresh.generate([PROMPT, PROMPT[:7]], params), strict=True
            ):
                assert_same(group, truth)
                assert [[s.version for s in c.version_spans] for c in group] == [[version]] * 2
    assert_idle(engine)


@pytest.mark.parametrize("depth", DEPTHS)
def test_what_ended_in_flight_is_found_again(plain, make_late, depth):
    """A second turn over the contexts of completions that drew a stop token, by their pages."""
    params = SamplingParams(n=3, max_new_tokens=30, stop_token_ids=range(1, 6))
    [first] = plain.generate([PROMPT], params)
    assert {c.finish_reason for c in first} == {"stop"}
    turns = [[*PROMPT, *c.token_ids, 9, 8] for c in first]
    truth = plain.generate(turns, LONG)
    hits = []
    for in_flight in (0, depth):
        engine = make_late(in_flight, page_size=2)
        assert_same(engine.generate([PROMPT], params)[0], first)
        before = engine.prefixes.num_hit_tokens
        for found, group in zip(engine.generate(turns, LONG), truth, strict=True):
            assert_same(found, group)
        hits.append(engine.prefixes.num_hit_tokens - before)
    assert hits[0] == hits[1] == sum((len(turn) - 3) // 2 * 2 for turn in turns)


@pytest.mark.parametrize("depth", [0, *DEPTHS])
def test_a_score_that_is_preempted_begins_anew(plain, make_late, depth):
    """Its first values are not there twice."""
    context = [i % VOCAB for i in range(30)]
    [truth] = plain.score([context])
    engine = make_late(depth, page_size=2, kv_cache_tokens=48, prefill_chunk=2, prefix_cache=False)
    request = engine.add_request(PROMPT, SamplingParams(max_new_tokens=30, ignore_eos=True), [0])
    engine.step()
    assert engine.score([context]) == [truth]
    assert engine.scheduler.num_preemptions > 0
    [again] = plain.generate([PROMPT], SamplingParams(max_new_tokens=30, ignore_eos=True))
    assert_same(run_to_end(engine)[request], again)
    assert_idle(engine)
