"""GRPO and supervised losses against values computed by hand."""

import math
import re

import pytest
import torch

from samebit.trainer.algorithms.base import LossInputs
from samebit.trainer.algorithms.grpo import Grpo, group_advantages
from samebit.trainer.algorithms.policy_gradient import kl_estimate
from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.config import GrpoConfig, OptimizerConfig, TrainerConfig
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import Sample

EPS = 1e-6


def advantages(rewards, **config):
    return group_advantages(torch.tensor(rewards), GrpoConfig(**config)).tolist()


def test_advantages_by_hand():
    """(r - mean) / (sample standard deviation + eps), each group on its own."""
    found = advantages([[1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 6.0, 8.0]])
    std = 0.5  # of 1, 0, 0, 0
    assert found[0] == pytest.approx([0.75 / (std + EPS)] + [-0.25 / (std + EPS)] * 3, rel=1e-12)
    std = math.sqrt(20 / 3)
    assert found[1] == pytest.approx([x / (std + EPS) for x in (-3, -1, 1, 3)], rel=1e-12)


def test_advantages_are_pinned():
    """In the order of the samples; eps is added to the deviation, whose divisor is n - 1."""
    found = advantages([[1.0, 0.0, 0.5, 4.0], [0.0, 3.0, 1.0, 1.0]], std_eps=0.25)
    first = [-0.18319597354784037, -0.6717185696754147, -0.4274572716116275, 1.2823718148348826]
    second = [-0.828744443187774, 1.1602422204628835, -0.1657488886375548, -0.1657488886375548]
    assert found[0] == pytest.approx(first, rel=1e-12)
    assert found[1] == pytest.approx(second, rel=1e-12)
    wide = torch.tensor([[1.0, 1.0 + 2**-40]], dtype=torch.float64)
    assert group_advantages(wide, GrpoConfig(normalize_std=False)).tolist() == [[-(2**-41), 2**-41]]


def test_advantages_without_normalisation_are_centred_rewards():
    """Dr. GRPO."""
    assert advantages([[1.0, 0.0, 0.0, 0.0]], normalize_std=False) == [[0.75, -0.25, -0.25, -0.25]]


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -7.7e8])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_equal_rewards_give_exact_zeros(reward, n, normalize_std):
    """Rounding residue divided by eps would push the policy in a random direction."""
    found = advantages([[reward] * n], normalize_std=normalize_std)
    assert found == [[0.0] * n]
    assert not any(math.copysign(1, x) < 0 for x in found[0])


def test_rewards_too_far_apart_are_refused():
    """Their deviation is infinite and would make zeros of all advantages; or an advantage is."""
    for wide, normalize_std in ((1e200, True), (1e39, False)):
        rewards = torch.tensor([[0.0, 1.0], [wide, -wide]], dtype=torch.float64)
        message = re.escape(f"the rewards [{wide}, -{wide}] of a prompt lie too far apart")
        with pytest.raises(ValueError, match=message):
            group_advantages(rewards, GrpoConfig(normalize_std=normalize_std))
    equal = torch.full((1, 3), 1e200, dtype=torch.float64)
    assert group_advantages(equal, GrpoConfig()).tolist() == [[0.0] * 3]


def test_advantages_of_a_group_do_not_depend_on_other_groups():
    """A pure function of the group, so order and batching of prompts cannot matter."""
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    together = group_advantages(rewards, GrpoConfig())
    for i in (4, 0, 2):
        assert torch.equal(group_advantages(rewards[i : i + 1], GrpoConfig())[0], together[i])


def batch(old, advantages):
    """A batch of one-token responses with the given log-probs at the rollout."""
    samples = [
        Sample.of_response(
            sample_id=i, token_ids=(1, 2), prompt_len=1, logprobs=(value,), advantage=a
        )
        for i, (value, a) in enumerate(zip(old, advantages, strict=True))
    ]
    [packed] = pack_samples(samples, 1000)
    return packed


def loss_of(algorithm, logprobs, reference, packed):
    """Losses and metrics."""
    inputs = LossInputs(
        batch=packed,
        logprobs=logprobs,
        entropies=torch.zeros_like(logprobs),
        ref_logprobs=reference,
    )
    found = algorithm.checked_loss(inputs)
    return found.losses, found.metrics


