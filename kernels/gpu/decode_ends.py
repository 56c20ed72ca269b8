"""The two ends of a decode step, on the ring of kernels/decode_ring.py: all that the forward needs,
made from what the host gives; and the drawn tokens, handed to the host and to the next step.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from samebit.kernels.attention_kind import GraphEntries
from samebit.kernels.decode_ring import HostRing, RingRow
from samebit.kernels.gpu.pdl import after_previous, supported

_SLOT, _POSITION, _PAGE, _SEED, _SAMPLE_ID, _TEMPERATURE, _GREEDY, _TOKEN, _MORE = (
    tl.constexpr(row.value) for row in RingRow
)


@dataclass(frozen=True)
class DecodeInputs:
    """Tensors [T] of a decode step: entries.max_queries rows for each sample."""

    slots: Tensor  # int64, places in the engine's arrays; one past the last: nobody
    input_ids: Tensor  # int64
    positions: Tensor  # int64
    next_positions: Tensor  # int64
    kv_slots: Tensor  # int64; -1: nothing is stored
    seeds: Tensor  # int64
    sample_ids: Tensor  # int64
    temperatures: Tensor  # fp32
    greedy: Tensor  # bool


@triton.jit
def _told(entry, row: tl.constexpr, capacity, inside):
    """Load a row of the ring's entry as the host wrote it, past every cache."""
    return tl.load(entry + capacity * row, mask=inside, other=0, cache_modifier=".cv")


@triton.jit
def _decode_inputs_kernel(
    ring_ptr, turn_ptr, last_ptr, table_ptr, slot_ptr, ids_ptr, position_ptr, next_ptr,
    kv_slot_ptr, seed_ptr, sample_ptr, temperature_ptr, greedy_ptr, table_rows_ptr, context_ptr,
    query_len_ptr, capacity, num_slots, max_pages, T, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_previous(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < T
    entry = ring_ptr + tl.load(turn_ptr) * ROWS * capacity + i
    slot = _told(entry, _SLOT, capacity, inside)
    position = _told(entry, _POSITION, capacity, inside)
    page = _told(entry, _PAGE, capacity, inside)
    seed = _told(entry, _SEED, capacity, inside)
    sample = _told(entry, _SAMPLE_ID, capacity, inside)
    bits = _told(entry, _TEMPERATURE, capacity, inside)
    greedy = _told(entry, _GREEDY, capacity, inside)
    told = _told(entry, _TOKEN, capacity, inside)
    queries = 1 + _told(entry, _MORE, capacity, inside)
    live = inside & (slot < num_slots)
    newest = tl.load(last_ptr + slot, mask=live & (told == 0), other=0)
    tl.store(table_ptr + slot * max_pages + position // PAGE, page.to(tl.int32), mask=live)
    tl.store(slot_ptr + i, slot, mask=inside)
    tl.store(ids_ptr + i, tl.where(told == 0, newest, told - 1), mask=inside)
    tl.store(position_ptr + i, position, mask=inside)
    tl.store(next_ptr + i, position + 1, mask=inside)
    tl.store(kv_slot_ptr + i, tl.where(live, page * PAGE + position % PAGE, -1), mask=inside)
    tl.store(seed_ptr + i, seed, mask=inside)
    tl.store(sample_ptr + i, sample, mask=inside)
    tl.store(temperature_ptr + i, bits.to(tl.int32).to(tl.float32, bitcast=True), mask=inside)
    tl.store(greedy_ptr + i, greedy != 0, mask=inside)
    sample, first = i // QUERIES, inside & (i % QUERIES == 0)
    tl.store(table_rows_ptr + sample, tl.where(live, slot, 0).to(tl.int32), mask=first)
    tl.store(context_ptr + sample, tl.where(live, position + queries, 0).to(tl.int32), mask=first)
    tl.store(query_len_ptr + sample, tl.where(live, queries, 0).to(tl.int32), mask=first)


def decode_inputs(ring: HostRing, last_tokens: Tensor, entries: GraphEntries) -> DecodeInputs:
    """Inputs of a decode step of a sample for each entry, from the ring's present turn.

    last_tokens [slots + 1] int64. Notes pages in the entries' table, and fills in the rest.
    """
    num_rows, page_table = entries.num_rows, entries.page_table
    device = last_tokens.device
    integers = torch.empty(7, num_rows, dtype=torch.int64, device=device)  # up to the sample ids
    temperatures = torch.empty(num_rows, device=device)
    greedy = torch.empty(num_rows, dtype=torch.bool, device=device)
    made = DecodeInputs(*[*integers, temperatures, greedy])
    pdl = supported(device)
    _decode_inputs_kernel[(triton.cdiv(num_rows, 128),)](
        ring_ptr=ring.inputs, turn_ptr=ring.turn, last_ptr=last_tokens, table_ptr=page_table,
        slot_ptr=made.slots, ids_ptr=made.input_ids, position_ptr=made.positions,
        next_ptr=made.next_positions, kv_slot_ptr=made.kv_slots, seed_ptr=made.seeds,
        sample_ptr=made.sample_ids, temperature_ptr=made.temperatures, greedy_ptr=made.greedy,
        table_rows_ptr=entries.table_rows, context_ptr=entries.context_lens,
        query_len_ptr=entries.query_lens, capacity=ring.inputs.stride(1),
        num_slots=len(last_tokens) - 1, max_pages=page_table.stride(0), T=num_rows,
        QUERIES=entries.max_queries, ROWS=len(RingRow), PAGE=entries.page_size, BLOCK=128, PDL=pdl,
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return made


@triton.jit
def _decode_outputs_kernel(
    slot_ptr, token_ptr, logprob_ptr, last_ptr, ring_tokens, ring_logprobs, turn_ptr, capacity, T,
    QUERIES: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A single program: nobody else reads the turn that it changes."""
    after_previous(PDL)
    i = tl.arange(0, BLOCK)
    inside = i < T
    turn = tl.load(turn_ptr)
    token = tl.load(token_ptr + i, mask=inside)
    if QUERIES == 1:
        tl.store(last_ptr + tl.load(slot_ptr + i, mask=inside, other=0), token, mask=inside)
    tl.store(ring_tokens + turn * capacity + i, token, mask=inside)
    logprob = tl.load(logprob_ptr + i, mask=inside)
    tl.store(ring_logprobs + turn * capacity + i, logprob, mask=inside)
    tl.debug_barrier()  # every thread has read the turn
    tl.store(turn_ptr, (turn + 1) % SIZE)


def decode_outputs(
    ring: HostRing,
    slots: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    last_tokens: Tensor,
    max_queries: int = 1,
) -> None:
    """Write token_ids [T] int64 and logprobs [T] fp32 to the ring and end its turn.

    last_tokens [slots + 1] int64 gets each slot's token, but with several rows for a sample: which
    of them is its newest, the host finds out. T = 0 ends the turn, no more.
    """
    num_rows, pdl = len(token_ids), supported(last_tokens.device)
    _decode_outputs_kernel[(1,)](
        slot_ptr=slots, token_ptr=token_ids, logprob_ptr=logprobs, last_ptr=last_tokens,
        ring_tokens=ring.token_ids, ring_logprobs=ring.logprobs, turn_ptr=ring.turn,
        capacity=ring.token_ids.stride(0), T=num_rows, QUERIES=max_queries, SIZE=ring.size,
        BLOCK=max(32, triton.next_power_of_2(num_rows)), PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
