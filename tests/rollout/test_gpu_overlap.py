"""The host prepares and starts a step while the GPU is still busy with what came before."""

import pytest
import torch

from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams

pytestmark = pytest.mark.gpu

_TWO_SECONDS = 4_000_000_000  # cycles of the GPU's clock, about


def _step_behind_work(engine: Engine) -> None:
    """A step that begins behind other work on the stream, and must not wait for that."""
    torch.cuda._sleep(_TWO_SECONDS)
    work = torch.cuda.Event()
    work.record()
    torch.cuda.set_sync_debug_mode("error")  # names an operation that waits, where torch knows it
    try:
        engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not work.query(), "the host waited for the GPU"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=24, ignore_eos=True),
        SamplingParams(n=3, max_new_tokens=24, ignore_eos=True),
        SamplingParams(max_new_tokens=24, top_k=5, min_new_tokens=24, stop_token_ids=(7,)),
    ],
    ids=["one", "forks", "restricted"],
)
def test_steps_with_prompts_start_without_waiting(qwen3_path, params):
    """A prompt alone, and one beside sequences that decode; its last page is not full."""
    engine = Engine(qwen3_path, device="cuda", page_size=16, prefix_cache=False)
    for step in (Engine.step, _step_behind_work):  # the first time, kernels are compiled
        engine.add_request(list(range(1, 40)), params)
        step(engine)
        engine.step()
        engine.add_request(list(range(1, 70)), params)
        step(engine)
        while engine.has_unfinished_requests:
            engine.step()
