"""What users give to the engine and get back. Per-token fields are marked [L]."""

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from samebit.kernels.top_tokens import TopTokens
from samebit.rollout.ranges import RANGES, require_in_range
from samebit.rollout.values import MAX_UINT64, as_integer, as_list, bring_to_type
from samebit.weight_sync.types import VersionSpan


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw completions of one prompt.

    The token at a position is a function of weights, context, these parameters, the seed and the
    sample id; never of the batch. Log-probs are of the full softmax after temperature, unless
    truncated_logprobs is set; at temperature 0 (greedy) they are those of temperature 1.

    Example: SamplingParams(n=8, temperature=1.0, max_new_tokens=512)
    """

    n: int = 1
    """Samples per prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token, ties to the lower id."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this mass; 1 keeps all."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all. Ties with the k-th are kept."""
    min_p: float = 0.0
    """Keep tokens with at least min_p times the largest probability."""
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    """Stop tokens are not drawn before this many tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, besides the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    """Do not stop at the model's end-of-sequence tokens."""
    seed: int | None = None
    """Overrides the engine's seed."""
    logprobs: bool = True
    """Return the log-prob of every drawn token."""
    truncated_logprobs: bool = False
    """Log-probs are of the distribution that draws, over what top-k, top-p and min-p keep alone;
    completions say what that was (Completion.thresholds)."""

    def __post_init__(self) -> None:
        where = "SamplingParams.stop_token_ids"
        stops = as_list(self.stop_token_ids, where, "a list of token ids", ordered=False)
        token_ids = tuple(as_integer(i, f"{where}: token") for i in stops)
        object.__setattr__(self, "stop_token_ids", token_ids)
        bring_to_type(self, "SamplingParams")
        _require(self.n >= 1, "n", self.n, "at least 1")
        for name in RANGES:
            require_in_range(name, getattr(self, name), f"SamplingParams.{name}")
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        in_range = 0 <= self.min_new_tokens <= self.max_new_tokens
        _require(in_range, "min_new_tokens", self.min_new_tokens, "in [0, max_new_tokens]")
        if self.seed is not None:
            _require(0 <= self.seed <= MAX_UINT64, "seed", self.seed, "an unsigned 64-bit integer")

        fits = not (self.truncated_logprobs and self.min_new_tokens)
        meaning = "0 with truncated_logprobs: thresholds cannot say that stop tokens were forbidden"
        _require(fits, "min_new_tokens", self.min_new_tokens, meaning)

    @property
    def truncates(self) -> bool:
        """Whether log-probs are of less than the full softmax."""
        return self.truncated_logprobs and self.limits

    @property
    def limits(self) -> bool:
        """Whether top-k, top-p or min-p forbid any token."""
        return bool(self.top_k or self.top_p < 1 or self.min_p > 0)


def _require(holds: bool, name: str, value: object, what: str) -> None:
    if not holds:
        raise ValueError(f"SamplingParams.{name} is {value}; it must be {what}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt as asked for: `params.n` samples, whose ids are `sample_ids`.

    A request with `score_only` draws nothing: it returns the log-probs of its own tokens.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    sample_ids: tuple[int, ...]
    hidden_state_layers: tuple[int, ...] = ()
    score_only: bool = False
    num_top: int = 0
    """With score_only: so many likeliest tokens are told of each position, too."""


_BLOCKS = {"token_ids": "I", "logprobs": "fd"}
"""What a Completion has many of, and as what an array can hold them: the first that is exact."""
_BYTES_PER_TOKEN = array("I").itemsize


def _block(codes: str, numbers: tuple[float, ...]) -> bytes:
    """An array's type and contents."""
    for code in codes[:-1]:
        if tuple(found := array(code, numbers)) == numbers:
            return code.encode() + found.tobytes()
    return codes[-1].encode() + array(codes[-1], numbers).tobytes()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished sample.

    Example: Completion(request_id="0", sample_id=0, token_ids=(5, 9), logprobs=(-0.1, -2.3),
    finish_reason="stop", version_spans=(VersionSpan(0, version),))
    """

    request_id: str
    sample_id: int
    token_ids: tuple[int, ...]
    """[L] drawn tokens, the stop token included."""
    logprobs: tuple[float, ...]
    """[L] natural log, exact fp32 values; empty if not asked for."""
    finish_reason: str
    """"stop" (a stop token was drawn), "length" or "abort"."""
    version_spans: tuple[VersionSpan, ...]
    """Which weight version drew which tokens."""
    thresholds: tuple[float, ...] = ()
    """[L] exact fp32 values, where log-probs are truncated: a token could be drawn if its logit,
    divided by the temperature, was at least this. Empty where every token could."""
    hidden_states: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """By layer: [prompt + L - 1, D], the residual stream after that many layers (0: embeddings)."""
    top_tokens: TopTokens | None = field(default=None, repr=False)
    """[prompt - 1], in the host's memory, if a request that scores has asked for them."""

    @property
    def num_tokens(self) -> int:
        """L."""
        block = vars(self).get("_token_ids")
        return len(self.token_ids) if block is None else len(block) // _BYTES_PER_TOKEN

    def __getstate__(self) -> dict[str, Any]:
        """As it goes to another process: many numbers as one block."""
        state = {name: value for name, value in vars(self).items() if name[1:] not in _BLOCKS}
        for name, codes in _BLOCKS.items():
            state.pop(name, None)
            state[f"_{name}"] = _block(codes, getattr(self, name))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    if not TYPE_CHECKING:  # it would know any name

        def __getattr__(self, name: str) -> Any:
            """Numbers that came as a block, once somebody asks for them."""
            if (block := vars(self).get(f"_{name}")) is None or name not in _BLOCKS:
                told = f"'{type(self).__name__}' object has no attribute '{name}'"
                raise AttributeError(told, name=name, obj=self)
            vars(self)[name] = numbers = tuple(array(chr(block[0]), block[1:]))
            return numbers

    def as_increment(self) -> "Increment":
        """The whole sample at once, as `stream` gives it."""
        return Increment(
            request_id=self.request_id,
            sample_id=self.sample_id,
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            version_spans=self.version_spans,
            thresholds=self.thresholds,
        )


@dataclass(frozen=True, kw_only=True)
class Increment:
    """What a sample has drawn since the last time, as `stream` gives it.

    The increments of a sample, one behind another, are its Completion.
    """

    request_id: str
    sample_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of token_ids; empty if not asked for."""
    finish_reason: str | None
    """That of the Completion in the sample's last increment, else None."""
    version_spans: tuple[VersionSpan, ...]
    """Which weight version drew which tokens of the whole sample, so far."""
    thresholds: tuple[float, ...] = ()
    """Of token_ids, where log-probs are truncated; see Completion."""
