"""What the ranks of a parallel test run: each function is one rank's program."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from samebit.kernels.reduce import TensorRanks
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams

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
    {"kv_cache_tokens": 128, "page_size": 16, "overlap": True},
)


def prompts():
    """Fixed prompts for a vocabulary of 331."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(331, (n,), generator=generator).tolist() for n in LENS]


def start(rank, size, store):
    """This rank's group of all ranks."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size)
    )
    return TensorRanks(int(rank), int(size), dist.group.WORLD)


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
    found = {"generated": [], "versions": []}
    for settings in SETTINGS:
        one = Engine(folder, device="cpu", ranks=ranks, seed=3, **settings)
        found["generated"].append(exact(one.generate(prompts(), PARAMS)))
    contexts = [[*p, *c[0][0]] for p, c in zip(prompts(), found["generated"][0], strict=True)]
    found["scores"] = [[v.hex() for v in values] for values in one.score(contexts)]
    found["versions"].append(vars(one.weight_version))
    one.update_weights_from_tensor({n: w.clone() for n, w in one.weights.items()}, step=4)
    one.update_weights_from_disk(folder, step=5)
    found["versions"].append(vars(one.weight_version))
    found["updated"] = exact(one.generate(prompts(), PARAMS))
    found["profile"] = one.profile.tp_size
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
