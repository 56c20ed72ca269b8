"""The two ends of a decode step: all that the forward needs, made from the few numbers that the
host gives; and the drawn tokens, handed to the host and to the next step.

Both work on pinned host memory, so that nothing is copied between two replays of a CUDA graph. It
is a ring: while the GPU runs a step the host fills in the next one's entry and reads the last
one's. A counter on the device says whose turn it is.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from samebit.kernels.gpu.attention import GpuAttentionPlan
from samebit.kernels.gpu.pdl import after_previous, supported

NUM_INPUTS = 7


class HostRing:
    """Inputs and results of decode steps of at most `capacity` sequences, in pinned host memory.

    inputs [size, 7, capacity] int64: slot (one past the last: nobody), position of the newest
    token, page of that position, seed, sample id, bits of the fp32 temperature, greedy.
    token_ids [size, capacity] int64 and logprobs [size, capacity] fp32. turn [1] int64, on the
    device: the entry of the next step to run. size is more than the steps that may be in flight.
    """

    def __init__(self, size: int, capacity: int, device: torch.device) -> None:
        self.inputs = torch.zeros(size, NUM_INPUTS, capacity, dtype=torch.int64, pin_memory=True)
        self.token_ids = torch.zeros(size, capacity, dtype=torch.int64, pin_memory=True)
        self.logprobs = torch.zeros(size, capacity, pin_memory=True)
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def size(self) -> int:
        """Number of entries."""
        return len(self.inputs)


@dataclass(frozen=True)
class DecodeInputs:
    """Tensors [B] of a decode step."""

    owners: torch.Tensor  # int64, slots of the engine; one past the last: nobody
    input_ids: torch.Tensor  # int64
    positions: torch.Tensor  # int64
    next_positions: torch.Tensor  # int64
    slots: torch.Tensor  # int64, in the cache; -1: nothing is stored
    seeds: torch.Tensor  # int64
    sample_ids: torch.Tensor  # int64
    temperatures: torch.Tensor  # fp32
    greedy: torch.Tensor  # bool


@triton.jit
def _host(pointers, inside):
    """Load what the host wrote, past every cache."""
    return tl.load(pointers, mask=inside, other=0, cache_modifier=".cv")


@triton.jit
def _decode_inputs_kernel(
    ring_ptr, turn_ptr, last_ptr, table_ptr, owner_ptr, ids_ptr, position_ptr, next_ptr, slot_ptr,
    seed_ptr, sample_ptr, temperature_ptr, greedy_ptr, table_rows_ptr, context_ptr, capacity,
    num_slots, max_pages, B, ROWS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    after_previous(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < B
    source = ring_ptr + tl.load(turn_ptr) * ROWS * capacity + i
    owner, position = _host(source, inside), _host(source + capacity, inside)
    page, seed = _host(source + 2 * capacity, inside), _host(source + 3 * capacity, inside)
    sample, bits = _host(source + 4 * capacity, inside), _host(source + 5 * capacity, inside)
    greedy = _host(source + 6 * capacity, inside)
    live = inside & (owner < num_slots)
    tl.store(table_ptr + owner * max_pages + position // PAGE, page.to(tl.int32), mask=live)
    tl.store(owner_ptr + i, owner, mask=inside)
    tl.store(ids_ptr + i, tl.load(last_ptr + owner, mask=live, other=0), mask=inside)
    tl.store(position_ptr + i, position, mask=inside)
    tl.store(next_ptr + i, position + 1, mask=inside)
    tl.store(slot_ptr + i, tl.where(live, page * PAGE + position % PAGE, -1), mask=inside)
    tl.store(seed_ptr + i, seed, mask=inside)
    tl.store(sample_ptr + i, sample, mask=inside)
    tl.store(temperature_ptr + i, bits.to(tl.int32).to(tl.float32, bitcast=True), mask=inside)
    tl.store(greedy_ptr + i, greedy != 0, mask=inside)
    tl.store(table_rows_ptr + i, tl.where(live, owner, 0).to(tl.int32), mask=inside)
    tl.store(context_ptr + i, tl.where(live, position + 1, 0).to(tl.int32), mask=inside)


def decode_inputs(
    ring: HostRing,
    batch: int,
    last_tokens: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    plan: GpuAttentionPlan,
) -> DecodeInputs:
    """Inputs of a decode step of `batch` sequences, from the ring's present entry.

    last_tokens [slots + 1] int64. Notes the page in page_table [slots, max_pages] int32, and fills
    in the plan's entries.
    """
    device = last_tokens.device
    owners, ids, now, after, slots, seeds, sample_ids = torch.empty(
        7, batch, dtype=torch.int64, device=device
    )
    made = DecodeInputs(
        owners, ids, now, after, slots, seeds, sample_ids, torch.empty(batch, device=device),
        torch.empty(batch, dtype=torch.bool, device=device),
    )  # fmt: skip
    entries, pdl = plan.decode, supported(device)
    assert entries is not None
    _decode_inputs_kernel[(triton.cdiv(batch, 128),)](
        ring.inputs, ring.turn, last_tokens, page_table, made.owners, made.input_ids,
        made.positions, made.next_positions, made.slots, made.seeds, made.sample_ids,
        made.temperatures, made.greedy, entries.table_rows, entries.context_lens,
        ring.inputs.stride(1), len(last_tokens) - 1, page_table.stride(0), batch, NUM_INPUTS,
        page_size, 128, pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return made


@triton.jit
def _decode_outputs_kernel(
    owner_ptr, token_ptr, logprob_ptr, last_ptr, ring_tokens, ring_logprobs, turn_ptr, capacity, B,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A single program: nobody else reads the turn that it changes."""
    after_previous(PDL)
    i = tl.arange(0, BLOCK)
    inside = i < B
    turn = tl.load(turn_ptr)
    token = tl.load(token_ptr + i, mask=inside)
    tl.store(last_ptr + tl.load(owner_ptr + i, mask=inside, other=0), token, mask=inside)
    tl.store(ring_tokens + turn * capacity + i, token, mask=inside)
    logprob = tl.load(logprob_ptr + i, mask=inside)
    tl.store(ring_logprobs + turn * capacity + i, logprob, mask=inside)
    tl.debug_barrier()  # every thread has read the turn
    tl.store(turn_ptr, (turn + 1) % SIZE)


def decode_outputs(
    ring: HostRing,
    owners: torch.Tensor,
    token_ids: torch.Tensor,
    logprobs: torch.Tensor,
    last_tokens: torch.Tensor,
) -> None:
    """Write token_ids [B] int64 and logprobs [B] fp32 to the ring and end its turn.

    last_tokens [slots + 1] int64 gets each owner's token. B = 0 ends the turn, no more.
    """
    batch, pdl = len(token_ids), supported(last_tokens.device)
    _decode_outputs_kernel[(1,)](
        owners, token_ids, logprobs, last_tokens, ring.token_ids, ring.logprobs, ring.turn,
        ring.token_ids.stride(0), batch, ring.size, max(32, triton.next_power_of_2(batch)), pdl,
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
