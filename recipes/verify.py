"""samebit verify: measure every property of the promise on this machine, and say so in numbers."""

import gc
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from samebit.kernels.profile import numerics_profile
from samebit.kernels.registry import attention_kind
from samebit.recipes.config import ConfigError
from samebit.recipes.models.tiny_model import make_random_model
from samebit.recipes.run.folder import require_own_report
from samebit.recipes.run.provenance import write_result
from samebit.recipes.tools_config import VerifyRun
from samebit.recipes.verification.properties import PROPERTIES, Property
from samebit.recipes.verification.subject import Result, chained_digest, make_subject
from samebit.rollout.device import resolve_device
from samebit.rollout.models.registry import load_model_config

TINY_MODELS = {"qwen3": 64, "llama": 128}
"""What is verified where no model is named: architectures, and their head sizes on a GPU."""


def make_tiny_model(folder: Path, architecture: str, seed: int, device: torch.device) -> None:
    """Write one of TINY_MODELS; on a GPU with heads that every kernel takes, and room for contexts
    of several KV splits."""
    shape: dict[str, Any] = {}
    if device.type == "cuda":
        shape = {"head_dim": TINY_MODELS[architecture], "max_position_embeddings": 4096}
    make_random_model(folder, architecture, seed, tied=architecture == "llama", **shape)


def select_properties(names: Sequence[str] | None) -> list[Property]:
    """Return the properties of these names, in the order of a full run; None takes all."""
    known = {check.__name__: check for check in PROPERTIES}
    if unknown := sorted(set(names or ()) - set(known)):
        raise ConfigError(f"properties: no {', '.join(unknown)}; there are {', '.join(known)}")
    return [check for name, check in known.items() if names is None or name in names]


def outcomes_digest(results: Mapping[str, Sequence[Result]]) -> str:
    """Return one digest over those of all models and properties, in order."""
    digest = ""
    for model, group in results.items():
        for result in group:
            name = f"{model}, {result.name}"
            digest = chained_digest(digest, name, bytes.fromhex(result.outcomes_digest))
    return digest


@dataclass(frozen=True)
class Measured:
    """Holds what was found on one model."""

    results: list[Result]
    drawn: int
    """Different tokens that were drawn to compare with."""

    @property
    def untried(self) -> list[str]:
        """Nothing was found out about these properties."""
        return [result.name for result in self.results if not result.was_tried]


def verify_model(
    model_path: Path,
    label: str,
    device: torch.device,
    properties: Sequence[Property] = PROPERTIES,
    load_format: str = "safetensors",
    attention: str = "canonical",
) -> Measured:
    """Measure the properties of one model, printing them as they come."""
    subject = make_subject(model_path, device, load_format, attention)
    results = []
    for check in properties:
        result = check(subject)
        gc.collect()  # engines hold gigabytes; the next property makes its own
        results.append(result)
        tried = "" if result.was_tried or result.mismatches else "could not be tried"
        print(
            f"{label:10s} {result.name:26s} {result.cases:6,d} {result.tokens:11,d} "
            f"{result.mismatches:10,d} {tried or result.outcomes_digest[:16]}",
            flush=True,
        )
        for note in [*result.notes, *(f"not tried: {reason}" for reason in result.untried)]:
            print(f"{'':10s}   {note}", flush=True)
    return Measured(results, subject.num_drawn + sum(result.drawn for result in results))


def failure(found: Mapping[str, Measured], asked_for: bool) -> str | None:
    """Say in a line why the promise is not shown to hold; None if it is.

    asked_for: whether the properties were named one by one, so that each has to be tried.
    """
    results = [result for measured in found.values() for result in measured.results]
    if mismatches := sum(result.mismatches for result in results):
        return f"{mismatches:,d} mismatches"
    if not any(result.was_tried for result in results):
        return "nothing was compared, so nothing is shown"
    untried = [f"'{name}' ({model})" for model, m in found.items() for name in m.untried]
    if untried and asked_for:
        return f"asked for and could not be tried: {', '.join(untried)}"
    return None


def make_report(
    found: Mapping[str, Measured], device: torch.device, attention: str
) -> dict[str, Any]:
    """Return what verify.json holds."""
    results = {name: measured.results for name, measured in found.items()}
    everything = [result for group in results.values() for result in group]
    comparisons = sum(result.tokens for result in everything)
    return {
        "numerics": asdict(numerics_profile(device, attention=attention_kind(attention))),
        "tokens": comparisons,
        "comparisons": comparisons,
        "distinct_tokens": sum(measured.drawn for measured in found.values()),
        "mismatches": sum(result.mismatches for result in everything),
        "could_not_be_tried": {name: measured.untried for name, measured in found.items()},
        "outcomes_digest": outcomes_digest(results),
        "models": {name: [asdict(r) for r in group] for name, group in results.items()},
    }


def main(run: VerifyRun) -> int:
    """The command `samebit verify`; exit code 1 on any mismatch, and if nothing was compared, or a
    property that was asked for by name could not be tried."""
    properties = select_properties(run.properties)
    target = run.run_dir / "verify.json"
    require_own_report(target)
    torch.set_num_threads(run.cpu_threads)
    device, kind = resolve_device(run.device), run.numerics.attention
    counts = f"{'cases':>6s} {'comparisons':>11s} {'mismatches':>10s}"
    print(f"{'model':10s} {'property':26s} {counts} outcomes")
    found: dict[str, Measured] = {}
    if run.model is not None:
        path = Path(run.model)
        load_model_config(path, run.model_family)
        measured = verify_model(path, path.name[:10], device, properties, run.load_format, kind)
        found[path.name] = measured
    else:
        with tempfile.TemporaryDirectory() as folder:
            for architecture in TINY_MODELS:
                path = Path(folder) / architecture
                make_tiny_model(path, architecture, run.seed, device)
                measured = verify_model(path, architecture, device, properties, attention=kind)
                found[architecture] = measured
    report = make_report(found, device, kind)
    cases = sum(result.cases for measured in found.values() for result in measured.results)
    comparisons, mismatches = report["comparisons"], report["mismatches"]
    print(f"{'all':37s} {cases:6,d} {comparisons:11,d} {mismatches:10,d}")
    print(f"These are {comparisons:,d} comparisons of {report['distinct_tokens']:,d} drawn tokens.")
    for name, untried in report["could_not_be_tried"].items():
        if untried:
            print(f"Could not be tried on {name}: {', '.join(untried)}.")
    print(f"outcomes_digest {report['outcomes_digest']}")
    write_result(target, device, report)
    print(f"{target} holds the report.")
    reason = failure(found, run.properties is not None)
    if reason is not None:
        print(f"samebit verify: {reason}", file=sys.stderr)
    return 0 if reason is None else 1
