"""What rank 0 says to the others, as plain values and back."""

import pytest

from samebit.rollout.messages import (
    AbortRequest,
    Admit,
    Drain,
    FlushCache,
    Leave,
    of_plain,
    to_plain,
)
from samebit.rollout.types import Request, SamplingParams
from samebit.weight_sync.objects import decode, encode

PARAMS = SamplingParams(n=2, temperature=0.3, stop_token_ids=(3, 9), seed=(1 << 64) - 1, top_k=4)
REQUESTS = (
    Request(request_id="7", prompt_ids=(1, 5), params=PARAMS, sample_ids=((1 << 64) - 1, 0)),
    Request(
        request_id="8",
        prompt_ids=(2,),
        params=SamplingParams(logprobs=False),
        sample_ids=(4,),
        hidden_state_layers=(0, 2),
        score_only=True,
    ),
)


@pytest.mark.parametrize(
    "message",
    [
        Admit(REQUESTS, waits=True),
        Admit(REQUESTS[1:], waits=False),
        Admit((), waits=True),
        AbortRequest("7"),
        Drain(),
        FlushCache(),
        Leave(5, (1 << 64) - 3),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_is_said_is_heard(message):
    assert of_plain(decode(encode(to_plain(message)))) == message
