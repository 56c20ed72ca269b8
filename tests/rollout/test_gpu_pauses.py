"""Pauses on a GPU: graphs, steps in flight, and pages that leave for host memory."""

import pytest
from helpers import outcomes
from pauses import PROMPTS, add, changed, finish, num_drawn, step_until

from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams

pytestmark = pytest.mark.gpu

PARAMS = SamplingParams(n=2, max_new_tokens=40, ignore_eos=True)
WIDE = {"kv_cache_tokens": 4096, "page_size": 16}
TIGHT = {"kv_cache_tokens": 160, "page_size": 16}


def make(folder, **settings):
    return Engine(folder, device="cuda", **settings)


@pytest.mark.parametrize("mode", ["keep", "retract"])
@pytest.mark.parametrize("settings", [WIDE, TIGHT], ids=["wide", "tight"])
def test_a_pause_moves_no_bit(qwen3_path, mode, settings):
    """At several moments, with an update that changes nothing."""
    engine = make(qwen3_path, **settings)
    same = {n: w.clone() for n, w in engine.weights.items()}
    truth = outcomes(finish(engine, add(engine, params=PARAMS)))
    names, found, step = add(engine, params=PARAMS), {}, 0
    while engine.has_unfinished_requests:
        found |= {group[0].request_id: group for group in engine.step()}
        if (step := step + 1) in (2, 5, 17, 40):
            engine.pause_generation(mode)
            engine.copy_weights(same, step)
            engine.continue_generation()
    assert outcomes([found[name] for name in names]) == truth


@pytest.mark.parametrize("settings", [WIDE, TIGHT], ids=["wide", "tight"])
def test_keep_is_a_function_of_the_spans(qwen3_path, settings):
    """Alone or in company, some of which leaves for host memory and returns."""
    found, swaps = [], []
    for companions in ([], PROMPTS):
        engine = make(qwen3_path, **settings)
        original = engine.scheduler._swap_out
        engine.scheduler._swap_out = lambda seq, swap=original: (swaps.append(seq), swap(seq))
        [name] = add(engine, PROMPTS[1:2], SamplingParams(max_new_tokens=40, ignore_eos=True))
        add(engine, companions, PARAMS, first_id=500)
        step_until(engine, name, 9 - engine.step_loop.depth)
        engine.pause_generation("keep")
        assert num_drawn(engine, name) == 9
        engine.copy_weights(changed(engine), 7)
        engine.continue_generation()
        found.append(finish(engine, [name]))
    assert outcomes(found[0]) == outcomes(found[1])
    assert found[0][0][0].version_spans == found[1][0][0].version_spans
    assert swaps or settings is WIDE
