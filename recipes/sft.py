"""Supervised fine-tuning on prompts and labels: the trainer's loop without a rollout."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from samebit.recipes.config import SftRun
from samebit.recipes.export import write_model
from samebit.recipes.order import problem_index
from samebit.recipes.placement import make_trainer
from samebit.recipes.plan import checked_model, print_plan, sft_plan
from samebit.recipes.session import Session, open_session, require_startable
from samebit.recipes.signals import StopSignals, stop_signals
from samebit.recipes.tasks.base import Dataset, load_datasets
from samebit.recipes.text import TextCodec
from samebit.rollout.models.config import ModelConfig
from samebit.trainer.algorithms.sft import sft_loss
from samebit.trainer.checkpoint import latest_checkpoint
from samebit.trainer.packing import pack_samples
from samebit.trainer.ranks import is_first
from samebit.trainer.types import Sample


@dataclass
class Progress:
    """Part of every checkpoint."""

    step: int = 0


def make_batch(run: SftRun, step: int, data: Dataset, text: TextCodec) -> list[Sample]:
    """The samples of one optimizer step, by index."""
    size = run.trainer.batch_size
    assert size is not None
    samples = []
    for position in range(step * size, (step + 1) * size):
        problem = data[problem_index(position, len(data), run.seed)]
        prompt = text.encode_prompt(
            problem, run.trainer.micro_batch_tokens, "trainer.micro_batch_tokens"
        )
        label = text.encode_label(problem)
        samples.append(
            Sample(sample_id=position, token_ids=(*prompt, *label), prompt_len=len(prompt))
        )
    return samples


def train(run: SftRun, started: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run to the end and export to run_dir/model; the summary.

    `started` is called once everything is set up.
    """
    with stop_signals() as stop:
        # Everything is read before anything of an earlier run is touched.
        model, datasets = checked_model(run), load_datasets(run.data)
        text = TextCodec(run.model.path, run.data.chat)
        with open_session(run, datasets) as session:
            return _train(run, session, stop, model, datasets[0], text, started)


def _train(
    run: SftRun,
    session: Session,
    stop: StopSignals,
    model: ModelConfig,
    data: Dataset,
    text: TextCodec,
    started: Callable[[], None],
) -> dict[str, Any]:
    settings, total = run.trainer, run.trainer.num_steps
    trainer = make_trainer(run, model, total, session.device)
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
            samples = make_batch(run, progress.step, data, text)
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
