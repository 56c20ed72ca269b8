"""Several copies of the engine as one: each completes its share of the prompts, all get all."""

from array import array
from collections.abc import Sequence
from typing import Any

from samebit.rollout.engine import Engine
from samebit.rollout.types import Completion, SamplingParams
from samebit.weight_sync.objects import gather_objects
from samebit.weight_sync.types import VersionSpan, WeightVersion


class ReplicatedEngine:
    """Acts for the engines of a run's processes; `tensor_size` neighbours make up one copy.

    Every process makes the same calls. What is drawn does not depend on who draws it.
    """

    def __init__(self, engine: Engine, rank: int, size: int, tensor_size: int) -> None:
        self._engine = engine
        self._tensor_size = tensor_size
        self._copy, self._num_copies = rank // tensor_size, size // tensor_size

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams,
        sample_ids: Sequence[Sequence[int]],
        *,
        progress: Any = None,
    ) -> list[list[Completion]]:
        """Complete all prompts; see Engine.generate. Progress is of this process's share."""
        own = slice(self._copy, None, self._num_copies)
        drawn: list[list[Completion]] = []
        if prompts := prompt_ids[own]:
            drawn = self._engine.generate(
                prompts, sampling_params, sample_ids[own], progress=progress
            )
        plain = [[_to_plain(completion) for completion in group] for group in drawn]
        groups: list[list[Completion]] = [[] for _ in prompt_ids]
        for copy, part in enumerate(gather_objects(plain)[:: self._tensor_size]):
            groups[copy :: self._num_copies] = [[_completion(*c) for c in group] for group in part]
        return groups

    def close(self) -> None:
        """Let go of the engine."""
        self._engine.close()


def _to_plain(c: Completion) -> tuple[Any, ...]:
    """What _completion takes: log-probs are exact fp32 values; hidden states are not asked for."""
    spans = [(span.start, span.version.step, span.version.digest) for span in c.version_spans]
    numbers = array("i", c.token_ids), array("f", c.logprobs)
    return c.request_id, c.sample_id, *numbers, c.finish_reason, spans


def _completion(
    request_id: str,
    sample_id: int,
    token_ids: array[int],
    logprobs: array[float],
    finish_reason: str,
    spans: list[tuple[int, int, str]],
) -> Completion:
    versions = tuple(VersionSpan(n, WeightVersion(step, digest)) for n, step, digest in spans)
    return Completion(
        request_id=request_id,
        sample_id=sample_id,
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        finish_reason=finish_reason,
        version_spans=versions,
    )
