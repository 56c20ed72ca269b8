"""The configuration of `samebit bench`. No torch here, as in recipes/config.py."""

import re
from dataclasses import dataclass, field, replace
from typing import Any, Self

from samebit.recipes.config import FolderSection
from samebit.recipes.data.tasks.base import DataConfig
from samebit.recipes.numerics_config import AttentionSection
from samebit.recipes.tools_config import check_given
from samebit.rollout.config import LOAD_FORMATS, EngineConfig
from samebit.trainer.config import ParallelConfig, check_tp_invariant, require, require_default
from samebit.trainer.draft.config import TttConfig
from samebit.weight_sync.transports.registry import FROM_ONE

VARIANTS = ("default", "no_graphs", "no_overlap", "no_groups", "no_table", "torch_kernels")
TABLES = ("linear", "attention", "shared", "prefill", "training", "rows")


@dataclass(frozen=True)
class Workload:
    """Requests of one timed run; written 64x8x512x512."""

    num_prompts: int
    num_samples: int
    input_len: int
    output_len: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From prompts x samples x input length x output length; ValueError for anything else."""
        matched = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
        if matched is None:
            raise ValueError(
                f"workload '{text}' is not prompts x samples x input length x output length, "
                "such as 64x8x512x512"
            )
        return cls(*map(int, matched.groups()))

    def __str__(self) -> str:
        return f"{self.num_prompts}x{self.num_samples}x{self.input_len}x{self.output_len}"

    @property
    def num_seqs(self) -> int:
        """Samples over all prompts."""
        return self.num_prompts * self.num_samples

    @property
    def output_tokens(self) -> int:
        """Tokens drawn in one run."""
        return self.num_seqs * self.output_len


@dataclass(frozen=True)
class Pack:
    """Samples of one micro-batch of training; written 8x1024."""

    num_seqs: int
    seq_len: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From sequences x length; ValueError for anything else."""
        matched = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if matched is None or int(matched[2]) < 2:
            raise ValueError(
                f"pack '{text}' is not sequences x length (at least 2), such as 8x1024"
            )
        return cls(*map(int, matched.groups()))

    def __str__(self) -> str:
        return f"{self.num_seqs}x{self.seq_len}"

    @property
    def num_tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.num_seqs * self.seq_len


def _check_list(key: str, names: list[str]) -> None:
    require(len(names) > 0, key, names, "at least one")
    require(len(set(names)) == len(names), key, names, "without a repetition")


