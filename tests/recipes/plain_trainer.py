"""What a run should have done, by a plain program: transformers, fp64, a loop over samples.

Nothing of samebit is used here. What it reads is the user's: a model folder, records, settings.
"""

import math
from statistics import mean

import torch
from transformers import AutoModelForCausalLM


class PlainModel:
    """A model folder in fp64."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="sdpa"
        ).eval()
        self.weights = dict(self.model.named_parameters())

    def read(self, prompt, answer, temperature=1.0):
        """Log-probs [L] of an answer's tokens after a prompt, and the entropies there."""
        logits = self.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        whole = (logits / temperature).log_softmax(-1)
        entropies = -(whole.exp() * whole).sum(-1)
        return whole[torch.arange(len(answer)), torch.tensor(answer)], entropies.detach()


class AdamW:
    """Decoupled weight decay, of matrices only; the gradient is clipped by its norm before."""

    def __init__(self, weights, *, beta1, beta2, eps, weight_decay, clip):
        self.weights, self.betas, self.eps = weights, (beta1, beta2), eps
        self.weight_decay, self.clip, self.count = weight_decay, clip, 0
        self.moments = {n: (torch.zeros_like(w), torch.zeros_like(w)) for n, w in weights.items()}

    @torch.no_grad()
    def step(self, gradients, rate):
        """Change the weights; the gradient's norm before it was clipped."""
        self.count += 1
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        scale = min(1.0, self.clip / norm) if self.clip else 1.0
        for name, weight in self.weights.items():
            decay = self.weight_decay if weight.dim() > 1 else 0.0
            first, second = self.moments[name]
            gradient, (beta1, beta2) = gradients[name] * scale, self.betas
            first += (1 - beta1) * (gradient - first)
            second += (1 - beta2) * (gradient.square() - second)
            root = (second / (1 - beta2**self.count)).sqrt() + self.eps
            weight -= rate * (first / (1 - beta1**self.count) / root + decay * weight)
        return norm


def rate_of(update, num_updates, *, schedule, warmup, highest, lowest):
    """The learning rate of optimizer step `update`, counted from 0, of `num_updates`."""
    if update < warmup:
        return highest * update / warmup
    done = (update - warmup) / (num_updates - warmup)
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    return lowest + (highest - lowest) * left[schedule]


def optimizer_keys(rate, adamw):
    """The arguments of rate_of and AdamW as keys of a configuration."""
    return {
        "trainer.optimizer.lr_schedule": rate["schedule"],
        "trainer.optimizer.lr_warmup_steps": rate["warmup"],
        "trainer.optimizer.lr": rate["highest"],
        "trainer.optimizer.min_lr": rate["lowest"],
        "trainer.optimizer.adam_beta1": adamw["beta1"],
        "trainer.optimizer.adam_beta2": adamw["beta2"],
        "trainer.optimizer.adam_eps": adamw["eps"],
        "trainer.optimizer.weight_decay": adamw["weight_decay"],
        "trainer.optimizer.clip_grad": adamw["clip"],
    }


def order_of(num_records, seed, count):
    """Which record comes at each of the first `count` places: every epoch its own shuffle."""
    order = []
    for epoch in range(-(-count // num_records)):
        generator = torch.Generator().manual_seed(seed * 2**20 + epoch)
        order += torch.randperm(num_records, generator=generator).tolist()
    return order[:count]


def sample_id(step, prompt, sample, evaluation=False):
    """1 bit for evaluation, 31 bits step, 20 bits prompt, 12 bits sample."""
    return evaluation * 2**63 + step * 2**32 + prompt * 2**12 + sample


def advantages_of(rewards, normalized, eps=1e-6):
    """Of one group: how much better than its mean, in deviations if `normalized`."""
    centred = [reward - mean(rewards) for reward in rewards]
    deviation = math.sqrt(sum(c * c for c in centred) / (len(rewards) - 1)) + eps
    return [c / deviation if normalized else c for c in centred]


KL = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: log_ratio.square() / 2,
    "k3": lambda log_ratio: torch.exp(-log_ratio) - 1 + log_ratio,
}


def grpo_losses(logprobs, drawn, reference, advantage, *, low, high, kl_coef, estimator):
    """Loss of each token of a sample, and what is logged of each."""
    ratio = torch.exp(logprobs - drawn)
    bounded = torch.minimum(ratio, torch.tensor(1 + high)).maximum(torch.tensor(1 - low))
    is_clipped = (ratio != bounded) & (bounded * advantage < ratio * advantage)
    losses = -torch.where(is_clipped, bounded, ratio) * advantage
    logged = {"train/ratio": ratio, "train/clip_fraction": is_clipped.double()}
    if kl_coef:
        kl = KL[estimator](logprobs - reference)
        losses, logged["train/kl"] = losses + kl_coef * kl, kl
    return losses, logged


def update(model, optimizer, rate, losses_of, loss_mean="token"):
    """One optimizer step. losses_of: for each sample (losses [L], what is logged, each [L]).

    The row of metrics; of a logged quantity the mean over all tokens.
    """
    losses, logged = zip(*losses_of, strict=True)
    if loss_mean == "token":
        loss = torch.cat(losses).mean()
    else:
        loss = torch.stack([each.mean() for each in losses]).mean()
    names = list(model.weights)
    gradients = torch.autograd.grad(loss, [model.weights[name] for name in names])
    norm = optimizer.step(dict(zip(names, gradients, strict=True)), rate)
    metrics = {name: torch.cat([each[name] for each in logged]).mean().item() for name in logged[0]}
    return {"train/loss": loss.item(), "train/grad_norm": norm, **metrics}


def evenly(rows):
    """The mean of rows of metrics."""
    return {name: mean(row[name] for row in rows) for name in rows[0]}
