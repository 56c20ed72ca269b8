"""samebit bench speculative: the same samples with guesses and without, by the size of the batch.

One engine for each way to guess, and one that guesses nothing; all serve the same weights. Each
repeat asks them for the same samples in turn, and what they draw must be equal to the bit. Prompts
are those of `data`, which end as they end; without one they are random, and no end is looked for.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from samebit.recipes.bench import simulated
from samebit.recipes.bench.config import BenchSpeculativeRun, Workload
from samebit.recipes.bench.output import REPORT_FILE, BenchError, format_table
from samebit.recipes.bench.prompts import Outcome, PromptSource
from samebit.recipes.bench.start import report_of, settings_of
from samebit.recipes.bench.timing import Spread, timed
from samebit.recipes.data.records import Encoder, Split
from samebit.recipes.data.tasks.registry import load_datasets
from samebit.recipes.data.text import TextCodec
from samebit.recipes.run.folder import require_own_report
from samebit.recipes.run.provenance import write_result
from samebit.rollout.device import resolve_device
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.types import SamplingParams

NONE, SIMULATED = "none", "simulated"


@dataclass
class _Measured:
    """A way to guess, at one size of the batch."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Of each repeat."""
    accepted: AcceptLengths | None = None

    def entry(self, none: "_Measured") -> dict[str, Any]:
        """What the report says of it, beside the one that guesses nothing."""
        rate, other = (
            Spread.of([n / s for n, s in zip(x.tokens, x.seconds, strict=True)])
            for x in (self, none)
        )
        found: dict[str, Any] = {
            "output_tokens_s": asdict(rate),
            "seconds": self.seconds,
            "output_tokens": self.tokens,
            "x_none": rate.median / other.median,
        }
        if self.accepted is not None and self.accepted.verifications:
            found["accept_length"] = self.accepted.accept_length
            found["acceptance"] = self.accepted.acceptance
        return found


class Prompts:
    """Prompts for one repeat after another, of `data` or random."""

    def __init__(self, run: BenchSpeculativeRun) -> None:
        self._run, self._next = run, 0
        self.vocab_size = load_model_config(run.model, run.model_family).vocab_size
        self._source = PromptSource(self.vocab_size, run.seed)
        self._split: Split | None = None
        if run.has_data:
            encoder = Encoder(
                text=TextCodec(run.model, run.data.chat), vocab_size=self.vocab_size,
                max_len=run.input_len, limit="input_len", policy=run.data.overlong_prompts,
            )  # fmt: skip
            self._split = Split("held-out split", load_datasets(run.data)[1], encoder)
            if not len(self._split):
                raise BenchError("data has no held-out problems: give data.eval_size")

    def draw(self, count: int) -> tuple[list[list[int]], list[list[int]]]:
        """(prompts, the sample id of each) of one repeat."""
        run = self._run
        prompts, ids = self._source.draw(Workload(count, 1, run.input_len, run.output_len))
        if self._split is not None:
            places = range(self._next, self._next + count)
            problems = [self._split[i % len(self._split)] for i in places]
            prompts = [list(self._split.encoded(problem).prompt_ids) for problem in problems]
            self._next += count
        return prompts, ids


def engines_of(run: BenchSpeculativeRun, device: torch.device) -> dict[str, Engine]:
    """An engine by each way to guess, on the same weights."""
    page = run.engine.page_size
    longest = run.input_len + run.output_len + run.num_draft_tokens + page
    tokens = run.engine.kv_cache_tokens or max(run.batches) * -(-longest // page) * page
    made: dict[str, Engine] = {}
    for name in (NONE, *run.proposers):
        settings = settings_of(run, kv_cache_tokens=tokens, **run.guessing(name))
        weights = made[NONE].weights if made else None
        made[name] = Engine(run.model, settings, device=device, weights=weights)
    return made


def measure(
    run: BenchSpeculativeRun, engines: dict[str, Engine], prompts: Prompts, batch: int
) -> dict[str, Any]:
    """One repeat that warms up, and those that count; BenchError for other tokens than without."""
    device, found = engines[NONE].device, {name: _Measured() for name in engines}
    params = SamplingParams(
        temperature=run.temperature, max_new_tokens=run.output_len, ignore_eos=not run.has_data
    )
    for repeat in range(-1, run.repeats):
        prompt_ids, ids = prompts.draw(batch)
        truth: list[Outcome] = []
        for name, engine in engines.items():
            before = engine.accept_lengths
            groups, seconds = timed(partial(engine.generate, prompt_ids, params, ids), device)
            drawn = [(tuple(c.token_ids), tuple(c.logprobs)) for group in groups for c in group]
            if name == NONE:
                truth = drawn
                for [i], (tokens, _) in zip(ids, drawn, strict=True):
                    simulated.expect(i, tokens, run.simulated_acceptance, prompts.vocab_size)
            elif apart := sum(a != b for a, b in zip(drawn, truth, strict=True)):
                raise BenchError(
                    f"{name}, {batch} at a time: {apart} of {batch} samples are not those that are "
                    "drawn without guesses"
                )
            if repeat >= 0:
                measured = found[name]
                measured.seconds.append(seconds)
                measured.tokens.append(sum(len(tokens) for tokens, _ in drawn))
                if before is not None and engine.accept_lengths is not None:
                    more = engine.accept_lengths - before
                    measured.accepted = more + measured.accepted if measured.accepted else more
        simulated.GUESSES.clear()
    return {name: measured.entry(found[NONE]) for name, measured in found.items()}


def table_of(batches: dict[str, dict[str, Any]]) -> str:
    """A line for each size of the batch and way to guess."""
    rows = [["batch", "guesses by", "tok/s", "min", "max", "x none", "accept length"]]
    for batch, entry in batches.items():
        for name, found in entry.items():
            rates = (f"{found['output_tokens_s'][k]:,.1f}" for k in ("median", "min", "max"))
            accepted = f"{found['accept_length']:.2f}" if "accept_length" in found else "-"
            rows.append([batch, name, *rates, f"{found['x_none']:.2f}", accepted])
    return format_table(rows, num_left=2)


def main(run: BenchSpeculativeRun) -> int:
    """The command `samebit bench speculative`."""
    require_own_report(run.run_dir / REPORT_FILE)
    torch.set_num_threads(run.cpu_threads)
    device = resolve_device(run.device)
    report = report_of(run, device)
    batches = report["batches"] = dict[str, dict[str, Any]]()
    save: Callable[[], object] = partial(write_result, run.run_dir / REPORT_FILE, device, report)
    prompts = Prompts(run)
    engines = engines_of(run, device)
    for batch in run.batches:
        batches[str(batch)] = measure(run, engines, prompts, batch)
        save()
        print(table_of({str(batch): batches[str(batch)]}), flush=True)
    for engine in engines.values():
        engine.close()
    print(f"\n{table_of(batches)}\n")
    if SIMULATED in run.proposers:
        print(
            f"{SIMULATED}: no proposer; each guess is right with a probability of "
            f"{run.simulated_acceptance:g}, and costs nothing."
        )
    print(f"{run.run_dir / REPORT_FILE} holds the report.")
    return 0
