"""Requests for replicas, and a queue of these."""

from dataclasses import replace

from helpers import make_prompts

from samebit.rollout.job import Job
from samebit.rollout.types import Request, SamplingParams
from samebit.rollout.work_queue import WorkQueue


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


def uneven(seed, **params):
    """Requests that the queue takes for alike: every other one ends soon, the others go on. Prompts
    of other seeds have no home yet."""
    long = SamplingParams(**{"n": 2, "max_new_tokens": 250, "ignore_eos": True} | params)
    short = replace(long, min_new_tokens=0, stop_token_ids=tuple(range(331)))
    prompts = make_prompts(*range(3, 15), seed=seed)
    return prompts, [long, short] * 6, [[2 * i, 2 * i + 1] for i in range(12)]


def teach(pool):
    """Have a new pool of two draw what is uneven, so that its queue knows: whichever end first,
    most of them are short."""
    pool.generate(*uneven(99, max_new_tokens=40))
    assert pool.num_moves == 0, "nobody knew"
    prompts, (_, short, *_), sample_ids = uneven(98)
    pool.generate(prompts, short, sample_ids)
