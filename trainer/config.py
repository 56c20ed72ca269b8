"""Settings of the trainer and its algorithms. Field names are configuration keys; no torch here."""

import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import ClassVar

from samebit.trainer.loss_means import LOSS_MEANS

LR_SCHEDULES = ("constant", "linear", "cosine")
RECOMPUTE = ("none", "selective", "full")
KL_ESTIMATORS = ("k1", "k2", "k3", "k3_unbiased")
LENGTH_PENALTIES = ("none", "overlong", "relative")


def require(holds: bool, key: str, value: object, what: str) -> None:
    """Raise ValueError naming the key, its value and what would be right."""
    if not holds:
        raise ValueError(f"{key} is {value!r}; it must be {what}")


def require_default(section: object, prefix: str, names: Iterable[str], where: str) -> None:
    """Raise ValueError for a field that is set although nothing reads it, which `where` explains.

    `section` is a dataclass, `prefix` its key; a field that has its default counts as not set.
    """
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(section)  # type: ignore[arg-type]
    }
    for name in names:
        value, key = getattr(section, name), f"{prefix}.{name}".lstrip(".")
        what = f"{defaults[name]!r}, its default: nothing reads it where {where}"
        require(value == defaults[name], key, value, what)


def check_tp_invariant(tp_invariant: bool, tensor: int, key: str) -> None:
    """ValueError, naming the key of `tensor`, for a size that tp_invariant does not know."""
    fits = not tp_invariant or tensor in (1, 2, 4, 8)
    require(fits, key, tensor, "1, 2, 4 or 8 with tp_invariant")


def check_grad_segments(segments: int, parallel: "ParallelConfig") -> None:
    """ValueError, naming the key, for numerics.grad_segments that the layout does not go with."""
    is_power = segments >= 0 and segments & (segments - 1) == 0
    require(is_power, "numerics.grad_segments", segments, "a power of two, or 0: off")
    if not segments:
        where = "numerics.grad_segments is 0"
        require_default(parallel, "trainer.parallel", ("offload_segment_sums",), where)
        return
    meaning = f"a power of two up to numerics.grad_segments = {segments}"
    require(segments % parallel.data == 0, "trainer.parallel.data", parallel.data, meaning)
    key = "trainer.parallel.overlap_grad_reduce"
    meaning = "false with numerics.grad_segments, whose sums wait for one another"
    require(not parallel.overlap_grad_reduce, key, parallel.overlap_grad_reduce, meaning)


