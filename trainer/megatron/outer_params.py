"""The parameters outside of a policy's layers, on every stage of its pipeline."""

from collections.abc import Mapping

import torch
from torch import Tensor

from samebit.rollout.models.decoder import EMBEDDING
from samebit.trainer.megatron.models.adapter import layer_of
from samebit.trainer.megatron.stages import from_stage
from samebit.trainer.megatron.trainer import MegatronTrainer


class OuterParams:
    """Embedding, final norm and output layer of a policy: what its own stage has, live, and copies
    of what another has, which are as old as the last `refresh`."""

    def __init__(self, policy: MegatronTrainer) -> None:
        """All stages make one alike."""
        self._policy, self._step = policy, -1
        like = next(iter(policy.params.values()))
        self.params: Mapping[str, Tensor] = {
            spec.name: policy.params[spec.name].detach()
            if spec.name in policy.params
            else torch.empty(spec.shape, dtype=like.dtype, device=like.device)
            for spec in policy.model.param_specs(policy.ranks.shard)
            if layer_of(spec.name) is None
        }
        self.refresh()

    def refresh(self) -> None:
        """Bring the copies to the policy's present step, unless they are there. All stages call
        it."""
        stage, pipeline = self._policy.stage, self._policy.pipeline_group
        if stage.count == 1 or self._step == self._policy.step:
            return
        self._step = self._policy.step
        for name, param in self.params.items():
            from_stage(0 if name == EMBEDDING else stage.count - 1, param, pipeline)