def run(config, ratios, advantages, ref_diff=None):
    """Losses, gradients by log-prob and metrics at given policy ratios."""
    logprobs = (torch.tensor(ratios).log() - 1.0).requires_grad_()
    packed = batch([-1.0] * len(ratios), advantages)
    reference = None if ref_diff is None else logprobs.detach() - torch.tensor(ref_diff)
    losses, metrics = loss_of(Grpo(config), logprobs, reference, packed)
    losses.sum().backward()
    return losses.tolist(), logprobs.grad.tolist(), metrics


def test_at_ratio_one_the_gradient_is_minus_the_advantage():
    """The first optimizer step: no clipping, exact ratio."""
    packed = batch([-1.25, -3.5, -0.5], [1.5, -0.5, 0.0])
    logprobs = packed.rollout_logprobs.clone().requires_grad_()
    losses, metrics = loss_of(Grpo(), logprobs, None, packed)
    losses.sum().backward()
    assert losses.tolist() == [-1.5, 0.5, 0.0]
    assert logprobs.grad.tolist() == [-1.5, 0.5, 0.0]
    assert metrics["train/ratio"].tolist() == [1.0, 1.0, 1.0]
    assert metrics["train/clip_fraction"].tolist() == [0.0, 0.0, 0.0]
    assert metrics.keys() == {"train/ratio", "train/clip_fraction"}