@dataclass(kw_only=True)
class ParallelConfig:
    """How one model is spread over processes, and what a process keeps of it."""

    key: ClassVar[str] = "trainer.parallel"
    """The section's name in a configuration."""

    tensor: int = 1
    """Processes that share every layer."""
    sequence: bool = False
    """Split the tokens over them where a layer is not split."""
    pipeline: int = 1
    """Stages of layers, one behind the other."""
    virtual_pipeline: int = 1
    """Groups of layers that each stage has, from places all over the model (interleaved schedule).
    """
    context: int = 1
    """Processes that share the tokens of every sample."""
    data: int = 1
    """Copies of the model that train on different samples."""
    distributed_optimizer: bool = False
    """Split the optimizer's state over the copies."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the host's memory, and pass it through the device for a step.
    It moves no bit."""
    overlap_grad_reduce: bool = False
    """Sum the gradients over the copies while the last backward still runs."""
    offload_segment_sums: bool = False
    """Keep the sums that wait for other segments' (numerics.grad_segments) in the host's memory. It
    moves no bit."""
    offload_reference: bool = False
    """Keep the reference's weights in the host's memory but while its log-probs are computed. It
    moves no bit."""
    recompute: str = "none"
    """Activations computed again in the backward instead of kept: none; selective, those inside the
    MLPs; full, all but the input of every layer. It moves no bit."""

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """What processes are grouped by."""
        return self.tensor, self.pipeline, self.context, self.data

    @property
    def num_processes(self) -> int:
        """Processes in all."""
        return math.prod(self.layout)

    def __str__(self) -> str:
        return "tensor x pipeline x context x data = " + " x ".join(map(str, self.layout))

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "virtual_pipeline", "context", "data"):
            value = getattr(self, name)
            require(value >= 1, f"{self.key}.{name}", value, "at least 1")
        known = self.recompute in RECOMPUTE
        require(known, f"{self.key}.recompute", self.recompute, f"one of {RECOMPUTE}")
        needless = self.sequence and self.tensor == 1
        meaning = f"false where {self.key}.tensor is 1"
        require(not needless, f"{self.key}.sequence", self.sequence, meaning)
        needless = self.virtual_pipeline > 1 and self.pipeline == 1
        meaning = f"1 where {self.key}.pipeline is 1"
        require(not needless, f"{self.key}.virtual_pipeline", self.virtual_pipeline, meaning)
        needless = self.overlap_grad_reduce and self.data * self.context == 1
        meaning = f"false where {self.key}.data and context are 1"
        require(not needless, f"{self.key}.overlap_grad_reduce", self.overlap_grad_reduce, meaning)
        both = self.sequence and self.context > 1
        meaning = f"1 with {self.key}.sequence: they are not combined yet"
        require(not both, f"{self.key}.context", self.context, meaning)


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    key: ClassVar[str] = "trainer.optimizer"
    """The section's name in a configuration."""

    lr: float = 1e-6
    """Learning rate, after the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of a decaying schedule."""
    lr_schedule: str = "constant"
    """constant, linear or cosine."""
    lr_warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        finite = 0 <= self.lr < math.inf
        require(finite, f"{self.key}.lr", self.lr, "finite and at least 0")
        in_range = 0 <= self.min_lr <= self.lr
        require(in_range, f"{self.key}.min_lr", self.min_lr, f"in [0, lr = {self.lr}]")
        known = self.lr_schedule in LR_SCHEDULES
        require(known, f"{self.key}.lr_schedule", self.lr_schedule, f"one of {LR_SCHEDULES}")
        for name in ("lr_warmup_steps", "weight_decay", "clip_grad"):
            value = getattr(self, name)
            require(value >= 0, f"{self.key}.{name}", value, "at least 0")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{self.key}.{name}", value, "in [0, 1)")
        require(self.adam_eps > 0, f"{self.key}.adam_eps", self.adam_eps, "positive")
        if self.lr_schedule == "constant":
            where = f"{self.key}.lr_schedule is 'constant'"
            require_default(self, self.key, ("min_lr",), where)


@dataclass(kw_only=True)
class TrainerConfig:
    """How samples become optimizer steps, and what is kept of them."""

    num_steps: int = 100
    """Rollout steps of GRPO, optimizer steps of supervised fine-tuning."""
    batch_size: int | None = None
    """Samples per optimizer step; unset in GRPO: all samples of the rollout step."""
    micro_batch_tokens: int = 8192
    """Most tokens packed into one forward and backward."""
    loss_mean: str = "token"
    """token: every token counts the same; sequence: every sample counts the same; constant: a
    sample's sum of losses is divided by loss_mean_tokens, every token of the run counts the same.
    """
    loss_mean_tokens: int | None = None
    """What loss_mean=constant divides by, such as ${rollout.max_new_tokens}."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the last step always gets one. 0: only the last."""
    keep_checkpoints: int = 2
    """The newest ones; older ones are removed."""
    background_checkpoints: bool = True
    """A thread writes them, from a copy in the host's memory, while the run goes on."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for name in ("num_steps", "micro_batch_tokens", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"trainer.{name}", getattr(self, name), "positive")
        positive = self.batch_size is None or self.batch_size >= 1
        require(positive, "trainer.batch_size", self.batch_size, "positive or unset")
        at_least_0 = self.checkpoint_every >= 0
        require(at_least_0, "trainer.checkpoint_every", self.checkpoint_every, "at least 0")
        known = self.loss_mean in LOSS_MEANS
        require(known, "trainer.loss_mean", self.loss_mean, f"one of {tuple(LOSS_MEANS)}")
        tokens, where = self.loss_mean_tokens, f"trainer.loss_mean is {self.loss_mean!r}"
        if self.loss_mean == "constant":
            meaning = f"a positive number of tokens where {where}"
            require(tokens is not None and tokens >= 1, "trainer.loss_mean_tokens", tokens, meaning)
        else:
            require_default(self, "trainer", ("loss_mean_tokens",), where)

    def checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint follows `step`."""
        every = self.checkpoint_every
        return step == self.num_steps or (every > 0 and step % every == 0)


