"""Jobs that one replica leaves off for another: which ones, and what becomes of them."""

import itertools
import random
from dataclasses import replace

import pytest
from jobs import give_all, make_job, queue_of

from samebit.rollout.job import put_together, what_is_left
from samebit.rollout.types import Completion, SamplingParams
from samebit.weight_sync.types import VersionSpan, WeightVersion


def begun(queue, jobs):
    """Each behind who draws it."""
    queue.put(jobs)
    given = give_all(queue)
    for replica, job in given:
        queue.begun(replica, [job])
    return {job.number: replica for replica, job in given}


def completion(sample_id, count, reason="length"):
    return Completion(
        request_id="?",
        sample_id=sample_id,
        token_ids=tuple(range(count)),
        logprobs=(0.0,) * count,
        finish_reason=reason,
        version_spans=(),
    )


def aborted(job, count):
    """What a replica has of a job that it leaves off behind so many tokens, of each sample."""
    return [completion(sample_id, count, "abort") for sample_id in job.unfinished]


def uneven_queue(num_replicas=2, room=100, lengths=(10, 20, 30, 90)):
    """One in which samples were of these lengths."""
    queue = queue_of(num_replicas, room)
    queue.learn(completion(-1 - i, count) for i, count in enumerate(lengths))
    return queue


def test_who_has_few_left_gets_what_was_given_last():
    """Half of the difference at most, each once, and nothing while anything moves or waits."""
    queue = uneven_queue()
    jobs = [make_job(i, n=4, prompt=(i,)) for i in range(10)]
    homes = begun(queue, jobs)
    assert queue.leave() is None
    for job in jobs:
        if homes[job.number] == 1:
            assert queue.end(1, job.number)
    mine = [job for job in jobs if homes[job.number] == 0]
    assert queue.leave() == (0, [mine[4], mine[3]])
    assert queue.leave() is None
    for job in mine[3:]:
        assert queue.end(0, job.number) is job
        assert job.take(aborted(job, 7)) is None
        queue.put_back(job, 100 + job.number)
    assert give_all(queue) == [(1, mine[4]), (1, mine[3])]
    assert [request.prompt_ids for request in mine[3].requests] == [(6, *range(7))]
    assert mine[3].requests[0].params.max_new_tokens == 93
    assert mine[3].requests[0].sample_ids == mine[3].request.sample_ids
    queue.begun(1, mine[3:])
    for job in mine[:3]:
        assert queue.end(0, job.number)
    assert queue.leave() is None, "it was asked for before"


def two_loads(queue, num_most, num_least):
    """Jobs of one sample each, so many on each of two replicas."""
    jobs = [make_job(i, n=1, prompt=(i,)) for i in range(2 * num_most)]
    homes = begun(queue, jobs)
    for job in [job for job in jobs if homes[job.number] == 1][num_least:]:
        assert queue.end(1, job.number)
    return [job for job in jobs if homes[job.number] == 0]


@pytest.mark.parametrize(
    ("num_most", "num_least", "num_moving"), [(7, 0, 0), (15, 8, 0), (8, 0, 4), (16, 8, 4)]
)
def test_nothing_moves_where_a_step_takes_hardly_less(num_most, num_least, num_moving):
    queue = uneven_queue()
    two_loads(queue, num_most, num_least)
    replica, moving = queue.leave() or (0, [])
    assert (replica, len(moving)) == (0, num_moving)


@pytest.mark.parametrize(
    ("lengths", "moves"),
    [((), False), ((50,), False), ((50, 50, 50, 50), False), ((50, 50, 62, 63), False),
     ((50, 50, 63, 64), True), ((1, 2, 3, 4), True)],
)  # fmt: skip
def test_nothing_moves_where_samples_are_alike(lengths, moves):
    """What is left of them is not worth computing again what stands before; an aborted one counts
    for nothing."""
    queue = uneven_queue(lengths=lengths)
    queue.learn([completion(99, 1000, "abort")])
    two_loads(queue, 8, 0)
    assert (queue.leave() is not None) == moves


