"""GRPO, top to bottom: prompts -> rollout -> reward -> advantage -> Megatron step -> weight sync.

Deviations from the paper (Shao et al. 2024): no old-log-prob pass and no importance correction,
because the rollout's log-probs are the trainer's, bit for bit, and every step checks that they are.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from samebit.recipes.cli.dry_run import grpo_plan, print_plan
from samebit.recipes.config import GrpoRun
from samebit.recipes.data.order import SampleIds, problem_index
from samebit.recipes.data.records import Split
from samebit.recipes.data.rewards import RewardError, score
from samebit.recipes.data.samples import drawn_sample
from samebit.recipes.data.tasks.base import Problem
from samebit.recipes.launch.placement import make_trainer, start_engine
from samebit.recipes.run.inputs import Inputs
from samebit.recipes.run.metrics import MetricsLogger, NoLogger
from samebit.recipes.run.report import write_report
from samebit.recipes.run.rollouts import drop_rollouts_after, save_rollout
from samebit.recipes.run.secrets import to_yaml
from samebit.recipes.run.session import RunSession, open_session, require_startable
from samebit.recipes.run.signals import Stopped, StopSignals, stop_signals
from samebit.recipes.run.training_metrics import (
    Rollout,
    rollout_metrics,
    sample_rows,
    speed,
    train_metrics,
)
from samebit.rollout.remote import RemoteEngineError
from samebit.rollout.types import SamplingParams
from samebit.trainer.algorithms.grpo import GrpoLoss, group_advantages
from samebit.trainer.packing import pack_samples
from samebit.trainer.ranks import is_first, on_first
from samebit.trainer.types import Sample, StepStats
from samebit.weight_sync.types import WeightSyncError


class LogprobMismatchError(RuntimeError):
    """Trainer and rollout disagree about a token's log-prob: the promise is broken."""


@dataclass
class Progress:
    """What the summary needs of the steps so far; part of every checkpoint."""

    step: int = 0
    reward_first: float | None = None
    reward_last: float | None = None
    logprob_tokens_compared: int = 0
    logprob_mismatches: int = 0


@dataclass
class Phases:
    """Seconds spent in each phase of a step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the block's wall time to perf/<name>_s."""
        start = time.perf_counter()
        yield
        key = f"perf/{name}_s"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start


