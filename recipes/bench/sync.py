"""samebit bench sync: how long an engine is without an answer while it takes new weights.

A dict of parameters stands for the trainer. A window is from pause_generation, of an engine that
has nothing unfinished, to the first token after continue_generation: the sender's digest, the way
of the bytes, the engine's check of what came. What changes the weights is not in it. Every update
turns the weights into one of two versions; afterwards the engine has to draw what an engine on the
sender's own memory drew.
"""

import tempfile
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from samebit.recipes.bench.bars import TRANSFER_MS, UPDATE_MS, WINDOW_MS, Bars
from samebit.recipes.bench.config import BenchSyncRun, Workload
from samebit.recipes.bench.output import REPORT_FILE, BenchError, format_table
from samebit.recipes.bench.prompts import FixedPrompts, Outcome, PromptSource, timed_run
from samebit.recipes.bench.start import FIRST, fill, report_of, settings_of
from samebit.recipes.bench.timing import Spread, free_memory, timed
from samebit.recipes.launch.updates import Source, connect, why_not_here
from samebit.recipes.run.folder import require_own_report
from samebit.recipes.run.provenance import device_name, write_result
from samebit.rollout.device import DeviceError, resolve_device, resolve_dtype
from samebit.rollout.models.registry import load_model_config
from samebit.weight_sync.transports.registry import FROM_ONE
from samebit.weight_sync.transports.remote import RemoteTransport

_PARTS = ("digest", "begin", "transfer", "commit", "update", "first_token")


type Truth = dict[int, list[Outcome]]
"""What each of the two versions draws, by an engine on the source's own memory."""


def make_source(run: BenchSyncRun, device: torch.device) -> Source:
    """The weights that the run asks for, in this process."""
    specs = load_model_config(run.model, run.model_family).param_specs()
    dtype = resolve_dtype(None, device)
    params = {s.name: torch.empty(s.shape, dtype=dtype, device=device) for s in specs}
    fill(run, specs, params)
    return Source(params, specs)


class Receiver:
    """An engine, and what keeps it on the source's weights."""

    def __init__(self, name: str, run: BenchSyncRun, source: Source, folder: Path) -> None:
        place = run.model, settings_of(run), folder, run.cpu_threads
        self.engine, self.weights = connect(name, source, *place)
        self._source = source
        vocab_size = load_model_config(run.model, run.model_family).vocab_size
        self._prompts = PromptSource(vocab_size, run.seed + 1)

    def window(self) -> dict[str, float]:
        """Take the next step's weights: seconds of the whole and of its parts."""
        source, engine, weights = self._source, self.engine, self.weights

        def prepare() -> None:
            engine.pause_generation("abort")
            weights.lease(source.step + 1)

        _, before = timed(prepare, source.device)
        timed(source.change, source.device)
        start = time.perf_counter()
        digest = source.version.digest
        digested = time.perf_counter()
        weights.update(source.params, digest)
        updated = time.perf_counter()
        engine.continue_generation()
        timed_run(engine, self._prompts, FIRST)
        end = time.perf_counter()
        found = {"window_s": before + end - start, "digest_s": digested - start}
        found |= {"update_s": updated - digested, "first_token_s": end - updated}
        if isinstance(weights, RemoteTransport):
            found |= {f"{part}_s": seconds for part, seconds in weights.seconds.items()}
        return found

    def close(self) -> None:
        """Let go of both."""
        self.weights.close()
        self.engine.close()


