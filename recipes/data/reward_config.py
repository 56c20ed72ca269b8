"""How completions are scored, as a section of the configuration: one function, or several."""

import math
from dataclasses import dataclass, field
from typing import Any

from samebit.recipes.data.rewards import IN_PROCESS, REWARDS
from samebit.trainer.config import require, require_default

CALL_KEYS = ("batch_size", "concurrency", "timeout_s", "num_workers")
"""How a function is called."""
MOST_WEIGHT = 1e9
MOST_AT_ONCE = 1 << 14
NORMALIZE = ("none", "running")


@dataclass(kw_only=True)
class RewardFunction:
    """Names a function of a completion, and says how it is called."""

    name: str = "exact_match"
    """`exact_match`, `number_match`, `math_verify`, `reasoning_gym`, or your `module:function`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward."""
    batch_size: int | None = None
    """Your function takes lists of so many completions, and of their problems, at once; unset: one
    of each."""
    concurrency: int | None = None
    """Your `async def`: so many calls at the same time in each process; unset: 32."""
    timeout_s: float = 60.0
    """Seconds for one call in a worker process; a reward that takes longer is an error."""
    num_workers: int | None = None
    """Processes for math_verify, reasoning_gym or your function; unset: up to 4, one a core, and 1
    for an `async def`."""


@dataclass(kw_only=True)
class RewardTerm(RewardFunction):
    """Names one of several functions whose weighted sum is the reward."""

    weight: float = 1.0
    """Its factor in the sum; 0 or less may be meant."""
    label: str | None = None
    """What metrics call it; unset: its name, of your own the function's."""

    @property
    def metric(self) -> str:
        """Metrics and samples call it this."""
        return self.label or self.name.rpartition(":")[2]


@dataclass(kw_only=True)
class RewardConfig(RewardFunction):
    """Says how a completion is scored."""

    terms: list[RewardTerm] = field(default_factory=list)
    """In place of `name`: several, whose weighted sum, in this order, is the reward:
    [{name: exact_match}, {name: my_rewards:format, weight: 0.2}]."""
    normalize: str = "none"
    """running: what is trained on is a reward less the mean, over the deviation, of all rewards of
    training steps so far, this one included."""
    clip: float = 0.0
    """A reward, normalized if it is, counts from minus this to this in training; 0: as it is."""

    def __post_init__(self) -> None:
        known = self.normalize in NORMALIZE
        require(known, "reward.normalize", self.normalize, f"one of {NORMALIZE}")
        fits = 0 <= self.clip < math.inf
        require(fits, "reward.clip", self.clip, "0, or positive and finite")
        if not self.terms:
            _check_function(self, "reward")
            return
        require_default(self, "reward", ("name", "args", *CALL_KEYS), "reward.terms is given")
        for i, term in enumerate(self.terms):
            self._check_term(term, f"reward.terms.{i}")

    @property
    def functions(self) -> dict[str, RewardFunction]:
        """Return every function that is called, by the key of its section."""
        terms = {f"reward.terms.{i}": term for i, term in enumerate(self.terms)}
        return dict(terms) or {"reward": self}

    def _check_term(self, term: RewardTerm, key: str) -> None:
        _check_function(term, key)
        fits = math.isfinite(term.weight) and abs(term.weight) <= MOST_WEIGHT
        require(fits, f"{key}.weight", term.weight, "a number of at most 1e9, positive or negative")
        fits = term.label is None or 0 < len(term.label) <= 64 and term.label.isprintable()
        require(fits, f"{key}.label", term.label, "1 to 64 printable characters, or unset")
        first = [other.metric for other in self.terms].index(term.metric)
        meaning = f"not that of reward.terms.{first}: metrics are called by it"
        require(self.terms[first] is term, f"{key}.label", term.metric, meaning)


def _check_function(section: RewardFunction, key: str) -> None:
    if not (section.timeout_s > 0 and math.isfinite(section.timeout_s)):
        raise ValueError(f"{key}.timeout_s is {section.timeout_s}; give seconds above 0")
    for name in ("num_workers", "batch_size", "concurrency"):
        if (value := getattr(section, name)) is not None and value < 1:
            raise ValueError(f"{key}.{name} is {value}; give at least 1, or unset")
    for name in ("batch_size", "concurrency"):
        value = getattr(section, name)
        require((value or 0) <= MOST_AT_ONCE, f"{key}.{name}", value, f"at most {MOST_AT_ONCE}")
    if section.name in IN_PROCESS:
        where = f"{key}.name is {section.name!r}, which needs no worker"
        require_default(section, key, CALL_KEYS, where)
    elif section.name in REWARDS:
        where = f"{key}.name is {section.name!r}, which takes one completion at a time"
        require_default(section, key, ("batch_size", "concurrency"), where)
