"""Draft trainers on random targets, and random samples with random streams for them."""

import numpy as np
import torch
from draft_cases import make_params, make_vocabulary

from samebit.kernels.reduce import ALONE
from samebit.trainer.config import OptimizerConfig
from samebit.trainer.draft.batch import DraftBatch, TargetHead, pack_streams
from samebit.trainer.draft.config import TttConfig
from samebit.trainer.draft.trainer import DraftTrainer
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import Sample

NUM_LAYERS = 4
LENS = (3, 23, 2, 14)


def make_samples(lens=LENS, seed=0, vocab_size=61):
    """Random tokens, and masks with a gap."""
    generator = np.random.default_rng(seed)
    samples = []
    for i, length in enumerate(lens):
        mask = np.zeros(length, bool)
        mask[1 + i % 2 :] = True
        mask[12:15] = False
        ids = generator.integers(vocab_size, size=length)
        samples.append(Sample(sample_id=i, token_ids=ids, loss_mask=mask))
    return samples


def make_batches(config, lens=LENS, seed=0, max_tokens=100):
    """Packed samples with random streams, those of the last tokens missing."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for batch in pack_samples(make_samples(lens, seed, config.vocab_size), max_tokens):
        shape = config.target_hidden_size
        layers = sorted({*config.captured_layers, NUM_LAYERS})
        parts = [
            {i: torch.randn(n - 1, shape, generator=generator) for i in layers}
            for n in batch.seq_lens
        ]
        streams = pack_streams(parts, batch.seq_lens, torch.device("cpu"))
        batches.append(DraftBatch(batch=batch, streams=streams))
    return batches


def own_rows(weight, ranks):
    """Those of one rank, of a vocabulary that is padded for all."""
    padding = weight.new_zeros(-len(weight) % ranks.size, weight.shape[1])
    return torch.cat([weight, padding]).chunk(ranks.size)[ranks.rank]


def make_target(config, seed=1, ranks=ALONE):
    generator = torch.Generator().manual_seed(seed)
    width = config.target_hidden_size
    final_norm = 1 + 0.3 * torch.randn(width, generator=generator)
    output_weight = 0.4 * torch.randn(config.vocab_size, width, generator=generator)
    return TargetHead(
        final_norm=final_norm,
        output_weight=own_rows(output_weight, ranks),
        norm_eps=config.norm_eps,
        vocab_size=config.vocab_size,
        num_layers=NUM_LAYERS,
        ranks=ranks,
    )


def make_trainer(config, seed=0, ranks=ALONE, target_ranks=ALONE, **settings):
    """Filled with random weights; settings are TttConfig's and OptimizerConfig's."""
    names = TttConfig.__dataclass_fields__
    ttt_config = TttConfig(**{k: v for k, v in settings.items() if k in names})
    own = {"lr": 1e-2} | {k: v for k, v in settings.items() if k not in names}
    embedding = torch.randn(config.vocab_size, 24, generator=torch.Generator().manual_seed(8))
    target, embedding = make_target(config, ranks=target_ranks), own_rows(embedding, target_ranks)
    arguments = (make_vocabulary(config), target, embedding, OptimizerConfig(**own))
    trainer = DraftTrainer(config, *arguments, num_steps=10, ttt=ttt_config, ranks=ranks)
    params = make_params(config, seed)
    trainer.fill(lambda into: [into[name].copy_(p) for name, p in params.items()])
    return trainer
