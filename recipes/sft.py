"""Supervised fine-tuning on prompts and labels: the trainer's loop without a rollout."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from samebit.recipes.config import SftRun
from samebit.recipes.export import write_model
from samebit.recipes.inputs import SftInputs
from samebit.recipes.order import problem_index
from samebit.recipes.placement import make_trainer
from samebit.recipes.plan import print_plan, sft_plan
from samebit.recipes.records import Split
from samebit.recipes.session import Session, open_session, require_startable
from samebit.recipes.signals import StopSignals, stop_signals
from samebit.trainer.algorithms.sft import sft_loss
from samebit.trainer.checkpoint import latest_checkpoint
from samebit.trainer.packing import pack_samples
from samebit.trainer.ranks import is_first
from samebit.trainer.types import Sample


@dataclass
class Progress:
    """Part of every checkpoint."""

    step: int = 0


def make_batch(run: SftRun, step: int, data: Split) -> list[Sample]:
    """The samples of one optimizer step, by index."""
    size = run.trainer.batch_size
    assert size is not None
    samples = []
    for position in range(step * size, (step + 1) * size):
        problem = data[problem_index(position, len(data), run.seed)]
        ids = data.encoded(problem)
        prompt, label = ids.prompt_ids, ids.label_ids
        samples.append(
            Sample(sample_id=position, token_ids=(*prompt, *label), prompt_len=len(prompt))
        )
    return samples


def train(run: SftRun, started: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run to the end and export to run_dir/model; the summary.

    `started` is called once everything is set up.
    """
    with stop_signals() as stop:
        inputs = SftInputs(run, stop)
        with open_session(run, inputs.records) as session:
            return _train(run, session, stop, inputs, started)


def _train(
    run: SftRun,
    session: Session,
    stop: StopSignals,
    inputs: SftInputs,
    started: Callable[[], None],
) -> dict[str, Any]:
    settings, total = run.trainer, run.trainer.num_steps
    trainer = make_trainer(run, inputs.model, total, session.device)
    progress = Progress(**session.restore(trainer))
    logger, bar = session.logger(progress), session.bar(progress)

    def save() -> None:
        session.save(progress.step, trainer.state_dict(), asdict(progress))

    with logger, bar, session.saving(progress, save):
        session.started()
        started()
        while progress.step < total:
            stop.poll_together()
            session.writer.poll()
            samples = make_batch(run, progress.step, inputs.train_set)
            batches = pack_samples(
                samples,
                settings.micro_batch_tokens,
                settings.loss_mean,
                device=session.device,
                model=trainer.model,
                at_least=settings.parallel.data,
            )
            stats = trainer.train_step(trainer.own_batches(batches), stop.polled(sft_loss))
            progress.step += 1
            logger.log(
                progress.step,
                {
                    "train/loss": stats.loss,
                    "train/grad_norm": stats.grad_norm,
                    "train/learning_rate": stats.learning_rate,
                    **stats.metrics,
                },
            )
            if settings.checkpoint_due(progress.step):
                logger.sync()
                save()
            bar.set_postfix_str(f"loss {stats.loss:.4f}")
            bar.update()
    summary = {"steps": progress.step, "weights_digest": trainer.digest()}
    if session.is_first:
        last = latest_checkpoint(session.checkpoints)
        assert last is not None
        just_written = replace(last, verified=True)
        write_model(just_written, Path(run.model.path), session.run_dir / "model")
    session.finish(summary)
    return summary


def main(run: SftRun) -> int:
    """The command `samebit sft`."""
    if run.dry_run:
        require_startable(run)
        print_plan(run, sft_plan(run))
        return 0
    summary = train(run)
    if is_first():
        print(json.dumps(summary))
    return 0
