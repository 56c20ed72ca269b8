"""samebit verify: measure every property of the promise on this machine, and say so in numbers."""

import gc
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from samebit.kernels.profile import numerics_profile
from samebit.recipes.config import VerifyRun
from samebit.recipes.metrics import write_atomically
from samebit.recipes.provenance import provenance
from samebit.recipes.tiny_model import make_random_model
from samebit.recipes.verification.properties import PROPERTIES
from samebit.recipes.verification.subject import Result, make_subject
from samebit.rollout.config import resolve_device


def verify_model(
    model_path: Path, label: str, device: torch.device, load_format: str = "safetensors"
) -> list[Result]:
    """Every property of one model, printed as it is measured."""
    subject = make_subject(model_path, device, load_format)
    results = []
    for check in PROPERTIES:
        result = check(subject)
        gc.collect()  # engines hold gigabytes; the next property makes its own
        results.append(result)
        print(
            f"{label:10s} {result.name:26s} {result.cases:6,d} {result.tokens:10,d} "
            f"{result.mismatches:10,d}",
            flush=True,
        )
        for note in result.notes:
            print(f"{'':10s}   {note}", flush=True)
    return results


def main(run: VerifyRun) -> int:
    """The command `samebit verify`; exit code 1 on any mismatch."""
    torch.set_num_threads(run.cpu_threads)
    device = resolve_device(run.device)
    print(f"{'model':10s} {'property':26s} {'cases':>6s} {'tokens':>10s} {'mismatches':>10s}")
    results: dict[str, list[Result]] = {}
    if run.model is not None:
        path = Path(run.model)
        results[path.name] = verify_model(path, path.name[:10], device, run.load_format)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for architecture, tied in (("qwen3", False), ("llama", True)):
                path = Path(folder) / architecture
                make_random_model(path, architecture, run.seed, tied=tied)
                results[architecture] = verify_model(path, architecture, device)
    everything = [r for group in results.values() for r in group]
    tokens, mismatches = (sum(getattr(r, k) for r in everything) for k in ("tokens", "mismatches"))
    print(f"{'all':37s} {sum(r.cases for r in everything):6,d} {tokens:10,d} {mismatches:10,d}")
    report: dict[str, Any] = {
        **provenance(["samebit", *sys.argv[1:]]),
        "numerics": asdict(numerics_profile(device)),
        "tokens": tokens,
        "mismatches": mismatches,
        "models": {name: [asdict(r) for r in group] for name, group in results.items()},
    }
    target = Path(run.output_dir) / run.run_name / "verify.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, json.dumps(report, indent=1) + "\n")
    print(f"{target} holds the report.")
    return 1 if mismatches else 0
