"""Tensor parallel engine against tensor parallel trainer, on sequences of mixed length.

    torchrun --nproc-per-node 2 tests/programs/tensor_parallel.py FOLDER out.json \\
        [tp_invariant=true] [dummy=true] [cuda_graphs=false] [num_seqs=64] [max_len=4096] \\
        [seed=0]

Every process runs the engine's shard and, on the same weights, the trainer's (with sequence
parallelism where there are several). out.json says how many log-probs were compared (those of the
drawn tokens, an eighth of all tokens), how many differ on the process where most do, on which
weights, the digest of everything drawn (under tp_invariant it is the same for 1, 2, 4 and 8
processes) and how long both took. Exit code 1 if any log-prob differs or none was compared.
"""

import json
import os
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from samebit.recipes.bench.timing import timed
from samebit.recipes.data.samples import drawn_sample
from samebit.recipes.run.provenance import write_result
from samebit.recipes.verification.subject import chained_digest, exact_bytes
from samebit.rollout.device import resolve_device
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.types import Completion, SamplingParams
from samebit.trainer.config import ParallelConfig
from samebit.trainer.megatron.imports import lean_imports
from samebit.trainer.megatron.parallel import ranks_of
from samebit.trainer.megatron.setup import process_groups
from samebit.trainer.packing import pack_samples
from samebit.trainer.stats import count_mismatches
from samebit.weight_sync.objects import gather_objects

with lean_imports():
    from samebit.trainer.megatron.forward import ForwardModel

DEFAULTS = {
    "tp_invariant": False,
    "dummy": False,
    "cuda_graphs": True,
    "num_seqs": 64,
    "max_len": 4096,
    "seed": 0,
}


def parse(arguments: list[str]) -> dict[str, Any]:
    """Read key=value over the defaults; raises ValueError for anything else."""
    options: dict[str, Any] = dict(DEFAULTS)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in DEFAULTS:
            raise ValueError(f"'{argument}' is none of {', '.join(f'{k}=...' for k in DEFAULTS)}")
        known = {"true": True, "false": False}
        if isinstance(DEFAULTS[key], bool) and value not in known:
            raise ValueError(f"{key} is '{value}'; it must be true or false")
        options[key] = known[value] if isinstance(DEFAULTS[key], bool) else int(value)
    return options


def mixed_lengths(num_seqs: int, max_len: int, seed: int) -> list[tuple[int, int]]:
    """Return (prompt, new) tokens of every sequence: up to max_len in all, an eighth drawn."""
    rng = random.Random(seed)
    totals = [max_len, *(rng.randint(16, max_len) for _ in range(num_seqs - 1))]
    return [(total - total // 8, total // 8) for total in totals]


def outcomes_digest(groups: Sequence[Sequence[Completion]]) -> str:
    """Return a digest of every token and log-prob of completions, in order and to the bit."""
    digest = ""
    for i, completion in enumerate(c for group in groups for c in group):
        values = list(zip(completion.token_ids, completion.logprobs, strict=True))
        digest = chained_digest(digest, str(i), exact_bytes(values))
    return digest


def measure(folder: Path, options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Draw, compute again in the trainer, and compare."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    parallel, invariant = ParallelConfig(tensor=size, sequence=size > 1), options["tp_invariant"]
    ranks = ranks_of(process_groups(device, parallel).tp, invariant)
    model = load_model_config(folder)
    found: dict[str, Any] = {"tensor": size}
    make_engine = partial(
        Engine,
        folder,
        device=device,
        ranks=ranks,
        seed=options["seed"],
        cuda_graphs=None if options["cuda_graphs"] else False,
        max_num_seqs=options["num_seqs"],
        max_model_len=options["max_len"],
        load_format="dummy" if options["dummy"] else "safetensors",
    )
    engine, found["start_s"] = timed(make_engine, device)
    found["cuda_graphs"] = engine.config.cuda_graphs
    generator = torch.Generator().manual_seed(options["seed"])
    lens = mixed_lengths(options["num_seqs"], options["max_len"], options["seed"])
    prompts = [torch.randint(model.vocab_size, (n,), generator=generator).tolist() for n, _ in lens]
    params = [SamplingParams(max_new_tokens=new, ignore_eos=True) for _, new in lens]
    groups, found["rollout_s"] = timed(lambda: engine.generate(prompts, params), device)
    samples = [
        drawn_sample(prompt, completion)
        for prompt, [completion] in zip(prompts, groups, strict=True)
    ]
    trainer = ForwardModel(model, device, engine.weights, parallel, invariant)
    batches = pack_samples(samples, 2 * options["max_len"], device=device, model=model)
    ours, found["trainer_s"] = timed(lambda: trainer.logprobs(batches), device)
    again, found["trainer_again_s"] = timed(lambda: trainer.logprobs(batches), device)
    pairs = list(zip(batches, ours, again, strict=True))
    drawn = [(x, b.rollout_logprobs) for b, x, _ in pairs if b.rollout_logprobs is not None]
    found["compared"] = found["drawn_tokens_compared"] = sum(len(x) for x, _ in drawn)
    unequal = sum(count_mismatches(x, y) for x, y in drawn)
    unequal += sum(count_mismatches(x, y) for _, x, y in pairs)  # the trainer's own, once more
    found["mismatches"] = max(gather_objects(unequal))
    found["tokens"] = found["tokens_computed"] = sum(b.num_tokens for b in batches)
    found["weights"] = "random, made on the spot" if options["dummy"] else "those of the folder"
    found["weights_digest"] = engine.weight_version.digest
    found["prompts"] = "random tokens"
    found["outcomes_digest"] = outcomes_digest(groups)
    return found


def main(folder: str, out: str, *arguments: str) -> int:
    """Run and write the report."""
    options, device = parse(list(arguments)), resolve_device(None)
    found = measure(Path(folder), options, device)
    if dist.get_rank() == 0:
        write_result(Path(out), device, options | found, ["python", *sys.argv])
        print(json.dumps(found))
    return 1 if found["mismatches"] or not found["compared"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
