"""Which of the ways a run draws its steps by: each by itself, ahead of the trainer, or in parts."""

from samebit.recipes.config import GrpoRun
from samebit.recipes.run.inputs import GrpoInputs
from samebit.recipes.run.partial_rollouts import PartialRollouts
from samebit.recipes.run.sampling import RolloutSource
from samebit.recipes.run.stale_parts import StaleParts
from samebit.recipes.run.stale_rollouts import StaleRollouts
from samebit.recipes.run.step_rollouts import StepRollouts
from samebit.trainer.checkpoint import Checkpoint
from samebit.trainer.megatron.trainer import MegatronTrainer


def rollouts_of_steps(
    run: GrpoRun,
    inputs: GrpoInputs,
    source: RolloutSource,
    trainer: MegatronTrainer,
    resumed: Checkpoint | None,
) -> StepRollouts:
    """Steps are drawn as the configuration says; resumed: what holds the samples that wait."""
    comes_in_parts = run.rollout.partial_tokens is not None
    if run.rollout.max_staleness:
        kind = StaleParts if comes_in_parts else StaleRollouts
        return kind(run, inputs, source, trainer, resumed)
    if comes_in_parts:
        return PartialRollouts(run, source, trainer, resumed)
    return StepRollouts(run, source)
