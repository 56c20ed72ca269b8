"""Gradient segments on cards: where sums wait moves no bit, nor does the number of copies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from samebit.recipes.launch.placement import load_weights
from samebit.rollout.models.registry import load_model_config
from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.config import OptimizerConfig, ParallelConfig
from samebit.trainer.megatron.grad_norm import exact_norm
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.packing import pack_samples

pytestmark = pytest.mark.gpu

PROGRAM = Path(__file__).resolve().parents[1] / "programs" / "elastic.py"


def test_sums_wait_on_the_card_or_in_the_host(folder, random_samples):
    """On the card they are released with the gradients."""
    device = torch.device("cuda")
    batches = pack_samples(random_samples(10, seed=6), 100, device=device, num_segments=4)

    def steps(offload, releasable):
        parallel = ParallelConfig(offload_segment_sums=offload)
        settings, more = OptimizerConfig(lr=1e-3, clip_grad=0.1), {"grad_segments": 4}
        model = load_model_config(folder)
        trainer = MegatronTrainer(
            model, settings, 9, device, parallel, releasable=releasable, **more
        )
        load_weights(trainer, folder)
        num_params, found = sum(p.numel() for p in trainer.params.values()), []
        for _ in range(3):
            found.append((trainer.train_step(batches, Sft()), trainer.digest()))
            if releasable:
                done = trainer.release_memory()
                assert done["gradients"] >= (1 if offload else 3) * 4 * num_params
                assert trainer.resume_memory() == done
        return found

    expected = steps(offload=False, releasable=False)
    for offload in (False, True):
        assert steps(offload, releasable=True) == expected


def test_the_norm_is_the_cpus():
    generator = torch.Generator().manual_seed(5)
    exponents = torch.randint(-30, 9, (100_000,), generator=generator)
    x = torch.randn(100_000, generator=generator) * 2.0**exponents
    assert exact_norm([x.cuda()]) == exact_norm([x[:777], x[777:]])


@pytest.mark.multigpu
def test_two_cards_are_one(folder, tmp_path):
    """By the program that also times it, whose exit code tells."""
    words = [f"model={folder}", "samples=7", "max_len=64", "micro_batch_tokens=128", "steps=3"]
    command = [sys.executable, "-P", str(PROGRAM), str(tmp_path / "out.json"), *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["cases"]) == 6
    assert found["problems"] == []