@dataclass(kw_only=True)
class BenchRun(FolderSection):
    """What all have. Writes output_dir/run_name/bench.json."""

    device: str | None = None
    """cpu or cuda; unset: the GPU if there is one."""
    seed: int = 0
    """Of prompts and random tensors."""
    model: str = "???"
    """A Hugging Face folder."""
    model_family: str | None = None
    """module:Class, a model family of your own, of which the model is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_given(self, ("model",))


@dataclass(kw_only=True)
class BenchEngineSection(BenchRun):
    """What all have that measure an engine."""

    load_format: str = "safetensors"
    """dummy: random weights for a folder that holds only a config.json."""
    cpu_threads: int = 1
    repeats: int = 3
    """Timed runs, after one that warms up."""
    engine: EngineConfig = field(
        default_factory=lambda: EngineConfig(max_batch_tokens=8192, max_num_seqs=512)
    )
    numerics: AttentionSection = field(default_factory=AttentionSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.load_format in LOAD_FORMATS
        require(known, "load_format", self.load_format, f"one of {LOAD_FORMATS}")
        require(self.repeats >= 1, "repeats", self.repeats, "positive")
        require(self.cpu_threads >= 1, "cpu_threads", self.cpu_threads, "positive")
        own = ("attention", "load_format", "model_family", "seed")
        meaning = "attention, load_format, model_family and seed are the command's"
        require_default(self.engine, "engine", own, meaning)


@dataclass(kw_only=True)
class BenchEngineRun(BenchEngineSection):
    """`samebit bench engine`: output tokens per second of whole workloads."""

    run_name: str = "bench_engine"
    workloads: list[str] = field(
        default_factory=lambda: [
            "64x8x512x512",
            "1x1x512x256",
            "8x1x512x256",
            "64x1x512x256",
        ]  # fmt: skip
    )
    """Prompts x samples of each x input length x output length."""
    variants: list[str] = field(default_factory=lambda: ["default"])
    """default, no_graphs, no_overlap, no_groups, no_table, torch_kernels: an engine each."""
    cold: bool = False
    """Also start each engine in a process that finds empty caches, and time its first token."""
    peers: str | None = None
    """A JSON file of other engines' figures, printed beside ours where card, model and workload
    are the same."""
    profile: bool = False
    """Trace decode steps of the first workload; how much of them the GPU has something to run."""
    profile_steps: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_list("workloads", self.workloads)
        _check_list("variants", self.variants)
        require(self.profile_steps >= 1, "profile_steps", self.profile_steps, "positive")
        for text in self.workloads:
            Workload.parse(text)
        for name in self.variants:
            require(name in VARIANTS, "variants", name, f"one of {VARIANTS}")
        if not self.profile:
            require_default(self, "", ("profile_steps",), "profile is false")
        for variant, name in (
            ("no_graphs", "cuda_graphs"),
            ("no_overlap", "overlap"),
            ("no_groups", "group_attention"),
        ):
            if self.variants == [variant]:
                require_default(self.engine, "engine", (name,), f"variants is [{variant}]")


@dataclass(kw_only=True)
class BenchMemoryRun(BenchEngineSection):
    """`samebit bench memory`: an engine's memory, released and resumed by tag."""

    run_name: str = "bench_memory"
    workload: str = "8x2x64x16"
    """What is drawn before and after each row and in each cycle, always the same."""
    cycles: int = 200
    """Times that everything is released and resumed and the weights are updated, one behind the
    other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Workload.parse(self.workload)
        require(self.cycles >= 1, "cycles", self.cycles, "positive")
        meaning = "memory is released, with a backup and without"
        require_default(self.engine, "engine", ("releasable", "weights_backup"), meaning)


@dataclass(kw_only=True)
class BenchSyncRun(BenchEngineSection):
    """`samebit bench sync`: new weights on their way to an engine, by every transport."""

    run_name: str = "bench_sync"
    transports: list[str] | None = None
    """Of alias, ipc, nccl, gloo and file; unset: those for GPUs that there are, or for the CPU."""
    workload: str = "8x2x64x16"
    """What is drawn after each update, always the same."""
    engine: EngineConfig = field(
        default_factory=lambda: EngineConfig(kv_cache_tokens=1 << 16, max_num_seqs=64)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        Workload.parse(self.workload)
        if self.transports is not None:
            _check_list("transports", self.transports)
            for name in self.transports:
                require(name in FROM_ONE, "transports", name, f"one of {FROM_ONE}")


@dataclass(kw_only=True)
class BenchSpeculativeRun(BenchEngineSection):
    """`samebit bench speculative`: the same samples with guesses and without, by the batch."""

    run_name: str = "bench_speculative"
    proposers: list[str] = field(default_factory=lambda: ["suffix"])
    """As engine.speculative names them, each beside `none`; or simulated: guesses of which as many
    are right as simulated_acceptance says, at no cost."""
    simulated_acceptance: float = 0.7
    """Of each guess behind right ones."""
    num_draft_tokens: int = 5
    adaptive_drafts: bool = True
    draft_model: str | None = None
    """For eagle3 and hybrid; these three as an engine's settings."""
    block_draft_model: str | None = None
    """For peagle, as draft_model is for the others: the two stand beside each other."""
    batches: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128, 256])
    """Samples at a time."""
    samples_per_prompt: int = 1
    """Siblings among them, whose texts suffix reads too."""
    input_len: int = 512
    """Tokens of each prompt, which are random; of `data`, the most."""
    output_len: int = 256
    """Tokens of each sample; of `data`, the most."""
    temperature: float = 1.0
    data: DataConfig = field(default_factory=DataConfig)
    repeats: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_list("proposers", self.proposers)
        none = "none" not in self.proposers
        require(none, "proposers", self.proposers, "without none, which is measured beside them")
        likely = 0 <= self.simulated_acceptance <= 1
        require(likely, "simulated_acceptance", self.simulated_acceptance, "from 0 to 1")
        if "simulated" not in self.proposers:
            require_default(self, "", ("simulated_acceptance",), "proposers has no simulated")
        block, meaning = self.block_draft_model, "a block draft's folder where proposers has peagle"
        fits = (block is not None) == ("peagle" in self.proposers)
        require(fits, "block_draft_model", block, f"{meaning}, else unset")
        if not {"eagle3", "hybrid"} & {*self.proposers}:
            meaning = "proposers has neither eagle3 nor hybrid"
            require_default(self, "", ("draft_model",), meaning)
        require(len(self.batches) > 0, "batches", self.batches, "at least one")
        sizes = min(self.batches) >= 1 and max(self.batches) <= self.engine.max_num_seqs
        meaning = f"from 1 to engine.max_num_seqs, {self.engine.max_num_seqs}, each"
        require(sizes, "batches", self.batches, meaning)
        n = self.samples_per_prompt
        require(n >= 1, "samples_per_prompt", n, "positive")
        whole = all(size % n == 0 for size in self.batches)
        require(whole, "batches", self.batches, f"multiples of samples_per_prompt, {n}")
        for key in ("input_len", "output_len"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "positive")
        require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        meaning = "proposers chooses who guesses, and no prefix is to be found again"
        require_default(self.engine, "engine", ("speculative", "prefix_cache"), meaning)
        for name in self.proposers:
            replace(self.engine, **self.guessing(name))  # raises for what does not fit

    def guessing(self, proposer: str) -> dict[str, Any]:
        """What of EngineConfig says that this proposer guesses, or none."""
        if proposer == "none":
            return {"prefix_cache": False}
        name = "samebit.recipes.bench.simulated:Simulated" if proposer == "simulated" else proposer
        drafts = {"peagle": self.block_draft_model, "simulated": None, "suffix": None}
        return {
            "speculative": name,
            "num_draft_tokens": self.num_draft_tokens,
            "adaptive_drafts": self.adaptive_drafts,
            "draft_model": drafts.get(proposer, self.draft_model),
            "prefix_cache": False,
        }

    @property
    def has_data(self) -> bool:
        """Whether prompts are given, and not random."""
        return self.data.task != "file" or bool(self.data.path or self.data.sources)


