"""Measured times: spreads of repeated runs, CUDA graph replay, what the hardware would allow."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

# Measured on an H200: a device-to-device copy (read + write), and the fastest bf16 products.
MEMORY_BYTES_S = 4.25e12
FLOPS_S = 690e12

ROTATED_BYTES = 256 << 20
"""Operands read in turn inside one graph: several times what any L2 cache holds."""
_GRAPH_US = 1000.0  # a graph's own launch is then below one percent
_SHORTEST_US = 2.0  # of any kernel
_SUSTAINED_US = 2e5

Action = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Of repeated measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """From at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def num_copies(operand_bytes: int) -> int:
    """Copies of an operand that together exceed every cache."""
    return -(-ROTATED_BYTES // operand_bytes)


def ideal_us(flops: float, num_bytes: float) -> float:
    """The roofline: whichever of arithmetic and memory takes longer."""
    return max(flops / FLOPS_S, num_bytes / MEMORY_BYTES_S) * 1e6


def compute_bound(flops: float, num_bytes: float) -> bool:
    """Whether arithmetic takes longer than memory: then the card's power sets its clock."""
    return flops / FLOPS_S > num_bytes / MEMORY_BYTES_S


def timed[T](action: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """(result, seconds) of an action, from and to a moment at which the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


@torch.no_grad()
def graph_us(
    actions: Sequence[Action], expected_us: float, replays: int, sustained: bool = False
) -> Spread:
    """Microseconds of one action, from replays of a CUDA graph that runs all of them in turn.

    The actions differ in their operands alone. The graph repeats them until it should take a
    millisecond by `expected_us` each. sustained: warm up and measure for a fifth of a second each,
    so that the card draws all the power that it may, as in a prefill.
    """
    round_us = max(expected_us, _SHORTEST_US) * len(actions)
    rounds = max(1, round(_GRAPH_US / round_us))
    warm_ups = 2
    if sustained:
        warm_ups = math.ceil(_SUSTAINED_US / (round_us * rounds))
        replays = max(replays, warm_ups)
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
    for _ in range(warm_ups):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    count = len(actions) * rounds
    times = [1e3 * a.elapsed_time(b) / count for a, b in zip(events, events[1:], strict=False)]
    graph.reset()
    return Spread.of(times)


def copy_bytes_s(replays: int) -> float:
    """Bytes read and written per second while 1 GiB is copied.

    By torch's copy, which may be a copy engine's, or by a kernel: whichever is faster.
    """
    source = torch.zeros(1 << 28, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    fastest = min(graph_us([way], 500.0, replays).median for way in ways)
    return 2 * source.nbytes / fastest * 1e6
