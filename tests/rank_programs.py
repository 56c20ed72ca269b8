"""What the ranks of a parallel test run: each function is one rank's program."""

import importlib
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import file_size_limit
from policy_steps import gradient_samples, policy_step, refusals
from rank_updates import checked_shapes, updated_draft
from torch.distributed import distributed_c10d

from samebit.kernels.reduce import RankGroup
from samebit.recipes.verification.speculation import recall
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.objects import gather_objects

LENS = (1, 17, 70, 33)
PARAMS = (
    SamplingParams(n=3, max_new_tokens=12),
    SamplingParams(n=2, max_new_tokens=9, temperature=0.7, top_k=20),
    SamplingParams(n=2, max_new_tokens=12, temperature=1.3, top_p=0.9, min_new_tokens=3),
    SamplingParams(n=1, max_new_tokens=12, temperature=0.0),
)
SETTINGS = (
    {},
    {"max_num_seqs": 2, "prefix_cache": False},
    {"prefill_chunk": 9, "max_batch_tokens": 16, "page_size": 16},
    {"speculative": "hybrid", "num_draft_tokens": 2, "adaptive_drafts": False},
    {"speculative": "eagle3", "num_draft_tokens": 4, "adaptive_drafts": False},
    {"speculative": "suffix", "page_size": 16, "overlap": True},
    {"kv_cache_tokens": 128, "page_size": 16, "overlap": True},
)


def prompts():
    """Fixed prompts for a vocabulary of 331."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(331, (n,), generator=generator).tolist() for n in LENS]


def no_pickle(*_):
    raise AssertionError("an object is sent as a pickle")


def start(rank, size, store):
    """This rank's group of all ranks, which send each other plain values only."""
    distributed_c10d._object_to_tensor = no_pickle
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size)
    )
    return RankGroup(int(rank), int(size), dist.group.WORLD)


def exact(groups):
    """Completions with every bit of their log-probs."""
    return [
        [[list(c.token_ids), [v.hex() for v in c.logprobs], c.finish_reason] for c in group]
        for group in groups
    ]


def engine(rank, size, store, folder, out):
    """Generate under every setting, score, update; the results of this rank as JSON."""
    torch.set_num_threads(1)
    ranks = start(rank, size, store)
    found, drawn = {"generated": [], "versions": [], "guessed": []}, []
    draft = str(Path(out).parent / "draft")
    for settings in SETTINGS:
        if settings.get("speculative", "suffix") != "suffix":
            settings = settings | {"draft_model": draft}
        one = Engine(folder, device="cpu", ranks=ranks, seed=3, **settings)
        if settings.get("speculative") == "suffix":  # guesses that are mostly right
            recall(one, [completion for group in drawn for completion in group])
        drawn = one.generate(prompts(), PARAMS)
        found["generated"].append(exact(drawn))
        if one.accept_lengths is not None:
            found["guessed"].append(vars(one.accept_lengths))
        if settings.get("speculative") == "hybrid":
            found["draft"] = updated_draft(one, draft)
            found["generated"].append(exact(one.generate(prompts(), PARAMS)))
    contexts = [[*p, *c[0][0]] for p, c in zip(prompts(), found["generated"][0], strict=True)]
    found["scores"] = [[v.hex() for v in values] for values in one.score(contexts)]
    found["versions"].append(vars(one.weight_version))
    one.copy_weights({n: w.clone() for n, w in one.weights.items()}, step=4)
    one.update_weights_from_disk(folder, step=5)
    found["versions"].append(vars(one.weight_version))
    found["updated"] = exact(one.generate(prompts(), PARAMS))
    found["profile"] = one.profile.tp_size
    found["capacity"] = Engine(folder, device="cpu", ranks=ranks, max_num_seqs=4096).kv_capacity
    one.bind_weights({n: w.clone() for n, w in one.weights.items()}, step=6)
    one.update_weights_from_disk(folder, step=7)
    found["versions"].append(vars(one.weight_version))
    found["bound"] = exact(one.generate(prompts(), PARAMS))
    found["checked"] = checked_shapes(folder, ranks, Path(out).parent / f"cache.{rank}")
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def make_trainer(folder, parallel=None, **optimizer):
    """A trainer on the CPU that holds the folder's weights."""
    from samebit.recipes.launch.placement import load_weights
    from samebit.rollout.models.registry import load_model_config
    from samebit.trainer.config import OptimizerConfig
    from samebit.trainer.megatron.trainer import MegatronTrainer

    settings = OptimizerConfig(**({"lr": 1e-2} | optimizer))
    megatron = MegatronTrainer(
        load_model_config(folder), settings, 5, torch.device("cpu"), parallel=parallel
    )
    load_weights(megatron, folder)
    return megatron


