"""A loss that a test writes down as a function, as an algorithm."""

from samebit.trainer.algorithms.base import Algorithm, LossOutputs


class LossOf(Algorithm):
    """function(logprobs [R], reference [R] or None, batch) -> (losses [R], metrics [R] by name)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def loss(self, inputs):
        found = self.function(inputs.logprobs, inputs.ref_logprobs, inputs.batch)
        return LossOutputs(*found)


class SequenceRatio(Algorithm):
    """The ratio of whole samples, GSPO's, unclipped; and a bonus for entropy."""

    needs_entropy_grad = True

    def loss(self, inputs):
        batch = inputs.batch
        ratio = inputs.sample_means(inputs.logprobs - batch.rollout_logprobs).exp()
        ratio = inputs.in_rows(ratio)
        losses = -ratio * batch.advantages - 0.3 * inputs.entropies
        return LossOutputs(losses, {"train/sequence_ratio": ratio.detach()})


class NoSettings(Algorithm):
    """An algorithm whose settings are none of a recipe's."""

    Config = dict
