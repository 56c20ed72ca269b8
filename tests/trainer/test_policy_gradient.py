"""The policy gradients against numbers by hand and against their papers' formulas in fp64."""

import math
from dataclasses import replace

import pytest
import torch

from samebit.trainer.algorithms.base import LossInputs
from samebit.trainer.algorithms.policy_gradient import truncated
from samebit.trainer.algorithms.registry import ALGORITHMS, find_algorithm
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import Sample

# Each sample's policy ratios and advantage: with wide bounds tokens, with narrow ones whole samples
# stand on either side of them, for either sign.
RATIOS = [[1.0], [1.5, 0.9, 1.1], [4.0, 0.7], [0.9, 1.25, 3.0, 0.2]]
ADVANTAGES = [1.0, 2.0, -1.5, -0.5]
DISTANCES = [[0.5], [-0.25, 0.125, 0.0], [0.75, -0.5], [0.25, -0.125, 1.0, -2.0]]
"""Log-probs minus the reference's."""
OLD = -1.25


def make(name="grpo", **settings):
    """The algorithm of this name with these settings."""
    found = find_algorithm(name)
    return found(found.Config(name=name, **settings))


def samples_of(ratios, advantages):
    return [
        Sample.of_response(
            sample_id=i,
            token_ids=(7, *range(1, len(tokens) + 1)),
            prompt_len=1,
            logprobs=[OLD] * len(tokens),
            advantage=advantage,
        )
        for i, (tokens, advantage) in enumerate(zip(ratios, advantages, strict=True))
    ]


def losses_of(algorithm, batch, logprobs, distances=None, entropies=None):
    """LossOutputs of a batch."""
    inputs = LossInputs(
        batch=batch,
        logprobs=logprobs,
        entropies=torch.zeros_like(logprobs) if entropies is None else entropies,
        ref_logprobs=None if distances is None else logprobs.detach() - distances,
    )
    return algorithm.checked_loss(inputs)


def run(algorithm, ratios, advantages, loss_mean="token", max_tokens=1000, distances=None, **mean):
    """(loss, gradient by log-prob, losses, metrics) over all micro-batches."""
    flat = torch.tensor([r for tokens in ratios for r in tokens], dtype=torch.float64)
    leaf = (flat.log() + OLD).requires_grad_()
    far = None if distances is None else torch.tensor([d for each in distances for d in each])
    batches = pack_samples(samples_of(ratios, advantages), max_tokens, loss_mean, **mean)
    total, losses, metrics, start = 0.0, [], {}, 0
    for batch in batches:
        rows = slice(start, start := start + len(batch.rows))
        found = losses_of(algorithm, batch, leaf[rows], None if far is None else far[rows])
        total = total + (found.losses * batch.loss_weights).sum()
        losses += found.losses.tolist()
        for key, values in found.metrics.items():
            metrics.setdefault(key, []).extend(values.tolist())
    loss = total / sum(batch.loss_denominator for batch in batches)
    loss.backward()
    return loss.item(), leaf.grad.tolist(), losses, metrics


# ---- the papers' formulas, a sample at a time, in fp64 ----


def cut(ratio, bound):
    """Truncated importance sampling: the value ends at the bound, the gradient goes on with it."""
    if bound == 0 or ratio.item() <= bound:
        return ratio
    return bound * ratio / ratio.item()


def ppo(ratio, advantage, *, low, high, dual=0.0, tis=0.0):
    """min(r A, clip(r) A), and for A < 0 the larger of that and dual A."""
    ratio = cut(ratio, tis)
    bounded = ratio.clamp(1 - low, 1 + high)
    objective = torch.minimum(ratio * advantage, bounded * advantage)
    if dual and advantage < 0:
        objective = torch.maximum(objective, torch.tensor(dual * advantage, dtype=torch.float64))
    return -objective


def by_token(low, high, **more):
    def losses(logprobs, advantage):
        return [ppo((x - OLD).exp(), advantage, low=low, high=high, **more) for x in logprobs]

    return losses


