"""From the user's arguments to Requests, with everything checked before anything runs."""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

from samebit.rollout.types import MAX_UINT64, Request, SamplingParams, as_integer


@dataclass(kw_only=True)
class RequestFactory:
    """Knows the limits that a request must keep. All methods raise ValueError."""

    vocab_size: int
    num_layers: int
    max_model_len: int
    kv_capacity: int
    _ids: itertools.count = field(default_factory=itertools.count)

    def generation(
        self,
        prompt_ids: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        sample_ids: Sequence[Sequence[int]] | None,
        layers: tuple[int, ...],
    ) -> list[Request]:
        """One request per prompt."""
        per_prompt = _per_prompt(params, len(prompt_ids))
        ids = _sample_ids(per_prompt, sample_ids)
        layers = tuple(as_integer(layer, "return_hidden_states: layer") for layer in layers)
        for layer in layers:
            if not 0 <= layer <= self.num_layers:
                raise ValueError(
                    f"return_hidden_states: layer {layer} is not in [0, {self.num_layers}]"
                )
        return [
            self._request(i, *arguments, layers)
            for i, arguments in enumerate(zip(prompt_ids, per_prompt, ids, strict=True))
        ]

    def scoring(self, token_ids: Sequence[Sequence[int]], temperature: float) -> list[Request]:
        """One score_only request per sequence."""
        if not temperature > 0:
            raise ValueError(f"score temperature is {temperature}; it must be positive")
        params = SamplingParams(temperature=temperature, max_new_tokens=1)
        for i, ids in enumerate(token_ids):
            if len(ids) < 2:
                raise ValueError(f"score sequence {i} has {len(ids)} tokens; it needs at least 2")
        return [
            self._request(i, ids, params, (i,), (), score_only=True)
            for i, ids in enumerate(token_ids)
        ]

    def _request(
        self,
        place: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        sample_ids: tuple[int, ...],
        layers: tuple[int, ...],
        score_only: bool = False,
    ) -> Request:
        if not hasattr(prompt_ids, "__len__"):
            raise ValueError(f"prompt {place} is {prompt_ids!r}; it must be a list of token ids")
        if len(prompt_ids) == 0:
            raise ValueError(f"prompt {place} is empty; it needs at least one token")
        prompt_ids = self._checked_tokens(f"prompt {place}", prompt_ids)
        self._checked_tokens("stop_token_ids", params.stop_token_ids)
        num_new = 0 if score_only else params.max_new_tokens
        for what, limit in (("context", self.max_model_len), ("KV cache", self.kv_capacity)):
            if len(prompt_ids) + num_new > limit:
                raise ValueError(
                    f"prompt {place}: {len(prompt_ids)} prompt tokens + {num_new} max_new_tokens "
                    f"exceed the {what} of {limit} tokens"
                )
        return Request(
            request_id=str(next(self._ids)),
            prompt_ids=prompt_ids,
            params=params,
            sample_ids=sample_ids,
            hidden_state_layers=layers,
            score_only=score_only,
        )

    def _checked_tokens(self, what: str, token_ids: Sequence[int]) -> tuple[int, ...]:
        try:
            tokens = tuple(map(operator.index, token_ids))
        except TypeError:
            place, token = next(
                (i, t) for i, t in enumerate(token_ids) if not hasattr(t, "__index__")
            )
            raise ValueError(
                f"{what}: token {token!r} at position {place} is not an integer"
            ) from None
        if tokens and (min(tokens) < 0 or max(tokens) >= self.vocab_size):
            place, token = next(
                (i, t) for i, t in enumerate(tokens) if not 0 <= t < self.vocab_size
            )
            raise ValueError(
                f"{what}: token {token} at position {place} is outside the vocabulary "
                f"[0, {self.vocab_size})"
            )
        return tokens


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise ValueError(f"{len(params)} sampling_params for {num_prompts} prompts")
    return list(params)


def _sample_ids(
    params: Sequence[SamplingParams], sample_ids: Sequence[Sequence[int]] | None
) -> list[tuple[int, ...]]:
    """The ids given, or the running index in the call."""
    if sample_ids is None:
        numbers = itertools.count()
        return [tuple(itertools.islice(numbers, p.n)) for p in params]
    checked = [tuple(as_integer(i, "sample id") for i in ids) for ids in sample_ids]
    counts, wanted = [len(ids) for ids in checked], [p.n for p in params]
    if counts != wanted:
        raise ValueError(f"sample_ids come in groups of {counts}; the prompts ask for n = {wanted}")
    seen: set[int] = set()
    for i in itertools.chain.from_iterable(checked):
        if not 0 <= i <= MAX_UINT64:
            raise ValueError(f"sample id {i} is no unsigned 64-bit integer")
        if i in seen:
            raise ValueError(f"sample id {i} is used twice; every sample needs its own")
        seen.add(i)
    return checked
