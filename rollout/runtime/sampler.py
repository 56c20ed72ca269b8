"""From hidden states to tokens and log-probs, each row by its own request's parameters."""

import numpy as np
import torch

from samebit.kernels.linear import logits as logits_of
from samebit.kernels.logprob import logprob, logprob_of
from samebit.kernels.sample import allowed_tokens, draw, draw_with_logprobs
from samebit.rollout.runtime.batch import Draws, to_device
from samebit.rollout.runtime.sequence import Sequence
from samebit.rollout.runtime.slots import Slots

_MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 27}  # elements of one chunk of rows


class NonFiniteError(RuntimeError):
    """The model gave a NaN log-prob; the weights or the KV cache are damaged."""


class Sampler:
    """Draws next tokens. `eos_token_ids` are the model's end-of-sequence tokens."""

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._eos = np.array(eos_token_ids, dtype=np.int64)

    def stop_ids(self, seq: Sequence) -> set[int]:
        """Tokens that end this sequence."""
        params = seq.request.params
        eos = () if params.ignore_eos else self._eos_token_ids
        return {*eos, *params.stop_token_ids}

    def stopped(self, token_ids: np.ndarray, slots: Slots, owners: np.ndarray) -> np.ndarray:
        """Which of the decoding sequences [B] end with their new token [B]."""
        stopped = np.isin(token_ids, self._eos) & ~slots.ignore_eos[owners]
        for i in np.flatnonzero(slots.own_stops[owners]):
            seq = slots.seqs[owners[i]]
            if seq is not None and int(token_ids[i]) in seq.request.params.stop_token_ids:
                stopped[i] = True
        return stopped

    def draw(
        self, hidden: torch.Tensor, output_weight: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Next tokens [S] int64 and their log-probs [S] fp32 for hidden [T, D], on its device."""
        device, num_rows = hidden.device, len(draws.hidden_rows)
        if not np.array_equal(draws.hidden_rows, np.arange(len(hidden))):
            hidden = hidden[to_device(draws.hidden_rows, device)]
        columns = (
            draws.temperatures, draws.seeds, draws.positions, draws.sample_ids, draws.greedy
        )  # fmt: skip
        keys = [to_device(column, device) for column in columns]
        step = max(1, _MAX_LOGITS[device.type] // self.vocab_size)
        parts = []
        for start in range(0, num_rows, step):
            part = slice(start, start + step)
            logits = logits_of(hidden[part], output_weight[: self.vocab_size])
            restricted = [
                (i - start, seq, int(draws.positions[i]))
                for i, seq in draws.restricted
                if start <= i < start + step
            ]
            parts.append(self._draw(logits, restricted, *(key[part] for key in keys)))
        token_ids, logprobs = zip(*parts, strict=True)
        return torch.cat(token_ids), torch.cat(logprobs)

    def score(
        self,
        hidden: torch.Tensor,
        output_weight: torch.Tensor,
        next_ids: np.ndarray,
        owners: list[Sequence],
    ) -> torch.Tensor:
        """Log-probs [S] of given next tokens [S] for hidden [S, D]."""
        temperature = np.array([_divisor(seq) for seq in owners], dtype=np.float32)
        ids, divisors = (to_device(values, hidden.device) for values in (next_ids, temperature))
        return logprob(hidden, output_weight, ids, divisors, self.vocab_size)[0]

    def _draw(
        self,
        logits: torch.Tensor,
        restricted: list[tuple[int, Sequence, int]],
        temperature: torch.Tensor,
        *keys: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not restricted:
            return draw_with_logprobs(logits, temperature, *keys)
        scaled = logits / temperature[:, None]
        token_ids = draw(self._restrict(scaled, restricted), *keys)
        return token_ids, logprob_of(scaled, token_ids)

    def _restrict(
        self, scaled: torch.Tensor, restricted: list[tuple[int, Sequence, int]]
    ) -> torch.Tensor:
        """Scaled logits with -inf where (row, sequence, position) may not draw a token."""
        scaled, device = scaled.clone(), scaled.device
        limited = [(i, seq.request.params) for i, seq, _ in restricted if seq.request.params.limits]
        early = [
            (i, token)
            for i, seq, position in restricted
            if position < Slots.min_length_of(seq)
            for token in sorted(self.stop_ids(seq))
        ]
        if early:
            where = to_device(np.array(early).T.copy(), device)
            scaled[where[0], where[1]] = float("-inf")
        if limited:
            index = to_device(np.array([i for i, _ in limited]), device)
            rows = scaled[index]
            columns = (
                np.array([p.top_k for _, p in limited], dtype=np.int64),
                np.array([p.top_p for _, p in limited], dtype=np.float32),
                np.array([p.min_p for _, p in limited], dtype=np.float32),
            )
            allowed = allowed_tokens(rows, *(to_device(column, device) for column in columns))
            scaled[index] = rows.masked_fill(~allowed, float("-inf"))
        return scaled


def _divisor(seq: Sequence) -> float:
    return seq.request.params.temperature or 1.0


def require_finite(logprobs: np.ndarray, owners: list[tuple[Sequence, int]]) -> None:
    """Raise NonFiniteError naming the first (sequence, position) whose log-prob is NaN."""
    for i in np.flatnonzero(np.isnan(logprobs)):
        seq, position = owners[i]
        raise NonFiniteError(
            f"NaN log-prob in request {seq.request.request_id}, sample {seq.sample_id}, "
            f"at position {position}"
        )
