"""Samples of a prompt read it together in some steps and each for itself in others."""

import pytest

from samebit.kernels.gpu import prefix_tasks
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("graphs", [True, False])
def test_reading_together_comes_and_goes(graphs, qwen3_path, monkeypatch):
    """It is settled anew for every step, as contexts grow: no token moves."""
    prompts = [list(range(1, 300)), list(range(2, 270))]
    params = SamplingParams(n=5, max_new_tokens=60, ignore_eos=True)
    settled = []

    def every_seventh(shared, context_lens, heads):
        settled.append(int(context_lens.max()) % 14 < 7)
        return settled[-1]

    monkeypatch.setattr(prefix_tasks, "saves_time", every_seventh)
    draws = []
    for together in (True, False):
        engine = Engine(qwen3_path, device="cuda", cuda_graphs=graphs, group_attention=together)
        found = engine.generate(prompts, params)
        draws.append([(c.token_ids, c.logprobs) for request in found for c in request.completions])
        assert (len(settled) > 50) == together
        assert len(set(settled)) == (2 if together else 0)
        settled.clear()
    assert draws[0] == draws[1]
