"""Who draws which request: balance, room, homes of prefixes, and what the dead leave."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from samebit.rollout.types import Completion, Request, SamplingParams
from samebit.rollout.work_queue import Job, WorkQueue


def make_job(i=0, n=2, prompt=(1, 2, 3), max_new_tokens=100):
    ids = tuple(range(n * i, n * i + n))
    params = SamplingParams(n=n, max_new_tokens=max_new_tokens)
    request = Request(request_id=str(i), prompt_ids=prompt, params=params, sample_ids=ids)
    return Job(request, i, answer=print)


def queue_of(num_replicas, room=8):
    queue = WorkQueue(room)
    for replica in range(num_replicas):
        queue.add(replica)
    return queue


def give_all(queue):
    given = []
    while (pair := queue.give()) is not None:
        given.append(pair)
    return given


def test_tokens_are_balanced():
    """Long requests on one, short ones on the other, in the order in which they wait."""
    queue = queue_of(2, room=100)
    lengths = [1000, 100, 100, 100, 100, 100, 900]
    jobs = [make_job(i, 1, (i,), length) for i, length in enumerate(lengths)]
    queue.put(jobs)
    given = give_all(queue)
    assert [job for _, job in given] == jobs
    assert [replica for replica, _ in given] == [0, 1, 1, 1, 1, 1, 1]


def test_room_is_kept_and_filled():
    """What finds none waits, in order; a job larger than the room goes to an idle replica."""
    queue = queue_of(1, room=4)
    jobs = [make_job(0), make_job(1), make_job(2), make_job(3, n=9), make_job(4)]
    queue.put(jobs)
    assert [job for _, job in give_all(queue)] == jobs[:2]
    assert queue.end(0, jobs[1].number)
    assert [job for _, job in give_all(queue)] == [jobs[2]]
    assert queue.end(0, jobs[0].number)
    assert give_all(queue) == []
    assert queue.end(0, jobs[2].number)
    assert [job for _, job in give_all(queue)] == [jobs[3]]
    assert queue.is_busy(0)
    assert queue.end(0, jobs[3].number)
    assert [job for _, job in give_all(queue)] == [jobs[4]]
    assert not queue.end(0, jobs[3].number), "it was ended before"


def test_a_prefix_has_a_home_while_that_is_hardly_busier():
    queue = queue_of(2, room=100)
    queue.put([make_job(0, prompt=(7,) * 64 + (1,)), make_job(1, prompt=(8,))])
    assert [replica for replica, _ in give_all(queue)] == [0, 1]
    queue.put([make_job(i, prompt=(7,) * 64 + (i,)) for i in (2, 3, 4, 5)])
    assert [replica for replica, _ in give_all(queue)] == [0, 1, 1, 1]


@pytest.mark.parametrize("common", [0, 64, 500])
def test_a_conversation_stays_at_home(common):
    """Whatever all prompts begin with: each turn goes where the one before it was."""
    rng, queue = random.Random(common), queue_of(8, room=1000)

    def more(count):
        return tuple(rng.randrange(1000) for _ in range(count))

    system = more(common)
    prompts = [system + more(700) for _ in range(64)]
    queue.put([make_job(i, 1, prompt) for i, prompt in enumerate(prompts)])
    first = give_all(queue)
    homes = [replica for replica, _ in first]
    assert sorted(Counter(homes).values()) == [8] * 8
    for pair in first:
        assert queue.end(pair[0], pair[1].number) is pair[1]
    for _ in range(3):
        prompts = [prompt + more(300) for prompt in prompts]
        for i in rng.sample(range(64), 64):
            queue.put([make_job(i, 1, prompts[i])])
            [(replica, job)] = give_all(queue)
            assert replica == homes[i]
            assert queue.end(replica, job.number) is job


def test_a_lost_home_leaves_the_one_of_a_shorter_beginning():
    queue, begins = queue_of(3, room=100), (7,) * 64
    long, filler, other = (*begins, *(1,) * 100), (8,) * 200, (*begins, *(2,) * 100)
    jobs = [make_job(i, 1, x, 5000 - 2000 * i) for i, x in enumerate((long, filler, other))]
    queue.put(jobs)
    given = give_all(queue)
    assert [replica for replica, _ in given] == [0, 1, 2]
    for pair in given:
        assert queue.end(pair[0], pair[1].number) is pair[1]
    queue.remove(0)
    queue.put([make_job(3, 1, (*long, *(3,) * 100))])
    assert [replica for replica, _ in give_all(queue)] == [2]


def test_what_the_dead_had_waits_again_first():
    queue = queue_of(2, room=4)
    jobs = [make_job(i) for i in range(6)]
    queue.put(jobs)
    given = give_all(queue)
    lost = [job for replica, job in given if replica == 0]
    assert queue.remove(0)
    assert not queue.remove(0)
    assert not queue.end(0, lost[0].number), "somebody else draws it"
    queue.add(2)
    assert [job for _, job in give_all(queue)] == lost
    assert queue.replicas == [1, 2]


def test_samples_that_have_ended_leave_room():
    """Others of their job go on; where it has to be drawn again, it takes its whole room."""
    queue = queue_of(2, room=4)
    jobs = [make_job(0, n=4), make_job(1, n=4), make_job(2, n=3), make_job(3, n=1)]
    queue.put(jobs)
    assert give_all(queue) == [(0, jobs[0]), (1, jobs[1])]
    queue.free(0, jobs[0].number, 2)
    assert give_all(queue) == []
    queue.free(0, jobs[0].number, 1)
    assert give_all(queue) == [(0, jobs[2])]
    queue.free(1, jobs[0].number, 1)  # which another has
    queue.free(1, 9, 1)  # which nobody has
    assert give_all(queue) == []
    queue.remove(0)
    queue.add(2)
    assert give_all(queue) == [(2, jobs[0])]
    assert queue.end(1, jobs[1].number)
    assert give_all(queue) == [(1, jobs[2]), (1, jobs[3])]


def test_who_has_fewer_samples_left_is_asked_first():
    queue = queue_of(2, room=8)
    jobs = [make_job(i, n=4, prompt=(i,)) for i in range(3)]
    queue.put(jobs[:2])
    assert give_all(queue) == [(0, jobs[0]), (1, jobs[1])]
    queue.free(1, jobs[1].number, 1)
    queue.put(jobs[2:])
    assert give_all(queue) == [(1, jobs[2])]


def test_what_nobody_waits_for_is_not_drawn_again():
    queue = queue_of(2, room=4)
    jobs = [make_job(i) for i in range(4)]
    queue.put(jobs)
    lost = [job for replica, job in give_all(queue) if replica == 0]
    assert queue.drop(lost[:1]) == [(0, lost[0])]
    queue.remove(0)
    queue.add(2)
    assert give_all(queue) == [(2, job) for job in lost[1:]]


def test_what_is_dropped_and_found():
    queue = queue_of(1, room=2)
    jobs = [make_job(i) for i in range(3)]
    queue.put(jobs)
    give_all(queue)
    assert queue.find("0") == (0, jobs[0])
    assert queue.find("2") == (None, jobs[2])
    assert queue.find("9") is None
    assert queue.drop(jobs[:2]) == [(0, jobs[0])]
    assert queue.find("1") is None
    assert queue.drop_all() == [jobs[2]]
    assert queue.give() is None


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_or_given_twice(seed):
    """64 replicas that end, die and are replaced at random: every job is ended once."""
    rng, queue, num_replicas = random.Random(seed), queue_of(64, room=16), 64
    jobs = [
        make_job(i, rng.choice((1, 4, 16)), (rng.randrange(50),), rng.randrange(1, 500))
        for i in range(2000)
    ]
    queue.put(jobs)
    running, ended = [], Counter()
    while len(ended) < len(jobs):
        running += give_all(queue)
        if rng.random() < 0.02:
            dead = rng.choice(queue.replicas)
            queue.remove(dead)
            queue.add(num_replicas)
            num_replicas += 1
        at = rng.randrange(len(running))
        replica, job = running[at]
        if job.num_samples > 1 and rng.random() < 0.5:
            queue.free(replica, job.number, rng.randrange(1, job.num_samples))
            continue
        del running[at]
        ended[job] += queue.end(replica, job.number) is job
        if not ended[job]:
            del ended[job]
    assert set(ended.values()) == {1}
    assert give_all(queue) == []


def begun(queue, jobs):
    """Each behind who draws it."""
    queue.put(jobs)
    given = give_all(queue)
    for _, job in given:
        job.has_begun = True
    return {job.number: replica for replica, job in given}


def aborted(job, count):
    """What a replica has of a job that it leaves off behind so many tokens, of each sample."""
    return [
        Completion(
            request_id=request.request_id,
            sample_id=sample_id,
            token_ids=tuple(range(count)),
            logprobs=(0.0,) * count,
            finish_reason="abort",
            version_spans=(),
        )
        for request in job.requests
        for sample_id in request.sample_ids
    ]


def test_who_has_little_left_gets_what_was_given_last():
    """Half of the difference at most, and nothing while anything moves or waits."""
    queue = queue_of(2, room=100)
    jobs = [make_job(i, n=4, prompt=(i,)) for i in range(10)]
    homes = begun(queue, jobs)
    assert queue.leave() == []
    for job in jobs:
        if homes[job.number] == 1:
            assert queue.end(1, job.number)
    left = [job for job in jobs if homes[job.number] == 0]
    assert queue.leave() == [(0, left[4]), (0, left[3])]
    assert queue.leave() == []
    for job in left[3:]:
        assert queue.end(0, job.number) is job
        assert job.take(aborted(job, 7)) is None
        queue.put_back(job)
    assert give_all(queue) == [(1, left[4]), (1, left[3])]
    assert [request.prompt_ids for request in left[3].requests] == [(6, *range(7))]
    assert left[3].requests[0].params.max_new_tokens == 93
    assert left[3].requests[0].sample_ids == left[3].request.sample_ids
    assert queue.leave() == []


@pytest.mark.parametrize(("num_most", "num_least"), [(7, 0), (15, 8)])
def test_nothing_moves_where_it_would_hardly_pay(num_most, num_least):
    """A step of few samples takes hardly longer than one of half as many."""
    queue = queue_of(2, room=100)
    jobs = [make_job(i, n=1, prompt=(i,)) for i in range(2 * num_most)]
    homes = begun(queue, jobs)
    mine = [job for job in jobs if homes[job.number] == 1]
    for job in mine[num_least:]:
        assert queue.end(1, job.number)
    assert queue.leave() == []
    queue.put([job := make_job(99, n=1, prompt=(99,), max_new_tokens=1)])
    assert give_all(queue) == [(1, job)]
    for job in mine[:1] if num_least else jobs[:0]:
        assert queue.end(1, job.number)
        assert queue.end(1, 99)
        assert len(queue.leave()) == (num_most - num_least + 1) // 2


def test_what_has_not_begun_or_cannot_be_left_off_stays():
    queue = queue_of(2, room=100)
    jobs = [make_job(i, n=1, prompt=(i,)) for i in range(24)]
    homes = begun(queue, jobs)
    mine = [job for job in jobs if homes[job.number] == 0]
    for job in jobs:
        if homes[job.number] == 1:
            assert queue.end(1, job.number)
    mine[-1].has_begun = False
    mine[-2].request = replace(mine[-2].request, score_only=True)
    mine[-3].request = replace(mine[-3].request, hidden_state_layers=(0,))
    mine[-4].is_wanted = False
    assert [job for _, job in queue.leave()] == mine[-5:-11:-1]


def leaving(room=100):
    """A queue of two, one of which is to leave off two jobs, and these."""
    queue = queue_of(2, room)
    jobs = [make_job(i, n=4, prompt=(i,)) for i in range(10)]
    homes = begun(queue, jobs)
    for job in jobs:
        if homes[job.number] == 1:
            queue.end(1, job.number)
    return queue, [job for _, job in queue.leave()]


def test_what_moves_survives_both_replicas():
    """It is drawn by whoever lives: as it was, or what is left of it where that is known."""
    queue, (last, other) = leaving()
    queue.end(0, last.number)
    assert last.take(aborted(last, 5)) is None
    queue.put_back(last)
    queue.remove(1)
    queue.remove(0)
    queue.add(2)
    given = [job for _, job in give_all(queue)]
    assert {last.number, other.number} <= {job.number for job in given}
    assert {len(request.prompt_ids) for request in last.requests} == {6}
    assert other.requests == (other.request,)
    for job in given:
        job.has_begun = True
    queue.add(3)
    assert queue.leave(), "nothing moves any more"


def test_who_gives_up_what_moves_has_it_moved_nowhere():
    queue, (last, other) = leaving()
    assert queue.drop([last, other]) == [(0, other), (0, last)]
    assert queue.end(0, last.number) is last
    group = last.take(aborted(last, 5))
    assert [len(completion.token_ids) for completion in group] == [5] * 4


def test_what_ends_before_it_is_left_off_is_done():
    """And the rest goes on behind its own tokens; samples that have the same ones together."""
    _, (job, _) = leaving()
    found = aborted(job, 3)
    found[0] = replace(found[0], finish_reason="stop")
    found[2] = replace(found[2], token_ids=(9,), logprobs=(-1.0,))
    assert job.take(found) is None
    first, second, third, fourth = job.request.sample_ids
    assert [request.sample_ids for request in job.requests] == [(second, fourth), (third,)]
    assert [request.prompt_ids[1:] for request in job.requests] == [(0, 1, 2), (9,)]
    assert len({request.request_id for request in job.requests}) == 2
    job.wait()
    assert job.num_samples == 3
    job.next_home = None
    ends = [replace(c, finish_reason="length") for c in aborted(job, 2)]
    group = job.take(ends)
    assert [c.sample_id for c in group] == [first, second, third, fourth]
    assert [c.token_ids for c in group] == [(0, 1, 2), (0, 1, 2, 0, 1), (9, 0, 1), (0, 1, 2, 0, 1)]
    assert [c.logprobs[0] for c in group] == [0.0, 0.0, -1.0, 0.0]
    assert {c.request_id for c in group} == {job.request.request_id}
