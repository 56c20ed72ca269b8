"""Master weights, moments and a reference in the host's memory: the same steps on the card, with
less of its memory."""

import gc

import pytest
import torch

from samebit.recipes.launch.placement import load_weights
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.trainer.algorithms.grpo import Grpo
from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.config import GrpoConfig, OptimizerConfig, ParallelConfig
from samebit.trainer.megatron import trainer as trainer_module
from samebit.trainer.megatron.offload import OffloadedState
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.packing import pack_samples
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.transports.alias import AliasLease
from samebit.weight_sync.types import WeightSyncError

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("split", [False, True], ids=["whole", "distributed optimizer"])
def test_offload_moves_no_bit(folder, random_samples, split, monkeypatch):
    """Slices of 100,000 elements through three slots; either kind takes over the other's state."""
    monkeypatch.setattr(
        trainer_module, "OffloadedState", lambda *args: OffloadedState(*args, 100_000)
    )
    device = torch.device("cuda")
    batches = pack_samples(random_samples(20, seed=6), 200, device=device)

    def make(offload):
        parallel = ParallelConfig(offload_optimizer=offload, distributed_optimizer=split)
        settings = OptimizerConfig(lr=1e-3, weight_decay=0.1)
        trainer = MegatronTrainer(load_model_config(folder), settings, 9, device, parallel)
        load_weights(trainer, folder)
        return trainer

    def digest(trainer):
        found = trainer.digest()
        assert found == weights_digest(trainer.specs, trainer.params)
        return found

    def steps(trainer):
        return [(trainer.train_step(batches, Sft()), digest(trainer)) for _ in range(2)]

    def memory(offload):
        gc.collect()
        before = torch.cuda.memory_allocated()
        trainer = make(offload)
        return trainer, torch.cuda.memory_allocated() - before

    (plain, whole), (offloaded, less) = memory(False), memory(True)
    num_params = sum(p.numel() for p in plain.params.values())
    assert whole - less > 11 * num_params
    assert digest(plain) == digest(offloaded)  # filled, no step made
    assert steps(offloaded) == steps(plain)
    ours, theirs = offloaded.state_dict(), plain.state_dict()
    for name, state in theirs["optimizer"].items():
        for key in ("exp_avg", "exp_avg_sq", "master", "step"):
            assert torch.equal(ours["optimizer"][name][key].cpu(), state[key].cpu()), (name, key)
    back, forth = make(False), make(True)
    back.load_state_dict(ours)
    forth.load_state_dict(theirs)
    assert digest(back) == digest(forth) == digest(plain)
    expected = steps(plain)
    assert steps(back) == steps(forth) == steps(offloaded) == expected


def test_a_reference_on_the_host_moves_no_bit(folder, random_samples):
    """Its pinned weights are on the card only while they are read, before and after a refresh."""
    device, loss = torch.device("cuda"), Grpo(GrpoConfig(kl_coef=0.5))
    samples = random_samples(20, seed=6, with_logprobs=True)
    batches = pack_samples(samples, 200, device=device)

    def steps(offload):
        settings, parallel = OptimizerConfig(lr=1e-3), ParallelConfig(offload_reference=offload)
        trainer = MegatronTrainer(load_model_config(folder), settings, 9, device, parallel)
        load_weights(trainer, folder)
        gc.collect()
        before = torch.cuda.memory_allocated()
        trainer.freeze_reference()
        held, found = [torch.cuda.memory_allocated() - before], []
        for _ in range(2):
            found += [(trainer.train_step(batches, loss), trainer.digest()) for _ in range(2)]
            trainer.freeze_reference()
            before = torch.cuda.memory_allocated()
            own, reference = (trainer.logprobs(batches, reference=x) for x in (False, True))
            assert all(map(torch.equal, own, reference))
            del own, reference
            held.append(torch.cuda.memory_allocated() - before)
        kept = trainer.state_dict()["reference"].values()
        assert all(x.is_pinned() if offload else x.is_cuda for x in kept)
        return found, held, sum(x.nbytes for x in kept)

    (expected, on_card, size), (found, on_host, _) = steps(False), steps(True)
    assert found == expected
    assert on_card[0] >= size
    assert on_host[0] < size // 10
    assert max(on_card[1:] + on_host[1:]) < size // 10


@pytest.mark.parametrize("offload", [False, True], ids=["on the card", "offloaded"])
def test_weights_that_are_not_the_masters_are_refused(folder, random_samples, offload):
    """Of an engine on the trainer's own memory: a bit that flipped after the step is found."""
    device = torch.device("cuda")
    batches = pack_samples(random_samples(20, seed=6), 200, device=device)
    parallel = ParallelConfig(offload_optimizer=offload)
    trainer = MegatronTrainer(
        load_model_config(folder), OptimizerConfig(lr=1e-3), 9, device, parallel
    )
    load_weights(trainer, folder)
    engine = Engine(folder, device="cuda")
    engine.bind_weights(trainer.params)
    lease = AliasLease(engine.sink)
    lease.lease(1)
    trainer.train_step(batches, Sft())
    bits = trainer.params["decoder.layers.1.mlp.linear_fc2.weight"].detach().view(torch.int16)
    bits[5, 7] ^= 1
    with pytest.raises(WeightSyncError, match="digest .* here, .* at the sender"):
        lease.update(trainer.params, trainer.digest())
    bits[5, 7] ^= 1
    lease.lease(1)
    assert lease.update(trainer.params, trainer.digest()).step == 1
    engine.close()
