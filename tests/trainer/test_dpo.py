"""DPO by hand, and a step of it against a plain program in fp64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from samebit.trainer.algorithms.dpo import Dpo, preference_losses
from samebit.trainer.config import DpoConfig
from samebit.trainer.packing import pack_samples
from samebit.weight_sync.mapping import load_params, parts_of

BETA, SMOOTHING = 0.7, 0.1


def test_by_hand():
    """Log ratios of 0.5 and -0.3 with beta 0.1: a margin of 0.08, a loss of log(1 + e^-0.08)."""
    losses, margins = preference_losses(torch.tensor([0.5, -0.3, -1.0, 1.0]), DpoConfig())
    assert margins.tolist() == pytest.approx([0.08, -0.2], abs=1e-6)
    by_hand = [math.log(1 + math.exp(-0.08)), math.log(1 + math.exp(0.2))]
    assert losses.tolist() == pytest.approx(by_hand, abs=1e-6)
    smooth = DpoConfig(label_smoothing=0.25)
    found, _ = preference_losses(torch.tensor([0.5, -0.3]), smooth)
    assert found.item() == pytest.approx(0.75 * by_hand[0] + 0.25 * (by_hand[0] + 0.08), abs=1e-6)


def test_losses_and_gradients_are_the_papers():
    """-log sigmoid(beta (chosen - rejected)), in fp64; by label_smoothing some the other way."""
    log_ratios = torch.randn(40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    literal = log_ratios.detach().double().requires_grad_()
    losses, _ = preference_losses(log_ratios, DpoConfig(beta=BETA, label_smoothing=SMOOTHING))
    losses.sum().backward()
    margins = BETA * (literal[::2] - literal[1::2])
    right, wrong = ((1 + torch.exp(-m)).log() for m in (margins, -margins))
    expected = (1 - SMOOTHING) * right + SMOOTHING * wrong
    expected.sum().backward()
    assert losses.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert log_ratios.grad.tolist() == pytest.approx(literal.grad.tolist(), abs=1e-6)


def plain_model(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager"
    )


def whole_logprob(model, sample):
    """Of a response, its tokens' log-probs added up."""
    ids = torch.tensor(sample.token_ids[None])
    rows = model(ids).logits[0, :-1].log_softmax(-1)
    tokens = rows.gather(1, ids[0, 1:, None]).squeeze(1)
    return tokens[-sample.num_trained :].sum()


def test_a_step_is_that_of_a_plain_program(make_trainer, random_samples, qwen3_path):
    """Four pairs in two micro-batches: loss, every gradient; accuracy counts pairs, by tokens."""
    trainer = make_trainer(lr=0.0, clip_grad=0)
    trainer.freeze_reference()
    model, reference = plain_model(qwen3_path), plain_model(qwen3_path)
    with torch.no_grad():
        for p in (*model.parameters(), *trainer.params.values()):
            p.mul_(0.95)
    samples = [replace(s, unit=i // 2) for i, s in enumerate(random_samples(8, seed=4))]
    batches = pack_samples(samples, 120, "sequence")
    assert len(batches) >= 2
    config = DpoConfig(beta=BETA, label_smoothing=SMOOTHING)
    stats = trainer.train_step(batches, Dpo(config))
    losses, good, counts = [], [], []
    for better, worse in zip(samples[::2], samples[1::2], strict=True):
        with torch.no_grad():
            against = whole_logprob(reference, better) - whole_logprob(reference, worse)
        margin = BETA * (whole_logprob(model, better) - whole_logprob(model, worse) - against)
        losses.append(-(1 - SMOOTHING) * F.logsigmoid(margin) - SMOOTHING * F.logsigmoid(-margin))
        good.append(float(margin.detach() > 0))
        counts.append(better.num_trained + worse.num_trained)
    loss = torch.stack(losses).mean()
    loss.backward()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    share = sum(g * n for g, n in zip(good, counts, strict=True)) / sum(counts)
    assert stats.metrics["train/accuracy"] == pytest.approx(share)
    assert 0 < share < 1
    expected = {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in trainer.specs}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    load_params(trainer.specs, expected, parts_of(gradients.__getitem__))
    for name, p in trainer.params.items():
        error = (p.main_grad.double() - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, (name, float(error))


def test_the_first_loss_is_log_2(make_trainer, random_samples):
    """Policy and reference have the same bits: every margin is exactly 0."""
    trainer = make_trainer()
    trainer.freeze_reference()
    samples = [replace(s, unit=i // 2) for i, s in enumerate(random_samples(4, seed=4))]
    stats = trainer.train_step(pack_samples(samples, 100, "sequence"), Dpo())
    assert stats.metrics["train/margin"] == stats.metrics["train/accuracy"] == 0.0
    assert stats.loss == pytest.approx(math.log(2), rel=1e-6)
