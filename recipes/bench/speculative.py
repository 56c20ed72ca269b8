"""samebit bench speculative: the same samples with guesses and without, by the size of the batch.

One engine for each way to guess, and one that guesses nothing; all serve the same weights. Each
repeat asks them for the same samples in turn, and what they draw must be equal to the bit. Prompts
are those of `data`, which end as they end, the next ones in each repeat; without one they are
random, and no end is looked for.
"""

import functools
import math
import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch

from samebit.recipes.bench import simulated
from samebit.recipes.bench.config import BenchSpeculativeRun, Workload
from samebit.recipes.bench.output import REPORT_FILE, BenchError, format_table
from samebit.recipes.bench.prompts import Outcome, PromptSource
from samebit.recipes.bench.start import report_of, settings_of
from samebit.recipes.bench.timing import Spread, captures, timed
from samebit.recipes.data.records import Encoder, Split
from samebit.recipes.data.tasks.registry import load_datasets
from samebit.recipes.data.text import TextCodec
from samebit.recipes.run.folder import require_own_report
from samebit.recipes.run.provenance import write_result
from samebit.rollout.device import resolve_device, resolve_dtype
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.speculative.making import open_speculation
from samebit.rollout.types import SamplingParams

NONE, SIMULATED = "none", "simulated"
_GIB = 2**30
_WARM_UPS = 10  # at most: guesses of other lengths, and contexts, need graphs of their own


class _Turn(NamedTuple):
    """One repeat of an engine."""

    seconds: float
    tokens: int
    accepted: AcceptLengths | None
    captured: int
    """CUDA graphs, whose capture is in the seconds."""


def _entry(turns: Sequence[_Turn], none: Sequence[_Turn]) -> dict[str, Any]:
    """What the report says of an engine's turns, beside those of the one that guesses nothing."""
    ratios = [other.seconds / own.seconds for own, other in zip(turns, none, strict=True)]
    found: dict[str, Any] = {
        "output_tokens_s": asdict(Spread.of([turn.tokens / turn.seconds for turn in turns])),
        "seconds": [turn.seconds for turn in turns],
        "output_tokens": [turn.tokens for turn in turns],
        "x_none": statistics.median(ratios),
        "graphs_captured": sum(turn.captured for turn in turns),
    }
    counts = [turn.accepted for turn in turns if turn.accepted is not None]
    if counts and (accepted := functools.reduce(operator.add, counts)).verifications:
        found["verifications"] = accepted.verifications
        found["accept_length"] = accepted.accept_length
        found["acceptance"] = accepted.acceptance
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
            self._split = Split("held-out split", load_datasets(run.data.of_prompts())[1], encoder)
            if not len(self._split):
                raise BenchError("data has no held-out problems: give data.eval_size")

    def draw(self, count: int) -> tuple[list[list[int]], list[list[int]]]:
        """(prompts, the sample ids of each) of one repeat of `count` samples."""
        run, n = self._run, self._run.samples_per_prompt
        count //= n
        prompts, ids = self._source.draw(Workload(count, n, run.input_len, run.output_len))
        if self._split is not None:
            places = range(self._next, self._next + count)
            problems = [self._split[i % len(self._split)] for i in places]
            prompts = [list(self._split.encoded(problem).prompt_ids) for problem in problems]
            self._next += count
        return prompts, ids


