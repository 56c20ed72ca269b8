"""Whether it pays that a replica goes on with what another leaves off: the real queue, and replicas
that take as long as docs/results has an engine of Qwen3-8B's shape take on an H200.

    python tests/programs/moving.py OUT.json [replicas=2,4,8] [spread=0.4,0.8,1.2] [prompts=64]
        [n=16] [room=256] [typical=1500] [alike=0.5] [longest=16384] [prompt_tokens=512] [draws=5]

A sample's length is e to a normal variable of the standard deviation `spread` times `typical`; so
much of the variance as `alike` is its prompt's. A replica draws all that it has step by step, and
stands still while it computes what stands before a sample. Said are the seconds until all samples
have ended, where none moves and where they do as the queue has it: the medians of `draws` draws of
the lengths, and the least and most of what moving has saved.
"""

import itertools
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from samebit.recipes.bench.config import Workload
from samebit.recipes.bench.output import format_table
from samebit.recipes.bench.roofline import roofline_bounds
from samebit.recipes.bench.timing import CardRates
from samebit.recipes.planning.measured import H200, SHAPES, measured, row_bytes
from samebit.recipes.run.provenance import write_result
from samebit.rollout.job import Job
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.request_book import LEAST_LEFT
from samebit.rollout.types import Completion, Request, SamplingParams
from samebit.rollout.work_queue import WorkQueue

OPTIONS = {
    "replicas": "2,4,8",
    "spread": "0,0.1,0.4,0.8,1.2",
    "prompts": "64",
    "n": "16",
    "room": "256",
    "typical": "1500",
    "alike": "0.5",
    "longest": "16384",
    "prompt_tokens": "512",
    "draws": "5",
}


class Times:
    """Seconds of an engine's work."""

    def __init__(self) -> None:
        self._model = load_model_config(SHAPES / "qwen3-8b")
        self._own = own = measured().rollout
        self._rates = CardRates(H200.hbm_bytes_s, H200.flops_s)
        key_bytes = self._model.kv_layout.bytes_per_token(torch.bfloat16)
        self._context_s = key_bytes / H200.hbm_bytes_s / own.keys
        self._of_rows: dict[int, float] = {}
        self._row_s = row_bytes(self._model) / H200.hbm_bytes_s / own.rows

    def prefill(self, num_tokens: int) -> float:
        """Of so many tokens of one sequence."""
        bounds = roofline_bounds(self._model, Workload(1, 1, num_tokens, 1), self._rates)
        return bounds.prefill_s / self._own.prefill

    def _weights(self, num_rows: int) -> float:
        if num_rows not in self._of_rows:
            bounds = roofline_bounds(self._model, Workload(num_rows, 1, 1, 2), self._rates)
            self._of_rows[num_rows] = bounds.weights_s / self._own.weights
        return self._of_rows[num_rows]

    def steps(self, count: int, num_rows: int, context: int) -> float:
        """Of so many decode steps; context: tokens that the first one reads."""
        each = self._weights(num_rows) + self._own.step_s + num_rows * self._row_s
        contexts = count * context + num_rows * count * (count - 1) / 2
        return count * each + contexts * self._context_s


@dataclass(eq=False)
class Sample:
    """One of a job's, and how far it is."""

    job: Job
    sample_id: int
    left: int
    drawn: int = 0


@dataclass(eq=False)
class Replica:
    """Draws its samples, all at once."""

    times: Times
    now: float = 0.0
    samples: list[Sample] = field(default_factory=list)

    def begin(self, samples: Sequence[Sample], num_prompt: int, now: float) -> None:
        """Compute what stands before them, siblings' prompt once, and draw them."""
        self.now = max(self.now, now) if self.samples else now
        self.now += self.times.prefill(num_prompt + sum(sample.drawn for sample in samples))
        self.samples += samples

    def steps_s(self, count: int, num_prompt: int) -> float:
        """Seconds of its next steps."""
        context = sum(num_prompt + sample.drawn for sample in self.samples)
        return self.times.steps(count, len(self.samples), context)

    def next_end(self, num_prompt: int) -> float:
        """When the next one of its samples ends."""
        return self.now + self.steps_s(min(sample.left for sample in self.samples), num_prompt)

    def go_on(self, until: float, num_prompt: int) -> list[Sample]:
        """Draw as long as that; those that have ended."""
        most = min((sample.left for sample in self.samples), default=0)
        first, last = 0, most  # of the steps that fit, by halves
        while first < last:
            middle = (first + last + 1) // 2
            fits = self.now + self.steps_s(middle, num_prompt) <= until + 1e-9
            first, last = (middle, last) if fits else (first, middle - 1)
        self.now += self.steps_s(first, num_prompt)
        for sample in self.samples:
            sample.left, sample.drawn = sample.left - first, sample.drawn + first
        ended = [sample for sample in self.samples if not sample.left]
        self.samples = [sample for sample in self.samples if sample.left]
        return ended


