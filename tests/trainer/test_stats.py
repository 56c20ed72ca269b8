"""A step's figures: sums over micro-batches, then over ranks, by hand."""

from dataclasses import replace

import pytest
import torch

from samebit.trainer.packing import pack_samples
from samebit.trainer.stats import Totals
from samebit.trainer.types import Sample, StepStats


def packed(first_id, *responses, **options):
    """One micro-batch of samples whose rollout drew with these log-probs."""
    samples = [
        Sample(
            sample_id=first_id + i,
            token_ids=(7, *range(1, len(logprobs) + 1)),
            prompt_len=1,
            logprobs=logprobs,
        )
        for i, logprobs in enumerate(responses)
    ]
    [batch] = pack_samples(samples, 100, **options)
    return batch


def totals_of(batch, logprobs, loss, **metrics):
    totals = Totals()
    found = {name: torch.tensor(values) for name, values in metrics.items()}
    totals.add(batch, torch.tensor(logprobs), torch.tensor(loss), found)
    return totals


def test_micro_batches_and_ranks_add_up():
    """Every count, the largest difference and means over all rows, wherever they were computed."""
    first = packed(0, (-1.0, -2.0), (-4.0,))
    totals = totals_of(first, [-1.0, -2.5, -4.0], 6.0, kl=[1.0, 2.0, 3.0])
    second = packed(2, (-0.5,) * 4)
    kl = {"kl": torch.tensor([0.5, 0.5, 1.0, 2.0])}
    totals.add(second, torch.tensor([-0.5, -0.25, -0.5, -0.5]), torch.tensor(1.0), kl)
    other = totals_of(packed(3, (-8.0, -1.0)), [-7.0, -1.0], 2.0, kl=[4.0, 8.0])
    third = totals_of(packed(4, (-3.0,)), [-3.125], 4.0, kl=[5.0])
    alone = totals.stats(0.75, 1e-3)
    assert alone == StepStats(
        loss=7.0 / 7,
        grad_norm=0.75,
        learning_rate=1e-3,
        num_tokens=10,
        logprob_tokens_compared=7,
        logprob_mismatches=2,
        logprob_abs_diff_max=0.5,
        metrics={"kl": 10.0 / 7},
    )
    totals.merge([other, third])
    assert totals.stats(0.75, 1e-3) == StepStats(
        loss=13.0 / 10,
        grad_norm=0.75,
        learning_rate=1e-3,
        num_tokens=15,
        logprob_tokens_compared=10,
        logprob_mismatches=4,
        logprob_abs_diff_max=1.0,
        metrics={"kl": 27.0 / 10},
    )


def test_a_difference_of_another_rank_is_not_lost():
    """Also where this rank has none: one rank's agreement must not hide another's mismatch."""
    good, bad = packed(0, (-1.0,)), packed(1, (-2.0, -2.0))
    totals = totals_of(good, [-1.0], 1.0)
    totals.merge([totals_of(bad, [-2.0, -2.25], 1.0)])
    found = totals.stats(0.0, 0.0)
    assert (found.logprob_tokens_compared, found.logprob_mismatches) == (3, 1)
    assert found.logprob_abs_diff_max == 0.25
    totals = totals_of(bad, [-2.0, -2.25], 1.0)
    totals.merge([totals_of(good, [-1.0], 1.0)])
    assert totals.stats(0.0, 0.0) == found


def test_a_loss_over_samples_is_divided_by_samples():
    """And its metrics by rows all the same."""
    batch = packed(0, (-1.0, -1.0, -1.0), (-1.0,), loss_mean="sequence")
    found = totals_of(batch, [-1.0] * 4, 5.0, entropy=[1.0, 2.0, 3.0, 6.0]).stats(0.0, 0.0)
    assert (found.loss, found.metrics) == (2.5, {"entropy": 3.0})


def test_metrics_are_summed_in_double():
    """A mean over many rows must not depend on fp32's rounding of its sum."""
    batch = packed(0, (-1.0,) * 3)
    found = totals_of(batch, [-1.0] * 3, 0.0, entropy=[2.0**24, 1.0, 1.0]).stats(0.0, 0.0)
    assert found.metrics["entropy"] == (2**24 + 2) / 3


def test_without_a_rollout_nothing_is_compared():
    """No count may claim a comparison that did not take place; a context rank may have no rows."""
    compared = packed(0, (-1.0,))
    supervised = replace(compared, rollout_logprobs=None)
    found = totals_of(supervised, [-3.0], 3.0).stats(0.0, 0.0)
    assert (found.logprob_tokens_compared, found.logprob_mismatches) == (0, 0)
    assert found.logprob_abs_diff_max == 0.0
    totals, nothing = totals_of(compared, [-1.5], 1.5), torch.zeros(0)
    totals.add(replace(compared, rollout_logprobs=nothing), nothing, torch.tensor(0.0), {})
    assert totals.stats(0.0, 0.0).logprob_tokens_compared == 1
    assert totals.stats(0.0, 0.0).logprob_abs_diff_max == pytest.approx(0.5)