def by_sample(low, high):
    """GSPO, equation 5 with 7."""

    def losses(logprobs, advantage):
        ratio = ((logprobs - OLD).sum() / len(logprobs)).exp()
        return [ppo(ratio, advantage, low=low, high=high)] * len(logprobs)

    return losses


def by_sample_and_token(low, high):
    """GSPO-token, equations 13 and 14."""

    def losses(logprobs, advantage):
        ratio = ((logprobs - OLD).sum() / len(logprobs)).exp().item()
        own = [ratio * x.exp() / x.exp().item() for x in logprobs]
        return [ppo(r, advantage, low=low, high=high) for r in own]

    return losses


def weighted(low, high):
    """CISPO, and REINFORCE with a truncated weight."""

    def losses(logprobs, advantage):
        weights = [min(max((x - OLD).exp().item(), low), high) for x in logprobs]
        return [-w * advantage * x for w, x in zip(weights, logprobs, strict=True)]

    return losses


def plain(logprobs, advantage):
    """RLOO."""
    return [-advantage * x for x in logprobs]


def masked(literal, threshold):
    """Off-policy sequence masking of DeepSeek-V3.2."""

    def losses(logprobs, advantage):
        moved = (OLD - logprobs).mean().item()
        weight = 0.0 if advantage < 0 and moved > threshold else 1.0
        return [weight * x for x in literal(logprobs, advantage)]

    return losses


MEANS = {
    "token": lambda losses: sum(sum(each) for each in losses) / sum(map(len, losses)),
    "sequence": lambda losses: sum(sum(each) / len(each) for each in losses) / len(losses),
    "constant": lambda losses: sum(sum(each) for each in losses) / (8 * len(losses)),
}
BOUNDS = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
CASES = {
    "grpo": (make(clip_ratio_low=0.15, clip_ratio_high=0.4), by_token(0.15, 0.4)),
    "dapo": (make(**BOUNDS), by_token(0.2, 0.28)),
    "grpo dual clip": (make(**BOUNDS, dual_clip=2.5), by_token(0.2, 0.28, dual=2.5)),
    "grpo tis": (make(**BOUNDS, tis_clip=2.0), by_token(0.2, 0.28, tis=2.0)),
    "grpo masked": (make(off_policy_mask_threshold=0.05), masked(by_token(0.2, 0.2), 0.05)),
    "gspo": (make("gspo"), by_sample(3e-4, 4e-4)),
    "gspo masked": (
        make("gspo", off_policy_mask_threshold=0.05),
        masked(by_sample(3e-4, 4e-4), 0.05),
    ),
    "gspo token": (make("gspo", token_level=True), by_sample_and_token(3e-4, 4e-4)),
    "cispo": (make("cispo", clip_ratio_high=0.5), weighted(0.0, 1.5)),
    "cispo low": (make("cispo", clip_ratio_low=0.2, clip_ratio_high=0.5), weighted(0.8, 1.5)),
    "rloo": (make("rloo"), plain),
    "rloo masked": (make("rloo", off_policy_mask_threshold=0.05), masked(plain, 0.05)),
    "rloo tis": (make("rloo", tis_clip=2.0), weighted(0.0, 2.0)),
    "reinforce_plus_plus": (make("reinforce_plus_plus", **BOUNDS), by_token(0.2, 0.28)),
    "ppo": (make("ppo", **BOUNDS), by_token(0.2, 0.28)),
    "distillation": (make("distillation", **BOUNDS), by_token(0.2, 0.28)),
    "reinforce_plus_plus_baseline": (
        make("reinforce_plus_plus_baseline", **BOUNDS),
        by_token(0.2, 0.28),
    ),
}


