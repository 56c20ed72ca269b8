"""Sums over GPUs that read each other's memory: the written-out ones, eager and in graphs."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import run_python

from samebit.recipes.models.tiny_model import write_config, write_weights

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu]

_SUMS = """
import sys, torch, torch.distributed as dist
from samebit.kernels.gpu.peers import peers_of
from samebit.kernels.contract import tree_sum
from samebit.kernels.reduce import (
    RankGroup, gather_columns, reduce_ref, sum_of_own_rows, sum_over_ranks,
)

rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.cuda.set_device(rank)
device = torch.device("cuda", rank)
dist.init_process_group(
    "cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=rank, world_size=size
)
group = dist.group.WORLD
assert peers_of(group, device) is not None, "the GPUs cannot read each other's memory"


def partials(shape, dtype, seed):
    generators = [torch.Generator(device).manual_seed(1000 * seed + r) for r in range(size)]
    return [torch.randn(shape, device=device, generator=g).to(dtype) for g in generators]


def expected(parts, dtype, tree):
    parts = [part.float() for part in parts]
    return tree_sum(parts).to(dtype) if tree else reduce_ref(parts, dtype)


# In an order that makes the memory grow in between; 2^22 elements fit at first.
SHAPES = [(1, 5), (3, 7), (64, 4096), (size, 96), (200, 1000), (6 * size, 1024), (1, 1)]
SHAPES += [(1030 * size, 4096), (2, 2), (64, 4096)]
for tree in (False, True):
    ranks = RankGroup(rank, size, group, invariant=tree)
    for seed, shape in enumerate(SHAPES):
        for dtype in (torch.float32, torch.bfloat16):
            parts = partials(shape, dtype, seed)
            for out in (torch.float32, torch.bfloat16):
                truth = expected(parts, out, tree)
                assert torch.equal(sum_over_ranks(parts[rank], ranks, out), truth), (shape, out)
                if shape[0] % size == 0:
                    found = sum_of_own_rows(parts[rank], ranks, out)
                    assert torch.equal(found, truth.chunk(size)[rank]), (shape, out)

ranks = RankGroup(rank, size, group)
for seed, shape in enumerate([(1, 3), (64, 2000), (3, 75968), (500, 75968), (64, 2000)]):
    parts = partials(shape, torch.float32, 50 + seed)
    assert torch.equal(gather_columns(parts[rank], ranks), torch.cat(parts, dim=1)), shape

# Three sums and a gather in a graph, between sums outside; ranks are made to drift apart.
inputs = [torch.empty(64, 4096, device=device) for _ in range(3)]
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    outputs = [sum_over_ranks(x, ranks, torch.bfloat16) for x in inputs]
    gathered = gather_columns(inputs[0], ranks)
for turn in range(50):
    parts = [partials((64, 4096), torch.float32, 100 + 3 * turn + i) for i in range(3)]
    for x, part in zip(inputs, parts):
        x.copy_(part[rank])
    if turn % size == rank:
        torch.cuda._sleep(2_000_000)
    graph.replay()
    for found, part in zip(outputs, parts):
        assert torch.equal(found, reduce_ref(part, torch.bfloat16)), turn
    assert torch.equal(gathered, torch.cat(parts[0], dim=1)), turn
    outside = partials((turn + 1, 50), torch.float32, turn)
    truth = reduce_ref(outside, torch.float32)
    assert torch.equal(sum_over_ranks(outside[rank], ranks, torch.float32), truth), turn
torch.cuda.synchronize()
dist.barrier()
dist.destroy_process_group()
"""


_GRAPHS = """
import sys, torch, torch.distributed as dist
from samebit.kernels.reduce import RankGroup
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams

rank, size, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.cuda.set_device(rank)
device = torch.device("cuda", rank)
dist.init_process_group(
    "cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=rank, world_size=size
)
prompts = [[1 + i, 5, 9 + i] * (1 + i % 7) for i in range(20)]
params = [
    SamplingParams(n=3, max_new_tokens=8 + 5 * (i % 4), ignore_eos=True, top_k=7 * (i % 2))
    for i in range(len(prompts))
]
for invariant in (False, True):
    ranks = RankGroup(rank, size, dist.group.WORLD, invariant)
    found = []
    for graphs in (False, True):
        engine = Engine(folder, device=device, ranks=ranks, max_num_seqs=32, cuda_graphs=graphs)
        found.append([
            (c.token_ids, c.logprobs) for group in engine.generate(prompts, params) for c in group
        ])
        assert (engine.runner.graphs is not None and engine.runner.graphs.num_graphs > 2) == graphs
    assert found[0] == found[1], invariant
dist.barrier()
dist.destroy_process_group()
"""


def run_ranks(script, size, tmp_path, *arguments):
    """A script on so many GPUs; raises if one of its processes fails."""
    with ThreadPoolExecutor(size) as pool:
        runs = [
            pool.submit(run_python, script, rank, size, tmp_path / "store", *arguments, timeout=300)
            for rank in range(size)
        ]
        for run in runs:
            run.result()


def test_every_rank_has_the_sum_in_the_contracts_order(tmp_path):
    """Of all sizes, dtypes and kinds; in graphs too, with ranks that arrive at different times."""
    size = torch.cuda.device_count() if torch.cuda.device_count() in (2, 4, 8) else 2
    run_ranks(_SUMS, size, tmp_path)


def test_decode_graphs_of_tensor_parallel_ranks(tmp_path):
    """The graphs hold sums and gathers: tokens and log-probs are those without graphs."""
    shape = {"hidden_size": 128, "intermediate_size": 1024, "head_dim": 64, "vocab_size": 3000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3}
    write_config(tmp_path / "model", "qwen3", **shape, **heads, tie_word_embeddings=False)
    write_weights(tmp_path / "model", seed=3, std=0.1)
    run_ranks(_GRAPHS, 2, tmp_path, tmp_path / "model")