@dataclass(kw_only=True)
class BenchKernelsRun(BenchRun):
    """`samebit bench kernels`: operations at a model's shapes against torch and the roofline."""

    run_name: str = "bench_kernels"
    tables: list[str] = field(default_factory=lambda: list(TABLES))
    """linear, attention (decode), shared (decode of groups), prefill (packed), training (the same
    with gradients), rows (norms, activations, sampling); FlashInfer's decode and prefill beside
    ours where it is installed."""
    rows: list[int] | None = None
    """Numbers of rows of linear's products; unset: from 1 to 8,192, and more of them to tune."""
    replays: int = 20
    """Timed replays of each CUDA graph."""
    tune: bool = False
    """Search for the fastest implementations of these shapes instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.replays >= 1, "replays", self.replays, "positive")
        some = self.rows is None or (len(self.rows) > 0 and min(self.rows) >= 1)
        require(some, "rows", self.rows, "positive numbers, at least one")
        _check_list("tables", self.tables)
        for name in self.tables:
            require(name in TABLES, "tables", name, f"one of {TABLES}")
        if self.tune:
            require_default(self, "", ("tables", "replays", "seed"), "tune is true")
        if "linear" not in self.tables:
            require_default(self, "", ("rows",), "tables has no linear")

    @property
    def measured_rows(self) -> list[int]:
        """Numbers of rows when it does not tune."""
        return self.rows or [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]


@dataclass(kw_only=True)
class BenchDraftRun(BenchRun):
    """`samebit bench draft`: optimizer steps of a new draft of a model's shape."""

    run_name: str = "bench_draft"
    packs: list[str] = field(default_factory=lambda: ["1x2176", "1x4096", "8x4096", "1x32768"])
    """Sequences x length of the one micro-batch of a step; an eighth of each sequence is a prompt.
    """
    draft_vocab_size: int | None = None
    """Tokens that the draft can say; unset: 32,000, or all where there are fewer."""
    draft_layers: list[int] | None = None
    """Numbers of the target's layers after which the draft reads its stream; unset: EAGLE-3's."""
    ttt: TttConfig = field(default_factory=TttConfig)
    repeats: int = 5
    """Timed steps, after one that warms up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_list("packs", self.packs)
        for text in self.packs:
            Pack.parse(text)
        meaning = "the command is bench draft, which evaluates none"
        require_default(self.ttt, "ttt", ("eval_passes",), meaning)
        size = self.draft_vocab_size
        require(size is None or size >= 1, "draft_vocab_size", size, "positive, or unset")
        require(self.repeats >= 1, "repeats", self.repeats, "positive")


@dataclass(kw_only=True)
class BenchTrainerRun(BenchRun):
    """`samebit bench trainer`: GRPO optimizer steps on random weights of a model's shape."""

    run_name: str = "bench_trainer"
    packs: list[str] = field(default_factory=lambda: ["8x1024", "1x8192"])
    """Sequences x length of a micro-batch."""
    tokens_per_step: int = 65536
    """At least as many tokens in an optimizer step."""
    repeats: int = 3
    """Timed steps and forwards, after one that warms up."""
    compare: bool = True
    """Also time the forward with torch's products and flash attention."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    numerics: AttentionSection = field(default_factory=AttentionSection)
    tp_invariant: bool = False
    """Sum row-parallel products so that a forward's bits do not depend on parallel.tensor."""

    @property
    def num_processes(self) -> int:
        """How many processes it runs in."""
        return self.parallel.num_processes

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_list("packs", self.packs)
        require(self.tokens_per_step >= 1, "tokens_per_step", self.tokens_per_step, "positive")
        require(self.repeats >= 1, "repeats", self.repeats, "positive")
        for text in self.packs:
            Pack.parse(text)
        check_tp_invariant(self.tp_invariant, self.parallel.tensor, "parallel.tensor")
        meaning = "the benchmark's gradients have no segments"
        require_default(self.parallel, "parallel", ("offload_segment_sums",), meaning)
        meaning = "the benchmark has no reference"
        require_default(self.parallel, "parallel", ("offload_reference",), meaning)
        meaning = "1 to compare with torch, whose attention knows no parts of contexts"
        fits = self.parallel.context == 1 or not self.compare
        require(fits, "parallel.context", self.parallel.context, meaning)