@dataclass(kw_only=True)
class AlgorithmConfig:
    """What every algorithm's settings have; those of an algorithm are a subclass."""

    min_samples_per_prompt: ClassVar[int] = 1
    """Fewest samples of a prompt of which advantages can be made."""
    sections: ClassVar[tuple[str, ...]] = ()
    """Which sections runs of the algorithm have besides: critic, distillation."""
    reads_rewards: ClassVar[bool] = True
    """Whether advantages are made of rewards."""

    name: str = "grpo"
    """An algorithm of docs/algorithms.md, or your own `module:Class`."""

    def check_lengths(self, max_new_tokens: int) -> None:
        """Raise ValueError for a setting that contradicts the tokens of a response, at most."""

    def check_rewards(self, normalized: bool) -> None:
        """Raise ValueError for a setting that contradicts rewards that are normalized."""


@dataclass(kw_only=True)
class DpoConfig(AlgorithmConfig):
    """Direct preference optimization; see trainer/algorithms/dpo.py."""

    name: str = "dpo"
    """dpo, and no other."""
    beta: float = 0.1
    """How much a log ratio to the reference counts: large keeps the policy near it."""
    label_smoothing: float = 0.0
    """The probability with which a pair is taken to be the wrong way round."""

    def __post_init__(self) -> None:
        require(self.name == "dpo", "algorithm.name", self.name, "dpo, as the command is")
        fits = 0 < self.beta < math.inf
        require(fits, "algorithm.beta", self.beta, "positive and finite")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, "algorithm.label_smoothing", smoothing, "in [0, 0.5)")


@dataclass(kw_only=True)
class PolicyGradientConfig(AlgorithmConfig):
    """What the policy-gradient algorithms share; see trainer/algorithms/policy_gradient.py."""

    kl_coef: float = 0.0
    """Weight of the KL to the reference model; 0 needs no reference."""
    kl_estimator: str = "k3"
    """k1: log ratio; k2: half its square; k3: ratio - 1 - log ratio; k3_unbiased: k3 times the
    policy ratio, whose gradient is the KL's."""
    kl_in: str = "loss"
    """loss: of each token; reward: the rewards are lowered by it, before advantages are made."""
    kl_refresh_every: int = 0
    """Training steps after which the weights of then become the reference; 0: those at the run's
    start stay it."""
    entropy_coef: float = 0.0
    """Weight of the entropy, which is rewarded."""
    tis_clip: float = 0.0
    """Truncated importance sampling: the policy ratio weighs a gradient at most so much; 0: off."""
    off_policy_mask_threshold: float = 0.0
    """Tokens of negative advantage are left out in samples from which the policy has moved away: of
    which the mean of log(rollout / policy) is above this; 0: in none."""
    length_penalty: str = "none"
    """overlong: rewards fall towards the longest response (DAPO); relative: short right responses
    of a prompt get more (Kimi k1.5)."""
    length_penalty_coef: float = 1.0
    """What a penalty of 1 takes from a reward."""
    max_response_len: int | None = None
    """Tokens at which the overlong penalty is whole, such as ${rollout.max_new_tokens}."""
    overlong_buffer: float = 0.2
    """Share of max_response_len in which it rises, up to the end."""

    def __post_init__(self) -> None:
        masks = "off_policy_mask_threshold"
        for name in ("kl_coef", "entropy_coef", "length_penalty_coef", masks):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"algorithm.{name}", value, "finite and at least 0")
        truncates = self.tis_clip == 0 or 1 <= self.tis_clip < math.inf
        require(truncates, "algorithm.tis_clip", self.tis_clip, "0, or finite and at least 1")
        self._check_kl()
        self._check_length_penalty()

    def check_lengths(self, max_new_tokens: int) -> None:
        """Raise ValueError for a length penalty that would never be whole."""
        longest = self.max_response_len
        meaning = f"at most {max_new_tokens}, rollout.max_new_tokens"
        fits = longest is None or longest <= max_new_tokens
        require(fits, "algorithm.max_response_len", longest, meaning)

    def check_rewards(self, normalized: bool) -> None:
        """Raise ValueError for a length penalty that asks which rewards are above 0."""
        fits = not (normalized and self.length_penalty == "relative")
        meaning = "another one with reward.normalize: relative takes rewards above 0 to be right"
        require(fits, "algorithm.length_penalty", self.length_penalty, meaning)

    def _check_kl(self) -> None:
        known = self.kl_estimator in KL_ESTIMATORS
        require(known, "algorithm.kl_estimator", self.kl_estimator, f"one of {KL_ESTIMATORS}")
        every = self.kl_refresh_every
        require(every >= 0, "algorithm.kl_refresh_every", every, "at least 0")
        known = self.kl_in in ("loss", "reward")
        require(known, "algorithm.kl_in", self.kl_in, "loss or reward")
        if self.kl_coef == 0:
            idle = ("kl_estimator", "kl_in", "kl_refresh_every")
            require_default(self, "algorithm", idle, "algorithm.kl_coef is 0")
        fits = self.kl_in == "loss" or self.kl_estimator != "k3_unbiased"
        meaning = "k1, k2 or k3 with algorithm.kl_in=reward, which has no gradient"
        require(fits, "algorithm.kl_estimator", self.kl_estimator, meaning)

    def _check_length_penalty(self) -> None:
        kind, longest = self.length_penalty, self.max_response_len
        known = kind in LENGTH_PENALTIES
        require(known, "algorithm.length_penalty", kind, f"one of {LENGTH_PENALTIES}")
        where = f"algorithm.length_penalty is {kind!r}"
        if kind == "none":
            require_default(self, "algorithm", ("length_penalty_coef",), where)
        if kind != "overlong":
            idle = ("max_response_len", "overlong_buffer")
            require_default(self, "algorithm", idle, where)
            return
        given = longest is not None and longest >= 1
        meaning = "a number of tokens with algorithm.length_penalty=overlong"
        require(given, "algorithm.max_response_len", longest, meaning)
        a_share = 0 < self.overlong_buffer <= 1
        require(a_share, "algorithm.overlong_buffer", self.overlong_buffer, "in (0, 1]")


