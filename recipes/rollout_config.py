"""What is sampled in a step, as a section of the configuration."""

import math
from dataclasses import dataclass, field
from typing import Any

from samebit.rollout.ranges import RANGES, require_in_range
from samebit.trainer.config import require, require_default

TOO_FEW_GROUPS = ("error", "train")
LOGPROBS = ("full", "truncated")


@dataclass(kw_only=True)
class RolloutSection:
    """Says what is sampled in a step."""

    prompts_per_step: int = 32
    samples_per_prompt: int = 8
    dynamic_sampling: bool = False
    """Train on prompts whose samples have different rewards alone, and draw others in place of the
    rest (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.2)."""
    max_refills: int = 9
    """With dynamic_sampling: a step draws more prompts so many times, at most; 0: never."""
    refill_prompts: int | None = None
    """So many each time; unset: prompts_per_step."""
    too_few_groups: str = "error"
    """If even then fewer than prompts_per_step prompts can be trained on: error, the run ends; or
    train on those that there are."""
    max_staleness: int = 0
    """Samples are drawn by weights at most so many training steps older than those that they train
    (with partial_tokens, what the step itself draws of them): later steps are drawn while one is
    trained. Needs placement=process."""
    weight_sync_steps: int = 1
    """With max_staleness: the engine gets new weights after every so many training steps."""
    partial_tokens: int | None = None
    """Partial rollouts: a sample goes on under newer weights after every so many of its tokens, and
    nowhere else; they compute anew what stands before. Unset: every sample is drawn whole."""
    check_stale: bool = True
    """With max_staleness or partial_tokens: find the log-probs of what older weights drew once more
    by the weights that drew, and compare."""
    temperature: float = 1.0
    top_p: float = 1.0
    """Draw from the most likely tokens that together have this probability; 1: from all."""
    top_k: int = 0
    """Draw from so many most likely tokens; 0: from all."""
    min_p: float = 0.0
    """Draw from tokens at least so likely, relative to the most likely one; 0: from all."""
    logprobs: str = "full"
    """Log-probs, ratios, entropies and KL are of the full softmax; or truncated, of what top_p,
    top_k and min_p draw from, as evaluations then do too."""
    max_prompt_len: int = 512
    """Tokens; what becomes of a longer prompt is for data.overlong_prompts to say."""
    max_new_tokens: int = 256
    """Tokens of a completion, at most."""
    eval_every: int = 20
    """Steps between evaluations on held-out problems; also before the first, after the last."""
    eval_samples_per_prompt: int = 1
    eval_temperature: float = 1.0
    generate: str | None = None
    """module:function, an `async def` of your own that draws a sample in turns, with tools; prompt
    and max_new_tokens then bound all turns and tools' text together."""
    generate_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that function."""
    generate_timeout_s: float = 3600.0
    """Seconds for all samples that are drawn at once."""

    def __post_init__(self) -> None:
        positive = ("prompts_per_step", "samples_per_prompt", "max_new_tokens", "eval_every")
        for name in (*positive, "eval_samples_per_prompt", "max_prompt_len"):
            require(getattr(self, name) >= 1, f"rollout.{name}", getattr(self, name), "positive")
        trainable = self.temperature != 0
        require(trainable, "rollout.temperature", self.temperature, "positive to train on")
        for name in RANGES:
            require_in_range(name, getattr(self, name), f"rollout.{name}")
        require_in_range("temperature", self.eval_temperature, "rollout.eval_temperature")
        known = self.logprobs in LOGPROBS
        require(known, "rollout.logprobs", self.logprobs, f"one of {LOGPROBS}")
        meaning = "full where rollout.top_p, top_k and min_p draw from all tokens"
        require(bool(self.limits) or not self.truncates, "rollout.logprobs", self.logprobs, meaning)
        self._check_dynamic_sampling()
        self._check_staleness()
        self._check_partial()
        self._check_generate()

    @property
    def limits(self) -> dict[str, Any]:
        """top_p, top_k and min_p by name, where they forbid any token; else nothing."""
        forbid = self.top_p < 1 or self.top_k or self.min_p > 0
        found = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        return found if forbid else {}

    @property
    def eval_limits(self) -> dict[str, Any]:
        """The limits of evaluations, which draw from the policy that is trained."""
        return self.limits if self.truncates else {}

    @property
    def truncates(self) -> bool:
        """Whether log-probs are of what may be drawn alone."""
        return self.logprobs == "truncated"

    @property
    def chooses_prompts(self) -> bool:
        """Whether a step may draw other prompts than it trains on."""
        return self.dynamic_sampling or self.partial_tokens is not None

    @property
    def has_schedule(self) -> bool:
        """Whether weights other than those of a step's beginning draw what it is trained on."""
        return self.max_staleness > 0 or self.partial_tokens is not None

    @property
    def longest(self) -> int:
        """A sample has at most so many tokens, prompt and completion."""
        return self.max_prompt_len + self.max_new_tokens

    @property
    def most_stints(self) -> int:
        """A sample is drawn in so many stints at most."""
        return -(-self.max_new_tokens // (self.partial_tokens or self.max_new_tokens))

    @property
    def most_rounds_per_step(self) -> int:
        """A step draws so many times at most: once and refills; or stints, until a sample that it
        begins is finished, and as many more as there are refills."""
        return self.most_stints + self._refills

    @property
    def _refills(self) -> int:
        return self.max_refills if self.dynamic_sampling else 0

    @property
    def most_prompts_left(self) -> int:
        """A step leaves so many prompts to later ones at most, unfinished or not trained on yet.

        A step of one stint begins as many as it trains on. Before the last of several fewer than
        prompts_per_step are finished, and beside them are those of most_stints stints at most.
        """
        if self.partial_tokens is None:
            return 0
        if self.dynamic_sampling:
            return self.most_stints * self.prompts_per_step - 1
        return (self.most_stints - 1) * self.prompts_per_step

    @property
    def most_prompts_per_step(self) -> int:
        """A step draws so many prompts at most."""
        if self.partial_tokens is not None:
            return self.prompts_per_step * self.most_rounds_per_step
        return self.most_prompts_named

    @property
    def most_prompts_named(self) -> int:
        """Sample ids name so many prompts at most of one step, or of one stint."""
        return self.places_of(self._refills if self.partial_tokens is None else 0).stop

    @property
    def most_token_staleness(self) -> int:
        """Tokens are drawn by weights at most so many training steps older than those they train.

        Of what a step leaves each later one trains on prompts_per_step, the earliest first; or on
        all that is finished by then, and what is not ends with one more stint for as many prompts.
        """
        return self.max_staleness + -(-self.most_prompts_left // self.prompts_per_step)

    def most_prompts(self, num_steps: int) -> int:
        """So many steps draw so many prompts at most."""
        if self.partial_tokens is None or self.dynamic_sampling:
            return num_steps * self.most_prompts_per_step
        return (num_steps + self.most_stints - 1) * self.prompts_per_step

    def places_of(self, refill: int) -> range:
        """Return which prompts of a step a refill draws; 0: those that every step draws."""
        begun, more = self.prompts_per_step, self.refill_prompts or self.prompts_per_step
        return range(begun + (refill - 1) * more, begun + refill * more) if refill else range(begun)

    def drawn_after(self, step: int) -> int:
        """Return the training step whose weights draw a step, which counts from 1; 0: the first.

        Of the weights that the engine gets they are the first that are not too old for the step.
        """
        every = self.weight_sync_steps
        return -(-max(0, step - 1 - self.max_staleness) // every) * every

    def syncs_after(self, step: int) -> bool:
        """Whether the engine gets the weights after a training step, to draw by them."""
        return step % self.weight_sync_steps == 0

    def _check_staleness(self) -> None:
        stale = self.max_staleness
        require(stale >= 0, "rollout.max_staleness", stale, "0 or more")
        if not stale:
            where = "rollout.max_staleness is 0"
            require_default(self, "rollout", ("weight_sync_steps",), where)
            if self.partial_tokens is None:
                where += " and rollout.partial_tokens is unset"
                require_default(self, "rollout", ("check_stale",), where)
        every = self.weight_sync_steps
        meaning = f"1 to {stale + 1} with rollout.max_staleness={stale}: samples would be older"
        require(1 <= every <= stale + 1, "rollout.weight_sync_steps", every, meaning)
        meaning = "full with rollout.max_staleness: what could be drawn is known by the weights "
        meaning += "that drew alone"
        require(not (stale and self.truncates), "rollout.logprobs", self.logprobs, meaning)

    def _check_partial(self) -> None:
        if (partial := self.partial_tokens) is None:
            return
        meaning = f"1 to {self.max_new_tokens}, rollout.max_new_tokens, or unset"
        require(1 <= partial <= self.max_new_tokens, "rollout.partial_tokens", partial, meaning)
        refused = {
            "refill_prompts": "unset with rollout.partial_tokens: every stint begins as many",
            "generate": "unset with rollout.partial_tokens: a function of your own cannot be left "
            "in the middle of a sample and kept in a checkpoint",
        }
        for name, meaning in refused.items():
            value = getattr(self, name)
            require(not value, f"rollout.{name}", value, meaning)
        meaning = "full with rollout.partial_tokens: what could be drawn is known by the weights "
        meaning += "that drew alone"
        require(not self.truncates, "rollout.logprobs", self.logprobs, meaning)

    def _check_generate(self) -> None:
        if self.generate is None:
            idle = ("generate_args", "generate_timeout_s")
            require_default(self, "rollout", idle, "rollout.generate is unset")
            return
        named = all(self.generate.partition(":"))
        require(named, "rollout.generate", self.generate, "module:function, or unset")
        fits = 0 < self.generate_timeout_s < math.inf
        require(fits, "rollout.generate_timeout_s", self.generate_timeout_s, "seconds above 0")

    def _check_dynamic_sampling(self) -> None:
        if not self.dynamic_sampling:
            idle = ("max_refills", "refill_prompts", "too_few_groups")
            require_default(self, "rollout", idle, "rollout.dynamic_sampling is false")
            return
        n, known = self.samples_per_prompt, self.too_few_groups in TOO_FEW_GROUPS
        meaning = "at least 2 with rollout.dynamic_sampling: one sample's reward is no spread"
        require(n >= 2, "rollout.samples_per_prompt", n, meaning)
        require(self.max_refills >= 0, "rollout.max_refills", self.max_refills, "0 or more")
        more = self.refill_prompts
        meaning = "positive, or unset"
        require(more is None or more >= 1, "rollout.refill_prompts", more, meaning)
        if self.max_refills == 0:
            require_default(self, "rollout", ("refill_prompts",), "rollout.max_refills is 0")
        meaning = f"one of {TOO_FEW_GROUPS}"
        require(known, "rollout.too_few_groups", self.too_few_groups, meaning)
