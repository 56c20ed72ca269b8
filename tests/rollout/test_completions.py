"""Completions go to other processes as they are, numbers as blocks."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch

from samebit.rollout.types import Completion, VersionSpan
from samebit.weight_sync.types import WeightVersion

SPANS = (VersionSpan(start=0, version=WeightVersion(step=3, digest="ab" * 8), recomputed=False),)


def completion(**fields):
    given = {
        "request_id": "7",
        "sample_id": 2**64 - 1,
        "token_ids": (0, 151935, 2**32 - 1),
        "logprobs": (-0.1, -math.inf, 5e-324),
        "finish_reason": "stop",
        "version_spans": SPANS,
        "thresholds": (1.5, -math.inf, 0.25),
    }
    return Completion(**given | fields)


@pytest.mark.parametrize("fields", [{}, {"token_ids": (), "logprobs": ()}, {"logprobs": ()}])
def test_a_completion_arrives_as_it_was(fields):
    """Also one that is passed on unread, or was read before."""
    sent = completion(**fields)
    for received in (
        pickle.loads(pickle.dumps(sent)),
        pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(sent)))),
        copy.copy(sent),
        copy.deepcopy(sent),
    ):
        assert received.num_tokens == len(sent.token_ids)
        assert received == sent
        assert received.num_tokens == len(sent.token_ids)
        assert hash(received.token_ids) == hash(sent.token_ids)
        assert repr(received) == repr(sent)
        assert pickle.loads(pickle.dumps(received)) == sent
        assert replace(received, sample_id=1) == replace(sent, sample_id=1)
        assert received.as_increment() == sent.as_increment()


def test_not_a_number_keeps_its_place():
    received = pickle.loads(pickle.dumps(completion(logprobs=(math.nan, -1.0, 0.0))))
    assert list(map(math.isnan, received.logprobs)) == [True, False, False]


def test_states_come_along():
    states = {0: torch.arange(6.0).view(2, 3)}
    received = pickle.loads(pickle.dumps(completion(hidden_states=states)))
    assert torch.equal(received.hidden_states[0], states[0])


@pytest.mark.parametrize("travelled", [False, True])
def test_an_unknown_name_is_none(travelled):
    found = pickle.loads(pickle.dumps(completion())) if travelled else completion()
    with pytest.raises(AttributeError, match="tokens"):
        _ = found.tokens
    assert not hasattr(found, "_other")
