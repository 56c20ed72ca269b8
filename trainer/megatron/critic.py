"""A critic in Megatron, and a policy that has one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samebit.rollout.models.config import ModelConfig
from samebit.trainer.algorithms.base import Algorithm, LossOutputs
from samebit.trainer.critic.config import CriticConfig
from samebit.trainer.critic.value_loss import value_losses
from samebit.trainer.critic.value_model import value_model_of
from samebit.trainer.megatron.resharding import WholeState
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.types import MicroBatch, NonFiniteError, StepStats


class MegatronCritic(MegatronTrainer):
    """A model with a value head, its optimizer and its schedule, in its policy's processes.

    Its layout there may be another one. Its gradients and its optimizer lie in the policy's arena:
    both are released together. The micro-batches that it is given are those of `own_batches`, and
    hold samples with `values` and `returns`.
    """

    def __init__(
        self, policy: MegatronTrainer, model: ModelConfig, config: CriticConfig, num_steps: int
    ) -> None:
        """model: of its trunk, which may have other sizes than the policy's."""
        super().__init__(
            value_model_of(model),
            config.optimizer,
            num_steps,
            policy.device,
            config.parallel.beside(policy.parallel),
            policy.ranks.invariant,
            policy.longest,
            type(policy.attention),
            arena=policy.arena,
        )
        self.config = config

    def values(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """[R] fp32 of every micro-batch: of the state before each trained token; no gradients."""
        return super().logprobs(batches)

    def learn(
        self, batches: Sequence[MicroBatch], poll: Callable[[], object] | None = None
    ) -> StepStats:
        """One optimizer step towards the samples' returns; otherwise as train_step."""
        try:
            return self.train_step(batches, Algorithm(), poll)
        except NonFiniteError as error:
            raise NonFiniteError(f"the critic: {error}") from error

    def _references(
        self, batches: Sequence[MicroBatch], algorithm: Algorithm[Any]
    ) -> Sequence[Tensor]:
        """[R, 2]: the samples' values and returns."""
        return [_targets(batch).to(self.device) for batch in batches]

    def _found(
        self,
        batch: MicroBatch,
        algorithm: Algorithm[Any],
        reference: Tensor | None,
        output: Tensor,
    ) -> LossOutputs:
        assert reference is not None
        old_values, returns = reference.unbind(1)
        return value_losses(output[0], old_values, returns, self.config)


class ActorCritic(MegatronTrainer):
    """A policy whose state, and so each checkpoint, has its critic's inside."""

    critic: MegatronCritic
    """Set before anything of the state is asked for."""

    def state_dict(self) -> dict[str, Any]:
        """See MegatronTrainer."""
        return super().state_dict() | {"critic": self.critic.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See MegatronTrainer."""
        super().load_state_dict(state)
        self.critic.load_state_dict(state["critic"])

    def load_resharded(self, saved: WholeState) -> None:
        """See MegatronTrainer."""
        super().load_resharded(saved)
        self.critic.load_resharded(saved.part("critic", self.critic.model))


def _targets(batch: MicroBatch) -> Tensor:
    found = []
    for sample in batch.samples:
        assert sample.values is not None
        assert sample.returns is not None
        found.append(np.stack([sample.values, sample.returns], 1)[sample.loss_mask])
    return torch.from_numpy(np.concatenate(found))
