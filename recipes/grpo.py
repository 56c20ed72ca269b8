"""GRPO, top to bottom: prompts -> rollout -> rewards -> advantages -> optimizer steps -> weights.

Advantages and loss are those of the algorithm that algorithm.name names (trainer/algorithms).
Deviations from the paper (Shao et al. 2024): no old-log-prob pass and no importance correction,
because the rollout's log-probs are the trainer's, bit for bit, and every step checks that they are.
With rollout.max_staleness later steps are drawn while one is trained, by weights that are older.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from samebit.recipes.cli.dry_run import describe_grpo, train_or_describe
from samebit.recipes.config import GrpoRun
from samebit.recipes.data.reward_scale import NO_REWARDS, Moments, RewardScale
from samebit.recipes.data.rewards import Poll
from samebit.recipes.data.samples import with_advantages, with_returns
from samebit.recipes.launch.critic import make_critic
from samebit.recipes.launch.online_draft import OnlineDraft
from samebit.recipes.launch.placement import (
    make_trainer,
    open_launcher,
    releases_memory,
    start_engine,
)
from samebit.recipes.launch.teacher import Teacher
from samebit.recipes.run.batches import compared_under, own_micro_batches, with_reference
from samebit.recipes.run.critic import CriticUpdates
from samebit.recipes.run.dynamic_sampling import StepRollout
from samebit.recipes.run.inputs import GrpoInputs
from samebit.recipes.run.phase_ledger import PhaseLedger
from samebit.recipes.run.recorder import Progress, Recorder, recording
from samebit.recipes.run.report import write_report
from samebit.recipes.run.rollouts import drop_rollouts_after, save_rollout
from samebit.recipes.run.rollouts_of_steps import rollouts_of_steps
from samebit.recipes.run.sampling import Rollout, RolloutSource
from samebit.recipes.run.secrets import to_yaml
from samebit.recipes.run.session import RunSession, open_session
from samebit.recipes.run.signals import StopSignals, stop_signals
from samebit.recipes.run.training_metrics import (
    PhaseTimer,
    reference_metrics,
    rollout_metrics,
    sample_rows,
    speculation_metrics,
    speed,
    train_metrics,
)
from samebit.trainer.algorithms.mistakes import naming_algorithm
from samebit.trainer.algorithms.registry import make_algorithm
from samebit.trainer.stats import Comparison
from samebit.trainer.types import Sample, StepStats
from samebit.weight_sync.types import WeightSyncError

if TYPE_CHECKING:
    from samebit.recipes.launch.ray_engines import RayEngines


def train(run: GrpoRun, started: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Run GRPO to its last step; returns the summary, which summary.json holds too.

    `started` is called once everything is set up. Raises Stopped if a signal has ended the run, and
    LogprobMismatchError if the promise is broken; what is saved can be resumed.
    """
    with (
        stop_signals() as stop,
        closing(GrpoInputs(run, stop)) as inputs,
        open_launcher(run) as cluster,
        open_session(run, inputs.records) as session,
    ):
        with (
            closing(GrpoRecipe(run, session, inputs, cluster)) as recipe,
            recording(session, recipe.progress, recipe) as recorder,
        ):
            progress = recipe.progress
            if session.is_first:
                drop_rollouts_after(run.run_dir, progress.step)
            started()
            if progress.step == 0:
                recorder.log(recipe.evaluate(recorder, stop))
            recipe.draw_ahead(PhaseTimer())

            while progress.step < run.trainer.num_steps:
                stop.poll_together()
                timer = PhaseTimer()
                of_step = recipe.draw(timer, stop, recorder.show)
                rollout = of_step.trained
                session.writer.poll()
                if run.logger.save_rollouts and session.is_first:
                    dropped = of_step.dropped() if run.rollout.dynamic_sampling else None
                    kept = rollout.prompt_ids, rollout.completions, rollout.rewards
                    save_rollout(run.run_dir, progress.step + 1, *kept, dropped)
                stats = recipe.update(rollout, timer, stop.poll)
                progress.step += 1
                progress.prompts_drawn += of_step.num_prompts
                progress.rewards_seen = recipe.reward_scale.seen

                metrics = rollout_metrics(rollout, "rollout") | recipe.step_metrics(stats)
                metrics |= of_step.metrics() if run.rollout.chooses_prompts else {}
                metrics |= speculation_metrics(of_step.guesses)
                if recorder.is_due(run.rollout.eval_every):
                    with timer.time("eval"):
                        metrics |= recipe.evaluate(recorder, trained=rollout, timer=timer)
                recipe.draw_ahead(timer)
                timer.end_step()
                metrics |= timer.seconds | recipe.rollouts.metrics(progress.step, timer)
                timed = rollout, stats or recipe.critic_stats, metrics, of_step.num_tokens
                metrics |= speed(recipe.trainer, *timed) | recipe.ledger.metrics()
                rate = f"{metrics.get('perf/rollout_tokens_per_s', 0):.0f} tok/s"
                row = recipe.rollouts.schedule_row(progress.step, progress.prompts_drawn, of_step)
                recorder.end_step(metrics, f"reward {rollout.reward_mean:.3f}, {rate}", row)
            if recipe.draft is not None:
                recipe.draft.write()
            summary = recipe.summary()
        session.finish(summary)
        if session.is_first:
            write_report(run.run_dir, title=run.run_name, summary=summary, config_yaml=to_yaml(run))
        return summary


