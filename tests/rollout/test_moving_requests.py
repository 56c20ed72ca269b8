"""Requests that one replica leaves off and another goes on with, as the queue has it."""

import asyncio
from contextlib import aclosing, closing, suppress
from dataclasses import replace

import pytest
from helpers import make_prompts, outcomes

from samebit.rollout.engine import Engine
from samebit.rollout.engine_pool import EnginePool
from samebit.rollout.remote import RemoteEngine
from samebit.rollout.types import SamplingParams


def uneven(**params):
    """Requests that the queue takes for alike: every other one ends soon, the others go on."""
    long = SamplingParams(n=2, max_new_tokens=250, ignore_eos=True, **params)
    short = replace(long, min_new_tokens=0, stop_token_ids=tuple(range(331)))
    return make_prompts(*range(3, 23)), [long, short] * 10, [[2 * i, 2 * i + 1] for i in range(20)]


@pytest.fixture(scope="module")
def wide_pool(qwen3_path):
    """Two replicas that have room for all that is uneven."""
    settings = {"device": "cpu", "kv_cache_tokens": 16384, "max_num_seqs": 40, "waits": False}
    with closing(EnginePool(lambda _: RemoteEngine(qwen3_path, **settings), 2, 64)) as pool:
        yield pool


@pytest.fixture(scope="module")
def single(qwen3_path):
    return Engine(qwen3_path, device="cpu")


@pytest.mark.parametrize(
    "params", [{}, {"top_p": 0.9, "truncated_logprobs": True}, {"min_new_tokens": 200}]
)
def test_who_has_little_left_goes_on_with_what_another_leaves_off(wide_pool, single, params):
    """Nothing of that can be seen in what is drawn."""
    asked = uneven(**params)
    before = wide_pool.num_moves
    groups = wide_pool.generate(*asked)
    assert wide_pool.num_moves > before
    expected = single.generate(*asked)
    assert outcomes(groups) == outcomes(expected)
    for group, right in zip(groups, expected, strict=True):
        assert [c.thresholds for c in group] == [c.thresholds for c in right]
        assert [c.version_spans for c in group] == [c.version_spans for c in right]
        assert [c.finish_reason for c in group] == [c.finish_reason for c in right]
        assert len({c.request_id for c in group}) == 1
    assert len({group[0].request_id for group in groups}) == len(groups)


def test_what_moves_is_aborted_wherever_it_is(wide_pool, single):
    asked = uneven()
    before = wide_pool.num_moves
    requests = wide_pool._requests.generation(*asked, ())
    result, _ = wide_pool._begin(requests)
    while wide_pool.num_moves == before:
        pass
    groups = {}
    for request in requests:
        with suppress(KeyError):  # it has ended
            groups[request.request_id] = wide_pool.abort_request(request.request_id)
    assert len(groups) >= 8
    for group, right in zip(result.result(), single.generate(*asked), strict=True):
        assert group == groups.get(group[0].request_id, group)
        for completion, whole in zip(group, right, strict=True):
            assert completion.finish_reason in ("abort", whole.finish_reason)
            assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
            assert completion.logprobs == whole.logprobs[: len(completion.token_ids)]


def test_who_dies_while_requests_move_loses_none(wide_pool, single):
    """Whichever of the two it is; before, a caller gives up what moves."""
    asked = uneven()
    before = wide_pool.num_moves

    def kill(_num_done, _tokens):
        if wide_pool.num_moves > before:
            victims.pop().kill() if victims else None

    async def give_up():
        stream = wide_pool.stream(*asked)
        async with aclosing(stream):
            while wide_pool.num_moves == before:
                await anext(stream)

    asyncio.run(give_up())
    for place in (0, 1):
        before, victims = wide_pool.num_moves, [wide_pool.replicas[place]]
        assert outcomes(wide_pool.generate(*asked, progress=kill)) == outcomes(
            single.generate(*asked)
        )
        assert not victims
    assert wide_pool.num_restarts == 2
