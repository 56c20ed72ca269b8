"""RequestClient: what engine clients of several engines have in common.

A call becomes requests, which are checked whole before anything is drawn; who draws them, and what
`progress` is told meanwhile, is the client's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from samebit.kernels.top_tokens import TopTokens
from samebit.rollout.client import Progress
from samebit.rollout.runtime.requests import RequestFactory, scores_of, top_scores_of
from samebit.rollout.types import Completion, Request, SamplingParams
from samebit.rollout.values import as_integer


class RequestClient(ABC):
    """The calls of an EngineClient that draw or score, by what subclasses do with requests."""

    @property
    @abstractmethod
    def _requests(self) -> RequestFactory:
        """Knows what all engines can do."""

    @abstractmethod
    def _drawn(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        """The groups of all requests, in order."""

    @abstractmethod
    async def _adrawn(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """`_drawn` for asyncio."""

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
        *,
        return_hidden_states: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """Complete all prompts; see Engine.generate."""
        requests = self._requests.generation(
            prompt_ids, sampling_params, sample_ids, return_hidden_states
        )
        return self._drawn(requests, progress)

    async def agenerate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
        *,
        return_hidden_states: Sequence[int] = (),
    ) -> list[list[Completion]]:
        """Complete all prompts; see Engine.agenerate."""
        requests = self._requests.generation(
            prompt_ids, sampling_params, sample_ids, return_hidden_states, fresh_ids=True
        )
        return await self._adrawn(requests)

    def score(
        self, token_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float]]:
        """Score all sequences; see Engine.score."""
        return scores_of(self._drawn(self._requests.scoring(token_ids, temperature)))

    def score_top(
        self, token_ids: Sequence[Sequence[int]], k: int, temperature: float = 1.0
    ) -> list[tuple[list[float], TopTokens]]:
        """Score all sequences; see Engine.score_top."""
        k = as_integer(k, "score_top k")
        return top_scores_of(self._drawn(self._requests.scoring(token_ids, temperature, k)))
