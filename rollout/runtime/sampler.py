"""From hidden states to tokens and log-probs, each row by its own request's parameters."""

import torch

from samebit.kernels.linear import logits as logits_of
from samebit.kernels.logprob import logprob, logprob_of
from samebit.kernels.sample import allowed_tokens, draw
from samebit.rollout.runtime.sequence import Sequence

_MAX_LOGITS = 1 << 24  # elements of one chunk of rows


class NonFiniteError(RuntimeError):
    """The model gave a NaN log-prob; the weights or the KV cache are damaged."""


def _signed64(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


class Sampler:
    """Draws next tokens. `stop_ids` are the model's end-of-sequence tokens."""

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...], seed: int) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._seed = seed

    def stop_ids(self, seq: Sequence) -> set[int]:
        """Tokens that end this sequence."""
        params = seq.request.params
        eos = () if params.ignore_eos else self._eos_token_ids
        return {*eos, *params.stop_token_ids}

    def draw(
        self, hidden: torch.Tensor, output_weight: torch.Tensor, seqs: list[Sequence]
    ) -> tuple[list[int], list[float]]:
        """Next tokens and their log-probs for hidden [S, D], one row per sequence."""
        rows = max(1, _MAX_LOGITS // self._vocab_size)
        token_ids: list[int] = []
        logprobs: list[float] = []
        for start in range(0, len(seqs), rows):
            part = slice(start, start + rows)
            ids, values = self._draw_chunk(hidden[part], output_weight, seqs[part])
            token_ids += ids
            logprobs += values
        _require_finite(logprobs, seqs)
        return token_ids, logprobs

    def score(
        self,
        hidden: torch.Tensor,
        output_weight: torch.Tensor,
        next_ids: torch.Tensor,
        seqs: list[Sequence],
    ) -> list[float]:
        """Log-probs of given next tokens [S] for hidden [S, D]."""
        temperature = torch.tensor([_divisor(s) for s in seqs], device=hidden.device)
        values, _ = logprob(hidden, output_weight, next_ids, temperature, self._vocab_size)
        logprobs = values.tolist()
        _require_finite(logprobs, seqs)
        return logprobs

    def _draw_chunk(
        self, hidden: torch.Tensor, output_weight: torch.Tensor, seqs: list[Sequence]
    ) -> tuple[list[int], list[float]]:
        temperature = torch.tensor([_divisor(s) for s in seqs], device=hidden.device)
        logits = logits_of(hidden, output_weight[: self._vocab_size]) / temperature[:, None]
        token_ids = draw(self._restrict(logits, seqs), *self._noise_keys(seqs, hidden.device))
        return token_ids.tolist(), logprob_of(logits, token_ids).tolist()

    def _noise_keys(
        self, seqs: list[Sequence], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Seeds, positions, sample ids and greedy flags, [S] each."""
        seeds = [self._seed if (s := q.request.params.seed) is None else s for q in seqs]
        words = torch.tensor(
            [
                [_signed64(s) for s in seeds],
                [len(s.token_ids) for s in seqs],
                [_signed64(s.sample_id) for s in seqs],
                [s.request.params.temperature == 0 for s in seqs],
            ],
            dtype=torch.int64,
        ).to(device)
        return words[0], words[1], words[2], words[3].bool()

    def _restrict(self, logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
        """Logits with -inf where a token may not be drawn; only the rows that restrict anything."""
        params = [s.request.params for s in seqs]
        early = [i for i, s in enumerate(seqs) if s.num_new_tokens < params[i].min_new_tokens]
        limited = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1 or p.min_p > 0]
        if not (early or limited):
            return logits
        logits = logits.clone()
        for i in early:
            logits[i, sorted(self.stop_ids(seqs[i]))] = float("-inf")
        if limited:
            rows = logits[limited]
            allowed = allowed_tokens(
                rows,
                torch.tensor([params[i].top_k for i in limited], device=logits.device),
                torch.tensor([params[i].top_p for i in limited], device=logits.device),
                torch.tensor([params[i].min_p for i in limited], device=logits.device),
            )
            logits[limited] = rows.masked_fill(~allowed, float("-inf"))
        return logits


def _divisor(seq: Sequence) -> float:
    return seq.request.params.temperature or 1.0


def _require_finite(logprobs: list[float], seqs: list[Sequence]) -> None:
    for value, seq in zip(logprobs, seqs, strict=True):
        if value != value:
            raise NonFiniteError(
                f"NaN log-prob in request {seq.request.request_id}, sample {seq.sample_id}, "
                f"at position {len(seq.token_ids)}"
            )