class LogprobMismatchError(RuntimeError):
    """Trainer and rollout disagree about a token's log-prob: the promise is broken."""


@dataclass
class GrpoProgress(Progress):
    """Keeps what the summary needs of the steps so far, and where the next one begins."""

    prompts_drawn: int = 0
    """The next step begins at this place of the training order."""
    rewards_seen: Moments = NO_REWARDS
    """See RewardScale."""
    reward_first: float | None = None
    reward_last: float | None = None
    logprob_tokens_compared: int = 0
    logprob_mismatches: int = 0
    teacher_digest: str | None = None
    """Of a teacher's weights, where there is one: a run has the same all the time."""


class GrpoRecipe:
    """Holds the trainer, the engine, and what keeps the engine on the trainer's weights."""

    def __init__(
        self,
        run: GrpoRun,
        session: RunSession,
        inputs: GrpoInputs | None = None,
        cluster: "RayEngines | None" = None,
    ) -> None:
        self.run = run
        self._inputs = inputs or GrpoInputs(run)
        device = session.device
        releases = releases_memory(run, device)
        model = self._inputs.model
        self.trainer = make_trainer(run, model, run.num_updates, device, releases)
        self.critic: CriticUpdates | None = None
        if self._inputs.critic is not None:
            critic = make_critic(run, self._inputs.critic, self.trainer)
            self.critic = CriticUpdates(run, critic)
        self.algorithm = make_algorithm(run.algorithm)
        if self.algorithm.has_reference:
            self.trainer.freeze_reference()
        restored = session.restore(self.trainer)
        self.draft: OnlineDraft | None = None
        if self._inputs.draft is not None:
            self.draft = OnlineDraft(run, self._inputs.draft, self.trainer)
            if session.resumed is not None:
                self.draft.restore(session.resumed)
        # Earlier versions drew as many in every step, and did not write it down.
        drawn = {"prompts_drawn": restored.get("step", 0) * run.rollout.prompts_per_step}
        self.progress = GrpoProgress(**drawn | restored)
        self.reward_scale = RewardScale(run.reward, self.progress.rewards_seen)
        self.reference_metrics: dict[str, float] = {}
        self.draft_metrics: dict[str, float] = {}
        self.teacher = None if run.distillation is None else Teacher(run, self.trainer)
        if self.teacher is not None:
            self.progress.teacher_digest = self.progress.teacher_digest or self.teacher.digest
            self.teacher.require(self.progress.teacher_digest)
        self.engine, self.weights = start_engine(
            run, device, self.trainer, releases, self.draft, cluster
        )
        self.ledger = PhaseLedger(self.trainer, self.engine, releases)
        self.rollout_source = RolloutSource(run, self._inputs, self.engine)
        self.rollouts = rollouts_of_steps(
            run, self._inputs, self.rollout_source, self.trainer, session.resumed
        )
        self.sync()

    def sync(self) -> None:
        """Serve the trainer's present weights."""
        self.weights.lease(self.trainer.step)
        self.weights.update(self.trainer.params, self.trainer.digest())

    def draw(
        self, timer: PhaseTimer, stop: StopSignals, show: Callable[[str], object]
    ) -> StepRollout:
        """Draw and score what the next step trains on, or wait for it where it is drawn ahead;
        `show` is told how it goes."""
        where = self.progress.step + 1, self.progress.prompts_drawn
        with timer.time(self.rollouts.phase):
            return self.rollouts.take(*where, stop, show)

    def draw_ahead(self, timer: PhaseTimer) -> None:
        """Begin to draw in the background what the present weights, which are served, draw of later
        steps; meanwhile compare what earlier ones drew. Raises LogprobMismatchError."""
        self.rollouts.begin(self.progress.step, self.progress.prompts_drawn)
        for step, compared in self.rollouts.compare_drawn(self.progress.step, timer).items():
            self._check_promise(step, compared)

    def update(
        self, rollout: Rollout, timer: PhaseTimer, poll: Poll = lambda: None
    ) -> list[StepStats]:
        """Train on a rollout, which is scored, and serve the result, if it is the turn of one;
        nothing is served in between, but what is drawn ahead, which is drawn then.

        While the critic alone learns there is nothing new to serve, and no figure of the policy's.
        `poll` is called between micro-batches as long as the weights are as they were; what it
        raises drops the step. Raises LogprobMismatchError.
        """
        self.ledger.enter("train")
        waits = self.progress.step < self.run.num_waits
        try:
            with timer.time("train"):
                samples = self._samples(rollout)
                if waits and self.critic is not None:
                    self.critic.train(samples, poll)
            if not waits:
                compared = self.rollouts.compare_taken(timer)
                self._check_promise(self.progress.step + 1, compared)
        except BaseException:
            self.ledger.enter("rollout")  # nothing has begun: the engine serves on
            raise
        if waits:
            self.rollouts.finish(timer)
            self.ledger.enter("rollout")
            return []
        if syncs := self.run.rollout.syncs_after(self.progress.step + 1):
            self.weights.lease(self.trainer.step + self.run.updates_on(len(samples)))
        try:
            with timer.time("train"):
                finish = partial(self.rollouts.finish, timer, poll) if syncs else None
                stats = self._train(samples, poll, finish)
                self._count_compared(stats[0])
                self._refresh_reference()
                self.draft_metrics = {} if self.draft is None else self.draft.end_step()
                if self.critic is not None:
                    self.critic.train(samples)
            if syncs:
                self.rollouts.finish(timer)
            self.ledger.enter("rollout")
            if syncs:
                with timer.time("sync"):
                    self.weights.update(self.trainer.params, self.trainer.digest())
        except BaseException as error:
            if syncs:
                with suppress(WeightSyncError):  # the first error is the one to tell
                    self.weights.give_up(f"the training step failed: {error}")
            raise
        return stats

    @property
    def critic_stats(self) -> list[StepStats]:
        """Of the critic's latest optimizer steps, if there is one."""
        return [] if self.critic is None else self.critic.stats

    def step_metrics(self, stats: Sequence[StepStats]) -> dict[str, float]:
        """Return what is logged of a step's training; nothing of a policy that waits."""
        found = self.reference_metrics | self.draft_metrics
        found |= train_metrics(stats, self.rollouts.compared(stats[0])) if stats else {}
        for part in (self.reward_scale, self.critic, self.teacher):
            found |= {} if part is None else part.metrics
        return found

    def evaluate(
        self,
        recorder: Recorder,
        stop: StopSignals | None = None,
        trained: Rollout | None = None,
        timer: PhaseTimer | None = None,
    ) -> dict[str, float]:
        """Complete and score the held-out problems; returns the metrics and records some samples,
        of what was `trained` on before, too. Without `stop`, no signal ends it. timer: is told how
        long a draw was waited for."""
        stop = stop or StopSignals()
        if self.engine.weight_version.step != self.trainer.step:
            self.rollouts.finish(timer or PhaseTimer())
            self.sync()
        prompts = self.rollout_source.held_out_prompts(self.progress.step)
        held_out = self.rollout_source.draw(prompts, stop.poll)
        self.rollout_source.score(held_out, stop.poll_alone)
        if self.progress.reward_first is None:
            self.progress.reward_first = held_out.reward_mean
        self.progress.reward_last = held_out.reward_mean
        for kind, rollout in (("train", trained), ("eval", held_out)):
            if rollout is not None:
                rows = sample_rows(rollout, self.run.logger.num_samples, self._inputs.text)
                recorder.log_samples(kind, rows)
        return rollout_metrics(held_out, "eval")

    def summary(self) -> dict[str, Any]:
        """Return what the run has come to."""
        return {
            "reward_first": self.progress.reward_first,
            "reward_last": self.progress.reward_last,
            "logprob_tokens_compared": self.progress.logprob_tokens_compared,
            "logprob_mismatches": self.progress.logprob_mismatches,
            "weights_digest": self.trainer.digest(),
            **({} if self.draft is None else {"draft_digest": self.draft.trainer.digest()}),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run goes on from."""
        draft = {} if self.draft is None else self.draft.state_dict()
        return self.trainer.state_dict() | draft | self.rollouts.state_dict(self.progress.step)

    def close(self) -> None:
        """Let go of the engine and of the reward's processes."""
        self.rollouts.close()
        self._inputs.close()
        self.weights.close()
        self.engine.close()
        if self.teacher is not None:
            self.teacher.close()

    def _samples(self, rollout: Rollout) -> list[Sample]:
        """What the algorithm makes of the rewards."""
        groups, rewards = rollout.samples(), self.reward_scale.scaled(rollout.reward_tensor)
        if self.algorithm.rewards_need_reference:
            temperature = self.run.rollout.temperature
            groups = with_reference(groups, self.run.trainer, self.trainer, temperature)
            samples = [sample for group in groups for sample in group]
            self.reference_metrics = reference_metrics(samples)
        if self.teacher is not None:
            groups = self.teacher.with_logprobs(groups)
        if self.critic is not None:
            groups = self.critic.with_values(groups)
            with naming_algorithm(self.algorithm, "returns"):
                returns = self.algorithm.returns(rewards, groups)
            groups = with_returns(groups, returns)
        with naming_algorithm(self.algorithm, "advantages"):
            advantages = self.algorithm.advantages(rewards, groups)
        return with_advantages(groups, advantages)

    def _train(
        self, samples: Sequence[Sample], poll: Poll, finish: Callable[[], None] | None
    ) -> list[StepStats]:
        """One or more optimizer steps on a rollout; the first is exactly on-policy, as far as no
        earlier weights drew it.

        Where there is one, it calls `finish` before it writes, which waits for what is drawn ahead:
        until then a signal may drop the step, and what the weights before it are drawing.
        """
        settings, temperature = self.run.trainer, self.run.rollout.temperature
        size, stats = self.run.batch_size, list[StepStats]()
        parts = [
            own_micro_batches(samples[i : i + size], settings, self.trainer, temperature)
            for i in range(0, len(samples), size)
        ]
        parts = [compared_under(batches, self.trainer.step) for batches in parts]
        for i, batches in enumerate(parts):
            if i or self.algorithm.needs_reference:  # weights that have not drawn
                parts[i] = self.trainer.with_kept_sets(batches)
        before_write = finish if len(parts) == 1 else None
        with self._watched_by_draft():
            for batches in parts:
                # Until the first optimizer step writes, the whole step may be dropped.
                drops = None if stats else poll
                stats.append(self.trainer.train_step(batches, self.algorithm, drops, before_write))
        return stats

    def _refresh_reference(self) -> None:
        """The weights after every so many training steps are what the next are compared with."""
        every = self.algorithm.refresh_reference_every if self.algorithm.has_reference else 0
        if every and (self.progress.step + 1) % every == 0:
            self.trainer.freeze_reference()

    def _watched_by_draft(self) -> AbstractContextManager[None]:
        """Within it the draft, if one is trained, is shown what the policy's steps compute."""
        return nullcontext() if self.draft is None else self.draft.watching(self.progress.step + 1)

    def _count_compared(self, first: StepStats) -> None:
        """Count all comparisons of the step, whose first optimizer step this is."""
        compared = self.rollouts.compared(first)
        self.progress.logprob_tokens_compared += compared.tokens
        self.progress.logprob_mismatches += compared.mismatches
        self._check_promise(self.progress.step + 1, compared)

    def _check_promise(self, step: int, compared: Comparison) -> None:
        """Mismatches end the run if the kind of attention promises that there are none."""
        if (fault := compared.fault) and self.trainer.attention.is_invariant:
            raise LogprobMismatchError(f"step {step}: {fault}; the last checkpoint is unharmed")


def main(run: GrpoRun) -> int:
    """Run the command `samebit grpo`."""
    return train_or_describe(run, train, describe_grpo)
