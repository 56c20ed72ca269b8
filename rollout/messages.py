"""What is said to an engine that another process drives, and what it answers.

To an engine in a process of its own (remote.py), by a connection and with a number for each call;
and by rank 0 of a tensor parallel engine to the others (runtime/lockstep.py), as plain values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samebit.rollout.types import Increment, Request, SamplingParams

# -- to an engine's process ------------------------------------------------------------------------


@dataclass(frozen=True)
class Meet:
    """Be this rank of an engine's: the first message, answered when the engine is made. Several
    ranks meet where a store is, and show each other that they know the secret."""

    rank: int
    size: int
    address: str = ""
    port: int = 0
    secret: str = ""


@dataclass(frozen=True)
class Generate:
    """Complete prompts; answered by groups of completions."""

    prompt_ids: Sequence[Sequence[int]]
    sampling_params: SamplingParams | Sequence[SamplingParams] | None
    sample_ids: Sequence[Sequence[int]] | None
    return_hidden_states: Sequence[int] = ()
    fresh_ids: bool = False
    """Without sample_ids: ids that were never given before."""
    streams: bool = False
    """Answer with Drew as well, step by step."""


@dataclass(frozen=True)
class Draw:
    """Complete requests that are checked, and whose ids nobody else has. Those of a number are a
    call, answered by all their completions; of several Ended tells before."""

    requests: Mapping[int, Sequence[Request]]


@dataclass(frozen=True)
class Score:
    """Score tokens; answered by groups of completions."""

    token_ids: Sequence[Sequence[int]]
    temperature: float
    k: int | None = None
    """So many likeliest tokens are told, too."""


@dataclass(frozen=True)
class Abandon:
    """The caller of this number has gone: abort its requests."""

    number: int


@dataclass(frozen=True)
class LeaveOff:
    """Abort the calls of these numbers, for another engine to go on with what is left of them,
    where that may be worth it: see RequestBook.leave_off. Answered behind those calls."""

    numbers: Sequence[int]


@dataclass(frozen=True)
class Ask:
    """Call a function of the engine that takes no steps; answered by what it returns. All ranks are
    sent it, and do it when rank 0 does."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    by_name: dict[str, Any]


@dataclass(frozen=True)
class Stop:
    """Abort everything and end; not answered. Rank 0 lets the others go."""


# -- from it ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """The call's result."""

    value: Any


@dataclass(frozen=True)
class Failed:
    """What the call raised."""

    error: BaseException


@dataclass(frozen=True)
class Drew:
    """What one step drew for the call."""

    increments: list[Increment]


@dataclass(frozen=True)
class Ended:
    """So many more samples have ended of calls of which others go on, by their numbers: they leave
    room. Said now and then, of no call."""

    num_samples: Mapping[int, int]


@dataclass(frozen=True)
class Beat:
    """The engine is between two steps, or idle; said once a second, of no call."""


# -- from rank 0 to the others ---------------------------------------------------------------------


@dataclass(frozen=True)
class Admit:
    """Queue requests; `waits`: a caller waits for them, who is told if a step fails."""

    requests: tuple[Request, ...]
    waits: bool


@dataclass(frozen=True)
class Step:
    """Take a step."""


@dataclass(frozen=True)
class Asked:
    """Do what the Ask of this number asks for, which each rank is sent by its own connection."""

    number: int


@dataclass(frozen=True)
class Drain:
    """Take in every step in flight."""


@dataclass(frozen=True)
class AbortRequest:
    """End a request."""

    request_id: str


@dataclass(frozen=True)
class FlushCache:
    """Forget all cached prefixes."""


@dataclass(frozen=True)
class Pause:
    """Take no steps; what runs is as RequestBook.pause says."""

    mode: str


@dataclass(frozen=True)
class Continue:
    """Take steps again."""


@dataclass(frozen=True)
class Leave:
    """Rank 0 leads no longer; the ids to go on from, see RequestFactory.marks."""

    request_id: int
    sample_id: int


type Message = Meet | Generate | Draw | Score | Abandon | LeaveOff | Ask | Stop
type Answer = Done | Failed | Drew | Ended | Beat
type RankMessage = (
    Admit | Step | Asked | Drain | AbortRequest | FlushCache | Pause | Continue | Leave
)

_PLAIN: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(Admit, Step, Asked, Drain, AbortRequest, FlushCache, Pause, Continue, Leave),
        *(Request, SamplingParams),
    )
}
_KIND = "kind"


def to_plain(value: Any) -> Any:
    """A rank's message as a plain value (weight_sync.objects)."""
    if type(value) in _PLAIN.values():
        fields = {name: to_plain(item) for name, item in vars(value).items()}
        return {_KIND: type(value).__name__, **fields}
    if isinstance(value, tuple) and value and type(value[0]) in _PLAIN.values():
        return tuple(map(to_plain, value))
    return value


def of_plain(value: Any) -> Any:
    """What `to_plain` was given. Raises KeyError or TypeError for anything else."""
    if isinstance(value, dict):
        fields = {name: of_plain(item) for name, item in value.items() if name != _KIND}
        return _PLAIN[value[_KIND]](**fields)
    if isinstance(value, tuple) and value and isinstance(value[0], dict):
        return tuple(map(of_plain, value))
    return value
