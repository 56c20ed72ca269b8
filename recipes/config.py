"""The configuration of every recipe: dataclasses that Hydra fills, and the checks across fields.

Defaults stand here; configs/*.yaml hold what a group or an experiment changes. No torch here, so
that --help and dry_run answer at once.
"""

from dataclasses import dataclass, field, make_dataclass
from math import gcd
from pathlib import Path
from typing import Any, ClassVar

from samebit.recipes.data.reward_config import RewardConfig
from samebit.recipes.data.tasks.base import DataConfig, PreferenceConfig, SupervisedConfig
from samebit.recipes.distillation_config import DistillationSection
from samebit.recipes.draft_config import OnlineDraftSection
from samebit.recipes.numerics_config import NumericsSection
from samebit.recipes.placement_config import PlacementSection
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.metrics import LoggerConfig
from samebit.rollout.config import EngineConfig
from samebit.trainer.config import (
    AlgorithmConfig,
    DpoConfig,
    GrpoConfig,
    ParallelConfig,
    TrainerConfig,
    require,
    require_default,
)
from samebit.trainer.critic.config import CriticConfig
from samebit.trainer.draft.config import TttConfig

SET_BY_RUN = ("attention", "load_format", "max_model_len", "model_family", "seed")
"""Settings of the engine that commands derive from keys of their own."""


class ConfigError(ValueError):
    """A configuration key is unknown, missing, of the wrong type or contradicts another."""


def check_run_folder(run_name: str, output_dir: str) -> None:
    """Raise ValueError unless output_dir/run_name can be a folder of its own inside output_dir."""
    meaning = "a folder's name, or several with / between: 1 to 200 bytes, printable, not - first"
    for name in run_name.split("/"):
        fits = name.isprintable() and len(name.encode()) <= 200  # what is beside it adds some
        fits = fits and name not in ("", ".", "..") and name[:1] != "-"
        require(fits, "run_name", run_name, meaning)
    require(output_dir != "", "output_dir", output_dir, "the path of a folder, such as outputs")


@dataclass(kw_only=True)
class FolderSection:
    """Names the folder that a command writes."""

    run_name: str = "run"
    output_dir: str = "outputs"
    """The run's folder is output_dir/run_name."""

    @property
    def run_dir(self) -> Path:
        """The run's files go here."""
        return Path(self.output_dir) / self.run_name

    def __post_init__(self) -> None:
        check_run_folder(self.run_name, self.output_dir)


@dataclass(kw_only=True)
class ModelSection:
    """Names the model that a run starts from."""

    path: str = "???"
    """A Hugging Face folder: config.json, *.safetensors and, for text, a tokenizer."""

    def __post_init__(self) -> None:
        require(self.path != "", "model.path", self.path, "the path of a folder")


