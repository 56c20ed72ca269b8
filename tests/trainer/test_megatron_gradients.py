"""Gradients and optimizer steps against transformers' own models, differentiated by autograd."""

import pytest
import torch
from helpers import assert_same_bits

from samebit.trainer.algorithms.grpo import Grpo
from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.packing import pack_samples
from samebit.weight_sync.mapping import load_params, parts_of


def gradients(trainer, batches, loss):
    """The gradients of one step, by parameter, as the optimizer would see them."""
    from samebit.trainer.megatron.cpu import no_cuda

    with no_cuda():
        trainer._forward_backward(batches, loss, None)
    return {name: p.main_grad.clone() for name, p in trainer.params.items()}


def reference_model(path, dtype=torch.float64):
    """transformers' model on the same weights; fp64 leaves all the error to ours."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")


def cross_entropy(model, samples, loss_mean):
    """Mean negative log-likelihood of the response tokens, one sample at a time."""
    losses = []
    for s in samples:
        ids, start = torch.tensor(s.token_ids[None]), len(s.token_ids) - s.num_trained
        logprobs = model(ids).logits[0].log_softmax(-1)
        own = logprobs[start - 1 : -1].gather(1, ids[0, start:, None]).squeeze(1)
        losses.append(-own)
    if loss_mean == "token":
        return torch.cat(losses).mean()
    return torch.stack([x.mean() for x in losses]).mean()


def in_our_layout(specs, tensors):
    """Hugging Face gradients under Megatron's names and in its rows."""
    params = {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in specs}
    load_params(specs, params, parts_of(tensors.__getitem__))
    return params


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_gradients_are_those_of_transformers(model_path, make_trainer, random_samples, loss_mean):
    """A wrong backward of any operation, or a wrong normalisation, shows in some parameter."""
    samples = random_samples(9, seed=1)
    trainer = make_trainer(model_path)
    batches = pack_samples(samples, 100, loss_mean)
    assert len(batches) > 2
    found = gradients(trainer, batches, Sft())
    model = reference_model(model_path)
    cross_entropy(model, samples, loss_mean).backward()
    hf = {name: p.grad for name, p in model.named_parameters()}
    expected = in_our_layout(trainer.specs, hf)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-5, errors


def test_a_loss_is_the_mean_that_is_reported(make_trainer, qwen3_path, random_samples):
    """The logged loss must be the one that was differentiated."""
    samples = random_samples(9, seed=1)
    for loss_mean in ("token", "sequence"):
        stats = make_trainer().train_step(pack_samples(samples, 100, loss_mean), Sft())
        with torch.no_grad():
            expected = cross_entropy(reference_model(qwen3_path), samples, loss_mean)
        assert stats.loss == pytest.approx(float(expected), rel=1e-5)


def test_gradients_do_not_depend_on_the_split(make_trainer, random_samples):
    """Micro-batches are a matter of memory: the sum is the same but for fp32's rounding."""
    samples = random_samples(12, seed=2, with_logprobs=True)
    loss = Grpo()
    for loss_mean in ("token", "sequence"):
        found = [
            gradients(make_trainer(), pack_samples(samples, max_tokens, loss_mean), loss)
            for max_tokens in (10_000, 120, 45)
        ]
        for other in found[1:]:
            for name, gradient in found[0].items():
                assert relative_error(other[name], gradient.double()) < 2e-5, name


def test_gradients_repeat_to_the_bit(make_trainer, random_samples):
    """Same input, same gradient bits: resuming and two equal runs rest on it."""
    samples = random_samples(12, seed=2, with_logprobs=True)
    batches = pack_samples(samples, 120)
    loss = Grpo()
    trainer = make_trainer()
    first = gradients(trainer, batches, loss)
    again = gradients(trainer, batches, loss)
    other = gradients(make_trainer(), batches, loss)
    for name, gradient in first.items():
        assert_same_bits(again[name], gradient, name)
        assert_same_bits(other[name], gradient, name)


def test_vocabulary_padding_gets_no_gradient(model_path, make_trainer, random_samples):
    """Padding that moves would leak into the next step's log-sum-exp."""
    trainer = make_trainer(model_path)
    batches = pack_samples(random_samples(4, seed=1), 200)
    found = gradients(trainer, batches, Sft())
    trainer.train_step(batches, Sft())
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in found:
            assert not found[name][331:].any()
            assert not trainer.params[name][331:].any()


@pytest.mark.parametrize("clip_grad", [0.0, 0.05])
def test_steps_are_those_of_adamw(model_path, make_trainer, random_samples, clip_grad):
    """Learning rate, betas, eps, decay and clipping mean what torch.optim.AdamW means by them."""
    settings = {"weight_decay": 0.1, "adam_eps": 1e-4, "adam_beta1": 0.8, "adam_beta2": 0.95}
    trainer = make_trainer(model_path, lr=3e-3, clip_grad=clip_grad, **settings)
    model = reference_model(model_path)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]  # norms do not decay
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1, eps=1e-4, betas=(0.8, 0.95))
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    before = in_our_layout(trainer.specs, tensors)
    for step in range(3):
        samples = random_samples(5, seed=step)
        stats = trainer.train_step(pack_samples(samples, 100), Sft())
        adam.zero_grad()
        cross_entropy(model, samples, "token").backward()
        limit = clip_grad or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        assert stats.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert not clip_grad or norm > clip_grad
        adam.step()
    expected = in_our_layout(trainer.specs, tensors)
    for name, p in trainer.params.items():
        moved = p.detach().double() - before[name]
        assert relative_error(moved, expected[name] - before[name]) < 1e-4, name
