"""A trainer's gradients and optimizer leave the card and come back; no bit of a step moves."""

import gc

import pytest
import torch

from samebit.kernels.memory import ReleasedError
from samebit.recipes.launch.placement import load_weights
from samebit.rollout.models.registry import load_model_config
from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.config import OptimizerConfig, ParallelConfig
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.packing import pack_samples
from samebit.weight_sync.digest import weights_digest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("split", [False, True], ids=["whole", "distributed optimizer"])
def test_releases_between_steps_move_no_bit(folder, random_samples, split):
    device = torch.device("cuda")
    batches = pack_samples(random_samples(20, seed=6), 200, device=device)
    tags = ["gradients", "optimizer"]

    def make(releasable):
        parallel = ParallelConfig(distributed_optimizer=split)
        settings = OptimizerConfig(lr=1e-3, weight_decay=0.1)
        model = load_model_config(folder)
        trainer = MegatronTrainer(model, settings, 9, device, parallel, releasable=releasable)
        load_weights(trainer, folder)
        return trainer

    def steps(trainer, between=lambda: None):
        found = []
        for _ in range(3):
            found.append((trainer.train_step(batches, Sft()), trainer.digest()))
            between()
        return found

    trainer = make(True)
    num_params = sum(p.numel() for p in trainer.params.values())

    def turn():
        digest = trainer.digest()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        done = trainer.release_memory(tags)
        assert done["gradients"] >= 4 * num_params
        assert done["optimizer"] >= 12 * num_params
        assert torch.cuda.mem_get_info()[0] - before >= sum(done.values())
        with pytest.raises(ReleasedError, match="optimizer is released"):
            trainer.digest()
        assert weights_digest(trainer.specs, trainer.params) == digest, "the weights stay"
        assert trainer.resume_memory(tags) == done

    assert steps(trainer, turn) == steps(make(False))
