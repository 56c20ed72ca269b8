"""Draft training on a GPU: bf16 with fp32 masters, the same bytes again, and fp32's loss nearly."""

import pytest
import torch
from draft_cases import make_config, make_params, make_vocabulary
from draft_training import NUM_LAYERS, make_samples
from helpers import assert_same_bits

from samebit.trainer.config import OptimizerConfig
from samebit.trainer.draft.batch import DraftBatch, TargetHead
from samebit.trainer.draft.config import TttConfig
from samebit.trainer.draft.trainer import DraftTrainer
from samebit.trainer.packing import pack_samples

pytestmark = pytest.mark.gpu
WIDTH = 128


def steps(device, dtype):
    """(losses of three steps, parameters) of the same numbers on any device."""
    sizes = {
        "hidden_size": WIDTH,
        "target_hidden_size": WIDTH,
        "head_dim": 64,
        "ffn_size": 256,
        "max_position": 256,
    }
    config = make_config(**sizes, fc_norm=True, feeds_normed=True)
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    head = TargetHead(
        final_norm=drawn(WIDTH, scale=0.1) + 1,
        output_weight=drawn(61, WIDTH, scale=0.2),
        norm_eps=1e-6,
        vocab_size=61,
        num_layers=NUM_LAYERS,
    )
    settings = OptimizerConfig(lr=1e-3), 3, TttConfig(passes=3)
    trainer = DraftTrainer(config, make_vocabulary(config), head, drawn(61, WIDTH), *settings)
    params = {name: param / 4 for name, param in make_params(config).items()}
    trainer.fill(lambda into: [into[name].copy_(p) for name, p in params.items()])
    [batch] = pack_samples(make_samples((70, 200, 9)), 300, device=device)
    streams = {layer: drawn(batch.num_tokens, WIDTH) for layer in (1, 2, 3, NUM_LAYERS)}
    data = DraftBatch(batch=batch, streams=streams)
    losses = [trainer.train_step([data]).loss for _ in range(3)]
    return losses, trainer.params


def test_steps_repeat_themselves_and_are_nearly_fp32s():
    losses, params = steps("cuda", torch.bfloat16)
    again, others = steps("cuda", torch.bfloat16)
    assert losses == again
    for name, param in params.items():
        assert param.dtype is torch.bfloat16
        assert_same_bits(param, others[name], name)
    assert losses == pytest.approx(steps("cpu", torch.float32)[0], rel=0.02)
    assert losses[2] < losses[0]
