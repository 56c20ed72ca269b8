"""Measured times: spreads of repeated runs, CUDA graph replay, what the hardware would allow."""

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch

ROTATED_BYTES = 256 << 20
"""Operands read in turn inside one graph: several times what any L2 cache holds."""
_GRAPH_US = 1000.0  # a graph's own launch is then below one percent
_SHORTEST_US = 2.0  # of any kernel
_TURNS, _SUSTAINED_US = 4, 1e5

Action = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Holds the median and the spread of repeated measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Make it from at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def num_copies(operand_bytes: int) -> int:
    """Return how many copies of an operand together exceed every cache."""
    return -(-ROTATED_BYTES // operand_bytes)


@dataclass(frozen=True)
class CardRates:
    """Holds what a card reached: the roofline under which its times are looked at."""

    memory_bytes_s: float
    """Read and written, by a copy within its memory."""
    flops_s: float
    """By a large bf16 product of random numbers."""

    def ideal_us(self, flops: float, num_bytes: float) -> float:
        """Return the time of arithmetic or of memory, whichever is longer."""
        return max(flops / self.flops_s, num_bytes / self.memory_bytes_s) * 1e6

    def compute_bound(self, flops: float, num_bytes: float) -> bool:
        """Say whether arithmetic takes longer than memory: then the card's power sets its clock."""
        return flops / self.flops_s > num_bytes / self.memory_bytes_s

    @property
    def words(self) -> str:
        """Say what the roofline is made of."""
        return (
            f"roofline: {self.memory_bytes_s / 1e12:.2f} TB/s copied and "
            f"{self.flops_s / 1e12:.0f} TFLOP/s multiplied by this card in this run"
        )


def timed[T](action: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Return (result, seconds) of an action, between moments at which the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def _record(actions: Sequence[Action], rounds: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # whoever fills the operands
    with torch.cuda.stream(stream):
        for action in actions:  # compiles, and chooses algorithms
            action()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for action in list(actions) * rounds:
            action()
    return graph


@torch.no_grad()
def graphs_us(
    ways: Sequence[Sequence[Action]], expected_us: float, replays: int, sustained: bool = False
) -> list[Spread]:
    """Return microseconds of one action of each way, from CUDA graphs replayed in turns.

    So all ways meet the card in the same state. Every way has as many actions, which differ in
    their operands alone; its graph repeats them until it should take a millisecond by
    `expected_us` each. sustained: every turn, and a warm-up before, lasts a tenth of a second, so
    that the card draws all the power that it may, as in a prefill.
    """
    round_us = max(expected_us, _SHORTEST_US) * len(ways[0])
    rounds = max(1, round(_GRAPH_US / round_us))
    warm_ups, turn = 2, math.ceil(replays / _TURNS)
    if sustained:
        warm_ups = math.ceil(_SUSTAINED_US / (round_us * rounds))
        turn = max(turn, warm_ups)
    graphs = [_record(actions, rounds) for actions in ways]
    for graph in graphs:
        for _ in range(warm_ups):
            graph.replay()
    turns: list[list[list[torch.cuda.Event]]] = [[] for _ in ways]
    for _ in range(_TURNS):
        for graph, marks in zip(graphs, turns, strict=True):
            graph.replay()  # the first one after another way's
            events = [torch.cuda.Event(enable_timing=True) for _ in range(turn + 1)]
            events[0].record()
            for event in events[1:]:
                graph.replay()
                event.record()
            marks.append(events)
    torch.cuda.synchronize()
    count = len(ways[0]) * rounds
    times = (
        [1e3 * a.elapsed_time(b) / count for events in marks for a, b in pairwise(events)]
        for marks in turns
    )
    spreads = [Spread.of(measured) for measured in times]
    for graph in graphs:
        graph.reset()
    return spreads


def graph_us(actions: Sequence[Action], expected_us: float, replays: int) -> Spread:
    """Return the graphs_us of one way."""
    return graphs_us([actions], expected_us, replays)[0]


_COPIED_BYTES, _PRODUCT_WIDTH, _RATE_REPLAYS = 1 << 30, 8192, 20


def _copy_bytes_s() -> float:
    """By torch's copy, which may be a copy engine's, or by a kernel: whichever is faster."""
    source = torch.zeros(_COPIED_BYTES // 4, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    fastest = min(graph_us([way], 500.0, _RATE_REPLAYS).median for way in ways)
    return 2 * source.nbytes / fastest * 1e6


def _product_flops_s() -> float:
    x, y = (
        torch.randn(_PRODUCT_WIDTH, _PRODUCT_WIDTH, device="cuda").to(torch.bfloat16)
        for _ in range(2)
    )
    out = torch.empty_like(x)
    us = graph_us([lambda: torch.mm(x, y, out=out)], 1500.0, _RATE_REPLAYS).median
    return 2 * _PRODUCT_WIDTH**3 / us * 1e6


@functools.cache
def card_rates() -> CardRates:
    """Measure the current CUDA device, once a process: 1 GiB copied, 8,192^3 multiplied.

    Takes part of a second and 2 GiB, which are given back.
    """
    rates = CardRates(_copy_bytes_s(), _product_flops_s())
    torch.cuda.empty_cache()
    return rates


@contextmanager
def captures() -> Iterator[Callable[[], int]]:
    """Give what says how many CUDA graphs this process has captured within the block, whoever they
    belong to."""
    begin, count = torch.cuda.CUDAGraph.capture_begin, 0

    def counted(graph: torch.cuda.CUDAGraph, *args: Any, **named: Any) -> None:
        nonlocal count
        count += 1
        begin(graph, *args, **named)

    torch.cuda.CUDAGraph.capture_begin = counted  # type: ignore[assignment, method-assign]
    try:
        yield lambda: count
    finally:
        torch.cuda.CUDAGraph.capture_begin = begin  # type: ignore[method-assign]


def free_memory(device: torch.device) -> None:
    """Collect what nothing refers to any more; on a GPU, give its memory back to the card."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
