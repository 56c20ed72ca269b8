"""The training-time test: the draft on its own states, and what comes of it, in linear memory.

Column t of a sample holds the target's streams of token t. In pass i the draft reads there token
t + 1 + i (the sample's own) at position t + i, and what pass i - 1 left in the column; it is to say
what the target says behind token t + 1 + i. So the target's row r is answered in pass i by column
r - 1 - i. Keys: those of pass 0 up to t, and column t's own of each pass since (kernels/
ttt_attention.py). Source: Li et al. 2025, arXiv 2503.01840.

In all passes but the first a block draft (P-EAGLE, arXiv 2602.01469) reads a mask: its token
and its learned streams, whatever the pass before gave. All columns are trained in each pass, where
the paper takes fewer of them the later the pass is.

Deviations from the paper's code: a row counts if the token behind it is trained on, in every pass
alike, and the mean is over rows that count, not over all positions.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_kind import AttentionPlan
from samebit.kernels.linear import add_product
from samebit.kernels.logprob import logsumexp
from samebit.kernels.rope import rope
from samebit.kernels.ttt_attention import ttt_attention
from samebit.rollout.models.draft.decoder import DraftDecoder, split_heads
from samebit.trainer.draft.batch import DraftBatch, TargetHead
from samebit.trainer.draft.config import TttConfig
from samebit.trainer.draft.losses import DRAFT_LOSSES, acceptance


@dataclass
class Unrolled:
    """The keys and values of the passes so far."""

    attention: CanonicalAttention
    plan: AttentionPlan
    rope_table: Tensor
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def attend(self, qkv: Tensor, positions: Tensor) -> Tensor:
        """The next pass's attention: qkv [T, (Hq + 2 Hkv) Dh] -> [T, Hq, Dh]."""
        heads = self.attention.heads
        q, k, v = split_heads(qkv, heads)
        q, k = rope(q, positions, self.rope_table), rope(k, positions, self.rope_table)
        self.pairs.append((k, v.contiguous()))
        (keys, values), *own = self.pairs
        if not own:
            return self.attention.attend_packed(q, keys, values, self.plan)
        return ttt_attention(q, keys, values, own, self.plan, heads.scale)


def unroll(draft: DraftDecoder, data: DraftBatch, passes: int, rope_table: Tensor) -> list[Tensor]:
    """The states [T, D] that give each pass's logits; differentiable.

    rope_table: a row for every position, and `passes` more. In columns whose pass reads beyond its
    sample's end they mean nothing.
    """
    batch = data.batch
    attention = CanonicalAttention(draft.heads, batch.input_ids.device)
    done = Unrolled(attention, attention.plan_packed(batch.seq_lens), rope_table)
    states = draft.fuse([data.streams[layer] for layer in draft.config.captured_layers])
    finals = []
    mask = draft.config.mask_token_id
    for i in range(passes):
        token_ids, positions = batch.input_ids.roll(-1 - i), batch.positions + i
        if i and mask is not None:
            token_ids = torch.full_like(token_ids, mask)
            states = draft.mask_state().expand_as(states)
        attend = partial(done.attend, positions=positions)
        states, final = draft.step(states, token_ids, attend)
        finals.append(final)
    return finals


@dataclass
class TttTotals:
    """Sums over rows of each pass [passes] fp64, and the rows that were asked for."""

    rows: Tensor
    """Rows that count: trained on, and the target's first choice is in the draft vocabulary."""
    loss: Tensor
    matches: Tensor
    """Rows whose first choices are the same."""
    acceptance: Tensor
    entropy: Tensor
    """[1]: the target's, in nats, over the draft vocabulary, of pass 0's rows."""
    asked: Tensor
    """[1]: rows trained on that pass 0 can answer."""
    accepted: Tensor
    """[2]: tokens that verifications yield, and verifications; where that is looked at."""

    @classmethod
    def zeros(cls, passes: int, device: torch.device) -> "TttTotals":
        """No rows."""

        def sums(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        own = sums(passes), sums(passes), sums(passes), sums(passes)
        return cls(*own, sums(1), sums(1), sums(2))

    def tensors(self) -> list[Tensor]:
        """All of them, in one order."""
        of_passes = [self.rows, self.loss, self.matches, self.acceptance]
        return [*of_passes, self.entropy, self.asked, self.accepted]


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits at a time: about 1 GB of fp32 logits on a GPU, 16 MB elsewhere."""
    return max(1, (1 << (28 if device.type == "cuda" else 22)) // vocab_size)


@torch.no_grad()
def loss_gradients(
    draft: DraftDecoder,
    finals: list[Tensor],
    data: DraftBatch,
    target: TargetHead,
    token_ids: Tensor,
    config: TttConfig,
    output_grad: Tensor | None,
    totals: TttTotals,
) -> list[Tensor]:
    """The gradients [T, D] by the finals of the sum over rows and passes of decayed losses.

    token_ids [Vd]: the target's ids of the draft vocabulary. output_grad [Vd, D] fp32: the buffer
    that the output layer's gradient is added to; None: nothing is differentiated. No probabilities
    of more than a chunk's rows exist at any time.
    """
    batch = data.batch
    num_tokens, rows = batch.num_tokens, batch.rows
    grads = [f.new_zeros(num_tokens + 1, f.shape[1]) for f in finals if output_grad is not None]
    last = data.streams[target.num_layers]
    for part in rows.split(chunk_rows(target.vocab_size, rows.device)):
        full = target.logits(last[part])
        best = full.argmax(-1)
        log_p = full[:, token_ids]
        place = torch.searchsorted(token_ids, best).clamp(max=len(token_ids) - 1)
        known = token_ids[place] == best
        del full
        log_p -= logsumexp(log_p)[:, None]
        asked = batch.positions[part] > 0
        totals.asked += asked.sum()
        entropy = -(log_p.exp() * log_p).sum(-1)
        totals.entropy += entropy.where(known & asked, 0).double().sum()
        for i, final in enumerate(finals):
            answers = batch.positions[part] > i
            counts = known & answers
            column = torch.where(answers, part - 1 - i, num_tokens)  # no column: a row to forget
            hidden = final.detach()[column.clamp(max=num_tokens - 1)]
            log_q = draft.logits(hidden)
            totals.matches[i] += (counts & (log_q.argmax(-1) == place)).sum()
            log_q -= logsumexp(log_q)[:, None]
            losses, slope = DRAFT_LOSSES[config.loss](log_p, log_q, config)
            totals.rows[i] += counts.sum()
            totals.loss[i] += losses.where(counts, 0).double().sum()
            totals.acceptance[i] += acceptance(log_p, log_q).where(counts, 0).double().sum()
            if output_grad is not None:
                slope = (slope * config.loss_decay**i).where(counts[:, None], 0)
                narrow = slope.to(hidden.dtype)
                grads[i].index_copy_(0, column, narrow @ draft.output_weight)
                add_product(output_grad, narrow.t(), hidden)
    return [grad[:num_tokens] for grad in grads]