def test_a_long_prompt_has_to_be_worth_it():
    queue = uneven_queue()
    mine = two_loads(queue, 8, 0)
    mine[-1].request = replace(mine[-1].request, prompt_ids=(1,) * 1000)
    assert queue.leave() == (0, mine[-2:-6:-1])


def test_what_has_not_begun_or_cannot_be_left_off_stays():
    queue = uneven_queue()
    mine = two_loads(queue, 12, 0)
    mine[-1].has_begun = False
    mine[-2].request = replace(mine[-2].request, score_only=True)
    mine[-3].request = replace(mine[-3].request, hidden_state_layers=(0,))
    mine[-4].is_wanted = False
    assert queue.leave() == (0, mine[-5:-11:-1])
    queue.stay(mine)
    assert queue.leave() == (0, [mine[1], mine[0]])


def test_others_leave_where_the_fullest_replica_cannot():
    """Its one request is larger than half of the difference."""
    queue = uneven_queue(1)
    begun(queue, [make_job(0, n=64, prompt=(0,))])
    queue.add(1)
    jobs = [make_job(i, n=4, prompt=(i,)) for i in range(20, 30)]
    assert {*begun(queue, jobs).values()} == {1}
    queue.add(2)
    assert queue.leave() == (1, jobs[:-6:-1])


def test_what_was_taken_from_a_replica_has_not_begun():
    queue = uneven_queue()
    queue.put([job := make_job()])
    [(replica, _)] = give_all(queue)
    queue.remove(replica)
    queue.begun(replica, [job])
    assert not job.has_begun
    assert give_all(queue) == [(1, job)]
    assert not job.has_begun


def leaving():
    """A queue of two, one of which is to leave off two jobs, and these."""
    queue = uneven_queue()
    jobs = [make_job(i, n=4, prompt=(i,)) for i in range(10)]
    homes = begun(queue, jobs)
    for job in jobs:
        if homes[job.number] == 1:
            queue.end(1, job.number)
    _, found = queue.leave()
    return queue, found


def test_what_moves_survives_both_replicas():
    """It is drawn by whoever lives: as it was, or what is left of it where that is known."""
    queue, (last, other) = leaving()
    queue.end(0, last.number)
    assert last.take(aborted(last, 5)) is None
    queue.put_back(last, 100)
    queue.remove(1)
    queue.remove(0)
    queue.add(2)
    given = [job for _, job in give_all(queue)]
    assert {100, other.number} <= {job.number for job in given}
    assert {len(request.prompt_ids) for request in last.requests} == {6}
    assert other.requests == (other.request,)
    assert other.next_home is None
    queue.begun(2, given)
    queue.add(3)
    assert queue.leave() is not None, "nothing moves any more"


def test_who_gives_up_what_moves_has_it_moved_nowhere():
    queue, (last, other) = leaving()
    assert queue.drop([last, other]) == [(0, other), (0, last)]
    assert queue.end(0, last.number) is last
    group = last.take(aborted(last, 5))
    assert [len(completion.token_ids) for completion in group] == [5] * 4


