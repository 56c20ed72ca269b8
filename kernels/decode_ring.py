"""The ring between the host and the CUDA graphs of decode steps: one layout for both sides.

It lies in pinned host memory: while the GPU runs a step, the host fills in the next one's entry and
reads the last one's. kernels/gpu/decode_ends.py is the GPU's side.
"""

from enum import IntEnum

import torch


class RingRow(IntEnum):
    """The rows of an entry: what a step is told of each of its forward's rows, in int64.

    A sequence has as many of these as the step's graph has for each, one behind another: its newest
    token's, and some for guesses that are to follow it; those without a guess are nobody's.
    """

    SLOT = 0
    """The sequence's place in the engine's arrays; one past the last: nobody's."""
    POSITION = 1
    """Position of the row's token."""
    PAGE = 2
    """Page of that position."""
    SEED = 3
    SAMPLE_ID = 4
    TEMPERATURE = 5
    """Bits of the fp32 value."""
    GREEDY = 6
    """0 or 1."""
    TOKEN = 7
    """1 + the row's token; 0: the sequence's newest, which the device alone knows."""
    MORE = 8
    """Of a sequence's first row: how many guesses follow."""


class HostRing:
    """Inputs and results of decode steps of at most `capacity` rows.

    inputs [size, rows of RingRow, capacity] int64, token_ids [size, capacity] int64 and logprobs
    [size, capacity] fp32 are the host's; turn [1] int64, on the device, is the entry of the next
    step to run. size is more than the steps that may be in flight.
    """

    def __init__(self, size: int, capacity: int, device: torch.device) -> None:
        self.inputs = torch.zeros(size, len(RingRow), capacity, dtype=torch.int64, pin_memory=True)
        self.token_ids = torch.zeros(size, capacity, dtype=torch.int64, pin_memory=True)
        self.logprobs = torch.zeros(size, capacity, pin_memory=True)
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def size(self) -> int:
        """Number of entries."""
        return len(self.inputs)