def test_low_and_high_clip_are_separate():
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A): a clipped token has no gradient."""
    config = GrpoConfig(clip_ratio_low=0.1, clip_ratio_high=0.4)
    ratios = [1.3, 1.5, 0.95, 0.8, 1.5, 1.3, 0.8, 0.95]
    signs = [2.0, 2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0]
    losses, gradients, metrics = run(config, ratios, signs)
    expected = [-2.6, -2.8, -1.9, -1.6, 3.0, 2.6, 1.8, 1.9]
    assert losses == pytest.approx(expected, rel=1e-6)
    slopes = [-2.6, 0.0, -1.9, -1.6, 3.0, 2.6, 0.0, 1.9]  # d loss / d logprob = -A ratio, or 0
    assert gradients == pytest.approx(slopes, rel=1e-6)
    assert metrics["train/clip_fraction"].tolist() == [0, 1, 0, 0, 0, 0, 1, 0]


def test_kl_estimators_by_hand():
    """k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d with d = log-prob minus the reference's."""
    d = torch.tensor([0.0, 0.7, -0.7, 1e-4, 3.0], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(5, dtype=torch.float64)
    values = {
        "k1": (d.detach(), torch.ones(5, dtype=torch.float64)),
        "k2": (d.detach() ** 2 / 2, d.detach()),
        "k3": (torch.exp(-d.detach()) - 1 + d.detach(), 1 - torch.exp(-d.detach())),
    }
    for estimator, (value, slope) in values.items():
        found = kl_estimate(d, zeros, estimator)
        assert torch.allclose(found, value, rtol=1e-9, atol=1e-15), estimator
        [gradient] = torch.autograd.grad(found.sum(), d)
        assert torch.allclose(gradient, slope, rtol=1e-9, atol=1e-15), estimator
        assert found[0] == 0.0
    assert (kl_estimate(d, zeros, "k3") >= 0).all()


def test_losses_are_pinned():
    """Ratios 1.5 and 0.6, clipped at 1.3 and 0.9, advantages 2 and -1, and a penalty of each kind
    for log-probs 0.5 above and 0.25 below the reference's."""
    clips = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3}
    penalties = {
        "k1": ([0.5, -0.25], [1.0, 1.0]),
        "k2": ([0.125, 0.03125], [0.5, -0.25]),
        "k3": ([0.1065306597, 0.0340254167], [0.3934693403, -0.2840254167]),
    }
    for estimator, (values, slopes) in penalties.items():
        config = GrpoConfig(**clips, kl_coef=0.5, kl_estimator=estimator)
        losses, gradients, metrics = run(config, [1.5, 0.6], [2.0, -1.0], [0.5, -0.25])
        surrogate, slope = [-2.6, 0.9], [0.0, 0.0]
        for found, base, kl in ((losses, surrogate, values), (gradients, slope, slopes)):
            assert found == pytest.approx([a + 0.5 * b for a, b in zip(base, kl, strict=True)])
        assert metrics["train/kl"].tolist() == pytest.approx(values)
        assert metrics["train/ratio"].tolist() == pytest.approx([1.5, 0.6])
        assert metrics["train/clip_fraction"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_penalty_is_added_with_its_weight(estimator):
    """Loss and gradient are those without the penalty plus kl_coef times the estimate's."""
    difference = [0.5, -0.25]
    plain, plain_gradient, _ = run(GrpoConfig(), [1.1, 0.9], [1.0, -1.0])
    config = GrpoConfig(kl_coef=0.3, kl_estimator=estimator)
    losses, gradients, metrics = run(config, [1.1, 0.9], [1.0, -1.0], difference)
    d = torch.tensor(difference, requires_grad=True)
    kl = kl_estimate(d, torch.zeros(2), estimator)
    kl.sum().backward()
    for i in range(2):
        assert losses[i] == pytest.approx(plain[i] + 0.3 * kl[i].item(), rel=1e-5)
        assert gradients[i] == pytest.approx(plain_gradient[i] + 0.3 * float(d.grad[i]), rel=1e-5)
    assert metrics["train/kl"].tolist() == pytest.approx(kl.tolist(), rel=1e-5)


def test_the_reference_equal_to_the_policy_costs_exactly_nothing():
    """Before the first step policy and reference are the same bits."""
    losses, _, metrics = run(GrpoConfig(kl_coef=1.0), [1.0], [2.0], [0.0])
    assert losses == [-2.0]
    assert metrics["train/kl"].tolist() == [0.0]


def test_supervised_loss():
    """The negative log-likelihood, whatever the advantages."""
    logprobs = torch.tensor([-0.5, -2.0], requires_grad=True)
    packed = batch([-9.0, -9.0], [5.0, -5.0])
    losses, metrics = loss_of(Sft(), logprobs, None, packed)
    losses.sum().backward()
    assert losses.tolist() == [0.5, 2.0]
    assert logprobs.grad.tolist() == [-1.0, -1.0]
    assert metrics == {}


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (lambda: GrpoConfig(clip_ratio_low=1.1), "algorithm.clip_ratio_low is 1.1"),
        (lambda: GrpoConfig(clip_ratio_high=-0.1), "algorithm.clip_ratio_high is -0.1"),
        (lambda: GrpoConfig(kl_coef=-1), "algorithm.kl_coef is -1"),
        (lambda: GrpoConfig(kl_estimator="k4"), "algorithm.kl_estimator is 'k4'.*k1.*k2.*k3"),
        (lambda: OptimizerConfig(lr=-1.0), "trainer.optimizer.lr is -1.0"),
        (lambda: OptimizerConfig(lr=1.0, min_lr=2.0), "trainer.optimizer.min_lr is 2.0"),
        (lambda: OptimizerConfig(lr_schedule="step"), "trainer.optimizer.lr_schedule is 'step'"),
        (lambda: OptimizerConfig(clip_grad=-1.0), "trainer.optimizer.clip_grad is -1.0"),
        (lambda: OptimizerConfig(lr_warmup_steps=-1), "trainer.optimizer.lr_warmup_steps is -1"),
        (lambda: OptimizerConfig(weight_decay=-0.1), "trainer.optimizer.weight_decay is -0.1"),
        (lambda: OptimizerConfig(adam_beta2=1.0), "trainer.optimizer.adam_beta2 is 1.0"),
        (lambda: OptimizerConfig(adam_eps=0.0), "trainer.optimizer.adam_eps is 0.0"),
        (lambda: OptimizerConfig(lr=math.nan), "trainer.optimizer.lr is nan"),
        (lambda: TrainerConfig(num_steps=0), "trainer.num_steps is 0"),
        (lambda: TrainerConfig(micro_batch_tokens=0), "trainer.micro_batch_tokens is 0"),
        (lambda: TrainerConfig(keep_checkpoints=0), "trainer.keep_checkpoints is 0"),
        (lambda: TrainerConfig(batch_size=0), "trainer.batch_size is 0"),
        (lambda: TrainerConfig(checkpoint_every=-1), "trainer.checkpoint_every is -1"),
        (lambda: TrainerConfig(loss_mean="batch"), "trainer.loss_mean is 'batch'"),
    ],
)
def test_settings_out_of_range_name_their_key(config, key):
    """A setting that cannot be meant must not start a run."""
    with pytest.raises(ValueError, match=key):
        config()
