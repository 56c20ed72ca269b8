"""Figures of a step that need no run."""

from types import SimpleNamespace

import pytest
import torch

from samebit.recipes.run import training_metrics
from samebit.recipes.run.sampling import Rollout
from samebit.recipes.run.training_metrics import rollout_metrics, speculation_metrics, speed
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.types import Completion
from samebit.trainer.config import ParallelConfig
from samebit.trainer.flops import train_flops
from samebit.trainer.types import StepStats

CPU = torch.device("cpu")


def completion(length):
    return Completion(
        request_id="0",
        sample_id=0,
        token_ids=(1,) * length,
        logprobs=(-1.0,) * length,
        finish_reason="length",
        version_spans=(),
    )


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "data": 3}])
def test_each_process_has_its_share_of_a_peak(llama_path, monkeypatch, parallel):
    """Prompts and completions pass once, shared by all processes, in the training's seconds."""
    model = load_model_config(llama_path)
    trainer = SimpleNamespace(device=CPU, model=model, parallel=ParallelConfig(**parallel))
    groups = [[completion(3), completion(5)], [completion(2), completion(7)]]
    rollout = Rollout([], [[1] * 4, [1] * 6], groups, [])
    read = {"loss": 0.0, "grad_norm": 1.0, "learning_rate": 0.0, "logprob_abs_diff_max": 0.0}
    counts = {"logprob_tokens_compared": 0, "logprob_mismatches": 0}
    stats = [StepStats(num_tokens=n, **read, **counts) for n in (17, 20)]
    seconds = {"perf/rollout_s": 2.0, "perf/train_s": 0.5, "perf/eval_s": 9.0}
    rates = {"perf/rollout_tokens_per_s": 8.5, "perf/train_tokens_per_s": 74.0}
    assert speed(trainer, rollout, stats, seconds, 17) == rates
    assert speed(trainer, rollout, stats, seconds, 100)["perf/rollout_tokens_per_s"] == 50.0
    monkeypatch.setattr(training_metrics, "peak_flops", {CPU: 1e9}.get)
    share = train_flops(model, [7, 9, 8, 13]) / trainer.parallel.num_processes / 0.5 / 1e9
    found = speed(trainer, rollout, stats, seconds, 17)
    assert found == rates | {"perf/train_mfu": pytest.approx(share, rel=1e-14)}


def test_guesses_are_told_in_all_and_by_place():
    """What was never guessed has no share, and an engine that guesses nothing has no metrics."""
    assert speculation_metrics(None) == {}
    counts = {"verifications": 0, "draft_tokens": 0, "accepted_tokens": 0}
    none = AcceptLengths.none(3)
    assert speculation_metrics(none) == {f"rollout/spec_{k}": v for k, v in counts.items()}
    some = AcceptLengths(verifications=4, tokens=7, guessed=(4, 2, 0), right=(2, 1, 0))
    earlier = AcceptLengths(verifications=1, tokens=1, guessed=(1, 1, 0), right=(0, 0, 0))
    found = speculation_metrics(some + earlier - earlier)
    assert (
        found
        == speculation_metrics(some)
        == {
            "rollout/spec_verifications": 4,
            "rollout/spec_draft_tokens": 6,
            "rollout/spec_accepted_tokens": 3,
            "rollout/spec_accept_length": 1.75,
            "rollout/spec_accept_rate": 0.5,
            "rollout/spec_accept_rate_0": 0.5,
            "rollout/spec_accept_rate_1": 0.5,
        }
    )


def test_the_speedup_is_of_the_rollouts_own_steps():
    """What came before it does not count; without steps to compare with there is none."""
    earlier = AcceptLengths.none(1).timed(10.0, 5.0)
    found = speculation_metrics(earlier + _one().timed(0.5, 0.75).timed(0.5, 1.75) - earlier)
    assert found["rollout/spec_speedup"] == 2.5
    assert "rollout/spec_speedup" not in speculation_metrics(_one())
    assert _one().timed(0.5, 0.75) == _one(), "times are no counts"


def _one():
    return AcceptLengths(verifications=1, tokens=2, guessed=(1,), right=(1,))


def test_huge_rewards_have_finite_figures():
    """Those of small ones, times a power of two; also of terms, and of a rollout's own mean."""

    def figures(scale):
        rewards = [[3.0 * scale, 5.0 * scale], [-1.0 * scale, 0.5 * scale]]
        completions = [[completion(2)] * 2] * 2
        rollout = Rollout([], [], completions, [], rewards, {"a": rewards})
        found = rollout_metrics(rollout, "rollout")
        assert rollout.reward_mean == found["rollout/reward_mean"] == found["rollout/reward_mean/a"]
        return found["rollout/reward_mean"], found["rollout/reward_std"]

    huge = 2.0**1021
    assert figures(1.0)[0] == 1.875
    assert figures(huge) == tuple(huge * x for x in figures(1.0))
