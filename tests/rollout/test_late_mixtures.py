"""Random requests under random settings, with steps in flight, on the CPU: no bit may move.

The runner gives nothing before it is waited for (late_runner.py), and poison for what has ended.
"""

import functools
import itertools
import random
from collections import Counter
from contextlib import suppress

import pytest
from late_runner import VOCAB, FaultError, assert_idle, assert_same

from samebit.rollout.runtime.sampler import NonFiniteError
from samebit.rollout.types import SamplingParams


class Mixture:
    """Random requests that share beginnings, and random settings under which they run."""

    def __init__(self, seed, plain):
        rng = self.rng = random.Random(seed)
        stem = [rng.randrange(VOCAB) for _ in range(8)]
        self.prompts, self.params, self.ids, self.layers = [], [], [], []
        for i in range(7):
            tail = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 6))]
            self.prompts.append(stem[: rng.randrange(9)] + tail)
            longest = rng.choice((1, 2, 9, 14))
            self.params.append(
                SamplingParams(
                    n=rng.choice((1, 1, 2, 4)),
                    max_new_tokens=longest,
                    min_new_tokens=min(longest, rng.choice((0, 0, 1, 3, 14))),
                    stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice((0, 9, 20)))),
                    ignore_eos=rng.random() < 0.3,
                    temperature=rng.choice((0.0, 0.7, 1.0, 3.0)),
                    top_k=rng.choice((0, 0, 5)),
                    top_p=rng.choice((1.0, 1.0, 0.8)),
                    seed=rng.choice((None, None, 5)),
                    logprobs=rng.random() < 0.9,
                )
            )
            self.ids.append([100 * i + 7 * s for s in range(self.params[-1].n)])
            self.layers.append(rng.choice(((), (), (1,), (0, 1))))
        self.settings = {
            "page_size": rng.choice((2, 4)),
            "kv_cache_tokens": rng.choice((28, 36, 60)),
            "prefill_chunk": rng.choice((3, 64)),
            "max_batch_tokens": rng.choice((7, 64)),
            "max_num_seqs": rng.choice((3, 8)),
            "prefix_cache": rng.random() < 0.7,
        }
        self.truth = plain.generate(
            self.prompts, self.params, self.ids, return_hidden_states=(0, 1)
        )
        self.scores = plain.score([[*self.prompts[0], *self.truth[0][0].token_ids]])

    def add(self, engine, i):
        """Queue prompt i; its request id."""
        return engine.add_request(
            self.prompts[i], self.params[i], self.ids[i], return_hidden_states=self.layers[i]
        )


def repeated(call):
    """Call until no step fails in it that was told to."""
    while True:
        try:
            return call()
        except (FaultError, NonFiniteError):
            pass


def assert_aborted(found, truth):
    """Each sample as far as it was, or whole if it had ended."""
    for part, whole in zip(found, truth, strict=True):
        length = len(part.token_ids)
        assert part.sample_id == whole.sample_id
        assert part.token_ids == whole.token_ids[:length]
        assert part.logprobs == whole.logprobs[:length]
        assert part.version_spans == (whole.version_spans if length else ())
        ended = length == len(whole.token_ids)
        assert part.finish_reason == (whole.finish_reason if ended else "abort")
    assert any(part.finish_reason == "abort" for part in found)


def run_mixture(engine, mixture, seen):
    """Add, abort and score at random moments; every result is the plain engine's."""
    rng, truth, names, found, aborted = mixture.rng, mixture.truth, {}, {}, {}
    coming = rng.sample(range(len(truth)), len(truth))
    context = [*mixture.prompts[0], *truth[0][0].token_ids]
    moments = itertools.count(-rng.randrange(12))
    while coming or engine.has_unfinished_requests:
        while coming and rng.random() < 0.5:
            i = coming.pop()
            names[mixture.add(engine, i)] = i
        if next(moments) == 0:
            assert repeated(lambda: engine.score([context])) == mixture.scores
        running = [name for name in names if name not in found and name not in aborted]
        if running and rng.random() < 0.06:
            doomed = rng.choice(running)
            with suppress(KeyError):  # it has ended in flight
                aborted[doomed] = repeated(functools.partial(engine.abort_request, doomed))
        found |= {group[0].request_id: group for group in repeated(engine.step)}
    assert {*found, *aborted} == set(names)
    for name, group in found.items():
        assert_same(group, truth[names[name]], mixture.layers[names[name]], names[name])
        seen.update(c.finish_reason for c in group)
    for name, group in aborted.items():
        assert_aborted(group, truth[names[name]])
        seen["abort"] += 1
    everything = [c for group in (*found.values(), *aborted.values()) for c in group]
    assert engine.step_loop.num_drawn == sum(len(c.token_ids) for c in everything)
    seen["preemption"] += engine.scheduler.num_preemptions
    seen["hit"] += engine.prefixes.num_hit_tokens if engine.prefixes else 0
    seen["fault"] += engine.runner.num_faults
    assert_idle(engine)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seeds", [range(4, 9), range(10, 14)], ids=["calm", "failing"])
def test_random_mixtures(plain, make_late, seeds, depth):
    """Stops, forks, preemption, cache hits, aborts, scores and failures, in flight."""
    failing, seen = seeds.start > 0, Counter()
    for seed in seeds:
        mixture = Mixture(seed, plain)
        engine = make_late(depth, **mixture.settings)
        if failing:
            *moments, a, b = mixture.rng.sample(range(24), 6)
            engine.runner.fails = {(mixture.rng.choice(("launch", "wait")), m) for m in moments}
            engine.runner.nans = {a, b}
        run_mixture(engine, mixture, seen)
    for kind in ("stop", "length", "abort", "preemption", "hit", *["fault"] * failing):
        assert seen[kind] > 0, kind
