"""Eagle3: guesses by a draft model, one behind another, over what the target computed.

At position p the draft reads the target's streams of token p and, beside them, token p + 1. Its
keys and values lie in the last layer of the KV cache, in the sample's own pages: they are forked,
kept and found again with the target's. What is drafted goes on from the draft's own states, and is
written over once the target has computed those tokens. Source: Li et al. 2025, arXiv 2503.01840. A
block draft reads masks behind what was drawn, and says all tokens in that one pass; it is run
without CUDA graphs.

A guess is drawn as the target will draw, with the same noise for each token of its vocabulary: at a
temperature, too, both mostly take the same token where they think alike.

Where nothing is to be guessed the states of what the target computes are kept for some steps, and
read together: then a step waits for no draft.

Where pages hold no keys of the draft's, those of its weights before, or of another continuation
(the last token of a page that samples share), the guesses are worse, and nothing else is. While the
draft's weights are no whole version nothing is guessed.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from samebit.kernels.transfer import to_device
from samebit.rollout.runtime.batch import Layout, chunk_rows, lay_out
from samebit.rollout.runtime.scheduler import EngineStep
from samebit.rollout.speculative.draft_graphs import Chains, DraftGraphs
from samebit.rollout.speculative.draft_passes import DraftPasses
from samebit.rollout.speculative.proposer import (
    MOST_UNREAD,
    Context,
    Proposal,
    Proposer,
    ProposerParts,
)


class Eagle3(Proposer):
    """Guesses by the engine's draft model; see the file's head."""

    takes_draft = True

    def __init__(self, parts: ProposerParts) -> None:
        super().__init__(parts)
        self._passes = DraftPasses(parts)
        assert parts.draft is not None
        self._served, self.config = parts.draft, parts.draft.config
        self.streams = self.config.captured_layers
        # A pass reads its weights, on every rank the whole; each rank has its share of the target.
        target = parts.runner.model.config.num_matmul_weights / parts.ranks.size
        share = self.config.num_matmul_weights / target
        # Of a block draft one pass is all, however much it guesses.
        self.cost, self.round_cost = (0.0, share) if self.config.is_block else (share, 0.0)
        # By slot, what the target computed last: fused states of the tokens [first, end), which
        # are those that the draft has yet to read; each at its position modulo `kept`.
        num_slots, self._kept = parts.slots.num_slots, MOST_UNREAD + parts.num_draft_tokens + 1
        shape = (num_slots + 1, self._kept, self.config.hidden_size)  # the last slot is nobody's
        like = parts.runner.model.embedding
        self._states = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self._graphs: DraftGraphs | None = None
        self._model = parts.runner.model  # whose embedding the graphs read
        self._first = np.zeros(num_slots, dtype=np.int64)
        self._end = np.zeros(num_slots, dtype=np.int64)
        self._entry = np.full(num_slots, -1)  # the sample's, see Slots

    def observe(self, step: EngineStep, collected: dict[int, Tensor]) -> None:
        """Note the states of tokens whose next one is yet to be drawn; read the others at once."""
        if not self._served.is_whole:
            self._entry[:] = -1  # what is known of samples has a gap from here on
            return
        states = self._passes.fuse(collected)
        slots, num_rows = self.parts.slots, step.num_decode_rows
        owners, offsets = step.decode, np.zeros(num_rows, dtype=np.int64)
        if step.drafts is not None:
            owners, offsets = step.drafts.spread(owners), step.drafts.offsets
        lasts = [
            (part.stop - 1, seq.slot, chunk.end - 1)
            for chunk, part in chunk_rows(step)
            for seq in chunk.drawing
            if seq.slot is not None
        ]
        rows, others, ends = np.array(lasts, dtype=np.int64).reshape(-1, 3).T
        rows = np.concatenate([np.arange(num_rows), rows])
        held = np.concatenate([step.decode, others])
        positions = np.concatenate([slots.computed[owners] + offsets, ends])
        owners = np.concatenate([owners, others])
        if len(rows):
            self._states.index_put_(self._where(owners, positions), states[self._on_device(rows)])
        starts = np.concatenate([slots.computed[step.decode], ends])
        ends = starts + np.bincount(owners, minlength=slots.num_slots)[held]
        known = (self._entry[held] == slots.entry[held]) & (starts <= self._end[held])
        first = np.where(known, np.minimum(self._first[held], starts), starts)
        self._first[held] = np.maximum(first, ends - self._kept)
        self._end[held], self._entry[held] = ends, slots.entry[held]
        self._read_chunks(step, states)

    def _read_chunks(self, step: EngineStep, states: Tensor) -> None:
        """Keys and values of the chunks' tokens whose next one is known."""
        rows: list[int] = []
        token_ids: list[int] = []
        places = []
        for chunk, part in chunk_rows(step):
            num_tokens = chunk.num_tokens - chunk.completes
            if num_tokens and not chunk.scores:
                rows += range(part.start, part.start + num_tokens)
                token_ids += chunk.seq.token_ids[chunk.start + 1 : chunk.start + 1 + num_tokens]
                places.append((chunk.seq.slot, chunk.start, num_tokens))
        if places:
            owners, starts, lens = np.array(places, dtype=np.int64).T
            read = self._on_device(np.array(rows)), self._on_device(np.array(token_ids))
            self._step(states[read[0]], read[1], lay_out(owners, starts, lens, self.parts.slots))

    def propose(self, contexts: Sequence[Context]) -> list[Proposal]:
        """Read what was drawn since, and guess for those that have room."""
        proposals = [Proposal()] * len(contexts)
        if not self._served.is_whole or not len(held := self._unread(contexts)):
            return proposals
        asked = [contexts[i] for i in held]
        slots, room = np.array([c.slot for c in asked]), np.array([c.room for c in asked])
        starts, lengths = self._first[slots], np.array([len(c.token_ids) for c in asked])
        layout = lay_out(slots, starts, lengths - 1 - starts, self.parts.slots)
        behind = [c.token_ids[start + 1 :] for c, start in zip(asked, starts, strict=True)]
        token_ids = np.concatenate(behind).astype(np.int64)
        chains = Chains(slots, lengths, room, layout, token_ids)
        graphs = self._usable_graphs()
        if self.config.is_block:
            guesses = self._block(chains)
        elif graphs is not None and graphs.fits(chains):
            guesses = graphs.guess(chains)
        else:
            guesses = self._guess(chains)
        self._first[slots] = lengths - 1
        for i, chain, num_tokens in zip(held, guesses, room, strict=True):
            proposals[i] = Proposal(chain[:num_tokens].tolist())
        return proposals

    def _usable_graphs(self) -> DraftGraphs | None:
        """Graphs for the model that is served now, where the engine has any."""
        runner = self.parts.runner
        if runner.graph_pool is None:
            return None
        if self._graphs is None or self._model is not runner.model:
            self._model = runner.model
            self._graphs = DraftGraphs(
                self._passes,
                self.parts.slots,
                self._states,
                runner.graph_pool,
            )
        return self._graphs

    def _guess(self, chains: Chains) -> np.ndarray:
        """Guesses [B, most room], launch by launch."""
        layout = chains.layout
        where = self._where(np.repeat(chains.slots, layout.lens), layout.positions)
        read = self._on_device(chains.token_ids)
        fed, final = self._step(self._states[where], read, layout)
        lasts = self._on_device(np.cumsum(layout.lens) - 1)
        return self._chain(fed[lasts], final[lasts], chains.slots, chains.lengths, chains.room)

    def _block(self, chains: Chains) -> np.ndarray:
        """Guesses [B, most room] of a block draft: of each context's last token, and of masks."""
        slots, room, read = chains.slots, chains.room, chains.layout.lens
        lens = read + np.maximum(room - 1, 0)
        layout = lay_out(slots, chains.layout.starts, lens, self.parts.slots)
        owners = np.repeat(np.arange(len(slots)), lens)
        offsets = layout.positions - layout.starts[owners]
        behind = offsets - (read - 1)[owners]  # the last token that was drawn: masks are above 0
        token_ids = np.full(len(owners), self.config.mask_token_id)
        token_ids[behind <= 0] = chains.token_ids
        where = self._where(slots[owners], layout.positions)  # of a mask: whatever lies there
        is_mask = self._on_device(behind > 0)[:, None]
        states = torch.where(is_mask, self._passes.mask_state(), self._states[where])
        _, final = self._step(states, self._on_device(token_ids), layout)
        table = np.zeros((len(slots), int(room.max())), dtype=np.int64)
        if len(rows := np.flatnonzero((behind >= 0) & (room > 0)[owners])):
            of, places = owners[rows], behind[rows]
            chosen = self._choose(
                final[self._on_device(rows)], slots[of], chains.lengths[of] + places
            )
            table[of, places] = chosen.cpu().numpy()
        return table

    def _unread(self, contexts: Sequence[Context]) -> np.ndarray:
        """The contexts with tokens to read, for all of which there are states.

        A place belongs to one sample: of those that share one, the others leave it out.
        """
        slots = np.array([c.slot for c in contexts], dtype=np.int64)
        ends = np.array([len(c.token_ids) for c in contexts], dtype=np.int64) - 1
        lens = ends - self._first[slots]
        ready = self._entry[slots] == self.parts.slots.entry[slots]
        held = np.flatnonzero(ready & (lens >= 1) & (ends <= self._end[slots]))
        if not len(held):
            return held
        slots, lens = slots[held], lens[held]
        layout = lay_out(slots, self._first[slots], lens, self.parts.slots)
        others = np.ones(len(layout.kv_slots), dtype=bool)
        others[np.unique(layout.kv_slots, return_index=True)[1]] = False
        behind = np.where(others, layout.positions + 1, 0)
        behind = np.maximum.reduceat(behind, np.cumsum(lens) - lens)
        self._first[slots] = np.maximum(self._first[slots], behind)
        return held[behind < layout.starts + lens]

    def _chain(
        self, fed: Tensor, final: Tensor, slots: np.ndarray, lengths: np.ndarray, room: np.ndarray
    ) -> np.ndarray:
        """Guesses [B, most room] behind contexts of these lengths, by what their last rows gave."""
        most, rows = int(room.max()), np.arange(len(room))
        chosen, guesses = torch.zeros(len(room), dtype=torch.int64, device=fed.device), []
        for i in range(most):
            going = np.flatnonzero(room[rows] > i)
            kept, rows = self._on_device(going), rows[going]
            fed, final, chosen = fed[kept], final[kept], chosen[kept]
            if i:
                places = slots[rows], lengths[rows] - 2 + i, np.ones_like(rows)
                fed, final = self._step(fed, chosen, lay_out(*places, self.parts.slots))
            chosen = self._choose(final, slots[rows], lengths[rows] + i)
            guesses.append((rows, chosen))
        table = np.zeros((len(room), most), dtype=np.int64)
        for i, (which, chosen) in enumerate(guesses):
            table[which, i] = chosen.cpu().numpy()
        return table

    def _choose(self, final: Tensor, slots: np.ndarray, positions: np.ndarray) -> Tensor:
        """The tokens [B] that the draft takes at these positions."""
        own = self.parts.slots
        columns = own.temperature[slots], own.seed[slots], positions, own.sample_id[slots]
        told = (self._on_device(column) for column in (*columns, own.greedy[slots]))
        return self._passes.choose(final, *told)

    def _step(self, states: Tensor, token_ids: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """A pass over rows [T], each with the token behind it."""
        lens = layout.lens.tolist(), (layout.starts + layout.lens).tolist()
        table = torch.from_numpy(layout.table)
        plan = self._passes.attention.plan_step(*lens, table, self.parts.slots.page_size)
        places = self._on_device(layout.positions), self._on_device(layout.kv_slots)
        return self._passes.step(states, token_ids, *places, plan)

    def _where(self, slots: np.ndarray, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """Where the states of tokens lie, by their samples' slots."""
        return self._on_device(slots), self._on_device(positions % self._kept)

    def _on_device(self, values: np.ndarray) -> Tensor:
        return to_device(values, self._states.device)
