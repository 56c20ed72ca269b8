"""Who draws which request: balance, room, homes of prefixes, and what the dead leave."""

import random
from collections import Counter

import pytest
from jobs import give_all, make_job, queue_of


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