def gradients(folder, out):
    """One process's gradients by Hugging Face names, and their norm; and those of a GRPO step."""
    from samebit.trainer.algorithms.sft import Sft
    from samebit.trainer.megatron.cpu import no_cuda
    from samebit.trainer.packing import pack_samples
    from samebit.weight_sync.mapping import hf_tensors

    torch.set_num_threads(1)
    megatron = make_trainer(folder)
    batches = pack_samples(gradient_samples(), 70)
    with no_cuda():
        megatron._forward_backward(batches, Sft(), None)
    found = {name: p.main_grad.clone() for name, p in megatron.params.items()}
    saved = {
        "gradients": dict(hf_tensors(megatron.specs, found)),
        "nll": megatron.mean_nll(batches),
    }
    saved["norm"] = megatron.train_step(batches, Sft()).grad_norm
    policy, saved["stats"] = policy_step(megatron, folder)
    saved["policy"] = dict(hf_tensors(megatron.specs, policy))
    torch.save(saved, out)


def trainer(rank, size, store, folder, mode, expected, out):
    """Rollout against trainer, and a step's gradients against given ones; counts as JSON.

    mode: "tensor", "sequence" (tensor parallel too), "context", "pipeline", "virtual_pipeline" (two
    chunks a stage), "data", or several with plus signs, of two ranks each; the rollout is one
    engine for those that share every layer.
    expected: what `gradients` wrote.
    """
    from samebit.trainer.algorithms.sft import Sft
    from samebit.trainer.config import ParallelConfig
    from samebit.trainer.megatron.cpu import no_cuda
    from samebit.trainer.packing import pack_samples, share_batches
    from samebit.weight_sync.mapping import load_params, parts_of

    torch.set_num_threads(1)
    start(rank, size, store)
    also = {"sequence": "tensor", "virtual_pipeline": "pipeline"}
    layout = {part: 2 for part in mode.split("+") if part != "sequence"}
    layout |= {also[part]: 2 for part in mode.split("+") if part in also}
    parallel = ParallelConfig(**layout, sequence="sequence" in mode)
    megatron = make_trainer(folder, parallel)
    rollout = Engine(folder, device="cpu", ranks=megatron.ranks, seed=3)
    found = {"digests": [megatron.digest(), rollout.weight_version.digest]}
    found["compared"], found["unequal"] = compare_logprobs(megatron, rollout, 90, 300)
    saved = torch.load(expected)

    def errors(gradients, field):
        wanted = {s.name: torch.zeros(s.shape) for s in megatron.specs}
        load_params(megatron.specs, wanted, parts_of(saved[field].__getitem__))
        # A rank may hold nothing but padding of the vocabulary.
        return {
            name: float((gradient - wanted[name]).norm() / (wanted[name].norm() + 1e-30))
            for name, gradient in gradients.items()
        }

    batches = pack_samples(gradient_samples(), 70)  # three: interleaved stages add a filler
    batches = share_batches(batches, parallel.data)[megatron.data_ranks.rank]
    found["nll"], found["nll_alone"] = megatron.mean_nll(batches), saved["nll"]
    with no_cuda():
        megatron._forward_backward(batches, Sft(), None)
    found["errors"] = errors({n: p.main_grad for n, p in megatron.params.items()}, "gradients")
    norms = [megatron.train_step(batches, Sft()).grad_norm for _ in range(2)]
    found["norms"], found["trained"] = norms, megatron.digest()
    rollout.bind_weights(whole_params(megatron, rollout), megatron.step)
    count, found["unequal_after"] = compare_logprobs(megatron, rollout, 200)
    policy, found["stats"] = policy_step(megatron, folder)
    found["policy_errors"], found["stats_alone"] = errors(policy, "policy"), saved["stats"]
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def invariant(rank, size, store, folder, out):
    """Generate, score and compare with the trainer under tp_invariant; this rank's results."""
    from samebit.rollout.models.registry import load_model_config
    from samebit.trainer.config import ParallelConfig
    from samebit.trainer.megatron.forward import ForwardModel

    torch.set_num_threads(1)
    group = start(rank, size, store).group if int(size) > 1 else None
    ranks = RankGroup(int(rank), int(size), group, invariant=True)
    rollout = Engine(folder, device="cpu", ranks=ranks, seed=3)
    generated = exact(rollout.generate(prompts(), PARAMS))
    contexts = [[*p, *c[0][0]] for p, c in zip(prompts(), generated, strict=True)]
    megatron = ForwardModel(
        load_model_config(folder),
        torch.device("cpu"),
        rollout.weights,
        ParallelConfig(tensor=int(size)),
        tp_invariant=True,
    )
    compared, unequal = compare_logprobs(megatron, rollout, 200)
    found = {
        "generated": generated,
        "scores": [[v.hex() for v in values] for values in rollout.score(contexts)],
        "profile": rollout.profile.digest,
        "compared": compared,
        "unequal": unequal,
    }
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    if int(size) > 1:
        dist.barrier()
        dist.destroy_process_group()


