"""Supervised fine-tuning on labels, or on chats: the trainer's loop without a rollout."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from samebit.recipes.cli.dry_run import describe_sft, train_or_describe
from samebit.recipes.config import SftRun
from samebit.recipes.data.records import Split
from samebit.recipes.export import write_model
from samebit.recipes.launch.placement import make_trainer
from samebit.recipes.run.batches import own_micro_batches
from samebit.recipes.run.inputs import SftInputs
from samebit.recipes.run.recorder import Progress, recording
from samebit.recipes.run.session import RunSession, open_session
from samebit.recipes.run.signals import stop_signals
from samebit.recipes.run.training_metrics import train_metrics
from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.checkpoint import CheckpointError, latest_checkpoint
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.ranks import together
from samebit.trainer.types import Sample


def train(run: SftRun, started: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Train to the last step and export to run_dir/model; returns the summary.

    `started` is called once everything is set up. Raises Stopped if a signal has ended the run,
    which can be resumed.
    """
    with stop_signals() as stop:
        inputs = SftInputs(run, stop)
        with open_session(run, inputs.records) as session:
            total = run.trainer.num_steps
            trainer = make_trainer(run, inputs.model, total, session.device)
            progress = SftProgress(**session.restore(trainer))
            with recording(session, progress, trainer) as recorder:
                started()
                if progress.step == 0 and inputs.eval_set is not None:
                    recorder.log(evaluate(run, trainer, inputs.eval_set, progress))

                while progress.step < total:
                    stop.poll_together()
                    session.writer.poll()
                    samples = samples_of_step(run, progress.step, inputs.train_set)
                    batches = own_micro_batches(samples, run.trainer, trainer)
                    stats = trainer.train_step(batches, Sft(), stop.poll)
                    progress.step += 1

                    metrics = train_metrics([stats])
                    if inputs.eval_set is not None and recorder.is_due(run.eval_every):
                        metrics |= evaluate(run, trainer, inputs.eval_set, progress)
                    recorder.end_step(metrics, f"loss {stats.loss:.4f}")
            export(session)
            summary: dict[str, Any] = {"steps": progress.step, "weights_digest": trainer.digest()}
            if progress.eval_loss is not None:
                summary["eval_loss"] = progress.eval_loss
            session.finish(summary)
            return summary


@dataclass
class SftProgress(Progress):
    """Keeps what the summary needs of the steps so far."""

    eval_loss: float | None = None
    """Of the held-out records, if there are any, when it was last measured."""


def samples_of_step(run: SftRun, step: int, data: Split) -> list[Sample]:
    """Return the samples of an optimizer step, which its number alone decides."""
    size = run.trainer.batch_size
    assert size is not None
    positions = range(step * size, (step + 1) * size)
    return [make_sample(data, data.index_at(p, run.seed), p) for p in positions]


def make_sample(data: Split, index: int, sample_id: int) -> Sample:
    """Join a record's prompt and label, which is trained on; of a chat, its answers."""
    ids = data.encoded(data[index])
    if ids.label_mask:
        return Sample(
            sample_id=sample_id,
            token_ids=np.asarray(ids.prompt_ids + ids.label_ids, np.int64),
            loss_mask=np.asarray([0] * len(ids.prompt_ids) + [*ids.label_mask], bool),
        )
    return Sample.of_response(
        sample_id=sample_id,
        token_ids=ids.prompt_ids + ids.label_ids,
        prompt_len=len(ids.prompt_ids),
    )


def evaluate(
    run: SftRun, trainer: MegatronTrainer, held_out: Split, progress: SftProgress
) -> dict[str, float]:
    """Return the mean loss of the tokens of all held-out labels, which the progress keeps too."""
    samples = [make_sample(held_out, i, i) for i in range(len(held_out))]
    progress.eval_loss = trainer.mean_nll(own_micro_batches(samples, run.trainer, trainer))
    return {"eval/loss": progress.eval_loss}


def export(session: RunSession) -> None:
    """Write the last checkpoint to run_dir/model; every process waits until it is there."""
    with together(CheckpointError):
        if session.is_first:
            last = latest_checkpoint(session.checkpoints)
            assert last is not None
            just_written = replace(last, verified=True)
            start = Path(session.run.model.path)
            write_model(just_written, start, session.run_dir / "model")


def main(run: SftRun) -> int:
    """Run the command `samebit sft`."""
    return train_or_describe(run, train, describe_sft)
