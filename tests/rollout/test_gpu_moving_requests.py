"""Requests that one replica leaves off and another goes on with, both on one GPU."""

from contextlib import closing

import pytest
from helpers import outcomes
from jobs import teach, uneven

from samebit.rollout.engine import Engine
from samebit.rollout.engine_pool import EnginePool
from samebit.rollout.remote import RemoteEngine

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("speculative", ["none", "suffix"])
def test_what_moves_comes_out_the_same(qwen3_path, speculative):
    """Between CUDA graphs, steps that overlap and guesses."""
    settings = {"device": "cuda:0", "kv_cache_tokens": 65536, "max_num_seqs": 64}
    settings |= {"speculative": speculative}
    single = Engine(qwen3_path, **settings)

    def start(_place):
        return RemoteEngine(qwen3_path, waits=False, **settings)

    with closing(EnginePool(start, 2, 64)) as pool:
        teach(pool)
        for seed in (1, 2, 3):
            asked = uneven(seed, max_new_tokens=1000)
            assert outcomes(pool.generate(*asked)) == outcomes(single.generate(*asked))
        assert pool.num_moves