def launched(rank, size, port, name, *arguments):
    """A program of tests/programs, as one that a launcher has started."""
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    sys.exit(importlib.import_module(f"programs.{name}").main(*arguments))


def whole_params(megatron, rollout):
    """The engine's parameters: a tensor rank has its own, pipeline stages put theirs together."""
    if megatron.stage.count == 1:
        return megatron.params
    mine = {name: p.detach().clone() for name, p in megatron.params.items()}
    stages = gather_objects(mine, megatron.pipeline_group)
    everything = {name: p for stage in reversed(stages) for name, p in stage.items()}
    return {name: everything[name] for name in rollout.weights}


def data(rank, size, store, folder, distributed, out):
    """Two steps on this rank's share of the micro-batches; gradients, weights and stats saved."""
    from samebit.trainer.algorithms.sft import Sft
    from samebit.trainer.config import ParallelConfig
    from samebit.trainer.megatron.cpu import no_cuda
    from samebit.trainer.packing import pack_samples, share_batches

    torch.set_num_threads(1)
    if int(size) > 1:
        start(rank, size, store)
    split, overlap = "split" in distributed, "overlap" in distributed
    parallel = ParallelConfig(
        data=int(size), distributed_optimizer=split, overlap_grad_reduce=overlap
    )
    megatron = make_trainer(folder, parallel, lr=1e-3)
    mine = share_batches(pack_samples(gradient_samples(), 50), int(size))[int(rank)]
    with no_cuda():
        megatron._forward_backward(mine, Sft(), None)
    gradients = {name: p.main_grad.clone() for name, p in megatron.params.items()}
    nll = megatron.mean_nll(mine)
    stats = [vars(megatron.train_step(mine, Sft())) for _ in range(2)]
    refused = refusals(megatron, mine, int(rank))
    rollout = Engine(folder, device="cpu", seed=3)
    rollout.bind_weights(megatron.params, megatron.step)
    found = {
        "refused": refused,
        "gradients": gradients,
        "params": {name: p.detach().clone() for name, p in megatron.params.items()},
        "stats": stats,
        "digest": megatron.digest(),
        "compared": compare_logprobs(megatron, rollout, 200),
        "num_batches": len(mine),
        "nll": nll,
        "policy": policy_step(megatron, folder)[1],
    }
    torch.save(found, Path(out).with_suffix(f".{rank}"))
    if int(size) > 1:
        dist.barrier()
        dist.destroy_process_group()


