"""A step's figures, added up over micro-batches and ranks: every sum by hand."""

import math
from dataclasses import replace

import torch

from samebit.trainer.packing import pack_samples
from samebit.trainer.stats import Totals, merged
from samebit.trainer.types import Sample


def batch(*logprobs, first_id=0, loss_mean="token"):
    """One micro-batch of samples with these rollout log-probs (none: supervised samples)."""
    samples = [
        Sample.of_response(
            sample_id=first_id + i,
            token_ids=(5,) * (3 + max(1, len(values))),
            prompt_len=3,
            logprobs=tuple(values),
        )
        for i, values in enumerate(logprobs)
    ]
    [packed] = pack_samples(samples, 100, loss_mean)
    return packed


def totals_of(*micro_batches):
    totals = Totals()
    for packed, logprobs, loss, metrics in micro_batches:
        values = {name: torch.tensor(row) for name, row in metrics.items()}
        totals.add(packed, torch.tensor(logprobs), torch.tensor(loss), values)
    return totals


FIRST = (batch([-1.0, -2.0], [-3.0]), [-1.0, -2.25, -3.0], 6.0, {"a": [1.0, 2.0, 6.0]})
SECOND = (batch([-0.5]), [-0.375], 1.5, {"a": [3.0]})
THIRD = (batch([-0.0, -4.0], first_id=7), [0.0, -4.0], -2.0, {"a": [0.5, 0.5]})


def test_two_micro_batches_by_hand():
    """The loss is over what it is divided by, metrics are means over rows."""
    stats = totals_of(FIRST, SECOND).stats(grad_norm=2.5, learning_rate=0.125)
    assert stats.loss == 7.5 / 4
    assert stats.metrics == {"a": 12.0 / 4}
    assert (stats.grad_norm, stats.learning_rate) == (2.5, 0.125)
    assert stats.num_tokens == (3 + 2 + 3 + 1) + (3 + 1)
    assert stats.logprob_tokens_compared == 4
    assert stats.logprob_mismatches == 2
    assert stats.logprob_abs_diff_max == 0.25


def test_the_mean_over_samples_divides_by_their_number():
    packed = batch([-1.0, -2.0], [-3.0], loss_mean="sequence")
    stats = totals_of((packed, [-1.0, -2.0, -3.0], 5.0, {"a": [1.0, 2.0, 6.0]})).stats(0.0, 0.0)
    assert stats.loss == 5.0 / 2
    assert stats.metrics == {"a": 3.0}
    assert (stats.logprob_mismatches, stats.logprob_abs_diff_max) == (0, 0.0)


def test_ranks_are_added_up():
    """Every sum counts what other ranks have, mismatches included; the largest difference stays."""
    alone = totals_of(SECOND, FIRST, THIRD)
    first, others = totals_of(SECOND), [totals_of(FIRST), totals_of(THIRD)]
    first.merge(others)
    assert vars(first) == vars(alone)
    assert first.mismatches == 3  # 0.0 is not -0.0
    assert first.abs_diff_max == 0.25
    assert first.first_mismatch == (0, 3, -0.5, -0.375)  # not that of sample 7, nor the later one
    assert first.metrics == {"a": 13.0}
    assert (first.compared, first.num_rows, first.denominator) == (6, 6, 6)
    assert first.num_tokens == 9 + 4 + 5
    assert first.loss == 5.5
    first, others = totals_of(FIRST), [totals_of(SECOND), totals_of(THIRD)]
    first.merge(others)
    assert first.abs_diff_max == 0.25


def test_totals_of_segments_do_not_depend_on_who_had_them():
    """They are added by a tree, what context ranks have of a segment first; empty ones count 0."""
    a, b, c, d = 0.1, 0.7, 1e9, 0.3 - 1e9
    parts = [vars(totals_of((FIRST[0], FIRST[1], x, {"a": [x]}))) for x in (a, b, c, d)]
    a, b, c, d = (part["loss"] for part in parts)
    tree = merged([dict(enumerate(parts))], 4)
    assert tree.loss == (a + b) + (c + d) != ((a + b) + c) + d
    assert tree.num_rows == 12
    halves = [{0: parts[0], 1: parts[1]}, {2: parts[2], 3: parts[3]}]
    for ranks in (halves, [{i: part} for i, part in enumerate(parts)], [{}, *halves]):
        assert merged(ranks, 4) == tree
    few = merged([{3: parts[0]}, {}, {3: parts[1]}], 4)
    assert few.loss == a + b
    assert few.num_rows == 6


def test_a_metric_that_only_another_rank_has_is_kept():
    first = totals_of(SECOND)
    first.merge([totals_of((batch([-1.0]), [-1.0], 0.0, {"b": [4.0]}))])
    assert first.metrics == {"a": 3.0, "b": 4.0}


def test_samples_of_several_versions_are_left_out():
    """Their log-probs are no one set of weights'."""
    packed, logprobs = FIRST[0], [-1.0, -2.25, -3.5]
    assert packed.sample_of_row.tolist() == [0, 0, 1]
    others = replace(packed, is_compared=packed.sample_of_row == 1)
    stats = totals_of((others, logprobs, 6.0, {"a": [1.0, 2.0, 6.0]})).stats(0.0, 0.0)
    assert (stats.logprob_tokens_compared, stats.logprob_mismatches) == (1, 1)
    assert stats.logprob_abs_diff_max == 0.5
    assert (stats.loss, stats.metrics) == (2.0, {"a": 3.0})
    none = replace(packed, is_compared=packed.sample_of_row == 2)
    stats = totals_of((none, logprobs, 6.0, {})).stats(0.0, 0.0)
    assert (stats.logprob_tokens_compared, stats.logprob_abs_diff_max) == (0, 0.0)


def test_supervised_samples_compare_nothing():
    stats = totals_of((batch([], []), [-1.0, -2.0], 3.0, {})).stats(0.0, 0.0)
    assert (stats.logprob_tokens_compared, stats.logprob_mismatches) == (0, 0)
    assert stats.loss == 1.5


def test_metrics_are_added_in_fp64():
    """Counts of many rows would be lost in fp32."""
    rows = [2.0**24, *[1.0] * 4]
    packed = batch(*[[-1.0]] * 5)
    totals = totals_of((packed, [-1.0] * 5, 0.0, {"a": rows}))
    assert totals.metrics["a"] == math.fsum(rows) == 2**24 + 4
    totals = totals_of(*[(batch([-1.0]), [-1.0], 0.0, {"a": [x]}) for x in rows])
    assert totals.metrics["a"] == 2**24 + 4
