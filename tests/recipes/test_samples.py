"""Completions as what is trained on: nothing that is known of a token is lost or moved."""

import re

import numpy as np
import pytest

from samebit.recipes.data.samples import drawn_sample, with_advantages
from samebit.rollout.types import Completion
from samebit.weight_sync.types import VersionSpan, WeightVersion

OLD, NEW = WeightVersion(1, "a" * 16), WeightVersion(2, "b" * 16)


def completion(*spans, sample_id=9):
    return Completion(
        request_id="0",
        sample_id=sample_id,
        token_ids=(5, 6, 7),
        logprobs=(-0.5, -0.25, -0.125),
        finish_reason="stop",
        version_spans=spans,
    )


def test_a_completion_stands_behind_its_prompt():
    sample = drawn_sample([1, 2], completion(VersionSpan(0, OLD)))
    assert sample.sample_id == 9
    assert sample.token_ids.tolist() == [1, 2, 5, 6, 7]
    assert sample.loss_mask.tolist() == [False, False, True, True, True]
    assert sample.logprobs.tolist() == [0.0, 0.0, -0.5, -0.25, -0.125]
    assert sample.advantages.tolist() == [0.0] * 5
    assert sample.version_spans == (VersionSpan(2, OLD),)
    assert sample.has_one_version


def test_spans_count_from_the_first_token_of_the_sample():
    sample = drawn_sample([1, 2, 3], completion(VersionSpan(0, OLD), VersionSpan(2, NEW)))
    assert sample.version_spans == (VersionSpan(3, OLD), VersionSpan(5, NEW))
    assert not sample.has_one_version
    same = drawn_sample([1], completion(VersionSpan(0, NEW), VersionSpan(1, NEW)))
    assert same.has_one_version


def test_advantages_are_numbers_or_one_for_each_token():
    groups = [[drawn_sample([1], completion(sample_id=2 * i + j)) for j in (0, 1)] for i in (0, 1)]
    each = np.array([0.0, 1.0, 2.0, 3.0])
    found = with_advantages(groups, [[0.1, -1.0], [each, 0.5]])
    assert [s.sample_id for s in found] == [0, 1, 2, 3]
    assert all(s.advantages.dtype == np.float32 for s in found)
    assert found[0].advantages.tolist() == [float(np.float32(0.1))] * 4
    assert found[2].advantages.tolist() == each.tolist()
    with pytest.raises(ValueError, match=r"sample 0: advantages of shape \(2,\) for 4 tokens"):
        with_advantages(groups[:1], [[[1.0, 2.0], 0.0]])
    for wrong, sizes in (([[0.1, -1.0]], [2]), ([[0.1, -1.0], [0.1]], [2, 1])):
        message = f"advantages of {sizes} samples for prompts with [2, 2] samples"
        with pytest.raises(ValueError, match=re.escape(message)):
            with_advantages(groups, wrong)
