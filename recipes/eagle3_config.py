"""The configuration of `samebit eagle3`, and that of any training command. No torch here."""

from dataclasses import dataclass, field

from samebit.recipes.config import (
    SET_BY_RUN,
    GrpoRun,
    ModelSection,
    RunSection,
    SftRun,
    check_overwrite,
    check_schedule,
)
from samebit.recipes.data.tasks.base import DataConfig
from samebit.recipes.numerics_config import NumericsSection
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.metrics import LoggerConfig
from samebit.rollout.config import EngineConfig
from samebit.trainer.config import TrainerConfig, require, require_default
from samebit.trainer.draft.config import TttConfig

DIALECTS = ("sglang", "speculators")
_NEW = ("vocab_size", "vocab_prompts", "layers", "fc_norm", "norm_before_fc",
        "norm_before_residual", "feeds_normed", "mask_token_id")  # fmt: skip


@dataclass(kw_only=True)
class DraftSection:
    """Says which draft is trained, and how it is written."""

    path: str | None = None
    """A draft's folder to start from; unset: a new one, whose output layer begins as the target's
    rows."""
    norm_output: str | None = None
    """Whose meaning that key has in the folder's config.json, sglang or specforge, if it is there
    and not of ours."""
    vocab_size: int | None = None
    """Tokens that a new draft can say; unset: 32,000, or all where there are fewer."""
    vocab_prompts: int = 256
    """Prompts whose answers are counted for the most frequent tokens, where vocab_size leaves out
    any."""
    layers: list[int] | None = None
    """Numbers of the target's layers after which a new draft reads its stream; unset: EAGLE-3's."""
    fc_norm: bool = False
    """EAGLE-3.1: normalise each of these streams."""
    norm_before_fc: bool = False
    """Normalise them as one vector."""
    norm_before_residual: bool = False
    """Add to the normalised state; only the speculators dialect can say so."""
    feeds_normed: bool = False
    """EAGLE-3.1: feed the next draft step with the normalised state."""
    mask_token_id: int | None = None
    """Make a new draft a block draft (P-EAGLE), whose masks have this token's embedding: one that
    answers do not use. Only the speculators dialect can say so."""
    dialect: str = "sglang"
    """What run_dir/draft is written as: sglang (also SpecForge's) or speculators (vLLM's)."""
    verifier: str | None = None
    """The target's name in the speculators dialect; unset: model.path."""

    def __post_init__(self) -> None:
        require(self.path != "", "draft.path", self.path, "the path of a folder, or unset")
        known = self.norm_output in (None, "sglang", "specforge")
        require(known, "draft.norm_output", self.norm_output, "sglang, specforge or unset")
        for name, least in (("vocab_size", 1), ("vocab_prompts", 1), ("mask_token_id", 0)):
            value = getattr(self, name)
            fits = value is None or value >= least
            require(fits, f"draft.{name}", value, f"at least {least}")
        require(self.dialect in DIALECTS, "draft.dialect", self.dialect, f"one of {DIALECTS}")
        if self.path is not None:
            require_default(self, "draft", _NEW, "draft.path is given, which says so")
        else:
            require_default(self, "draft", ("norm_output",), "draft.path is unset")
        if self.dialect == "sglang":
            require_default(self, "draft", ("verifier",), "draft.dialect is 'sglang'")
            fits, meaning = not self.norm_before_residual, "false with draft.dialect=sglang"
            require(fits, "draft.norm_before_residual", self.norm_before_residual, meaning)
            mask, meaning = self.mask_token_id, "unset with draft.dialect=sglang"
            require(mask is None, "draft.mask_token_id", mask, meaning)
        feeds = self.feeds_normed and self.mask_token_id is not None
        meaning = "false with draft.mask_token_id: a block draft is fed with no state of its own"
        require(not feeds, "draft.feeds_normed", self.feeds_normed, meaning)
        both = self.fc_norm and self.norm_before_fc
        require(not both, "draft.fc_norm", self.fc_norm, "false with draft.norm_before_fc=true")


@dataclass(kw_only=True)
class Eagle3Run(RunSection):
    """`samebit eagle3`: train a draft on what its target answers itself."""

    model: ModelSection = field(default_factory=ModelSection)
    draft: DraftSection = field(default_factory=DraftSection)
    ttt: TttConfig = field(default_factory=TttConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    rollout: RolloutSection = field(default_factory=lambda: RolloutSection(samples_per_prompt=1))
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    numerics: NumericsSection = field(default_factory=NumericsSection)
    data: DataConfig = field(default_factory=DataConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    @property
    def num_processes(self) -> int:
        """The run needs so many processes."""
        return self.trainer.parallel.num_processes

    def validate(self) -> None:
        """Check across sections; raises ValueError, which names the keys."""
        check_overwrite(self)
        check_schedule(self.trainer, self.trainer.num_steps)
        meaning = (
            "the command is eagle3: an optimizer step trains on all tokens of a step's answers"
        )
        means = ("batch_size", "loss_mean", "loss_mean_tokens")
        require_default(self.trainer, "trainer", means, meaning)
        meaning = "the command is eagle3, which runs in one process"
        require_default(self.trainer, "trainer", ("parallel",), meaning)
        require_default(self.numerics, "numerics", ("tp_invariant", "grad_segments"), meaning)
        meaning = "attention, model, lengths and seed are the run's"
        require_default(self.engine, "engine", SET_BY_RUN, meaning)
        meaning = "the command is eagle3, which scores no answer"
        require_default(self.rollout, "rollout", ("dynamic_sampling", "logprobs"), meaning)
        meaning = "the command is eagle3, whose target stays as it is"
        require_default(self.rollout, "rollout", ("max_staleness", "partial_tokens"), meaning)
        meaning = "the command is eagle3, which draws one answer to a prompt"
        require_default(self.rollout, "rollout", ("generate",), meaning)
        idle = ("num_samples", "save_rollouts")
        require_default(
            self.logger, "logger", idle, "the command is eagle3, which keeps no samples"
        )
        drawn = self.rollout.max_new_tokens
        meaning = "at least 2: the first token of an answer needs no draft"
        require(drawn >= 2, "rollout.max_new_tokens", drawn, meaning)
        meaning = "at least 1: the accept length is measured on held-out prompts"
        require(self.data.holds_out, "data.eval_size", self.data.eval_size, meaning)
        room, meaning = (
            self.trainer.micro_batch_tokens,
            f"at least {self.rollout.longest}, the longest sample",
        )
        require(room >= self.rollout.longest, "trainer.micro_batch_tokens", room, meaning)


type TrainingRun = GrpoRun | SftRun | Eagle3Run
"""The configuration of a command that trains and keeps checkpoints."""