def run_transport(
    name: str, run: BenchSyncRun, source: Source, prompts: FixedPrompts, truth: Truth
) -> dict[str, Any]:
    """Seconds of the windows of `repeats` updates, after one that warms up; bytes and their rate.

    Raises BenchError unless after each the engine serves the source's step and digest and draws
    what `truth` has of that version, which is filled in where it has nothing yet.
    """
    windows, tokens = list[dict[str, float]](), 0
    with tempfile.TemporaryDirectory(prefix="samebit_sync_") as folder:
        receiver = Receiver(name, run, source, Path(folder) / "weights")
        with closing(receiver):
            for _ in range(run.repeats + 1):
                windows.append(receiver.window())
                served, expected = receiver.engine.weight_version, source.version
                if served != expected:
                    raise BenchError(f"{name}: {served} is served in place of {expected}")
                version = source.step % 2
                if version not in truth:
                    truth[version] = prompts.outcomes(receiver.engine)
                tokens += prompts.require_same(receiver.engine, truth[version], f"after {name}")
    parts = {key: Spread.of([w[key] for w in windows[1:]]) for key in windows[0]}
    found: dict[str, Any] = {key: asdict(spread) for key, spread in parts.items()}
    moved = parts.get("transfer_s")
    rate = {} if moved is None else {"bytes_s": source.num_bytes / moved.median}
    return {**found, **rate, "bytes": source.num_bytes, "tokens_compared": tokens}


def chosen(run: BenchSyncRun, device: torch.device) -> list[str]:
    """The transports that the run asks for, or that are for this machine's devices.

    Raises DeviceError for one that is between more GPUs than there are.
    """
    if run.transports is None:
        of_cpus = ("gloo", "file") if device.type == "cuda" else ()
        return [n for n in FROM_ONE if n not in of_cpus and not why_not_here(n, device)]
    for name in run.transports:
        if reason := why_not_here(name, device):
            raise DeviceError(f"transports: {reason}")
    return run.transports


def summary(report: dict[str, Any], device: torch.device) -> str:
    """The table and what its columns mean."""
    bars = Bars(device_name(device), report["model"])
    limits = {"window": WINDOW_MS, "update": UPDATE_MS, "transfer": TRANSFER_MS}
    rows = [["transport", "window ms", "min", "max", *(p.replace("_", " ") for p in _PARTS)]]
    rows[0] += ["GiB", "GiB/s"]
    for name, found in report["transports"].items():

        def ms(part: str, name: str = name, found: dict[str, Any] = found) -> str:
            if (spread := found.get(f"{part}_s")) is None:
                return "-"
            return bars.beside(1e3 * spread["median"], limits.get(part, {}).get(name))

        window = found["window_s"]
        row = [name, ms("window"), *(f"{1e3 * window[k]:,.1f}" for k in ("min", "max"))]
        row += [ms(part) for part in _PARTS]
        row.append(f"{found['bytes'] / 2**30:,.2f}")
        row.append(f"{found['bytes_s'] / 2**30:,.1f}" if "bytes_s" in found else "-")
        rows.append(row)
    compared = sum(found["tokens_compared"] for found in report["transports"].values())
    return "\n".join(
        [
            format_table(rows),
            "window: from the pause of an idle engine to the first token of a new prompt. In it: "
            "the sender's digest; the update (begin, transfer, commit with the engine's digest); "
            "the first token. GiB/s: of the transfer.",
            f"{compared:,} tokens and their log-probs compared with those of an engine on the "
            "sender's own memory: all were equal.",
        ]
    )


def main(run: BenchSyncRun) -> int:
    """The command `samebit bench sync`."""
    require_own_report(run.run_dir / REPORT_FILE)
    torch.set_num_threads(run.cpu_threads)
    device = resolve_device(run.device)
    names, found = chosen(run, device), dict[str, Any]()
    report = report_of(run, device) | {"transports": found}
    source = make_source(run, device)
    truth: Truth = {}
    vocab_size = load_model_config(run.model, run.model_family).vocab_size
    prompts = FixedPrompts.of(PromptSource(vocab_size, run.seed), Workload.parse(run.workload))
    for name in dict.fromkeys(("alias", *names)):
        entry = run_transport(name, run, source, prompts, truth)
        if truth[0] == truth[1]:
            raise BenchError("both versions of the weights draw the same: nothing can be told")
        free_memory(device)  # the engine's goes to the next one
        if name in names:
            found[name] = entry
            write_result(run.run_dir / REPORT_FILE, device, report)
    print(summary(report, device))
    print(f"{run.run_dir / REPORT_FILE} holds the report.")
    return 0
