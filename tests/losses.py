"""A loss that a test writes down as a function, as an algorithm."""

import torch

from samebit.kernels.reduce import ALONE
from samebit.trainer.algorithms.base import Algorithm, LossInputs, LossOutputs
from samebit.trainer.algorithms.registry import ALGORITHMS, find_algorithm


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


def policy_gradients(batch, logprobs, ranks=ALONE):
    """By the name of each registered algorithm, rows [R] of a batch: losses, its metrics by name,
    and the gradient by log-prob of the weighted sum of the losses."""
    found = {}
    for name in ALGORITHMS:
        algorithm = find_algorithm(name)
        leaf = logprobs.clone().requires_grad_()
        inputs = LossInputs(
            batch=batch, logprobs=leaf, entropies=torch.zeros_like(leaf), context=ranks
        )
        outputs = algorithm(algorithm.Config(name=name)).checked_loss(inputs)
        (outputs.losses * batch.loss_weights).sum().backward()
        found[name] = {"losses": outputs.losses.detach(), "grad": leaf.grad, **outputs.metrics}
    return found
