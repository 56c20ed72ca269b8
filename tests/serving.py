"""Engines of this process, and what they make of some prompts."""

from helpers import outcomes

from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams

PROMPTS = [[5, 9, 200, 31], [7], [5, 9, 200, 31, 8, 8]]
PARAMS = SamplingParams(n=2, max_new_tokens=12, ignore_eos=True)


def local_engine(folder):
    return Engine(folder, device="cpu", kv_cache_tokens=1024)


def served(engine):
    """Completions and scores, to the bit."""
    return outcomes(engine.generate(PROMPTS, PARAMS)), engine.score(PROMPTS[::2], 0.7)


def serves(engine, version, expected):
    return served(engine) == expected[version.digest]