class Rollout:
    """All samples of a step, drawn by replicas that a queue gives them to."""

    def __init__(
        self, times: Times, lengths: Sequence[Sequence[int]], options: dict[str, str], num: int
    ) -> None:
        n = len(lengths[0])
        self._num_prompt, self._longest = int(options["prompt_tokens"]), int(options["longest"])
        params = SamplingParams(n=n, max_new_tokens=self._longest)
        self._queue = WorkQueue[Replica](int(options["room"]))
        self._replicas = [Replica(times) for _ in range(num)]
        for replica in self._replicas:
            self._queue.add(replica)
        self._left: dict[int, Sample] = {}
        self._ended: dict[Job, list[Completion]] = {}
        jobs = []
        for i, of_group in enumerate(lengths):
            ids = tuple(range(n * i, n * (i + 1)))
            prompt = tuple(range(i, i + self._num_prompt))
            request = Request(request_id=str(i), prompt_ids=prompt, params=params, sample_ids=ids)
            jobs.append(job := Job(request, i, answer=lambda _: None))
            self._left |= {s: Sample(job, s, x) for s, x in zip(ids, of_group, strict=True)}
        self._queue.put(jobs)
        self.num_moved = self.num_again = 0

    def seconds(self, moves: bool) -> float:
        """Until all have ended."""
        now = 0.0
        self._give(now)
        while busy := [replica for replica in self._replicas if replica.samples]:
            now = min(replica.next_end(self._num_prompt) for replica in busy)
            for replica in busy:
                for sample in replica.go_on(now, self._num_prompt):
                    self._end(replica, sample)
            if moves and (leaving := self._queue.leave()) is not None:
                self._leave(*leaving)
            self._give(now)
        return now

    def _give(self, now: float) -> None:
        while (pair := self._queue.give()) is not None:
            replica, job = pair
            self._queue.begun(replica, [job])
            samples = [self._left[sample_id] for sample_id in job.unfinished]
            self.num_again += sum(sample.drawn for sample in samples)
            replica.begin(samples, self._num_prompt, now)

    def _end(self, replica: Replica, sample: Sample) -> None:
        del self._left[sample.sample_id]
        ended = self._ended.setdefault(sample.job, [])
        ended.append(_completion(sample.sample_id, sample.drawn, "stop"))
        if any(other.job is sample.job for other in replica.samples):
            self._queue.free(replica, sample.job.number, 1)
        else:
            self._queue.end(replica, sample.job.number)
            self._queue.learn(ended)

    def _leave(self, replica: Replica, jobs: Sequence[Job]) -> None:
        for job in jobs:
            mine = {sample.sample_id: sample for sample in replica.samples if sample.job is job}
            drawn = min(sample.drawn for sample in mine.values())
            if self._longest - drawn < LEAST_LEFT * (self._num_prompt + drawn):
                continue
            self._queue.end(replica, job.number)
            self.num_moved += len(mine)
            replica.samples = [sample for sample in replica.samples if sample.job is not job]
            found = [
                _completion(i, mine[i].drawn, "abort") if i in mine else _completion(i, 0, "stop")
                for i in job.unfinished
            ]
            assert job.take(found) is None
            self._queue.put_back(job, job.number)
        self._queue.stay(jobs)


def _completion(sample_id: int, count: int, reason: str) -> Completion:
    return Completion(
        request_id="",
        sample_id=sample_id,
        token_ids=(0,) * count,
        logprobs=(),
        finish_reason=reason,
        version_spans=(),
    )


def lengths_of(options: dict[str, str], spread: float, seed: int) -> list[list[int]]:
    """Of each prompt's samples."""
    rng, alike = random.Random(seed), float(options["alike"])
    typical, longest = int(options["typical"]), int(options["longest"])

    def length(of_prompt: float) -> int:
        z = math.sqrt(alike) * of_prompt + math.sqrt(1 - alike) * rng.gauss(0, 1)
        return max(1, min(longest, round(typical * math.exp(spread * z))))

    shared = [rng.gauss(0, 1) for _ in range(int(options["prompts"]))]
    return [[length(of_prompt) for _ in range(int(options["n"]))] for of_prompt in shared]


def measure(options: dict[str, str], num_replicas: int, spread: float) -> dict[str, Any]:
    """Both ways, over all draws of the lengths."""
    found, times = [], Times()
    for seed in range(int(options["draws"])):
        lengths = lengths_of(options, spread, seed)
        stays, moves = (Rollout(times, lengths, options, num_replicas) for _ in range(2))
        stays_s, moves_s = stays.seconds(moves=False), moves.seconds(moves=True)
        found.append((stays_s, moves_s, 1 - moves_s / stays_s, moves.num_moved, moves.num_again))
    columns = list(zip(*found, strict=True))
    seconds, moved_s, _, num_moved, num_again = (statistics.median(column) for column in columns)
    return {
        "replicas": num_replicas,
        "spread": spread,
        "seconds": seconds,
        "seconds_moving": moved_s,
        "saved_min": min(columns[2]),
        "saved": statistics.median(columns[2]),
        "saved_max": max(columns[2]),
        "moved_samples": num_moved,
        "tokens_again": num_again,
    }


def main(out: str, *arguments: str) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    if unknown := sorted(given.keys() - OPTIONS.keys()):
        raise ValueError(f"'{unknown[0]}' is none of {', '.join(OPTIONS)}")
    options = OPTIONS | given
    every = itertools.product(options["replicas"].split(","), options["spread"].split(","))
    rows = [measure(options, int(number), float(spread)) for number, spread in every]
    body = {"options": options, "rows": rows}
    write_result(Path(out), torch.device("cpu"), body, ["python", *sys.argv])
    table = [[f"{value:.4g}" for value in row.values()] for row in rows]
    print(format_table([list(rows[0]), *table]))


if __name__ == "__main__":
    main(*sys.argv[1:])
