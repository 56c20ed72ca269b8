"""DPO: of two answers to a prompt, the better one is made more likely than the worse one.

loss = -log sigmoid(beta (log policy(y_w) / reference(y_w) - log policy(y_l) / reference(y_l))), a
mean over pairs. Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7. label_smoothing takes
a pair to be the wrong way round with that probability: Mitchell 2023, "A note on DPO with noisy
preferences & relationship to IPO".
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from samebit.trainer.algorithms.base import Algorithm, LossInputs, LossOutputs
from samebit.trainer.config import DpoConfig


def preference_losses(log_ratios: Tensor, config: DpoConfig) -> tuple[Tensor, Tensor]:
    """log_ratios [2 pairs] of whole answers, policy to reference, of each pair the better one's
    first -> losses and margins, both [pairs]."""
    chosen, rejected = log_ratios.view(-1, 2).unbind(1)
    margins = config.beta * (chosen - rejected)
    losses = -(1 - config.label_smoothing) * F.logsigmoid(margins)
    if config.label_smoothing > 0:
        losses = losses - config.label_smoothing * F.logsigmoid(-margins)
    return losses, margins


class Dpo(Algorithm[DpoConfig]):
    """See the module. It reads no rewards; trainer.loss_mean must be sequence."""

    Config = DpoConfig
    needs_reference = True

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """A pair's loss, in every row of its two samples, which are neighbours of one unit."""
        units = [sample.unit for sample in inputs.batch.samples]
        assert None not in units, units
        assert units[::2] == units[1::2], units
        assert inputs.ref_logprobs is not None
        log_ratios = inputs.sample_sums(inputs.logprobs - inputs.ref_logprobs)
        losses, margins = preference_losses(log_ratios, self.config)
        rewards = self.config.beta * log_ratios.detach().view(-1, 2)
        figures = {
            "train/margin": margins.detach(),
            "train/accuracy": (margins.detach() > 0).to(losses.dtype),
            "train/chosen_reward": rewards[:, 0],
            "train/rejected_reward": rewards[:, 1],
        }

        def in_rows(pairs: Tensor) -> Tensor:
            return inputs.in_rows(torch.repeat_interleave(pairs, 2))

        return LossOutputs(in_rows(losses), {name: in_rows(x) for name, x in figures.items()})
