"""How long an engine takes until its first token, and what it compiles on the way.

A cold start is one in a process of its own that finds nothing on disk from earlier runs: neither
Triton's compiled kernels nor the driver's, nor the remembered self-check. Files of weights are read
as the machine's page cache has them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from samebit.kernels.profile import numerics_profile
from samebit.kernels.registry import attention_kind
from samebit.recipes.bench.config import BenchEngineRun, BenchEngineSection, Workload
from samebit.recipes.bench.output import BenchError, model_fields
from samebit.recipes.bench.prompts import PromptSource, timed_run
from samebit.recipes.bench.variants import SETTINGS, kernels_of
from samebit.rollout.config import EngineConfig
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_dummy, load_safetensors
from samebit.rollout.speculative.making import open_speculation
from samebit.weight_sync.mapping import ParamSpec

FIRST = Workload(num_prompts=1, num_samples=1, input_len=16, output_len=1)
_CACHES = ("TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME")


def settings_of(run: BenchEngineSection, **changes: Any) -> EngineConfig:
    """The engine's settings as the run asks for them, with `changes` by name."""
    own: dict[str, Any] = {"load_format": run.load_format, "seed": run.seed}
    own |= {"attention": run.numerics.attention, "model_family": run.model_family}
    return replace(run.engine, **own | changes)


def fill(run: BenchEngineSection, specs: Sequence[ParamSpec], params: Mapping[str, Tensor]) -> None:
    """Fill parameters, in place, with the weights that the run asks for."""
    if run.load_format == "dummy":
        load_dummy(specs, params, run.seed)
    else:
        load_safetensors(Path(run.model), specs, params)


def report_of(run: BenchEngineSection, device: torch.device) -> dict[str, Any]:
    """What a report says of its engine: the model, its weights, the settings, the profile."""
    model = load_model_config(run.model, run.model_family)  # before anything is written
    open_speculation(run.engine, model)
    defaults, kind = asdict(EngineConfig()), attention_kind(run.numerics.attention)
    return {
        **model_fields(run.model),
        "load_format": run.load_format,
        "engine": {k: v for k, v in asdict(run.engine).items() if v != defaults[k]},
        "numerics": asdict(numerics_profile(device, attention=kind)),
    }


@dataclass(frozen=True, kw_only=True)
class Start:
    """What Engine is made of, so that another process can do it too."""

    model: str
    device: str
    cpu_threads: int
    variant: str
    settings: dict[str, Any]
    """Of EngineConfig."""

    @classmethod
    def of(cls, run: BenchEngineRun, variant: str, device: torch.device) -> Self:
        """The variant's engine as the run asks for it."""
        settings = asdict(settings_of(run, **SETTINGS.get(variant, {})))
        return cls(
            model=run.model, device=str(device), cpu_threads=run.cpu_threads, variant=variant,
            settings=settings,
        )  # fmt: skip


@contextmanager
def compilations() -> Iterator[dict[str, float]]:
    """Counts Triton's kernels: compiled, with the seconds that took, and found on disk."""
    from triton import knobs

    found = {"kernels_compiled": 0, "compile_s": 0.0, "kernels_from_cache": 0}

    def listen(*, times: Any, cache_hit: bool, **_: Any) -> None:
        found["kernels_from_cache" if cache_hit else "kernels_compiled"] += 1
        if not cache_hit:
            found["compile_s"] += times.total / 1e6

    before, knobs.compilation.listener = knobs.compilation.listener, listen
    try:
        yield found
    finally:
        knobs.compilation.listener = before


def start_engine(start: Start) -> tuple[Engine, PromptSource, dict[str, float]]:
    """A new engine, and the seconds from its call until it was there and until it had given its
    first token; on a GPU also what was compiled by then."""
    torch.set_num_threads(start.cpu_threads)
    with compilations() as compiled:
        begin = time.perf_counter()
        engine = Engine(start.model, device=start.device, **start.settings)
        there = time.perf_counter()
        source = PromptSource(engine.model_config.vocab_size, engine.config.seed)
        timed_run(engine, source, FIRST)
        done = time.perf_counter()
    seconds = {"start_s": there - begin, "first_token_s": done - begin}
    return engine, source, seconds | (compiled if engine.device.type == "cuda" else {})


def cold_start(start: Start) -> dict[str, float]:
    """start_engine's seconds in a new process with empty caches, and process_s, which counts from
    that process's own start. BenchError if it fails."""
    with tempfile.TemporaryDirectory(prefix="samebit_cold_") as folder:
        environment = os.environ | {name: os.path.join(folder, name) for name in _CACHES}
        begin = time.monotonic()
        child = subprocess.run(
            [sys.executable, "-P", "-m", "samebit.recipes.bench.start"],
            input=json.dumps(asdict(start)), env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    if child.returncode != 0:
        raise BenchError(f"cold: the engine's process ended with code {child.returncode}")
    found = json.loads(child.stdout.splitlines()[-1])
    return {"process_s": found.pop("done") - begin, **found}


def describe(entry: dict[str, Any]) -> list[str]:
    """A variant's starts in words."""
    lines = []
    for name, what in (("start", ""), ("cold_start", "cold, ")):
        if (found := entry.get(name)) is None:
            continue
        line = f"{what}engine made in {found['start_s']:.1f} s, first token after "
        line += f"{found['first_token_s']:.1f} s"
        if "process_s" in found:
            line += f", {found['process_s']:.1f} s after its process was started"
        if "kernels_compiled" in found:
            line += (
                f"; {found['kernels_compiled']} kernels compiled in {found['compile_s']:.1f} s, "
                f"{found['kernels_from_cache']} found compiled on disk"
            )
        lines.append(line)
    return lines


def main() -> int:
    """The child of cold_start: reads what to start, prints the seconds and when it was done."""
    start = Start(**json.load(sys.stdin))
    with kernels_of(start.variant, torch.device(start.device).type):
        engine, _, seconds = start_engine(start)
        done = time.monotonic()  # one clock for all processes of a machine
        engine.close()
    print(json.dumps(seconds | {"done": done}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
