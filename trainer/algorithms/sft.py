"""Supervised fine-tuning: the negative log-likelihood of the tokens that are trained on."""

from samebit.trainer.algorithms.base import Algorithm, LossInputs, LossOutputs
from samebit.trainer.config import AlgorithmConfig


class Sft(Algorithm[AlgorithmConfig]):
    """It has no settings and reads no rewards."""

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """See Algorithm.loss."""
        return LossOutputs(-inputs.logprobs)