@pytest.mark.parametrize("loss_mean", MEANS)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_papers(case, loss_mean):
    """Whichever mean the loss is."""
    algorithm, literal = CASES[case]
    tokens = {"loss_mean_tokens": 8} if loss_mean == "constant" else {}
    loss, gradient, *_ = run(algorithm, RATIOS, ADVANTAGES, loss_mean, **tokens)
    leaves = [
        (torch.tensor(each, dtype=torch.float64).log() + OLD).requires_grad_() for each in RATIOS
    ]
    losses = [literal(x, a) for x, a in zip(leaves, ADVANTAGES, strict=True)]
    expected = MEANS[loss_mean](losses)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    assert gradient == pytest.approx([g for x in leaves for g in x.grad.tolist()], abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_packing_moves_no_bit_of_a_row(case):
    """One micro-batch or three: each row's loss, gradient and figures."""
    algorithm, _ = CASES[case]
    loss, gradient, losses, metrics = run(algorithm, RATIOS, ADVANTAGES, "sequence")
    others = run(algorithm, RATIOS, ADVANTAGES, "sequence", max_tokens=6)
    assert others[1:] == (gradient, losses, metrics)
    assert others[0] == pytest.approx(loss, rel=1e-6)


# ---- by hand ----


def test_gspo_by_hand():
    """Ratios 2 and 1/8: s = (2 / 8)^(1/2) = 1/2, for all its tokens."""
    for token_level in (False, True):
        wide = make("gspo", clip_ratio_low=0.75, clip_ratio_high=0.75, token_level=token_level)
        loss, gradient, losses, metrics = run(wide, [[2.0, 0.125]], [3.0], "sequence")
        assert losses == pytest.approx([-1.5, -1.5], rel=1e-6)  # -s A
        assert loss == pytest.approx(-1.5, rel=1e-6)
        # d s / d log p = s / 2 for each of the two tokens, times -A: -0.5 / 2 * 3.
        assert gradient == pytest.approx([-0.75, -0.75], rel=1e-6)
        assert metrics["train/ratio"] == pytest.approx([0.5, 0.5], rel=1e-6)
        assert metrics["train/clip_fraction"] == [0.0, 0.0]
        # A < 0 and s below 1 - 0.25: -(0.75 * -3) = 2.25, without a gradient.
        near = make("gspo", clip_ratio_low=0.25, token_level=token_level)
        loss, gradient, *_, metrics = run(near, [[2.0, 0.125]], [-3.0], "sequence")
        assert (loss, gradient) == (pytest.approx(2.25, rel=1e-6), [0.0, 0.0])
        assert metrics["train/clip_fraction"] == [1.0, 1.0]


def test_tokens_with_advantages_of_their_own():
    """GSPO-token: a gradient -s A_t / 2; GSPO shares them out: -s (A_1 + A_2) / 2 / 2. s = 1/2."""
    [sample] = samples_of([[2.0, 0.125]], [0.0])
    [batch] = pack_samples([replace(sample, advantages=[0.0, 4.0, -2.0])], 100, "sequence")
    found = {}
    for token_level in (False, True):
        wide = make("gspo", clip_ratio_low=0.75, clip_ratio_high=0.75, token_level=token_level)
        leaf = (torch.tensor([2.0, 0.125]).log() + OLD).requires_grad_()
        (losses_of(wide, batch, leaf).losses * batch.loss_weights).sum().backward()
        found[token_level] = leaf.grad.tolist()
    assert found[True] == pytest.approx([-1.0, 0.5], rel=1e-6)
    assert found[False] == pytest.approx([-0.25, -0.25], rel=1e-6)


def test_cispo_by_hand():
    """Weights 1.5, of 4, and 0.5, as it is: -w A log p with A = 2; log p = -1.25 + log r."""
    cispo = make("cispo", clip_ratio_high=0.5)
    loss, gradient, losses, metrics = run(cispo, [[4.0, 0.5]], [2.0])
    # -1.5 * 2 * (-1.25 + 1.3862944) = -0.4088831; -0.5 * 2 * (-1.25 - 0.6931472) = 1.9431472
    assert losses == pytest.approx([-0.4088831, 1.9431472], rel=1e-6)
    assert loss == pytest.approx((1.9431472 - 0.4088831) / 2, rel=1e-6)
    assert gradient == pytest.approx([-1.5, -0.5], rel=1e-6)  # -w A / 2 tokens
    assert metrics["train/clip_fraction"] == [1.0, 0.0]


def test_rloo_by_hand():
    """-A log p with A = 2: weights 1; by tis_clip=3 they are 3, of 4, and 0.5."""
    loss, gradient, losses, metrics = run(make("rloo"), [[4.0, 0.5]], [2.0])
    # -2 * 0.1362944 and -2 * -1.9431472
    assert losses == pytest.approx([-0.2725887, 3.8862944], rel=1e-6)
    assert gradient == [-1.0, -1.0]  # -A / 2 tokens
    assert metrics.keys() == {"train/ratio"}
    _, gradient, losses, metrics = run(make("rloo", tis_clip=3.0), [[4.0, 0.5]], [2.0])
    assert losses == pytest.approx([-0.8177662, 1.9431472], rel=1e-6)
    assert gradient == pytest.approx([-3.0, -0.5], rel=1e-6)
    assert metrics["train/tis_fraction"] == [1.0, 0.0]


def test_dual_clip_and_truncation_by_hand():
    """A = -2, r = 5: PPO 10 with gradient 10; dual clip at 3: 6 without; TIS at 3: 6 with 6."""
    for settings, loss, gradient in (
        ({}, 10, 10),
        ({"dual_clip": 3}, 6, 0),
        ({"tis_clip": 3}, 6, 6),
    ):
        for name in ("grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"):
            found = run(make(name, **settings), [[5.0]], [-2.0])
            assert found[:2] == (pytest.approx(loss, rel=1e-6), pytest.approx([gradient], rel=1e-6))
        # Where the advantage is positive the upper bound comes first: -1.2 * 2.
        found = run(make(**settings), [[5.0]], [2.0])
        assert found[:2] == (pytest.approx(-2.4, rel=1e-6), [0.0])


def test_off_policy_masks_by_hand():
    """log(rollout / policy) of ratios 1/4 and 2 is log 4 and -log 2, in the mean log(2) / 2 = 0.35:
    masked below that, unless the advantage is positive. Ratios 1/2 and 2 have not moved at all. The
    KL, k1 = 1/2 of weight 1/4, stays where the mask is."""
    settings = {"clip_ratio_low": 1.0, "kl_coef": 0.25, "kl_estimator": "k1"}
    for threshold, expected in ((0.34, [0.0, 0.0]), (0.35, [0.25, 2.0])):
        algorithm = make(off_policy_mask_threshold=threshold, **settings)
        ratios, distances = [[0.25, 2.0], [0.5, 2.0], [0.25, 2.0]], [[0.5, 0.5]] * 3
        _, _, losses, metrics = run(algorithm, ratios, [-1.0, -1.0, 1.0], distances=distances)
        others = [0.5, 2.0, -0.25, -1.2]
        assert losses == pytest.approx([x + 0.125 for x in (*expected, *others)], abs=1e-6)
        masks = [float(threshold == 0.34)] * 2
        assert metrics["train/off_policy_mask_fraction"] == [*masks, *[0.0] * 4]


def test_the_unbiased_kl_by_hand():
    """ratio * k3 with ratio 2 and d = log 2: 2 (1/2 - 1 + log 2), whose gradient is ratio * d: for
    ratios within the bounds and advantage 0 it is all there is."""
    kl = make(kl_coef=0.5, kl_estimator="k3_unbiased")
    loss, gradient, _, metrics = run(kl, [[2.0]], [0.0], distances=[[math.log(2)]])
    assert metrics["train/kl"] == pytest.approx([0.3862944], rel=1e-6)  # 2 * 0.1931472
    assert loss == pytest.approx(0.5 * 0.3862944, rel=1e-6)
    # Here the reference's gradient is the score's alone: 0.5 * 2 * 0.6931472.
    assert gradient == pytest.approx([0.6931472], rel=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_unbiased"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_the_kl_and_the_entropy(name, estimator):
    """Added to the loss of each row: kl_coef times the estimate, minus entropy_coef times it."""
    penalties = {"kl_coef": 0.3, "kl_estimator": estimator, "kl_in": "loss"}
    assert not make(name).needs_reference
    assert not make(name).needs_entropy_grad
    algorithm = make(name, **penalties, entropy_coef=0.2)
    assert (algorithm.needs_reference, algorithm.rewards_need_reference) == (True, False)
    assert algorithm.needs_entropy_grad
    [batch] = pack_samples(samples_of(RATIOS, ADVANTAGES), 1000)
    far = torch.tensor([d for each in DISTANCES for d in each])
    ratio = torch.tensor([r for each in RATIOS for r in each])
    found = {}
    for key, each in {"with": algorithm, "without": make(name)}.items():
        leaf = (ratio.log() + OLD).requires_grad_()
        entropies = torch.full_like(leaf, 0.75).requires_grad_()
        losses = losses_of(each, batch, leaf, far, entropies).losses
        losses.sum().backward()
        found[key] = losses.detach(), leaf.grad, entropies.grad
    d = far.double()
    values, slopes = {
        "k1": (d, torch.ones_like(d)),
        "k2": (d * d / 2, d),
        "k3": ((-d).exp() - 1 + d, 1 - (-d).exp()),
        "k3_unbiased": (ratio * ((-d).exp() - 1 + d), ratio * d),
    }[estimator]
    (losses, gradient, entropy), (base, slope, none) = found["with"], found["without"]
    torch.testing.assert_close(losses, (base + 0.3 * values - 0.2 * 0.75).float())
    torch.testing.assert_close(gradient, (slope + 0.3 * slopes).float())
    assert entropy.eq(-0.2).all()
    assert none is None


# ---- edges ----


def test_an_infinite_ratio_that_is_clipped_has_no_gradient():
    """exp(200) is no fp32: clipped it is a bound, truncated it is one with a gradient."""
    [batch] = pack_samples(samples_of([[1.0] * 3] * 3, [2.0, -2.0, 0.0]), 1000)
    far = OLD + torch.tensor([200.0, 0.0, -200.0] * 3)
    bounds = {"clip_ratio_high": 0.25, "clip_ratio_low": 0.25}
    expected = {
        "dual_clip": ([-2.5, -2, 0, 6, 2, 1.5], [0, -2, 0, 0, 2, 0]),
        "tis_clip": ([-2.5, -2, 0, 6, 2, 1.5], [0, -2, 0, 6, 2, 0]),
    }
    for key, (losses, slopes) in expected.items():
        leaf = far.clone().requires_grad_()
        found = losses_of(make(**bounds, **{key: 3.0}), batch, leaf)
        found.losses.sum().backward()
        assert found.losses.tolist() == pytest.approx([*losses, 0, 0, 0], rel=1e-6)
        assert leaf.grad.tolist() == pytest.approx([*slopes, 0, 0, 0], rel=1e-6)
        assert found.metrics["train/clip_fraction"].tolist()[6:] == [0.0] * 3
    leaf = far.clone().requires_grad_()
    assert losses_of(make(), batch, leaf).losses[3].isinf()  # nothing bounds it: the run ends


@pytest.mark.parametrize("case", CASES)
def test_a_token_that_has_become_impossible(case):
    """log-prob -inf, ratio 0: PPO's loss is that of the bound. Where the log-prob itself stands in
    the loss it is not finite, which ends the run; other rows are as they were."""
    algorithm, _ = CASES[case]
    [batch] = pack_samples(samples_of([[1.0], [1.0, 1.0]], [-1.0, -1.0]), 1000)
    leaf = torch.tensor([-math.inf, OLD, OLD]).requires_grad_()
    losses = losses_of(algorithm, batch, leaf).losses
    stands = case.startswith(("cispo", "rloo", "gspo token")) and not case.endswith("masked")
    assert losses[0].isfinite() != stands
    losses[1:].sum().backward()
    assert losses[1:].isfinite().all()
    assert leaf.grad.isfinite().all()


def test_truncation_by_hand():
    """min(r, 2) as a value; of exp the gradient is that value, on both sides."""
    ratios = torch.tensor([0.5, 2.0, 8.0])
    leaf = ratios.log().requires_grad_()
    found = truncated(leaf, 2.0).exp()
    found.sum().backward()
    assert found.tolist() == pytest.approx([0.5, 2.0, 2.0], rel=1e-6)
    assert leaf.grad.tolist() == pytest.approx([0.5, 2.0, 2.0], rel=1e-6)
    assert truncated(leaf, 0.0) is leaf