def _kv_tokens(run: BenchSpeculativeRun) -> int:
    """That an engine has room for: of whole pages of the most samples at a time."""
    page = run.engine.page_size
    longest = run.input_len + run.output_len + run.num_draft_tokens + page
    return run.engine.kv_cache_tokens or max(run.batches) * -(-longest // page) * page


def require_memory(run: BenchSpeculativeRun, dtype: torch.dtype, free: int) -> None:
    """BenchError unless weights and every engine's keys and values are within `free` bytes.

    Raises what open_speculation does for a draft that does not fit, too.
    """
    model, num_tokens = load_model_config(run.model, run.model_family), _kv_tokens(run)
    specs, kv = [*model.param_specs()], 0
    for name in (NONE, *run.proposers):
        layouts = [model.kv_layout]
        folder = open_speculation(settings_of(run, **run.guessing(name)), model)
        if folder is not None:
            layouts.append(folder.config.kv_layout)
            specs += folder.config.param_specs()
        kv += num_tokens * sum(layout.bytes_per_token(dtype) for layout in layouts)
    weights = sum(math.prod(spec.shape) for spec in specs) * dtype.itemsize
    if kv + weights > free:
        raise BenchError(
            f"weights take {weights / _GIB:,.1f} GiB, keys and values of {num_tokens:,} tokens in "
            f"each of {1 + len(run.proposers)} engines {kv / _GIB:,.1f} GiB; {free / _GIB:,.1f} "
            "GiB are free: ask for smaller batches, shorter texts, or fewer proposers at a time"
        )


def engines_of(run: BenchSpeculativeRun, device: torch.device) -> dict[str, Engine]:
    """An engine by each way to guess, on the same weights; BenchError if they do not all fit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        require_memory(run, resolve_dtype(None, device), free)
    made: dict[str, Engine] = {}
    for name in (NONE, *run.proposers):
        settings = settings_of(run, kv_cache_tokens=_kv_tokens(run), **run.guessing(name))
        weights = made[NONE].weights if made else None
        made[name] = Engine(run.model, settings, device=device, weights=weights)
    return made


def _repeat(
    run: BenchSpeculativeRun,
    engines: dict[str, Engine],
    prompts: Prompts,
    batch: int,
    captured: Callable[[], int],
) -> dict[str, _Turn]:
    """The same samples by all engines in turn; BenchError for other tokens than without guesses."""
    prompt_ids, ids = prompts.draw(batch)
    params = SamplingParams(
        n=run.samples_per_prompt, temperature=run.temperature, max_new_tokens=run.output_len,
        ignore_eos=not run.has_data,
    )  # fmt: skip
    found, truth = dict[str, _Turn](), list[Outcome]()
    for name, engine in engines.items():
        before, graphs = engine.accept_lengths, captured()
        work = partial(engine.generate, prompt_ids, params, ids)
        groups, seconds = timed(work, engine.device)
        drawn = [(tuple(c.token_ids), tuple(c.logprobs)) for group in groups for c in group]
        if name == NONE:
            truth = drawn
            for i, (tokens, _) in zip(chain.from_iterable(ids), drawn, strict=True):
                simulated.expect(i, tokens, run.simulated_acceptance, prompts.vocab_size)
        elif apart := sum(a != b for a, b in zip(drawn, truth, strict=True)):
            raise BenchError(
                f"{name}, {batch} at a time: {apart} of {batch} samples are not those that are "
                "drawn without guesses"
            )
        after, num_tokens = engine.accept_lengths, sum(len(tokens) for tokens, _ in drawn)
        accepted = None if after is None or before is None else after - before
        found[name] = _Turn(seconds, num_tokens, accepted, captured() - graphs)
    simulated.GUESSES.clear()
    return found


def measure(
    run: BenchSpeculativeRun, engines: dict[str, Engine], prompts: Prompts, batch: int
) -> dict[str, Any]:
    """Repeats that warm up, until in one of them no CUDA graph is captured, and those that count.

    BenchError for other tokens than without guesses.
    """
    with captures() as captured:
        repeat = partial(_repeat, run, engines, prompts, batch, captured)
        for _ in range(_WARM_UPS):
            if not any(turn.captured for turn in repeat().values()):
                break
        turns = [repeat() for _ in range(run.repeats)]
    by_name = {name: [turn[name] for turn in turns] for name in engines}
    return {name: _entry(own, by_name[NONE]) for name, own in by_name.items()}


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
    for size, entry in batches.items():
        if late := {name: n for name, x in entry.items() if (n := x["graphs_captured"])}:
            print(f"{size}: CUDA graphs were captured in timed repeats: {late}.")
    if SIMULATED in run.proposers:
        print(
            f"{SIMULATED}: no proposer; each guess is right with a probability of "
            f"{run.simulated_acceptance:g}, and costs nothing."
        )
    print(f"{run.run_dir / REPORT_FILE} holds the report.")
    return 0