class GrpoRecipe:
    """Everything that one run holds."""

    def __init__(
        self,
        run: GrpoRun,
        session: RunSession,
        stop: StopSignals | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        self.run = run
        self.session = session
        self.stop = stop or StopSignals()
        inputs = inputs or Inputs(run)
        self.train_set, self.eval_set = inputs.train_set, inputs.eval_set
        self.reward, self.text = inputs.reward, inputs.text
        num_updates = run.trainer.num_steps * (run.samples_per_step // run.batch_size)
        self.trainer = make_trainer(run, inputs.model, num_updates, session.device)
        if run.algorithm.kl_coef > 0:
            self.trainer.freeze_reference()
        self.loss = GrpoLoss(run.algorithm)
        self.progress = Progress(**session.restore(self.trainer))
        self.sample_ids = SampleIds()
        self.engine, self.transport = start_engine(run, session.device, self.trainer)
        self.sync()

    def sync(self) -> None:
        """Serve the trainer's present weights."""
        self.transport.begin(self.trainer.step)
        self.transport.send(self.trainer.params)
        self.transport.commit(self.trainer.digest())

    def rollout(self, step: int, bar: tqdm | None = None) -> Rollout:
        """Sample and score the step's prompts."""
        r = self.run.rollout
        first = step * r.prompts_per_step
        indices = [
            problem_index(first + i, len(self.train_set), self.run.seed)
            for i in range(r.prompts_per_step)
        ]
        params = SamplingParams(
            n=r.samples_per_prompt,
            temperature=r.temperature,
            top_p=r.top_p,
            top_k=r.top_k,
            min_p=r.min_p,
            max_new_tokens=r.max_new_tokens,
        )
        ids = self.sample_ids.of_step(step, len(indices), r.samples_per_prompt)
        return self._sample(self.train_set, indices, params, ids, bar)

    def evaluate(self, step: int) -> Rollout:
        """Sample and score the held-out problems."""
        r = self.run.rollout
        indices = range(len(self.eval_set))
        params = SamplingParams(
            n=r.eval_samples_per_prompt,
            temperature=r.eval_temperature,
            max_new_tokens=r.max_new_tokens,
        )
        ids = self.sample_ids.of_step(
            step, len(indices), r.eval_samples_per_prompt, evaluation=True
        )
        return self._sample(self.eval_set, indices, params, ids, None)

    def _sample(
        self,
        split: Split,
        indices: Sequence[int],
        params: SamplingParams,
        sample_ids: list[list[int]],
        bar: tqdm | None,
    ) -> Rollout:
        problems = [split[i] for i in indices]
        prompt_ids = [split.encoded(problem).prompt_ids.tolist() for problem in problems]
        # A step that is trained already is evaluated to the end.
        may_stop = bar is not None or self.progress.step == 0
        start = shown = time.perf_counter()

        def progress(_done: int, num_tokens: int) -> None:
            nonlocal shown
            if may_stop:
                self.stop.poll()
            now = time.perf_counter()
            if bar is not None and num_tokens and now - shown > 0.5:
                shown = now
                bar.set_postfix_str(f"rollout: {num_tokens / (now - start):.0f} tok/s")

        groups = self.engine.generate(prompt_ids, params, sample_ids, progress=progress)
        texts = [[self.text.decode(c) for c in group] for group in groups]
        rewards = self._score(problems, texts, may_stop)
        return Rollout(problems, prompt_ids, groups, texts, rewards)

    def _score(
        self, problems: list[Problem], texts: list[list[str]], may_stop: bool
    ) -> list[list[float]]:
        """Rewards of the completions of each problem; a signal stops all processes here."""
        flat_problems = [p for p, group in zip(problems, texts, strict=True) for _ in group]
        flat_texts = [t for group in texts for t in group]

        def score_all() -> list[float] | str:
            try:
                poll = self.stop.poll_alone if may_stop else lambda: None
                return score(self.reward, flat_texts, flat_problems, poll)
            except Stopped as stopped:
                return str(stopped)

        found = on_first(score_all, RewardError)
        if isinstance(found, str):
            raise Stopped(found)
        values = iter(found)
        return [[next(values) for _ in group] for group in texts]

    def train(self, rollout: Rollout) -> list[StepStats]:
        """One or more optimizer steps on a rollout; the first is exactly on-policy."""
        samples = make_samples(rollout, self.run)
        size, stats = self.run.batch_size, list[StepStats]()
        for start in range(0, len(samples), size):
            batches = self.trainer.own_batches(
                pack_samples(
                    samples[start : start + size],
                    self.run.trainer.micro_batch_tokens,
                    self.run.trainer.loss_mean,
                    self.run.rollout.temperature,
                    self.session.device,
                    self.trainer.model,
                    self.trainer.parallel.data,
                )
            )
            # Until the first optimizer step writes, the whole step may be dropped.
            loss = self.loss if stats else self.stop.polled(self.loss)
            stats.append(self.trainer.train_step(batches, loss))
        self._check_promise(stats[0])
        return stats

    def _check_promise(self, first: StepStats) -> None:
        """The first optimizer step ran on the very weights that drew the samples."""
        self.progress.logprob_tokens_compared += first.logprob_tokens_compared
        self.progress.logprob_mismatches += first.logprob_mismatches
        if first.logprob_mismatches:
            raise LogprobMismatchError(
                f"step {self.progress.step + 1}: {first.logprob_mismatches} of "
                f"{first.logprob_tokens_compared} log-probs differ between rollout and trainer "
                f"(at most by {first.logprob_abs_diff_max}); the last checkpoint is unharmed"
            )

    def update(self, rollout: Rollout, phases: Phases) -> list[StepStats]:
        """Train on a rollout and serve the result; the engine serves nothing in between."""
        num_updates = self.run.samples_per_step // self.run.batch_size
        self.transport.begin(self.trainer.step + num_updates)
        try:
            with phases.time("train"):
                stats = self.train(rollout)
            with phases.time("sync"):
                self.transport.send(self.trainer.params)
                self.transport.commit(self.trainer.digest())
        except BaseException as error:
            with suppress(WeightSyncError, RemoteEngineError):  # the first error is the one to tell
                self.transport.abort(f"the training step failed: {error}")
            raise
        return stats

    def save(self) -> None:
        """Write a checkpoint: the trainer. Data order and samples follow from the step."""
        self.session.save(self.progress.step, self.trainer.state_dict(), asdict(self.progress))

    def close(self) -> None:
        """Let go of the engine and of the reward's processes."""
        self.reward.close()
        self.transport.close()
        self.engine.close()


def make_samples(rollout: Rollout, run: GrpoRun) -> list[Sample]:
    """Samples in prompt order, each with its group-relative advantage."""
    rewards = torch.tensor(rollout.rewards, dtype=torch.float64)
    advantages = group_advantages(rewards, run.algorithm).tolist()
    return [
        drawn_sample(prompt, completion, advantage)
        for prompt, group, values in zip(
            rollout.prompt_ids, rollout.completions, advantages, strict=True
        )
        for completion, advantage in zip(group, values, strict=True)
    ]


def train(run: GrpoRun, started: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run to the end; the summary, which summary.json holds too.

    `started` is called once everything is set up.
    """
    with stop_signals() as stop:
        inputs = Inputs(run, stop)
        with closing(inputs.reward), open_session(run, inputs.records) as session:
            summary = _train(GrpoRecipe(run, session, stop, inputs), started)
            if session.is_first:
                title, config = run.run_name, to_yaml(run)
                write_report(session.run_dir, title=title, summary=summary, config_yaml=config)
            return summary


def _train(recipe: GrpoRecipe, started: Callable[[], None]) -> dict[str, Any]:
    run, session = recipe.run, recipe.session
    progress, total = recipe.progress, run.trainer.num_steps
    with (
        closing(recipe),
        session.logger(progress) as logger,
        session.bar(progress) as bar,
        session.saving(progress, logger, recipe.save),
    ):
        session.started()
        if session.is_first:
            drop_rollouts_after(session.run_dir, progress.step)
        started()
        if progress.step == 0:
            evaluate(recipe, logger, {})
        while progress.step < total:
            recipe.stop.poll_together()
            train_one_step(recipe, logger, bar)
        summary = {
            "reward_first": progress.reward_first,
            "reward_last": progress.reward_last,
            "logprob_tokens_compared": progress.logprob_tokens_compared,
            "logprob_mismatches": progress.logprob_mismatches,
            "weights_digest": recipe.trainer.digest(),
        }
    session.finish(summary)
    return summary


def train_one_step(recipe: GrpoRecipe, logger: MetricsLogger | NoLogger, bar: tqdm) -> None:
    """Rollout, reward, update and sync; evaluation, metrics and checkpoint when they are due."""
    run, progress = recipe.run, recipe.progress
    phases = Phases()
    with phases.time("rollout"):
        rollout = recipe.rollout(progress.step, bar)
    recipe.session.writer.poll()
    if run.logger.save_rollouts and recipe.session.is_first:
        drawn = rollout.prompt_ids, rollout.completions, rollout.rewards
        save_rollout(run.run_dir, progress.step + 1, *drawn)
    stats = recipe.update(rollout, phases)
    progress.step += 1
    metrics = rollout_metrics(rollout, "rollout") | train_metrics(stats)
    last = progress.step == run.trainer.num_steps
    if last or progress.step % run.rollout.eval_every == 0:
        with phases.time("eval"):
            evaluate(recipe, logger, metrics)
    metrics |= phases.seconds | speed(recipe.trainer, rollout, stats, phases.seconds)
    logger.log(progress.step, metrics)
    if run.trainer.checkpoint_due(progress.step):
        logger.sync()
        recipe.save()
    rate = metrics["perf/rollout_tokens_per_s"]
    bar.set_postfix_str(f"reward {rollout.reward_mean:.3f}, {rate:.0f} tok/s")
    bar.update()


def evaluate(
    recipe: GrpoRecipe, logger: MetricsLogger | NoLogger, metrics: dict[str, float]
) -> None:
    """Held-out reward into metrics (step 0: a line of its own) and the samples file."""
    progress = recipe.progress
    held_out = recipe.evaluate(progress.step)
    metrics |= rollout_metrics(held_out, "eval")
    if progress.reward_first is None:
        progress.reward_first = held_out.reward_mean
        logger.log(0, metrics)
    progress.reward_last = held_out.reward_mean
    logger.log_samples(progress.step, "eval", sample_rows(held_out, recipe.run.logger.num_samples))


def main(run: GrpoRun) -> int:
    """The command `samebit grpo`."""
    if run.dry_run:
        require_startable(run)
        print_plan(run, grpo_plan(run))
        return 0
    summary = train(run)
    if is_first():
        print(json.dumps(summary))
    return 0
