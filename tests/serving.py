"""Engines of this process, what they make of some prompts, and how they fail."""

import pytest
from helpers import outcomes

from samebit.kernels.reduce import RankGroup
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams

PROMPTS = [[5, 9, 200, 31], [7], [5, 9, 200, 31, 8, 8]]
PARAMS = SamplingParams(n=2, max_new_tokens=12, ignore_eos=True)


SETTINGS = {"device": "cpu", "kv_cache_tokens": 1024, "ranks": RankGroup(invariant=True)}
"""With which engines of any number of tensor parallel ranks serve the same bits."""
SIZES = pytest.mark.parametrize("size", [1, 2], ids=["one", "pair"])
"""Of engines of other processes."""


def local_engine(folder, **settings):
    return Engine(folder, **SETTINGS | settings)


def served(engine):
    """Completions and scores, to the bit."""
    return outcomes(engine.generate(PROMPTS, PARAMS)), engine.score(PROMPTS[::2], 0.7)


def serves(engine, version, expected):
    return served(engine) == expected[version.digest]


def fail_on(engine, *ranks):
    """Have steps fail on these ranks, from here on."""

    def fail(flight):
        raise RuntimeError("a card fell off")

    if engine.ranks.rank in ranks:
        engine.step_loop._take_in = fail
