"""From the user's arguments to Requests, with everything checked before anything runs."""

import itertools
import operator
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from samebit.kernels.top_tokens import TopTokens
from samebit.rollout.types import Completion, Request, SamplingParams
from samebit.rollout.values import MAX_UINT64, as_integer, as_list, as_number, integer_of, shown

_PROMPTS = "a list of prompts, each a list of token ids"
_TOKENS = "a list of token ids"


@dataclass(kw_only=True)
class RequestFactory:
    """Knows the limits that a request must keep. All methods raise ValueError."""

    vocab_size: int
    num_layers: int
    max_model_len: int
    kv_capacity: int
    eos_token_ids: tuple[int, ...]
    _ids: Iterator[int] = field(default_factory=itertools.count)
    _fresh: Iterator[int] = field(default_factory=lambda: itertools.count(MAX_UINT64, -1))
    """Sample ids for those who give none, far from those that recipes and `generate` use."""

    def marks(self) -> tuple[int, int]:
        """A request id and a sample id that nobody gets: where `resume` goes on."""
        return next(self._ids), next(self._fresh)

    def resume(self, request_id: int, sample_id: int) -> None:
        """Give the ids that another factory gives after these `marks` of its own."""
        self._ids = itertools.count(request_id + 1)
        self._fresh = itertools.count(sample_id - 1, -1)

    def generation(
        self,
        prompt_ids: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        sample_ids: Sequence[Sequence[int]] | None,
        layers: Sequence[int],
        fresh_ids: bool = False,
    ) -> list[Request]:
        """One request per prompt.

        Without sample_ids they are the running index in the call or, with fresh_ids, never given
        before.
        """
        prompts = as_list(prompt_ids, "prompt_ids", _PROMPTS)
        per_prompt = _per_prompt(params, len(prompts))
        if sample_ids is None:
            numbers = self._fresh if fresh_ids else itertools.count()
            ids = [tuple(itertools.islice(numbers, p.n)) for p in per_prompt]
        else:
            ids = _checked_sample_ids(per_prompt, sample_ids)
        wanted = as_list(layers, "return_hidden_states", "a list of layers")
        layers = tuple(as_integer(layer, "return_hidden_states: layer") for layer in wanted)
        for layer in layers:
            if not 0 <= layer <= self.num_layers:
                raise ValueError(
                    f"return_hidden_states: layer {layer} is not in [0, {self.num_layers}]"
                )
        return [
            self._request(i, *arguments, layers)
            for i, arguments in enumerate(zip(prompts, per_prompt, ids, strict=True))
        ]

    def scoring(
        self, token_ids: Sequence[Sequence[int]], temperature: float, k: int | None = None
    ) -> list[Request]:
        """One score_only request per sequence, which tells the k likeliest tokens, too."""
        if k is not None and not 1 <= k <= self.vocab_size:
            right = f"1 to {self.vocab_size}, the tokens of the vocabulary"
            raise ValueError(f"score_top k is {k}; it must be {right}")
        temperature = as_number(temperature, "score temperature")
        if not temperature > 0:
            raise ValueError(f"score temperature is {temperature}; it must be positive")
        params = SamplingParams(temperature=temperature, max_new_tokens=1)
        sequences = [
            as_list(ids, f"score sequence {i}", _TOKENS)
            for i, ids in enumerate(as_list(token_ids, "token_ids", _PROMPTS))
        ]
        for i, ids in enumerate(sequences):
            if len(ids) < 2:
                raise ValueError(f"score sequence {i} has {len(ids)} tokens; it needs at least 2")
        return [
            self._request(i, ids, params, (i,), (), score_only=True, num_top=k or 0)
            for i, ids in enumerate(sequences)
        ]

    def _request(
        self,
        place: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        sample_ids: tuple[int, ...],
        layers: tuple[int, ...],
        score_only: bool = False,
        num_top: int = 0,
    ) -> Request:
        tokens = as_list(prompt_ids, f"prompt {place}", _TOKENS)
        if not tokens:
            raise ValueError(f"prompt {place} is empty; it needs at least one token")
        checked = self._checked_tokens(f"prompt {place}", tokens)
        self._check_stops(params)
        request = Request(
            request_id=str(next(self._ids)),
            prompt_ids=checked,
            params=params,
            sample_ids=sample_ids,
            hidden_state_layers=layers,
            score_only=score_only,
            num_top=num_top,
        )
        self.require_room(request, f"prompt {place}")
        return request

    def require_room(self, request: Request, name: str) -> None:
        """Raises ValueError for one that is too long, which the factory of an engine with more room
        may have made."""
        num_prompt = len(request.prompt_ids)
        num_new = 0 if request.score_only else request.params.max_new_tokens
        for what, limit in (("context", self.max_model_len), ("KV cache", self.kv_capacity)):
            if num_prompt + num_new > limit:
                raise ValueError(
                    f"{name}: {num_prompt} prompt tokens + {num_new} max_new_tokens exceed the "
                    f"{what} of {limit} tokens"
                )

    def _check_stops(self, params: SamplingParams) -> None:
        """Something must be left to draw where no stop token may be."""
        own = self._checked_tokens("stop_token_ids", params.stop_token_ids)
        stops = {*own, *(() if params.ignore_eos else self.eos_token_ids)}
        if params.min_new_tokens and len(stops) == self.vocab_size:
            raise ValueError(
                f"min_new_tokens is {params.min_new_tokens}, but all {self.vocab_size} tokens of "
                "the vocabulary are stop tokens: none could be drawn"
            )

    def _checked_tokens(self, what: str, token_ids: Sequence[int]) -> tuple[int, ...]:
        tokens = _integers(what, token_ids)
        if tokens and (min(tokens) < 0 or max(tokens) >= self.vocab_size):
            place, token = next(
                (i, t) for i, t in enumerate(tokens) if not 0 <= t < self.vocab_size
            )
            raise ValueError(
                f"{what}: token {token} at position {place} is outside the vocabulary "
                f"[0, {self.vocab_size})"
            )
        return tokens


