"""How long steps take without guesses, and what steps with guesses are held to."""

import math

from samebit.rollout.engine import Engine
from samebit.rollout.speculative.speculation import Speculation
from samebit.rollout.speculative.step_times import StepTimes
from samebit.rollout.types import SamplingParams


def test_the_nearest_size_that_was_seen_often_enough():
    times = StepTimes()
    assert times.typical(3) is None
    for seconds in (9.0, 1.0, 2.0):
        times.add(4, seconds)
    assert times.typical(4) is None, "the first of a size compile"
    times.add(3, 1.5)  # of the same size
    assert [times.typical(n) for n in (1, 3, 4, 100)] == [1.75] * 4
    for _ in range(4):
        times.add(64, 8.0)
    assert [times.typical(n) for n in (4, 5, 33, 500)] == [1.75, 1.75, 8.0, 8.0]
    for _ in range(100):
        times.add(4, 3.0)  # older ones are forgotten
    assert times.typical(4) == 3.0


def test_an_engine_times_its_own_steps(qwen3_path, monkeypatch):
    """Each once, and those with prompts not at all."""
    told = {"took": [], "learn": []}
    for name, calls in told.items():
        original = getattr(Speculation, name)

        def telling(self, *args, original=original, calls=calls):
            calls.append(args)
            return original(self, *args)

        monkeypatch.setattr(Speculation, name, telling)
    settings = {"device": "cpu", "kv_cache_tokens": 4096, "adaptive_drafts": False}
    engine = Engine(qwen3_path, speculative="suffix", **settings)
    assert math.isnan(engine.accept_lengths.speedup)
    params = SamplingParams(n=2, max_new_tokens=24, ignore_eos=True, temperature=0.05)
    engine.generate([[*range(40, 70)]], params)
    engine.generate([[5, 6, 7, 8] * 12], params)
    plain, guessed = told["took"], [args[2] for args in told["learn"]]
    assert len(plain) >= 4
    assert len([seconds for seconds in guessed if seconds is not None]) >= 1
    assert all(num_samples in (1, 2) and seconds > 0 for num_samples, seconds in plain)
    found = engine.accept_lengths
    assert 0 < found.seconds <= sum(seconds or 0 for seconds in guessed)
    assert found.plain_seconds > 0
    assert found.speedup == found.plain_seconds / found.seconds
    assert (found - found).seconds == 0
