"""Training of an Eagle-3 draft on what its target answers itself, with the engine beside it.

Source: Li et al. 2025, arXiv 2503.01840. In each step the target answers the prompts whose turn it
is, its streams are had a micro-batch at a time, and the draft takes one optimizer step by the
training-time test. Nothing of it is stored.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from samebit.recipes.cli.dry_run import describe_eagle3, train_or_describe
from samebit.recipes.eagle3_config import Eagle3Run
from samebit.recipes.launch.draft import engine_of, make_draft_trainer
from samebit.recipes.run.answers import AnswerSource, HeldOut
from samebit.recipes.run.inputs import Eagle3Inputs
from samebit.recipes.run.metrics import METRICS_FILE, read_rows
from samebit.recipes.run.recorder import Progress, recording
from samebit.recipes.run.session import RunSession, open_session
from samebit.recipes.run.signals import StopSignals, stop_signals
from samebit.recipes.run.training_metrics import PhaseTimer
from samebit.rollout.models.draft.vocabulary import DraftVocabulary
from samebit.rollout.runtime.draft_folder import write_draft
from samebit.trainer.checkpoint import CheckpointError

SUMMED_UP = (
    "accept_length",
    "suffix_accept_length",
    "greedy_accept_length",
    "greedy_suffix_accept_length",
    "entropy",
)
"""Of the last evaluation, what the summary says; null where no answer has a second token."""
WALL = "perf/wall_s"


def train(run: Eagle3Run, started: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Train to the last step and write run_dir/draft; returns the summary.

    `started` is called once everything is set up. Raises Stopped if a signal has ended the run,
    which can be resumed, and CheckpointError if its target had other weights.
    """
    clock = Clock()
    with stop_signals() as stop:
        inputs = Eagle3Inputs(run, stop)
        with open_session(run, inputs.records) as session:
            with closing(engine_of(run, session.device)) as engine:
                recipe = Eagle3Recipe(run, session, inputs, engine, stop)
                progress, trainer = recipe.progress, recipe.trainer
                with recording(session, progress, trainer) as recorder:
                    started()
                    if progress.step == 0:
                        recorder.log(recipe.evaluate(stop) | clock.lap())
                    while progress.step < run.trainer.num_steps:
                        stop.poll_together()
                        session.writer.poll()
                        metrics = recipe.step(stop)
                        progress.step += 1
                        if recorder.is_due(run.rollout.eval_every):
                            metrics |= recipe.evaluate(StopSignals())
                        shown = f"loss {metrics['train/loss']:.4f}"
                        recorder.end_step(metrics | clock.lap(), shown)
                recipe.write()
                summary = recipe.summary()
            session.finish(summary)
            return summary


class Clock:
    """Measures all that goes by between two rows of metrics, also what no phase counts."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> dict[str, float]:
        """Return the seconds since the row before, or since the clock was made."""
        last, self._last = self._last, time.perf_counter()
        return {WALL: self._last - last}


@dataclass
class Eagle3Progress(Progress):
    """Keeps what the summary needs of the steps so far, and whose answers they were."""

    target_digest: str = ""
    accept_length_first: float | None = None
    last: dict[str, float | None] = field(default_factory=dict)
    """SUMMED_UP, by name."""


class Eagle3Recipe:
    """Holds the target's answers, and the trainer of its draft."""

    def __init__(
        self,
        run: Eagle3Run,
        session: RunSession,
        inputs: Eagle3Inputs,
        engine: Any,
        stop: StopSignals,
    ) -> None:
        self.run, self._draft = run, inputs.config
        self._source = AnswerSource(
            run.rollout, run.seed, (inputs.train_set, inputs.eval_set), engine, inputs.config
        )
        if session.resumed is not None:  # as it was counted
            saved = session.resumed.load()["vocabulary"]
            self.vocabulary = DraftVocabulary(saved.clone(), inputs.config.vocab_size)
        elif inputs.draft is not None:
            self.vocabulary = inputs.draft.vocabulary
        else:
            size, prompts = inputs.config.draft_vocab_size, run.draft.vocab_prompts
            self.vocabulary = self._source.vocabulary(size, prompts, stop.poll)
        self.trainer = make_draft_trainer(run, inputs.draft, inputs.config, self.vocabulary, engine)
        digest = engine.weight_version.digest
        self.progress = Eagle3Progress(**{"target_digest": digest} | session.restore(self.trainer))
        if self.progress.target_digest != digest:
            raise CheckpointError(
                f"{run.run_dir} was trained on a target of digest {self.progress.target_digest}; "
                f"that of model.path={run.model.path} is {digest}"
            )

    def step(self, stop: StopSignals) -> dict[str, float]:
        """One optimizer step on the answers to a step's prompts; returns its metrics."""
        timer = PhaseTimer()
        with timer.time("rollout"):
            prompts = self._source.training_prompts(self.progress.step)
            samples = self._source.draw(prompts, poll=stop.poll)
        with timer.time("train"):
            batches = self._source.batches(samples, self.run.trainer.micro_batch_tokens)
            stats = self.trainer.train_step(batches, stop.poll)
        timer.end_step()
        return {
            "rollout/response_len_mean": sum(s.num_trained for s in samples) / len(samples),
            "train/loss": stats.loss,
            "train/grad_norm": stats.grad_norm,
            "train/learning_rate": stats.learning_rate,
            **{f"train/{name}": value for name, value in stats.metrics.items()},
            **timer.seconds,
        }

    def evaluate(self, stop: StopSignals) -> dict[str, float]:
        """Loss, acceptance and accept length on answers to the held-out prompts, beside the accept
        length that suffix would have had; and accept lengths on greedy answers."""
        answers, greedy = self._source.held_out(self.run.ttt.eval_passes, stop.poll)
        found = self._measured(answers)
        greedily = self._measured(greedy)
        lengths = {key for key in greedily if key.endswith("accept_length")}
        found |= {f"greedy_{key}": greedily[key] for key in sorted(lengths)}
        self.progress.last = {name: found.get(name) for name in SUMMED_UP}
        if self.progress.accept_length_first is None:
            self.progress.accept_length_first = found.get("accept_length")
        return {f"eval/{name}": value for name, value in found.items()}

    def _measured(self, answers: HeldOut) -> dict[str, float]:
        """By name; no accept lengths of answers of one token each, which verify nothing."""
        batches = self._source.batches(answers.samples, self.run.trainer.micro_batch_tokens)
        stats = self.trainer.evaluate(batches, answers.temperature, self.run.seed)
        suffix, found = answers.suffix_accept_length, {"loss": stats.loss, **stats.metrics}
        return found if suffix is None else found | {"suffix_accept_length": suffix}

    def write(self) -> None:
        """Write run_dir/draft in the dialect that the run asks for."""
        params, dialect = self.trainer.params, self.run.draft.dialect
        write_draft(self.run.run_dir / "draft", self._draft, self.vocabulary, params, dialect)

    def summary(self) -> dict[str, Any]:
        """Return what the run has come to, and the seconds of all that led there: of a resumed run
        without those of steps that were lost."""
        rows = read_rows(self.run.run_dir / METRICS_FILE)
        return {
            "steps": self.progress.step,
            "accept_length_first": self.progress.accept_length_first,
            **self.progress.last,
            WALL: sum(row[WALL] for row in rows),
            "weights_digest": self.trainer.digest(),
        }


def main(run: Eagle3Run) -> int:
    """Run the command `samebit eagle3`."""
    return train_or_describe(run, train, describe_eagle3)
