"""Replicas on GPUs: what one of them draws, the other draws."""

from contextlib import closing

import pytest
from helpers import make_prompts, outcomes

from samebit.rollout.engine import Engine
from samebit.rollout.engine_pool import EnginePool
from samebit.rollout.remote import RemoteEngine
from samebit.rollout.types import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu]

PROMPTS = make_prompts(5, 16, 70, 1, 33) * 4
PARAMS = SamplingParams(n=4, max_new_tokens=40, ignore_eos=True)


def test_a_death_on_one_gpu_changes_nothing(qwen3_path):
    """The other GPU draws its samples anew; a successor joins in, after the next update."""
    settings = {"kv_cache_tokens": 8192, "max_num_seqs": 16}
    truth = outcomes(Engine(qwen3_path, device="cuda:0", **settings).generate(PROMPTS, PARAMS))

    def start(place):
        return RemoteEngine(qwen3_path, device=f"cuda:{place}", **settings)

    with closing(EnginePool(start, 2, 16, max_restarts=1)) as pool:
        assert outcomes(pool.generate(PROMPTS, PARAMS)) == truth
        victim, other = pool.living
        found = pool.generate(PROMPTS, PARAMS, progress=lambda done, _: done and victim.kill())
        assert outcomes(found) == truth
        assert pool.living == (other,)
        assert len(pool.replicas) == 2
        assert outcomes(pool.generate(PROMPTS, PARAMS)) == truth
