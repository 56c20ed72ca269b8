"""Streams: what each step drew, to whoever reads; who stops reading aborts."""

import asyncio
import itertools
from concurrent.futures import Future

import pytest
from callers import loop_threads, parts_of, put_together, wait_until
from conservation import check_books
from counting import World
from helpers import make_prompts, outcomes
from late_runner import assert_idle

from samebit.rollout.client import stream_of
from samebit.rollout.types import Increment, SamplingParams

PROMPTS = make_prompts(5, 70, 1, 33)
PARAMS = SamplingParams(n=2, max_new_tokens=12, ignore_eos=True)
IDS = [[2 * i, 2 * i + 1] for i in range(len(PROMPTS))]
LONG = SamplingParams(max_new_tokens=900, ignore_eos=True)


@pytest.fixture(scope="module")
def truth(engine):
    return engine.generate(PROMPTS, PARAMS, IDS)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"overlap": True},
        {"max_num_seqs": 3, "prefill_chunk": 7, "max_batch_tokens": 20},
        {"page_size": 16, "kv_cache_tokens": 144, "overlap": True},
    ],
    ids=str,
)
def test_increments_are_the_completion(make_engine, truth, settings):
    """Forks, samples without a slot, chunks and preemption: no token twice, none too few."""
    own = make_engine(**settings)
    parts = asyncio.run(parts_of(own.stream(PROMPTS, PARAMS, IDS)))
    for completion in itertools.chain(*truth):
        put_together(parts[completion.sample_id], completion)
    assert max(map(len, parts.values())) == 12, "a token a step"
    if "kv_cache_tokens" in settings:
        assert own.scheduler.num_preemptions > 0
    check_books(own)


def test_what_was_drawn_is_read_from_any_token_on():
    """In a slot, out of it and in another one."""
    world = World(num_pages=4)
    seqs = [seq for _ in range(2) for seq in world.add([1] * 6, max_new=8)]
    while world.scheduler.has_unfinished:
        world.step()
        for seq in seqs:
            known = len(seq.token_ids) if seq.slot is None else world.slots.known[seq.slot]
            count = int(known) - 6
            for start in range(count + 1):
                expected = [7] * (count - start), [-1.0] * (count - start), []
                assert world.slots.drawn(seq, start) == expected
    assert world.scheduler.num_preemptions > 0


def test_a_stream_without_logprobs_has_none(make_engine):
    params = SamplingParams(max_new_tokens=3, ignore_eos=True, logprobs=False)
    [parts] = asyncio.run(parts_of(make_engine().stream(PROMPTS[:1], params))).values()
    assert [p.logprobs for p in parts] == [()] * len(parts)
    assert sum(len(p.token_ids) for p in parts) == 3


def test_bad_input_is_refused_before_the_first_increment(engine):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.stream([[]], PARAMS)
    assert asyncio.run(parts_of(engine.stream([]))) == {}


def test_a_stream_draws_new_samples(make_engine):
    own = make_engine()

    async def both():
        return await asyncio.gather(*(parts_of(own.stream(PROMPTS[:1], PARAMS)) for _ in range(2)))

    first, second = asyncio.run(both())
    assert not set(first) & set(second)


def test_who_stops_reading_an_engine_that_is_gone_is_not_troubled():
    """What abandons the call may find that the process has just died."""
    increment = Increment(
        request_id="0", sample_id=0, token_ids=(1,), logprobs=(-0.5,), finish_reason=None,
        version_spans=(),
    )  # fmt: skip

    def gone():
        raise RuntimeError("the engine's process 7 ended with code -9")

    def start(tell):
        tell([increment])
        return Future(), gone

    assert asyncio.run(parts_of(stream_of(start), take=1)) == {0: [increment]}


def test_who_stops_reading_aborts(make_engine, truth):
    """The neighbour gets its bits; the engine is idle soon afterwards, and its thread gone."""
    own = make_engine(prefix_cache=False)

    async def together():
        kept = asyncio.create_task(own.agenerate(PROMPTS, PARAMS, IDS))
        parts = await parts_of(own.stream(PROMPTS[:2], LONG), take=5)
        assert sum(map(len, parts.values())) == 5
        return await kept

    assert outcomes(asyncio.run(together())) == outcomes(truth)
    wait_until(lambda: not loop_threads())
    assert own.loop.book.num_drawn < LONG.max_new_tokens  # of each of the two that nobody read
    assert_idle(own)


def test_an_abort_by_name_ends_a_stream(make_engine):
    """Its increments are what was drawn until then; an agenerate returns it too."""
    own = make_engine(overlap=True)

    async def together():
        other = asyncio.create_task(own.agenerate(PROMPTS[:1], LONG))
        parts = []
        async for part in own.stream(PROMPTS[:1], LONG):
            parts.append(part)
            if len(parts) == 4:
                [aborted] = own.abort_request(part.request_id)
                for name in list(own.loop.book.live):
                    own.abort_request(name)
        return parts, aborted, await other

    parts, aborted, [[other]] = asyncio.run(together())
    put_together(parts, aborted)
    assert aborted.finish_reason == other.finish_reason == "abort"
    assert 0 < len(other.token_ids) < 900
    assert not own.has_unfinished_requests
