"""On-policy distillation: advantages by hand, and the gradient of the reverse KL that they give."""

from dataclasses import replace

import pytest
import torch

from samebit.trainer.algorithms.distillation import Distillation, DistillationConfig
from samebit.trainer.algorithms.policy_gradient import clipped_surrogate
from samebit.trainer.types import Sample

CONFIG = DistillationConfig(name="distillation")


def test_advantages_by_hand():
    """How much likelier the teacher finds each drawn token; no reward is read."""
    sample = Sample(sample_id=0, token_ids=range(5), loss_mask=[0, 1, 0, 1, 1])
    sample = sample.with_logprobs([-1.0, -2.0, -0.5])
    sample = replace(sample, teacher_logprobs=[0.0, -0.25, -9.0, -4.0, -0.5])
    algorithm = Distillation(CONFIG)
    assert algorithm.needs_teacher
    for reward in (0.0, 7.0):
        [[found]] = algorithm.advantages(torch.tensor([[reward]]), [[sample]])
        assert found[sample.loss_mask].tolist() == pytest.approx([0.75, -2.0, 0.0], abs=1e-6)


def test_its_mean_gradient_is_the_reverse_kls():
    """The mean over all tokens that could be drawn, by their probabilities, in fp64: that of
    KL(policy || teacher), written down."""
    generator = torch.Generator().manual_seed(6)
    policy, teacher = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    logits, theirs = policy.requires_grad_(), teacher.log_softmax(-1)
    own = logits.log_softmax(-1)
    drawn, advantages = own.detach(), (theirs - own).detach()
    losses, _ = clipped_surrogate(own - drawn, advantages, CONFIG)
    [found] = torch.autograd.grad((drawn.exp() * losses).sum(), logits)
    own = logits.log_softmax(-1)
    [expected] = torch.autograd.grad((own.exp() * (own - theirs)).sum(), logits)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    assert found.abs().max() > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length_penalty": "relative"}, "algorithm.length_penalty is 'relative'; it must be"),
        ({"kl_coef": 0.1, "kl_in": "reward"}, "algorithm.kl_in is 'reward'; it must be loss: adv"),
    ],
)
def test_what_only_rewards_would_read_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(name="distillation", **settings)