@dataclass(kw_only=True)
class ClippedConfig(PolicyGradientConfig):
    """Where the policy ratio counts; see policy_gradient.clipped_surrogate."""

    clip_ratio_low: float = 0.2
    """A token's probability ratio counts down to 1 minus this."""
    clip_ratio_high: float = 0.2
    """It counts up to 1 plus this."""
    dual_clip: float = 0.0
    """Where the advantage is negative it counts up to this; 0: without a bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.clip_ratio_low, self.clip_ratio_high
        require(0 <= low <= 1, "algorithm.clip_ratio_low", low, "in [0, 1]")
        require(0 <= high < math.inf, "algorithm.clip_ratio_high", high, "finite and at least 0")
        meaning = f"0, or finite and above 1 + clip_ratio_high = {1 + high}"
        for name in ("dual_clip", "tis_clip"):
            value = getattr(self, name)
            require(value == 0 or 1 + high < value < math.inf, f"algorithm.{name}", value, meaning)
        one = self.dual_clip == 0 or self.tis_clip == 0
        meaning = "0 with algorithm.dual_clip: both bound the same ratios"
        require(one, "algorithm.tis_clip", self.tis_clip, meaning)


@dataclass(kw_only=True)
class GrpoConfig(ClippedConfig):
    """Group-relative policy optimization; see trainer/algorithms/grpo.py."""

    min_samples_per_prompt: ClassVar[int] = 2

    normalize_std: bool = True
    """Divide a group's centred rewards by a standard deviation (off: Dr. GRPO)."""
    std_over: str = "group"
    """Whose: group, of the prompt's rewards; batch, of all rewards of the training step."""
    std_eps: float = 1e-6
    """Added to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.std_eps >= 0, "algorithm.std_eps", self.std_eps, "at least 0")
        known = self.std_over in ("group", "batch")
        require(known, "algorithm.std_over", self.std_over, "group or batch")
        if not self.normalize_std:
            where = "algorithm.normalize_std is false"
            require_default(self, "algorithm", ("std_over", "std_eps"), where)
