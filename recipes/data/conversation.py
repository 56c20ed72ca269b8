"""What a generate function of the user's is given, and what it may make its sample with.

`async def generate(engine, request, sampling_params) -> Sample` draws one sample in several turns.
What the engine drew is trained on; what stands between the turns, such as a tool's output, is not.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from samebit.recipes.data.tasks.base import ChatPrompt, Problem
from samebit.recipes.data.text import TextCodec
from samebit.rollout.types import Completion, SamplingParams
from samebit.rollout.values import as_integer, as_list
from samebit.trainer.types import Sample


class GenerateError(RuntimeError):
    """A generate function raised, took too long, or returned what the engine did not draw."""


class TurnDrawer(Protocol):
    """Draws the turns of one sample: the engine, as a generate function has it."""

    async def draw(self, context_ids: Sequence[int], sampling_params: SamplingParams) -> Completion:
        """Go on after a context, which begins with the request's prompt.

        Raises GenerateError for a context that is full, for more new tokens than there is room
        for, and while another turn of the sample is being drawn.
        """

    async def agenerate(
        self, prompt_ids: Sequence[Sequence[int]], sampling_params: SamplingParams
    ) -> list[list[Completion]]:
        """`draw` as an EngineClient has it: one context, one sample."""


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """Says what sample is asked for."""

    sample_id: int
    prompt_ids: tuple[int, ...]
    problem: Problem
    """Its prompt, label, metadata and tools."""
    max_new_tokens: int
    """What follows the prompt has at most so many tokens, drawn or not."""
    text: TextCodec = field(repr=False)
    """Between text and token ids."""

    def room(self, context_ids: Sequence[int]) -> int:
        """Return how many tokens still fit behind a context, 0 or more."""
        return max(0, len(self.prompt_ids) + self.max_new_tokens - len(context_ids))

    def reply(self, turn: Completion, messages: ChatPrompt) -> list[int]:
        """Return the tokens of chat messages that follow a turn, up to where the next one begins.

        What ends a turn in the chat template is left out where the turn itself has drawn it.
        Raises ValueError where the template cannot write them.
        """
        found = self.text.encode(self.text.after_answer(messages))
        ended = turn.finish_reason == "stop" and turn.token_ids[-1:] == tuple(found[:1])
        return found[1:] if ended else found


type Generate = Callable[..., Awaitable[Sample]]
"""generate(engine, request, sampling_params, **rollout.generate_args)."""


class Conversation:
    """A sample that grows by turns that are drawn and by text that is added.

    Example: talk = Conversation(request); turn = await talk.draw(engine, sampling_params);
    talk.add(request.text.encode("12")); return talk.sample()
    """

    def __init__(self, request: GenerateRequest) -> None:
        """Begin with the request's prompt."""
        self.request = request
        self.token_ids = list(request.prompt_ids)
        self.turns: list[Completion] = []
        self._logprobs = [0.0] * len(self.token_ids)
        self._loss_mask = [False] * len(self.token_ids)

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.request.room(self.token_ids)

    async def draw(self, engine: TurnDrawer, sampling_params: SamplingParams) -> Completion:
        """Draw the next turn, of at most sampling_params.max_new_tokens and what there is room for.

        Raises GenerateError where there is no room; ask `room` before.
        """
        most = max(1, min(sampling_params.max_new_tokens, self.room))
        least = min(sampling_params.min_new_tokens, most)
        params = replace(sampling_params, max_new_tokens=most, min_new_tokens=least)
        turn = await engine.draw(self.token_ids, params)
        self.turns.append(turn)
        self.token_ids += turn.token_ids
        self._logprobs += turn.logprobs
        self._loss_mask += [True] * len(turn.token_ids)
        return turn

    def add(self, token_ids: Sequence[int]) -> None:
        """Add tokens that the policy has not drawn; they are not trained on.

        Raises GenerateError for more than there is room for (ask `room` before), ValueError for
        anything but integers: request.text.encode gives a text's.
        """
        right = "a list of token ids; request.text.encode gives a text's"
        given = as_list(token_ids, "what Conversation.add is given", right)
        token_ids = [as_integer(token, "a token of Conversation.add") for token in given]
        if len(token_ids) > self.room:
            raise GenerateError(
                f"adds {len(token_ids)} tokens where there is room for {self.room} of "
                f"{self.request.max_new_tokens} (rollout.max_new_tokens)"
            )
        self.token_ids += token_ids
        self._logprobs += [0.0] * len(token_ids)
        self._loss_mask += [False] * len(token_ids)

    def sample(self) -> Sample:
        """Return all of it as what is trained on. Raises ValueError if nothing was drawn."""
        return Sample(
            sample_id=self.request.sample_id,
            token_ids=np.asarray(self.token_ids, np.int64),
            loss_mask=np.asarray(self._loss_mask),
            logprobs=np.asarray(self._logprobs, np.float32),
        )


@dataclass(frozen=True, kw_only=True)
class Response(Completion):
    """What follows a prompt in a sample of several turns.

    token_ids, logprobs and loss_mask have one length, and so have thresholds, where log-probs are
    truncated: a token that is not trained on has the log-prob 0 and the threshold 0. The places of
    version_spans are those of the turns that are trained on.
    """

    loss_mask: tuple[bool, ...] = ()
    num_turns: int = 1


def num_drawn(completion: Completion) -> int:
    """Return how many of a completion's tokens the policy has drawn and is trained on."""
    if isinstance(completion, Response):
        return sum(completion.loss_mask)
    return len(completion.token_ids)
