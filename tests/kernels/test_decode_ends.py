"""What begins and ends a decode graph's step, by Triton's interpreter: rows of samples with guesses
and without, and what only fills up."""

from helpers import run_python


def test_rows_in_tritons_interpreter():
    run_python(_ROWS, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


_ROWS = """
from types import SimpleNamespace
import torch
from samebit.kernels.attention_kind import GraphEntries
from samebit.kernels.decode_ring import RingRow
from samebit.kernels.gpu import decode_ends

decode_ends.supported = lambda device: False
SLOTS, PAGE, QUERIES = 5, 16, 4
ring = SimpleNamespace(
    inputs=torch.zeros(2, len(RingRow), 16, dtype=torch.int64),
    token_ids=torch.zeros(2, 16, dtype=torch.int64),
    logprobs=torch.zeros(2, 16),
    turn=torch.ones(1, dtype=torch.int64),
    size=2,
)
table = torch.full((SLOTS, 6), -1, dtype=torch.int32)
entries = GraphEntries.empty(3, table, PAGE, 96, QUERIES)
last = torch.tensor([100, 101, 102, 103, 104, 105])
inputs = ring.inputs[1]
inputs[RingRow.SLOT] = SLOTS
# A sample in slot 3 with two guesses, over the end of a page; one in slot 0 without; then nobody.
inputs[RingRow.SLOT, :5] = torch.tensor([3, 3, 3, SLOTS, 0])
inputs[RingRow.POSITION, :5] = torch.tensor([30, 31, 32, 0, 7])
inputs[RingRow.PAGE, :5] = torch.tensor([8, 8, 9, 0, 2])
inputs[RingRow.TOKEN, :5] = torch.tensor([0, 1 + 0, 1 + 55, 0, 0])
inputs[RingRow.MORE, 0] = 2
inputs[RingRow.SEED, :5] = torch.arange(5)
made = decode_ends.decode_inputs(ring, last, entries)
assert made.slots.tolist() == [3, 3, 3, 5, 0, *[5] * 7]
assert made.input_ids[:5].tolist() == [103, 0, 55, 0, 100]
assert made.positions[:5].tolist() == [30, 31, 32, 0, 7]
assert made.next_positions[:5].tolist() == [31, 32, 33, 1, 8]
assert made.kv_slots.tolist() == [8 * 16 + 14, 8 * 16 + 15, 9 * 16, -1, 2 * 16 + 7, *[-1] * 7]
assert made.seeds[:5].tolist() == list(range(5))
assert entries.table_rows.tolist() == [3, 0, 0]
assert entries.context_lens.tolist() == [33, 8, 0]
assert entries.query_lens.tolist() == [3, 1, 0]
assert table.tolist() == [[2, *[-1] * 5], *[[-1] * 6] * 2, [-1, 8, 9, *[-1] * 3], [-1] * 6]
drawn = torch.arange(200, 212)
decode_ends.decode_outputs(ring, made.slots, drawn, torch.full((12,), -1.5), last, QUERIES)
assert ring.token_ids[1, :12].equal(drawn) and ring.logprobs[1, :12].eq(-1.5).all()
assert ring.turn.item() == 0 and last.tolist() == [100, 101, 102, 103, 104, 105]
# One row for each sample: the newest token of its slot is told at once.
entries = GraphEntries.empty(12, table, PAGE, 96)
inputs = ring.inputs[0]
inputs[RingRow.SLOT] = SLOTS
inputs[RingRow.SLOT, :2] = torch.tensor([4, 1])
made = decode_ends.decode_inputs(ring, last, entries)
assert made.input_ids[:2].tolist() == [104, 101]
assert entries.query_lens.tolist() == entries.context_lens.tolist() == [1, 1, *[0] * 10]
decode_ends.decode_outputs(ring, made.slots, drawn, torch.zeros(12), last)
assert last[:5].tolist() == [100, 201, 102, 103, 200] and ring.turn.item() == 1
"""