@pytest.mark.parametrize("seed", range(3))
def test_nothing_that_moves_is_lost_or_drawn_twice(seed):
    """Eight replicas that die at random, leave off what they are asked to or not, or end it: every
    sample has all its tokens once."""
    rng, queue, numbers = random.Random(seed), uneven_queue(8, room=64), itertools.count(1000)
    jobs = [make_job(i, rng.choice((1, 4)), (rng.randrange(50),)) for i in range(300)]
    queue.put(jobs)
    running, groups, replicas, num_moves = [], {}, itertools.count(8), 0
    while len(groups) < len(jobs):
        for replica, job in give_all(queue):
            queue.begun(replica, [job])
            running.append((replica, job))
        if rng.random() < 0.02:
            queue.remove(rng.choice(queue.replicas))
            queue.add(next(replicas))
        if (leaving := queue.leave()) is not None and rng.random() < 0.9:
            replica, moving = leaving
            for job in moving:
                if rng.random() < 0.8 and queue.end(replica, job.number) is job:
                    running.remove((replica, job))
                    if (group := job.take(aborted(job, rng.randrange(3)))) is not None:
                        groups[job] = group
                        continue
                    num_moves += 1
                    queue.put_back(job, next(numbers))
            queue.stay(moving)
            continue
        fast = [pair for pair in running if pair[0] % 3 == 0]
        running.remove(ends := rng.choice(fast or running))
        replica, job = ends
        if queue.end(replica, job.number) is job:
            count = job.requests[0].params.max_new_tokens
            assert job not in groups
            groups[job] = job.take([completion(i, count) for i in job.unfinished])
    assert num_moves
    for job in jobs:
        assert [c.sample_id for c in groups[job]] == list(job.request.sample_ids)
        assert {len(c.token_ids) for c in groups[job]} == {100}


def test_what_ends_before_it_is_left_off_is_done():
    """And the rest goes on behind its own tokens; samples that have the same ones together."""
    _, (job, _) = leaving()
    found = aborted(job, 3)
    found[0] = replace(found[0], finish_reason="stop")
    found[2] = replace(found[2], token_ids=(9,), logprobs=(-1.0,))
    assert job.take([replace(c, request_id=job.request.request_id) for c in found]) is None
    first, second, third, fourth = job.request.sample_ids
    assert [request.sample_ids for request in job.requests] == [(second, fourth), (third,)]
    assert [request.prompt_ids[1:] for request in job.requests] == [(0, 1, 2), (9,)]
    assert len({request.request_id for request in job.requests}) == 2
    assert job.num_samples == 3
    job.next_home = None
    group = job.take([completion(sample_id, 2) for sample_id in job.unfinished])
    assert [c.sample_id for c in group] == [first, second, third, fourth]
    assert [c.token_ids for c in group] == [(0, 1, 2), (0, 1, 2, 0, 1), (9, 0, 1), (0, 1, 2, 0, 1)]
    assert [c.logprobs[0] for c in group] == [0.0, 0.0, -1.0, 0.0]
    assert {c.request_id for c in group} == {job.request.request_id}


def test_the_least_number_of_tokens_goes_on_behind_those_there_are():
    params = SamplingParams(n=2, max_new_tokens=9, min_new_tokens=5)
    request = replace(make_job().request, params=params, sample_ids=(7, 8))
    left = what_is_left(request, [completion(7, 3, "abort"), completion(8, 6, "abort")])
    assert [(r.params.min_new_tokens, r.params.max_new_tokens) for r in left] == [(2, 6), (0, 3)]


OLD, NEW = WeightVersion(step=1, digest="1" * 16), WeightVersion(step=2, digest="2" * 16)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([(0, OLD, False)], []),  # the weights are the same
        ([(0, NEW, False)], [(5, OLD, True)]),
        ([(0, NEW, False), (2, OLD, False)], [(5, OLD, True)]),  # keys of both, and now of one
        ([(0, NEW, False), (2, OLD, True)], []),
    ],
)
def test_spans_say_whose_keys_stand_before(before, after):
    """The second part begins anew, under OLD; NEW comes in it behind one token, and keeps keys."""
    spans = tuple(VersionSpan(*span) for span in before)
    first = replace(completion(1, 5, "abort"), version_spans=spans)
    rest = (VersionSpan(0, OLD), VersionSpan(1, NEW))
    found = put_together(first, replace(completion(1, 4), version_spans=rest)).version_spans
    added = tuple(VersionSpan(*span) for span in after)
    assert found == spans + added + (VersionSpan(6, NEW),)
