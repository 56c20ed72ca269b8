"""Requests that are stepped by hand, for the tests of pauses."""

from conservation import check_books, settle

from samebit.rollout.types import SamplingParams

PROMPTS = [[7, 3, 11, 3, 19, 5, 2], [7, 3, 11, 3, 19, 5, 2, 23, 13], [9]]
PARAMS = SamplingParams(n=2, max_new_tokens=12, ignore_eos=True)


def changed(engine):
    """Other weights: each matrix its neighbour's, so to say."""
    return {n: w.roll(1, 0) * 1.1 if w.dim() > 1 else w.clone() for n, w in engine.weights.items()}


def add(engine, prompts=PROMPTS, params=PARAMS, first_id=0, layers=()):
    """Requests, whose samples have ids that say which they are."""
    return [
        engine.add_request(
            p, params, range(10 * i + first_id, 10 * i + first_id + params.n),
            return_hidden_states=layers,
        )
        for i, p in enumerate(prompts)
    ]  # fmt: skip


def finish(engine, names):
    found = {}
    while engine.has_unfinished_requests:
        found |= {group[0].request_id: group for group in engine.step()}
        check_books(engine)
    settle(engine)
    return [found[name] for name in names]


def num_drawn(engine, name, index=0):
    sample = engine.loop.book.live[name].samples[index]
    return len(engine.scheduler._slots.drawn(sample, 0)[0])


def step_until(engine, name, count, index=0):
    """Step until a sample has drawn so many tokens."""
    while num_drawn(engine, name, index) < count:
        engine.step()


def finish_without_settling(engine, names):
    found = {}
    while engine.has_unfinished_requests:
        found |= {group[0].request_id: group for group in engine.step()}
    return [found[name] for name in names]
