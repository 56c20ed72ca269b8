"""samebit verify: measure every property of the promise on this machine, and say so in numbers."""

import gc
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from samebit.kernels.profile import numerics_profile
from samebit.recipes.compose import ConfigError
from samebit.recipes.config import VerifyRun
from samebit.recipes.metrics import write_atomically
from samebit.recipes.provenance import provenance
from samebit.recipes.run_folder import require_own_report
from samebit.recipes.tiny_model import make_random_model
from samebit.recipes.verification.properties import PROPERTIES, Property
from samebit.recipes.verification.subject import Result, chained_digest, make_subject
from samebit.rollout.config import resolve_device


def select_properties(names: Sequence[str] | None) -> list[Property]:
    """The properties of these names, in the order of a full run; None takes all."""
    known = {check.__name__: check for check in PROPERTIES}
    if unknown := sorted(set(names or ()) - set(known)):
        raise ConfigError(f"properties: no {', '.join(unknown)}; there are {', '.join(known)}")
    return [check for name, check in known.items() if names is None or name in names]


def outcomes_digest(results: Mapping[str, Sequence[Result]]) -> str:
    """One digest over those of all models and properties, in order."""
    digest = ""
    for model, group in results.items():
        for result in group:
            name = f"{model}, {result.name}"
            digest = chained_digest(digest, name, bytes.fromhex(result.outcomes_digest))
    return digest


def verify_model(
    model_path: Path,
    label: str,
    device: torch.device,
    properties: Sequence[Property] = PROPERTIES,
    load_format: str = "safetensors",
) -> list[Result]:
    """Properties of one model, printed as they are measured."""
    subject = make_subject(model_path, device, load_format)
    results = []
    for check in properties:
        result = check(subject)
        gc.collect()  # engines hold gigabytes; the next property makes its own
        results.append(result)
        print(
            f"{label:10s} {result.name:26s} {result.cases:6,d} {result.tokens:10,d} "
            f"{result.mismatches:10,d} {result.outcomes_digest[:16]}",
            flush=True,
        )
        for note in result.notes:
            print(f"{'':10s}   {note}", flush=True)
    return results


def main(run: VerifyRun) -> int:
    """The command `samebit verify`; exit code 1 on any mismatch."""
    properties = select_properties(run.properties)
    target = Path(run.output_dir) / run.run_name / "verify.json"
    require_own_report(target)
    torch.set_num_threads(run.cpu_threads)
    device = resolve_device(run.device)
    counts = f"{'cases':>6s} {'tokens':>10s} {'mismatches':>10s}"
    print(f"{'model':10s} {'property':26s} {counts} outcomes")
    results: dict[str, list[Result]] = {}
    if run.model is not None:
        path = Path(run.model)
        results[path.name] = verify_model(path, path.name[:10], device, properties, run.load_format)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for architecture, tied in (("qwen3", False), ("llama", True)):
                path = Path(folder) / architecture
                make_random_model(path, architecture, run.seed, tied=tied)
                results[architecture] = verify_model(path, architecture, device, properties)
    everything = [r for group in results.values() for r in group]
    tokens, mismatches = (sum(getattr(r, k) for r in everything) for k in ("tokens", "mismatches"))
    print(f"{'all':37s} {sum(r.cases for r in everything):6,d} {tokens:10,d} {mismatches:10,d}")
    digest = outcomes_digest(results)
    print(f"outcomes_digest {digest}")
    report: dict[str, Any] = {
        **provenance(["samebit", *sys.argv[1:]], device),
        "numerics": asdict(numerics_profile(device)),
        "tokens": tokens,
        "mismatches": mismatches,
        "outcomes_digest": digest,
        "models": {name: [asdict(r) for r in group] for name, group in results.items()},
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, json.dumps(report, indent=1) + "\n")
    print(f"{target} holds the report.")
    return 1 if mismatches else 0