@dataclass(kw_only=True)
class RunSection(FolderSection):
    """Holds what every training recipe has."""

    resume: bool = False
    """Continue from the newest checkpoint, or start if there is none."""
    reshard: bool = False
    """Resume a checkpoint of another trainer.parallel or critic.parallel too; bits then follow the
    new one."""
    overwrite: bool = False
    """Without resume: remove what an earlier run of this name left."""
    dry_run: bool = False
    """Print what the run would be and stop."""
    max_restarts: int = 0
    """How often the run's processes are started again, after one of them has crashed."""
    model_family: str | None = None
    """module:Class, a model family of your own, of which the model is one."""
    device: str | None = None
    """cpu or cuda; unset: the GPU if there is one."""
    cpu_threads: int = 1
    """Threads per process of CPU operations."""
    seed: int = 0
    """Of the sampling noise and of the problems' order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.cpu_threads >= 1, "cpu_threads", self.cpu_threads, "positive")
        require(0 <= self.seed < 1 << 43, "seed", self.seed, "in [0, 2^43)")
        require(self.max_restarts >= 0, "max_restarts", self.max_restarts, "0 or more")
        require(self.resume or not self.reshard, "reshard", self.reshard, "false without resume")

    def validate(self) -> None:
        """Check across sections; raises ValueError, which names the keys."""


def check_schedule(section: TrainerConfig | CriticConfig, num_updates: int) -> None:
    """ValueError for a learning rate that is to decay and has no step left to do so."""
    schedule, warmup = section.optimizer.lr_schedule, section.optimizer.lr_warmup_steps
    decays = schedule == "constant" or warmup < num_updates
    meaning = f"below {num_updates}, the run's optimizer steps, for lr_schedule {schedule!r}"
    require(decays, f"{section.optimizer.key}.lr_warmup_steps", warmup, meaning)


def check_algorithm(
    algorithm: AlgorithmConfig, rollout: RolloutSection, reward: RewardConfig
) -> None:
    """ValueError for settings of the algorithm that contradict lengths or rewards, or for rewards
    that are scaled and not read."""
    algorithm.check_lengths(rollout.max_new_tokens)
    algorithm.check_rewards(reward.normalize != "none")
    if not algorithm.reads_rewards:
        where = f"algorithm.name is {algorithm.name!r}: no reward is read"
        require_default(reward, "reward", ("normalize", "clip"), where)


def check_overwrite(run: RunSection) -> None:
    """ValueError for a run that is to go on and to remove what is there."""
    alone = not (run.resume and run.overwrite)
    require(alone, "overwrite", run.overwrite, "false with resume=true, which removes nothing")


def check_reference(trainer: TrainerConfig, has_reference: bool) -> None:
    """ValueError for settings of a reference where there is none."""
    if not has_reference:
        idle, where = ("offload_reference",), "no reference is kept"
        require_default(trainer.parallel, "trainer.parallel", idle, where)


def _check_copies(size: int, copies: int, key: str = ParallelConfig.key) -> None:
    require(size >= copies, f"{key}.data", copies, f"at most {size}, a step's samples")


def _check_staleness(max_staleness: int, placement: PlacementSection) -> None:
    fits = not max_staleness or placement.engine == "process"
    meaning = "0 with a colocated engine, which draws and trains in turns; placement=process has "
    meaning += "an engine that draws while the trainer trains"
    require(fits, "rollout.max_staleness", max_staleness, meaning)


@dataclass(kw_only=True)
class SftRun(RunSection):
    """`samebit sft`: supervised fine-tuning on prompts and labels, or on chats."""

    command: ClassVar[str] = "sft"
    has_reference: ClassVar[bool] = False

    model: ModelSection = field(default_factory=ModelSection)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    numerics: NumericsSection = field(default_factory=NumericsSection)
    data: SupervisedConfig = field(default_factory=SupervisedConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    eval_every: int = 20
    """Steps between evaluations of the held-out loss; also before the first, after the last."""

    @property
    def num_processes(self) -> int:
        """The run needs so many processes."""
        return self.trainer.parallel.num_processes

    def validate(self) -> None:
        """Check across sections; raises ValueError, which names the keys."""
        check_overwrite(self)
        require(self.eval_every >= 1, "eval_every", self.eval_every, "positive")
        given = self.trainer.batch_size is not None
        require(given, "trainer.batch_size", None, f"set for {self.command}")
        check_schedule(self.trainer, self.trainer.num_steps)
        if not self.data.holds_out:
            require_default(self, "", ("eval_every",), "no record is held out")
        idle = ("num_samples", "save_rollouts")
        meaning = f"the command is {self.command}, which draws no samples"
        require_default(self.logger, "logger", idle, meaning)
        check_reference(self.trainer, self.has_reference)
        self.numerics.check(self.trainer.parallel)
        copies = self.numerics.copies_to_fill(self.trainer.parallel)
        _check_copies(self.trainer.batch_size or 0, copies)


@dataclass(kw_only=True)
class DpoRun(SftRun):
    """`samebit dpo`: direct preference optimization on pairs of answers."""

    command: ClassVar[str] = "dpo"
    has_reference: ClassVar[bool] = True

    data: PreferenceConfig = field(default_factory=PreferenceConfig)
    algorithm: DpoConfig = field(default_factory=DpoConfig)

    def validate(self) -> None:
        """Check across sections; raises ValueError, which names the keys."""
        super().validate()
        mean = self.trainer.loss_mean
        require(mean == "sequence", "trainer.loss_mean", mean, "sequence: a loss is a pair's")


@dataclass(kw_only=True)
class GrpoRun(RunSection):
    """`samebit grpo`: rollout, reward, train, sync, until num_steps."""

    critic: ClassVar[CriticConfig | None] = None
    distillation: ClassVar[DistillationSection | None] = None
    """Sections of runs whose algorithm has a critic or a teacher: see grpo_run_of."""

    model: ModelSection = field(default_factory=ModelSection)
    placement: PlacementSection = field(default_factory=PlacementSection)
    engine: EngineConfig = field(default_factory=EngineConfig)
    draft: OnlineDraftSection = field(default_factory=OnlineDraftSection)
    ttt: TttConfig = field(default_factory=TttConfig)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    numerics: NumericsSection = field(default_factory=NumericsSection)
    algorithm: GrpoConfig = field(default_factory=GrpoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    @property
    def num_processes(self) -> int:
        """The run needs so many processes."""
        return self.trainer.parallel.num_processes

    @property
    def launcher(self) -> str:
        """Who starts the run's processes."""
        return self.placement.launcher

    @property
    def samples_per_step(self) -> int:
        """A rollout step draws so many samples."""
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    @property
    def batch_size(self) -> int:
        """An optimizer step trains on so many samples."""
        return self.trainer.batch_size or self.samples_per_step

    @property
    def updates_per_step(self) -> int:
        """The samples of a rollout step are trained on in so many optimizer steps."""
        return self.samples_per_step // self.batch_size

    def updates_on(self, num_samples: int) -> int:
        """Return the optimizer steps of a training step that trains on so many samples."""
        return -(-num_samples // self.batch_size)

    @property
    def num_updates(self) -> int:
        """The policy takes so many optimizer steps, if no training step has fewer samples."""
        return (self.trainer.num_steps - self.num_waits) * self.updates_per_step

    @property
    def num_waits(self) -> int:
        """The policy waits so many training steps for its critic."""
        return 0 if self.critic is None else self.critic.warmup_steps

    @property
    def num_draft_updates(self) -> int:
        """A draft in training takes so many optimizer steps."""
        return self.draft.num_updates(self.trainer.num_steps, self.num_waits)

    @property
    def num_critic_updates(self) -> int:
        """A critic takes so many optimizer steps, on the same terms."""
        return self.trainer.num_steps * self.updates_per_step

    @property
    def critic_parallel(self) -> ParallelConfig:
        """The layout of the critic, if there is one; raises ValueError for one that cannot be."""
        policy = self.trainer.parallel
        return policy if self.critic is None else self.critic.parallel.beside(policy)

    def validate(self) -> None:
        """Check across sections; raises ValueError, which names the keys."""
        check_overwrite(self)
        prompts, n = self.rollout.prompts_per_step, self.rollout.samples_per_prompt
        steps, turns = self.trainer.num_steps, "whose turns have ids of their own"
        fits, meaning = steps < 1 << 24, f"below 2^24 with rollout.generate, {turns}"
        require(fits or not self.rollout.generate, "trainer.num_steps", steps, meaning)
        least = self.algorithm.min_samples_per_prompt
        meaning = f"at least {least}: an advantage is relative to the other samples of the prompt"
        require(n >= least, "rollout.samples_per_prompt", n, meaning)
        check_algorithm(self.algorithm, self.rollout, self.reward)
        segments, alone = self.numerics.grad_segments, self.critic is None
        meaning = "0 with a critic or draft.train=online, which sum by the copies of the model"
        fits = not segments or (alone and not self.draft.is_online)
        require(fits, "numerics.grad_segments", segments, meaning)
        self._check_placement()
        fits = self.engine.releasable is not False or not self.placement.release_memory
        require(fits, "engine.releasable", False, "left alone with placement.release_memory=true")
        self.draft.check(self.ttt, self.engine, self.num_draft_updates)
        meaning = "attention, model, lengths and seed are the run's"
        require_default(self.engine, "engine", SET_BY_RUN, meaning)
        meaning = "a run releases no weights of the engine"
        require_default(self.engine, "engine", ("weights_backup",), meaning)
        if self.samples_per_step % self.batch_size:
            raise ValueError(
                f"rollout.prompts_per_step x rollout.samples_per_prompt = {prompts} x {n} = "
                f"{self.samples_per_step} samples are no multiple of trainer.batch_size = "
                f"{self.batch_size}"
            )
        for layout in (self.trainer.parallel, self.critic_parallel):
            self._check_layout(layout)
        meaning = f"below {steps}, trainer.num_steps: the policy is to learn too"
        require(self.num_waits < steps, "critic.warmup_steps", self.num_waits, meaning)
        check_schedule(self.trainer, self.num_updates)
        if self.critic is not None:
            check_schedule(self.critic, self.num_critic_updates)
        if self.distillation is not None:
            self.distillation.check(self.rollout)
            meaning = "attention, model, lengths and seed are the run's"
            engine = self.distillation.engine
            require_default(engine, engine.key, SET_BY_RUN, meaning)
        if not self.data.holds_out:
            raise ValueError(
                f"data.eval_size is {self.data.eval_size}; grpo measures the reward on held-out "
                "problems: give at least 1"
            )
        longest = self.rollout.longest
        if longest > self.trainer.micro_batch_tokens:
            raise ValueError(
                f"rollout.max_prompt_len + rollout.max_new_tokens = {longest} exceed "
                f"trainer.micro_batch_tokens = {self.trainer.micro_batch_tokens}: the longest "
                "sample would not fit a micro-batch"
            )

    def _check_layout(self, layout: ParallelConfig) -> None:
        """ValueError for one that does not go with the numerics that are chosen, or of more copies
        of a model than optimizer steps are sure to have samples."""
        self.numerics.check(layout)
        copies = self.numerics.copies_to_fill(layout)
        _check_copies(self.batch_size, copies, layout.key)
        if self.rollout.too_few_groups == "train":
            least = gcd(self.rollout.samples_per_prompt, self.batch_size)
            meaning = f"at most {least}, the samples that too few groups may leave"
            meaning += " an optimizer step of with rollout.too_few_groups=train"
            require(least >= copies, f"{layout.key}.data", copies, meaning)

    def _check_placement(self) -> None:
        """ValueError for a placement that does not go with the trainer and what is asked of it."""
        self.placement.check(self.trainer.parallel, self.numerics.tp_invariant)
        _check_staleness(self.rollout.max_staleness, self.placement)


SECTIONS: dict[str, type[Any]] = {"critic": CriticConfig, "distillation": DistillationSection}
"""Of runs, by their keys, which an algorithm's settings may name."""


def grpo_run_of(
    algorithm: type[AlgorithmConfig], name: str, base: type[GrpoRun] = GrpoRun
) -> type[Any]:
    """Return `base` with the settings of another algorithm, of this name, as `algorithm`, and its
    sections."""
    meaning = f"a class whose Config.sections are among {tuple(SECTIONS)}"
    require(SECTIONS.keys() >= {*algorithm.sections}, "algorithm.name", name, meaning)
    own: list[Any] = [("algorithm", algorithm, field(default_factory=lambda: algorithm(name=name)))]
    kinds = [(key, SECTIONS[key]) for key in algorithm.sections]
    own += [(key, kind, field(default_factory=kind)) for key, kind in kinds]
    return make_dataclass(f"{algorithm.__name__}Run", own, bases=(base,), kw_only=True)
