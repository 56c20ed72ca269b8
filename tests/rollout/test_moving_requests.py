"""Requests that one replica leaves off and another goes on with, as the queue has it."""

from contextlib import closing, suppress

import pytest
from helpers import outcomes
from jobs import teach, uneven

from samebit.rollout.engine import Engine
from samebit.rollout.engine_pool import EnginePool
from samebit.rollout.remote import RemoteEngine


@pytest.fixture(scope="module")
def pool(qwen3_path):
    """Two replicas that have room for all that is uneven, and have drawn such."""
    settings = {"device": "cpu", "kv_cache_tokens": 16384, "max_num_seqs": 40, "waits": False}
    with closing(EnginePool(lambda _: RemoteEngine(qwen3_path, **settings), 2, 64)) as pool:
        teach(pool)
        yield pool


@pytest.fixture(scope="module")
def single(qwen3_path):
    return Engine(qwen3_path, device="cpu")


@pytest.mark.parametrize(
    ("seed", "params"),
    [
        (1, {}),
        (2, {"top_p": 0.9, "truncated_logprobs": True}),
        (3, {"min_new_tokens": 150, "stop_token_ids": tuple(range(0, 331, 2))}),
        (4, {"logprobs": False}),
    ],
)
def test_who_has_little_left_goes_on_with_what_another_leaves_off(pool, single, seed, params):
    """Nothing of that can be seen in what is drawn."""
    asked = uneven(seed, **params)
    before = pool.num_moves
    groups = pool.generate(*asked)
    assert pool.num_moves > before
    expected = single.generate(*asked)
    assert outcomes(groups) == outcomes(expected)
    for group, right in zip(groups, expected, strict=True):
        assert [c.thresholds for c in group] == [c.thresholds for c in right]
        assert [c.version_spans for c in group] == [c.version_spans for c in right]
        assert [c.finish_reason for c in group] == [c.finish_reason for c in right]
        assert len({c.request_id for c in group}) == 1
    assert len({group[0].request_id for group in groups}) == len(groups)


def test_what_moves_is_aborted_wherever_it_is(pool, single):
    asked = uneven(6)
    before = pool.num_moves
    requests = pool._requests.generation(*asked, ())
    result, _ = pool._begin(requests)
    while pool.num_moves == before:
        assert not result.done()
    groups = {}
    for request in requests:
        with suppress(KeyError):  # it has ended
            groups[request.request_id] = pool.abort_request(request.request_id)
    assert groups
    for group, right in zip(result.result(), single.generate(*asked), strict=True):
        assert group == groups.get(group[0].request_id, group)
        for completion, whole in zip(group, right, strict=True):
            assert completion.finish_reason in ("abort", whole.finish_reason)
            assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
            assert completion.logprobs == whole.logprobs[: len(completion.token_ids)]


def test_who_gives_up_what_moves_has_it_abandoned(pool):
    before = pool.num_moves
    result, abandon = pool._begin(pool._requests.generation(*uneven(7), ()))
    while pool.num_moves == before:
        assert not result.done()
    abandon()
    assert not result.done()
    with pool._lock:
        loads = pool._queue._loads.values()
        assert not any(job.is_wanted for load in loads for job in load.jobs.values())


@pytest.mark.parametrize("leaves", [True, False])
def test_who_dies_while_requests_move_loses_none(pool, single, monkeypatch, leaves):
    """Whoever leaves them off, or was to go on with them."""
    leave_off = RemoteEngine.leave_off
    engines = pool.replicas

    def dying(engine, numbers):
        answer = leave_off(engine, numbers)
        victims.append(engine if leaves else next(e for e in engines if e is not engine))
        victims[-1].kill()
        return answer

    victims = []
    monkeypatch.setattr(RemoteEngine, "leave_off", dying)
    asked = uneven(8 + leaves)
    assert outcomes(pool.generate(*asked)) == outcomes(single.generate(*asked))
    assert victims
    assert not {*victims} & {*pool.replicas}
