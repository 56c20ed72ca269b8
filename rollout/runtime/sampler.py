"""From hidden states to tokens and log-probs, each row by its own request's parameters."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from samebit.kernels.logprob import logprob_of
from samebit.kernels.sample import draw, draw_with_logprobs, least_allowed
from samebit.kernels.top_tokens import TopTokens, top_tokens
from samebit.kernels.transfer import to_device
from samebit.rollout.runtime.batch import Draws
from samebit.rollout.runtime.running_sample import RunningSample
from samebit.rollout.runtime.slots import Slots

Logits = Callable[[Tensor], Tensor]
"""From hidden states [S, D] to logits [S, V] fp32, before any temperature."""

Drawn = tuple[Tensor, Tensor, Tensor | None]
"""Next tokens [S] int64, their log-probs [S] fp32, and thresholds [S] fp32, -inf where every token
may be drawn; None where no log-prob is truncated."""

_MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 27}  # elements of one chunk of rows


class NonFiniteError(RuntimeError):
    """The model gave a NaN log-prob; the weights or the KV cache are damaged."""


class Sampler:
    """Draws next tokens. `eos_token_ids` are the model's end-of-sequence tokens."""

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._eos = np.array(eos_token_ids, dtype=np.int64)

    def stop_ids(self, seq: RunningSample) -> set[int]:
        params = seq.request.params
        eos = () if params.ignore_eos else self._eos_token_ids
        return {*eos, *params.stop_token_ids}

    def reasons_to_end(
        self,
        rows: np.ndarray,
        token_ids: np.ndarray,
        positions: np.ndarray,
        slots: Slots,
        owners: np.ndarray,
    ) -> dict[int, str]:
        """By row [S], why a sample ends with the token [S] at that position [S]; of the slots
        `owners` [S]."""
        stopped = (token_ids[:, None] == self._eos).any(1) & ~slots.ignore_eos[owners]
        for i in np.flatnonzero(slots.own_stops[owners]):
            stopped[i] |= int(token_ids[i]) in slots.owner(owners[i]).request.params.stop_token_ids
        stopped &= positions + 1 >= slots.min_length[owners]
        full = positions + 1 >= slots.limit[owners]
        ends = np.flatnonzero(stopped | full)
        return {int(rows[i]): "stop" if stopped[i] else "length" for i in ends}

    def reason_to_end(self, seq: RunningSample) -> str | None:
        """Why a sample without a slot ends with its newest token, if it does."""
        params, num_new = seq.request.params, seq.num_new_tokens
        if seq.token_ids[-1] in self.stop_ids(seq) and num_new >= params.min_new_tokens:
            return "stop"
        return "length" if num_new >= params.max_new_tokens else None

    def draw(self, hidden: Tensor, logits_of: Logits, draws: Draws) -> Drawn:
        """What is drawn for hidden [S, D], on its device."""
        device, num_rows = hidden.device, len(hidden)
        columns = (
            draws.temperatures, draws.seeds, draws.positions, draws.sample_ids, draws.greedy
        )  # fmt: skip
        keys = [to_device(column, device) for column in columns]
        parts = []
        for part in self._chunks(num_rows, device):
            restricted = [
                (i - part.start, seq, int(draws.positions[i]))
                for i, seq in draws.restricted
                if part.start <= i < part.stop
            ]
            logits = logits_of(hidden[part])
            parts.append(self._draw(logits, restricted, *(key[part] for key in keys)))
        token_ids, logprobs, least = zip(*parts, strict=True)
        if not any(seq.request.params.truncates for _, seq in draws.restricted):
            return torch.cat(token_ids), torch.cat(logprobs), None
        return torch.cat(token_ids), torch.cat(logprobs), torch.cat(least)

    def score(
        self, hidden: Tensor, logits_of: Logits, next_ids: np.ndarray, owners: list[RunningSample]
    ) -> tuple[Tensor, TopTokens | None]:
        """Log-probs [S] of given next tokens [S] for hidden [S, D], and the likeliest tokens [S, k]
        if an owner asks for some; of one that asks for fewer they come first."""
        divisors = np.array([s.request.params.temperature or 1.0 for s in owners], np.float32)
        ids, temperature = (to_device(values, hidden.device) for values in (next_ids, divisors))
        wanted = np.array([s.request.num_top for s in owners])
        scores, tops = list[Tensor](), list[TopTokens]()
        for part in self._chunks(len(hidden), hidden.device):
            scaled = logits_of(hidden[part]) / temperature[part, None]
            scores.append(logprob_of(scaled, ids[part]))
            if wanted.any():
                tops.append(_top_of(scaled, wanted[part], int(wanted.max())))
        return torch.cat(scores), TopTokens.joined(tops) if tops else None

    def _chunks(self, num_rows: int, device: torch.device) -> list[slice]:
        """Rows whose logits fit the memory set aside for them."""
        step = max(1, _MAX_LOGITS[device.type] // self.vocab_size)
        return [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]

    def _draw(
        self,
        logits: Tensor,
        restricted: list[tuple[int, RunningSample, int]],
        temperature: Tensor,
        *keys: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, log-probs and thresholds [S] of rows; thresholds are -inf where none is told."""
        if not restricted:
            return *draw_with_logprobs(logits, temperature, *keys), _no_threshold(logits)
        scaled = logits / temperature[:, None]
        allowed, least = self._restrict(scaled, restricted)
        token_ids = draw(allowed, *keys)
        logprobs = logprob_of(scaled, token_ids)
        told = [i for i, seq, _ in restricted if seq.request.params.truncates]
        if told:
            rows = to_device(np.array(told), logits.device)
            logprobs[rows] = logprob_of(allowed[rows], token_ids[rows])
        return token_ids, logprobs, least

    def _restrict(
        self, scaled: Tensor, restricted: list[tuple[int, RunningSample, int]]
    ) -> tuple[Tensor, Tensor]:
        """Scaled logits with -inf where (row, sequence, position) may not draw a token, and the
        thresholds [S] of the rows that have some."""
        scaled, device, thresholds = scaled.clone(), scaled.device, _no_threshold(scaled)
        limited = [(i, seq.request.params) for i, seq, _ in restricted if seq.request.params.limits]
        early = [
            (i, token)
            for i, seq, position in restricted
            if position < Slots.min_length_of(seq)
            for token in sorted(self.stop_ids(seq))
        ]
        if early:
            where = to_device(np.array(early).T.copy(), device)
            scaled[where[0], where[1]] = scaled.new_full((), float("-inf"))  # the host's would wait
        if limited:
            index = to_device(np.array([i for i, _ in limited]), device)
            rows = scaled[index]
            columns = (
                np.array([p.top_k for _, p in limited], dtype=np.int64),
                np.array([p.top_p for _, p in limited], dtype=np.float32),
                np.array([p.min_p for _, p in limited], dtype=np.float32),
            )
            least = least_allowed(rows, *(to_device(column, device) for column in columns))
            thresholds[index] = least
            scaled[index] = rows.masked_fill(~(rows >= least[:, None]), float("-inf"))
        return scaled, thresholds


def _top_of(scaled: Tensor, wanted: np.ndarray, most: int) -> TopTokens:
    """[S, most] of scaled logits [S, V], of which each row wants so many [S]."""
    found = TopTokens(
        scaled.new_zeros((len(scaled), most), dtype=torch.int32),
        scaled.new_zeros((len(scaled), most)),
        scaled.new_zeros(len(scaled)),
    )
    for k in sorted({*wanted.tolist()} - {0}):  # mostly one, and then of all rows
        rows = to_device(np.flatnonzero(wanted == k), scaled.device)
        top = top_tokens(scaled[rows], k)
        found.token_ids[rows, :k], found.logprobs[rows, :k] = top.token_ids, top.logprobs
        found.rest[rows] = top.rest
    return found


def _no_threshold(logits: Tensor) -> Tensor:
    return logits.new_full((len(logits),), float("-inf"))


def require_finite(logprobs: np.ndarray, owners: list[tuple[RunningSample, int]]) -> None:
    """Raise NonFiniteError naming the first (sequence, position) whose log-prob is NaN."""
    for i in np.flatnonzero(np.isnan(logprobs)):
        seq, position = owners[i]
        raise NonFiniteError(
            f"NaN log-prob in request {seq.request.request_id}, sample {seq.sample_id}, "
            f"at position {position}"
        )
