"""Sums and gathers by peer reads, without GPUs: Triton's interpreter, processes that share memory.

Each waits for the others as GPUs would; what is not told in time is read too early.
"""

from helpers import run_python

_SUMS = """
import multiprocessing, time
from random import Random
import torch, triton
from samebit.kernels.gpu import peers
from samebit.kernels.contract import tree_sum

CAPACITY, PROGRAMS, BLOCK = 1024, 4, 32
GATHER, WIDTH = 3, 70
context = multiprocessing.get_context("fork")


def late(function, random):
    # Before a sum is read, and before its sequel begins, a rank may be held up.
    def call(*arguments, **options):
        if random.random() < 0.3:
            time.sleep(0.02 * random.random())
        return function(*arguments, **options)

    return call


def sums(rank, size, calls, memories, epochs, inputs, outputs):
    random = Random(rank)
    for name in ("_meet", "_total"):
        setattr(peers, name, late(getattr(peers, name), random))
    for (numel, mode, tree), partial, output in zip(calls, inputs, outputs):
        if mode == GATHER:
            rows = numel // WIDTH
            peers._gather_kernel[(min(3, rows * triton.cdiv(WIDTH, BLOCK)),)](
                partial, output, memories, epochs, rows, WIDTH, CAPACITY, rank, size, PROGRAMS,
                BLOCK,
            )
            continue
        part = -(-numel // size)
        if mode != 2:
            part += -part % 16
        peers._sum_kernel[(min(3, triton.cdiv(part, BLOCK)),)](
            partial, output, memories, epochs, numel, part, CAPACITY, rank, size,
            mode, tree, PROGRAMS, BLOCK,
        )


for size in (2, 4):
    calls = [(numel, mode, tree) for tree in (False, True) for mode, numel in
             ((0, 1), (0, 150), (GATHER, WIDTH), (1, 301), (2, 96 * size), (GATHER, 5 * WIDTH),
              (1, 64), (0, 999))]
    start = 2**31 - 5  # epochs run over
    memories = [torch.zeros(2 * size * PROGRAMS + 2 * CAPACITY + CAPACITY // 2, dtype=torch.int32)
                for _ in range(size)]
    for memory in memories:
        memory[: 2 * size * PROGRAMS] = start
        memory.share_memory_()
    table = torch.tensor([memory.data_ptr() for memory in memories])
    inputs, outputs = [], []
    for rank in range(size):
        generator = torch.Generator().manual_seed(rank)
        inputs.append([torch.randn(n, generator=generator) for n, _, _ in calls])
        lengths = [{2: n // size, GATHER: n * size}.get(mode, n) for n, mode, _ in calls]
        outputs.append([torch.full((n,), float("nan")).share_memory_() for n in lengths])
    processes = [
        context.Process(target=sums, args=(rank, size, calls, table,
            torch.full((PROGRAMS,), start, dtype=torch.int32), inputs[rank], outputs[rank]))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * size
    for i, (numel, mode, tree) in enumerate(calls):
        parts = [inputs[rank][i] for rank in range(size)]
        total = tree_sum(parts) if tree else sum(parts[1:], parts[0])
        for rank in range(size):
            truth = total.chunk(size)[rank] if mode == 2 else total
            if mode == GATHER:
                truth = torch.cat([part.view(-1, WIDTH) for part in parts], dim=1).flatten()
            assert torch.equal(outputs[rank][i], truth), (size, rank, calls[i])
"""


def test_every_rank_has_the_sum_in_the_contracts_order():
    """One shot, two shots and own parts, in rank order and as a tree, one behind another."""
    run_python(_SUMS, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
