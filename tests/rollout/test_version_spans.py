"""Each token belongs to the weights of the step that drew it, however late its result comes.

The steps themselves take any version at any time. The model that only counts draws the version's
own number, so that tokens say who drew them.
"""

import random
from contextlib import suppress

import pytest
from conservation import check_books
from counting import World

from samebit.weight_sync.types import VersionSpan, WeightVersion

VERSIONS = [WeightVersion(step, f"digest {step}") for step in range(4)]
FIRST = 10  # the token that version 0 draws


def spans_by_tokens(seq):
    """The spans that a sample's own tokens tell of."""
    numbers = [token - FIRST for token in seq.token_ids[seq.prompt_len :]]
    starts = [i for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1]]
    return [VersionSpan(i, VERSIONS[numbers[i]]) for i in starts]


def spans_by_versions(seq):
    """Its spans, but for those that tell no more than that a context was computed anew."""
    found = []
    for span in seq.spans:
        if not found or found[-1].version != span.version:
            found.append(VersionSpan(span.start, span.version))
        else:
            assert span.recomputed
    return found


def step_under(world, number):
    """One step that is launched under a version."""
    world.version, world.runner.token = VERSIONS[number], FIRST + number
    world.step()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_version_begins_with_the_step_that_is_launched_under_it(depth):
    """One token a step: two of version 0, three of version 1, then version 0 again."""
    world = World(depth=depth)
    [seq, other] = world.add([1] * 6, max_new=7, n=2)
    for number in (0, 0, 1, 1, 1, 0, 0, *[0] * depth):
        step_under(world, number)
    for sample in (seq, other):
        assert [token - FIRST for token in sample.token_ids[6:]] == [0, 0, 1, 1, 1, 0, 0]
        assert sample.spans == [
            VersionSpan(0, VERSIONS[0]), VersionSpan(2, VERSIONS[1]), VersionSpan(5, VERSIONS[0])
        ]  # fmt: skip


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("settings", [{}, {"num_pages": 7}, {"max_num_seqs": 2}], ids=str)
def test_spans_are_exact_whatever_becomes_of_a_sample(depth, settings):
    """Forks that wait, preemption, stops, aborts and failures, under versions that come and go."""
    rng, several, preemptions = random.Random(11), 0, 0
    for _ in range(20):
        world, seqs = World(depth=depth, cached=True, prefill_chunk=5, **settings), []
        number = 0
        while len(seqs) < 12 or world.scheduler.has_unfinished:
            if len(seqs) < 12 and rng.random() < 0.5:
                prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
                stops = rng.choice([(), (FIRST + 3,)])
                n = rng.choice([1, 3])
                seqs += world.add(prompt, rng.randrange(1, 12), n, stop_token_ids=stops)
            elif rng.random() < 0.05 and world.live:
                world.abort(rng.choice(list(world.live)))
            world.runner.fails = rng.random() < 0.05
            if rng.random() < 0.4:
                number = rng.randrange(len(VERSIONS))
            with suppress(RuntimeError):
                step_under(world, number)
            check_books(world)
        preemptions += world.scheduler.num_preemptions
        for seq in seqs:
            assert spans_by_versions(seq) == spans_by_tokens(seq)
            several += len(seq.spans) > 1
    assert several > 50
    assert preemptions > 0 or "num_pages" not in settings
