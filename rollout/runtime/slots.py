"""Slots: what a decode step needs of every running sequence, as arrays.

A running sequence holds a slot. While it decodes, its progress, its pages and what it drew stand
here, so that a step over hundreds of sequences touches no Python object; they go back into the
RunningSample when it leaves.
"""

import itertools

import numpy as np

from samebit.rollout.runtime.running_sample import RunningSample


def signed64(value: int) -> int:
    """The same 64 bits as a signed integer."""
    return value - (1 << 64) if value >> 63 else value


class Slots:
    """Arrays by slot. Lengths count tokens that are there or on their way from the device."""

    def __init__(self, num_slots: int, max_len: int, page_size: int, seed: int) -> None:
        self.num_slots = num_slots
        self.page_size = page_size
        self._seed = seed
        self._free = list(range(num_slots - 1, -1, -1))
        self._entries = itertools.count()
        self.seqs: list[RunningSample | None] = [None] * num_slots
        self.entry = np.zeros(num_slots, dtype=np.int64)  # a new number for every sequence
        self.decoding = np.zeros(num_slots, dtype=bool)
        self.collects = np.zeros(num_slots, dtype=bool)  # hidden states
        self.arrival = np.zeros(num_slots, dtype=np.int64)
        self.computed = np.zeros(num_slots, dtype=np.int64)  # tokens with keys and values
        self.length = np.zeros(num_slots, dtype=np.int64)  # tokens of the context
        self.known = np.zeros(num_slots, dtype=np.int64)  # length of what has arrived
        self.limit = np.zeros(num_slots, dtype=np.int64)  # length of a full completion
        self.num_pages = np.zeros(num_slots, dtype=np.int64)
        self.pages = np.zeros((num_slots, -(-max_len // page_size)), dtype=np.int32)
        self.tokens = np.zeros((num_slots, max_len), dtype=np.int32)
        self.logprobs = np.zeros((num_slots, max_len), dtype=np.float32)
        # Sampling parameters.
        self.seed = np.zeros(num_slots, dtype=np.int64)
        self.sample_id = np.zeros(num_slots, dtype=np.int64)
        self.temperature = np.ones(num_slots, dtype=np.float32)
        self.greedy = np.zeros(num_slots, dtype=bool)
        self.limited = np.zeros(num_slots, dtype=bool)  # top-k, top-p or min-p
        self.min_length = np.zeros(num_slots, dtype=np.int64)  # no stop token before this length
        self.ignore_eos = np.zeros(num_slots, dtype=bool)
        self.own_stops = np.zeros(num_slots, dtype=bool)

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Sequences that run."""
        return self.num_slots - len(self._free)

    def decode_order(self) -> np.ndarray:
        """Slots of the sequences that decode, earlier arrivals first."""
        slots = np.flatnonzero(self.decoding)
        return slots[np.argsort(self.arrival[slots], kind="stable")]

    def enter(self, seq: RunningSample) -> None:
        """Give a sequence a slot; IndexError if there is none."""
        slot = seq.slot = self._free.pop()
        params = seq.request.params
        self.seqs[slot] = seq
        self.entry[slot] = next(self._entries)
        self.arrival[slot] = seq.arrival
        self.collects[slot] = bool(seq.request.hidden_state_layers)
        self.known[slot] = len(seq.token_ids)
        self.limit[slot] = seq.prompt_len + params.max_new_tokens
        self.set_pages(seq)
        self.seed[slot] = self.seed_of(seq)
        self.sample_id[slot] = signed64(seq.sample_id)
        self.temperature[slot] = params.temperature or 1.0
        self.greedy[slot] = params.temperature == 0
        self.limited[slot] = params.limits
        self.min_length[slot] = self.min_length_of(seq)
        self.ignore_eos[slot] = params.ignore_eos
        self.own_stops[slot] = bool(params.stop_token_ids)

    def seed_of(self, seq: RunningSample) -> int:
        """The seed of a sequence's noise: its own or the engine's, as a signed integer."""
        own = seq.request.params.seed
        return signed64(self._seed if own is None else own)

    @staticmethod
    def min_length_of(seq: RunningSample) -> int:
        """No stop token is drawn while the context is shorter."""
        return seq.prompt_len + seq.request.params.min_new_tokens

    def set_pages(self, seq: RunningSample) -> None:
        """Note the sequence's present pages."""
        assert seq.slot is not None
        self.pages[seq.slot, : len(seq.pages)] = seq.pages
        self.num_pages[seq.slot] = len(seq.pages)

    def start_decoding(self, seq: RunningSample, length: int) -> None:
        """From now on the sequence draws a token a step; its context will be `length` tokens."""
        assert seq.slot is not None
        self.computed[seq.slot] = length - 1
        self.length[seq.slot] = length
        self.decoding[seq.slot] = length < self.limit[seq.slot]

    def advance(self, slots: np.ndarray) -> None:
        """These sequences' next tokens are on their way; full ones draw no more."""
        self.computed[slots] += 1
        self.length[slots] += 1
        self.decoding[slots] = self.length[slots] < self.limit[slots]

    def leave(self, seq: RunningSample) -> None:
        """Take the slot back."""
        slot = seq.slot
        assert slot is not None
        self.decoding[slot] = False
        self.seqs[slot] = None
        self._free.append(slot)
        seq.slot = None