def scores_of(groups: Sequence[Sequence[Completion]]) -> list[list[float]]:
    """Log-probs of each sequence, from what became of its score_only request."""
    return [list(completion.logprobs) for [completion] in groups]


def top_scores_of(groups: Sequence[Sequence[Completion]]) -> list[tuple[list[float], TopTokens]]:
    """Log-probs and likeliest tokens of each sequence, in the same way."""
    found = []
    for [completion] in groups:
        assert completion.top_tokens is not None
        found.append((list(completion.logprobs), completion.top_tokens))
    return found


def _integers(what: str, token_ids: Sequence[int]) -> tuple[int, ...]:
    kinds = set(map(type, token_ids))
    if kinds <= {int}:
        return tuple(token_ids)
    if bool not in kinds:
        with suppress(TypeError):
            return tuple(map(operator.index, token_ids))
    place, token = next((i, t) for i, t in enumerate(token_ids) if integer_of(t) is None)
    raise ValueError(f"{what}: token {shown(token)} at position {place} is not an integer")


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    each = as_list(params, "sampling_params", "SamplingParams, or a list of one for each prompt")
    for i, one in enumerate(each):
        if not isinstance(one, SamplingParams):
            raise ValueError(f"sampling_params {i} is {shown(one)}; it must be SamplingParams")
    if len(each) != num_prompts:
        raise ValueError(f"{len(each)} sampling_params for {num_prompts} prompts")
    return each


def _checked_sample_ids(
    params: Sequence[SamplingParams], sample_ids: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    """The ids given, each once."""
    right = "a list of n ids for each prompt"
    groups = [as_list(ids, "sample_ids", right) for ids in as_list(sample_ids, "sample_ids", right)]
    checked = [tuple(as_integer(i, "sample id") for i in ids) for ids in groups]
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
