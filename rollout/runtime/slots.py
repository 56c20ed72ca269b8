"""Slots: the progress of every sample that holds one, and what a step needs of it, as arrays.

A sample moves in by `enter` and out by `leave`; in between this is where it stands how far it is
and what it drew (see the table in running_sample.py), so that a step over hundreds of samples
touches no Python object.
"""

import itertools

import numpy as np

from samebit.kernels.sample import signed64
from samebit.rollout.runtime.running_sample import RunningSample
from samebit.weight_sync.types import WeightVersion


class Slots:
    """Arrays by slot, which only these methods write; whole steps read them by their slots.

    `computed` and `length` count tokens that are there or on their way from the device, `known`
    those that have arrived.
    """

    def __init__(self, num_slots: int, max_len: int, page_size: int, seed: int) -> None:
        self.num_slots = num_slots
        self.page_size = page_size
        self._seed = seed
        self._free = list(range(num_slots - 1, -1, -1))
        self._entries = itertools.count()
        self._newest: WeightVersion | None = None  # what drew the newest tokens
        self._number = 0  # of it; every change counts one up
        self.seqs: list[RunningSample | None] = [None] * num_slots
        self.entry = np.zeros(num_slots, dtype=np.int64)  # a new number for every sample
        self.decoding = np.zeros(num_slots, dtype=bool)
        self.collects = np.zeros(num_slots, dtype=bool)  # hidden states
        self.arrival = np.zeros(num_slots, dtype=np.int64)
        self.computed = np.zeros(num_slots, dtype=np.int64)  # tokens with keys and values
        self.length = np.zeros(num_slots, dtype=np.int64)  # tokens of the context
        self.known = np.zeros(num_slots, dtype=np.int64)  # length of what has arrived
        self.version = np.zeros(num_slots, dtype=np.int64)  # number of what drew the newest token
        self.limit = np.zeros(num_slots, dtype=np.int64)  # length of a full completion
        self.num_pages = np.zeros(num_slots, dtype=np.int64)
        self.pages = np.zeros((num_slots, -(-max_len // page_size)), dtype=np.int32)
        self.tokens = np.zeros((num_slots, max_len), dtype=np.int32)
        self.logprobs = np.zeros((num_slots, max_len), dtype=np.float32)
        self.filled = np.full(num_slots, -1)  # the entry whose first tokens are in `tokens` too
        self.thresholds = np.zeros((num_slots, max_len), dtype=np.float32)  # of truncated ones
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
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_slots - len(self._free)

    def decode_order(self) -> np.ndarray:
        """Slots of the samples that decode, earlier arrivals first."""
        slots = np.flatnonzero(self.decoding)
        return slots[np.argsort(self.arrival[slots], kind="stable")]

    def enter(self, seq: RunningSample) -> None:
        """Give a sample a slot; IndexError if there is none."""
        slot = seq.slot = self._free.pop()
        params = seq.request.params
        self.seqs[slot] = seq
        self.entry[slot] = next(self._entries)
        self.arrival[slot] = seq.arrival
        self.collects[slot] = bool(seq.request.hidden_state_layers)
        self.computed[slot] = seq.num_computed
        self.known[slot] = len(seq.token_ids)
        self.version[slot] = -1
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

    def owner(self, slot: int) -> RunningSample:
        seq = self.seqs[slot]
        assert seq is not None, slot
        return seq

    def seed_of(self, seq: RunningSample) -> int:
        """The seed of a sample's noise: its own or the engine's, as a signed integer."""
        own = seq.request.params.seed
        return signed64(self._seed if own is None else own)

    @staticmethod
    def min_length_of(seq: RunningSample) -> int:
        """No stop token is drawn while the context is shorter."""
        return seq.prompt_len + seq.request.params.min_new_tokens

    def set_pages(self, seq: RunningSample) -> None:
        assert seq.slot is not None
        self.pages[seq.slot, : len(seq.pages)] = seq.pages
        self.num_pages[seq.slot] = len(seq.pages)

    def num_computed(self, seq: RunningSample) -> int:
        """Tokens whose keys and values are computed, or will be once the steps in flight are."""
        assert seq.slot is not None
        return int(self.computed[seq.slot])

    def num_to_compute(self, seq: RunningSample) -> int:
        """Tokens whose keys and values are still to be computed.

        The last token of a score_only request predicts nothing that is asked for.
        """
        assert seq.slot is not None
        return int(self.known[seq.slot]) - self.num_computed(seq) - seq.request.score_only

    def advance_to(self, seq: RunningSample, num_tokens: int) -> None:
        """So many tokens of its context are computed or on their way."""
        assert seq.slot is not None
        self.computed[seq.slot] = num_tokens

    def start_decoding(self, seq: RunningSample) -> None:
        """Its context is computed and its next token on its way; then it draws one a step."""
        slot = seq.slot
        assert slot is not None
        self.computed[slot] = self.known[slot]
        self.length[slot] = self.known[slot] + 1
        self.decoding[slot] = self.length[slot] < self.limit[slot]

    def advance(self, slots: np.ndarray) -> None:
        """The next tokens of these slots [B] are on their way; full samples draw no more."""
        self.computed[slots] += 1
        self.length[slots] += 1
        self.decoding[slots] = self.length[slots] < self.limit[slots]

    def advance_more(self, slots: np.ndarray, counts: np.ndarray) -> None:
        """So many tokens [B] more than one each came of these slots' last step."""
        self.computed[slots] += counts
        self.length[slots] += counts
        self.decoding[slots] = self.length[slots] < self.limit[slots]

    def append(
        self,
        slots: np.ndarray,
        positions: np.ndarray,
        token_ids: np.ndarray,
        logprobs: np.ndarray,
        version: WeightVersion,
        thresholds: np.ndarray | None = None,
    ) -> None:
        """Take in tokens of these slots, drawn by `version` at `positions`; all [S].

        A slot's tokens are in their order. thresholds may be missing only where no slot's log-probs
        are truncated.
        """
        self.tokens[slots, positions] = token_ids
        self.logprobs[slots, positions] = logprobs
        if thresholds is not None:
            self.thresholds[slots, positions] = thresholds
        self.known[slots] = positions + 1
        if version != self._newest:
            self._newest, self._number = version, self._number + 1
        for i in np.flatnonzero(self.version[slots] != self._number):
            self.owner(slots[i]).stamp(int(positions[i]), version)
        self.version[slots] = self._number

    def contexts(self, slots: np.ndarray) -> tuple[list[RunningSample], list[np.ndarray]]:
        """The samples of these slots, and all tokens of each that have arrived, [known] int32; not
        to be changed."""
        for slot in slots[self.filled[slots] != self.entry[slots]]:
            seq = self.owner(slot)
            self.tokens[slot, : len(seq.token_ids)] = seq.token_ids
            self.filled[slot] = self.entry[slot]
        seqs = [self.owner(slot) for slot in slots]
        known = zip(slots, self.known[slots].tolist(), strict=True)
        return seqs, [self.tokens[slot, :length] for slot, length in known]

    def newest(self, slots: np.ndarray) -> np.ndarray:
        """The newest tokens [B] int64 of these slots, which decode; -1 where one is on its way."""
        token_ids = self.tokens[slots, self.length[slots] - 1]
        return np.where(self.known[slots] == self.length[slots], token_ids.astype(np.int64), -1)

    def drawn(self, seq: RunningSample, start: int) -> tuple[list[int], list[float], list[float]]:
        """Token ids, log-probs and, where those are truncated, thresholds of what a sample has
        drawn from its new token `start` on."""
        token_ids, logprobs = seq.token_ids[seq.prompt_len + start :], seq.logprobs[start:]
        thresholds = seq.thresholds[start:]
        if seq.slot is not None:
            first = max(len(seq.token_ids), seq.prompt_len + start)
            new = slice(first, int(self.known[seq.slot]))
            token_ids += self.tokens[seq.slot, new].tolist()
            logprobs += self.logprobs[seq.slot, new].tolist()
            if seq.request.params.truncates:
                thresholds += self.thresholds[seq.slot, new].tolist()
        return token_ids, logprobs, thresholds

    def num_drawn(self, seq: RunningSample) -> int:
        """How many tokens a sample has drawn that have come in."""
        if seq.slot is None:
            return seq.num_new_tokens
        return int(self.known[seq.slot]) - seq.prompt_len

    def leave(self, seq: RunningSample) -> None:
        """Take the slot back; what the sample drew in it goes with the sample.

        The newest token's keys and values do not count as computed: they may be on their way.
        """
        slot = seq.slot
        assert slot is not None
        known = int(self.known[slot])
        new = slice(len(seq.token_ids), known)
        seq.token_ids += self.tokens[slot, new].tolist()
        seq.logprobs += self.logprobs[slot, new].tolist()
        if seq.request.params.truncates:
            seq.thresholds += self.thresholds[slot, new].tolist()
        seq.num_computed = min(self.num_computed(seq), known - 1)
        self.decoding[slot] = False
        self.seqs[slot] = None
        self._free.append(slot)
        seq.slot = None
