"""Steps that every layout takes: one of GRPO with all that it can have, and some to be refused."""

import math
from dataclasses import replace

import pytest
import torch

from samebit.weight_sync.objects import encode

CHANGED = {1: 0.25, 4: -0.5, 5: 0.125}
"""Rows of the last sample whose log-probs are not the trainer's, and by how much."""
_ONE_SHARD = "decoder.layers.0.input_layernorm.weight"


def gradient_samples():
    """Samples of very different lengths, for the supervised loss."""
    from samebit.trainer.types import Sample

    generator = torch.Generator().manual_seed(9)
    lens = [(1, 8), (20, 3), (7, 30), (12, 12), (3, 1), (33, 14)]
    return [
        Sample.of_response(
            sample_id=i,
            token_ids=tuple(torch.randint(331, (p + r,), generator=generator).tolist()),
            prompt_len=p,
        )
        for i, (p, r) in enumerate(lens)
    ]


def assert_same_figures(found, alone):
    """One process's figures of policy_step: counts are equal, sums up to their order."""
    assert found.keys() == alone.keys()
    assert found["metrics"].keys() == alone["metrics"].keys()
    assert found["logprob_mismatches"] == alone["logprob_mismatches"] == len(CHANGED)
    assert found["logprob_abs_diff_max"] == pytest.approx(0.5, abs=1e-5)
    assert list(found["first_mismatch"][:2]) == [5, 33 + min(CHANGED)]
    for name in ("num_tokens", "logprob_tokens_compared", "learning_rate"):
        assert found[name] == alone[name], name
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(alone[name], rel=1e-5), name
    assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)


def policy_step(megatron, folder):
    """Gradients by name and the figures of a step with advantages, ratios and a far reference, as a
    mean over samples. Only the last micro-batch, rank 1's of two copies, has other log-probs."""
    from samebit.recipes.launch.placement import load_weights
    from samebit.trainer.algorithms.grpo import Grpo
    from samebit.trainer.config import GrpoConfig
    from samebit.trainer.megatron.cpu import no_cuda
    from samebit.trainer.packing import pack_samples

    load_weights(megatron, folder)
    with torch.no_grad():
        for p in megatron.params.values():
            p.mul_(1.5)
    megatron.freeze_reference()
    load_weights(megatron, folder)
    samples = gradient_samples()
    own = torch.cat(megatron.logprobs(pack_samples(samples, 70))).tolist()
    for i, sample in enumerate(samples):
        logprobs, own = own[: sample.num_trained], own[sample.num_trained :]
        if i == len(samples) - 1:
            logprobs = [value + CHANGED.get(row, 0.0) for row, value in enumerate(logprobs)]
        samples[i] = replace(sample.with_logprobs(logprobs), advantages=0.7 - 0.3 * i)
    batches = megatron.own_batches(pack_samples(samples, 70, "sequence"))
    loss = Grpo(GrpoConfig(kl_coef=0.3))
    references = megatron.logprobs(batches, reference=True)
    with no_cuda():
        megatron._forward_backward(batches, loss, references)
    gradients = {name: p.main_grad.clone() for name, p in megatron.params.items()}
    return gradients, vars(megatron.train_step(batches, loss))


def refusals(megatron, batches, rank):
    """What a NaN in the loss, then in the gradient, of micro-batch 1 alone is said to be, then in
    one parameter's gradient on rank 1 alone; and each time whether the whole state was kept."""
    from losses import LossOf

    from samebit.trainer.algorithms.sft import Sft
    from samebit.trainer.types import NonFiniteError

    def bad_loss(logprobs, reference, batch):
        return -logprobs * (math.nan if batch.index == 1 else 1.0), {}

    def bad_gradient(logprobs, reference, batch):
        kink = (logprobs - logprobs.detach()).abs().sqrt()
        return (kink if batch.index == 1 else 0.0) - logprobs, {}

    before, found = encode(megatron.state_dict()), []
    alone = megatron.parallel.data == 1
    for loss in (LossOf(bad_loss), LossOf(bad_gradient), *([] if alone else [Sft()])):
        hook = None
        if isinstance(loss, Sft) and rank == 1:
            hook = megatron.params[_ONE_SHARD].register_hook(lambda gradient: gradient * math.nan)
        try:
            megatron.train_step(batches, loss)
        except NonFiniteError as error:
            found.append((str(error), encode(megatron.state_dict()) == before))
        if hook:
            hook.remove()
    return found