def resume(rank, size, store, folder, mode, root, out):
    """Two steps, a checkpoint of all ranks, two more; then those two again from the checkpoint.

    mode: a field of ParallelConfig, or "optimizer" for the distributed one over copies.
    """
    from samebit.trainer.algorithms.sft import Sft
    from samebit.trainer.checkpoint import CheckpointError, latest_checkpoint
    from samebit.trainer.checkpoint_writer import CheckpointWriter
    from samebit.trainer.config import ParallelConfig
    from samebit.trainer.packing import pack_samples, share_batches

    torch.set_num_threads(1)
    start(rank, size, store)
    layout = {"data" if mode == "optimizer" else mode: int(size)}
    if mode == "virtual_pipeline":
        layout["pipeline"] = int(size)
    parallel = ParallelConfig(**layout, distributed_optimizer=mode == "optimizer")
    settings = {"lr_schedule": "linear", "weight_decay": 0.1}
    batches = pack_samples(gradient_samples(), 50)
    mine = share_batches(batches, parallel.data)[int(rank) if parallel.data > 1 else 0]
    first = make_trainer(folder, parallel, **settings)
    for _ in range(2):
        first.train_step(mine, Sft())
    writer = CheckpointWriter(Path(root), keep=2)
    writer.save(first.step, first.state_dict(), {"layout": str(parallel)})
    found = {"whole": [vars(first.train_step(mine, Sft())) for _ in range(2)]}
    found["whole_digest"] = first.digest()
    writer.finish()
    second = make_trainer(folder, parallel, **settings)
    second.load_state_dict(latest_checkpoint(Path(root)).load())
    found["resumed"] = [vars(second.train_step(mine, Sft())) for _ in range(2)]
    found["resumed_digest"] = second.digest()
    found["files"] = sorted(latest_checkpoint(Path(root)).manifest["files"])
    # The second rank's disk is full: both are told, and the checkpoint before is unharmed.
    try:
        with file_size_limit(1000) if int(rank) == 1 else nullcontext():
            writer.save(9, second.state_dict(), {})
            writer.finish()
    except CheckpointError as error:
        found["refused"] = str(error)
    dist.barrier()
    found["left"] = sorted(p.name for p in Path(root).iterdir())
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def reshard(rank, size, store, folder, mode, before, after, out):
    """Two steps, or the state of another layout's checkpoint; a checkpoint, and one step more.

    mode: as in `resume`, several of two ranks each with plus signs, or "alone".
    """
    from samebit.trainer.algorithms.sft import Sft
    from samebit.trainer.checkpoint import latest_checkpoint
    from samebit.trainer.checkpoint_writer import CheckpointWriter
    from samebit.trainer.config import ParallelConfig
    from samebit.trainer.megatron.resharding import WholeState
    from samebit.trainer.packing import pack_samples

    torch.set_num_threads(1)
    parts = [] if mode == "alone" else mode.split("+")
    if parts:
        start(rank, size, store)
    layout = {"data" if part == "optimizer" else part: 2 for part in parts}
    parallel = ParallelConfig(**layout, distributed_optimizer="optimizer" in parts)
    megatron = make_trainer(folder, parallel, lr_schedule="linear", weight_decay=0.1)
    mine = megatron.own_batches(pack_samples(gradient_samples(), 50))
    if (saved := latest_checkpoint(Path(before))) is None:
        megatron.freeze_reference()
        for _ in range(2):
            megatron.train_step(mine, Sft())
    else:
        megatron.load_resharded(WholeState(megatron.model, saved.load_all()))
    writer = CheckpointWriter(Path(after), keep=1, background=False)
    writer.save(megatron.step, megatron.state_dict(), {})
    found = {"digest": megatron.digest(), "next": vars(megatron.train_step(mine, Sft()))}
    found["after"] = megatron.digest()
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    if int(size) > 1:
        dist.barrier()
        dist.destroy_process_group()


def compare_logprobs(megatron, rollout, *pack_tokens):
    """(log-probs compared, unequal) between fresh samples and the trainer's forward of them, in
    packs of each of these numbers of tokens."""
    from samebit.recipes.data.samples import drawn_sample
    from samebit.trainer.packing import pack_samples

    params = SamplingParams(n=3, max_new_tokens=20)
    samples = [
        drawn_sample(prompt, c)
        for prompt, group in zip(prompts(), rollout.generate(prompts(), params), strict=True)
        for c in group
    ]
    packs = [pack_samples(samples, tokens) for tokens in pack_tokens]
    ours = [v for pack in packs for part in megatron.logprobs(pack) for v in part.tolist()]
    theirs = [v for sample in samples for v in sample.logprobs[sample.loss_mask].tolist()]
    theirs *= len(packs)
    return len(ours), sum(a != b for a, b in zip(ours, theirs, strict=True))
