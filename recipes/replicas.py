"""Several copies of the engine as one: each completes its share of the prompts, all get all."""

from collections.abc import Sequence
from typing import Any

from samebit.kernels.reduce import gather_objects
from samebit.rollout.engine import Engine
from samebit.rollout.types import Completion, SamplingParams


class ReplicatedEngine:
    """The engines of a run's processes, of which `tensor_size` neighbours make up one copy.

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
        """See Engine.generate; progress is of this process's share."""
        own = slice(self._copy, None, self._num_copies)
        drawn: list[list[Completion]] = []
        if prompts := prompt_ids[own]:
            drawn = self._engine.generate(
                prompts, sampling_params, sample_ids[own], progress=progress
            )
        groups: list[list[Completion]] = [[] for _ in prompt_ids]
        for copy, part in enumerate(gather_objects(drawn)[:: self._tensor_size]):
            groups[copy :: self._num_copies] = part
        return groups

    def close(self) -> None:
        """Let go of the engine."""
        self._engine.close()
