"""Supervised fine-tuning on prompts and labels: the trainer's loop without a rollout."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from samebit.recipes.cli.dry_run import print_plan, sft_plan
from samebit.recipes.config import SftRun
from samebit.recipes.data.order import problem_index
from samebit.recipes.data.records import Split
from samebit.recipes.export import write_model
from samebit.recipes.launch.placement import make_trainer
from samebit.recipes.run.inputs import SftInputs
from samebit.recipes.run.session import RunSession, open_session, require_startable
from samebit.recipes.run.signals import StopSignals, stop_signals
from samebit.trainer.algorithms.sft import sft_loss
from samebit.trainer.checkpoint import latest_checkpoint
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.packing import pack_samples
from samebit.trainer.ranks import is_first
from samebit.trainer.types import MicroBatch, Sample


@dataclass
class Progress:
    """Part of every checkpoint."""

    step: int = 0
    eval_loss: float | None = None
    """Of the held-out records, if there are any, when it was last measured."""


def make_batch(run: SftRun, step: int, data: Split) -> list[Sample]:
    """The samples of one optimizer step, by index."""
    size = run.trainer.batch_size
    assert size is not None
    positions = range(step * size, (step + 1) * size)
    return [make_sample(data, problem_index(p, len(data), run.seed), p) for p in positions]


def make_sample(data: Split, index: int, sample_id: int) -> Sample:
    """A record's prompt and label; the label is trained on."""
    ids = data.encoded(data[index])
    prompt, label = ids.prompt_ids, ids.label_ids
    return Sample(sample_id=sample_id, token_ids=(*prompt, *label), prompt_len=len(prompt))


def packed(run: SftRun, trainer: MegatronTrainer, samples: list[Sample]) -> list[MicroBatch]:
    """This data rank's micro-batches of the samples."""
    batches = pack_samples(
        samples,
        run.trainer.micro_batch_tokens,
        run.trainer.loss_mean,
        device=trainer.device,
        model=trainer.model,
        at_least=run.trainer.parallel.data,
    )
    return trainer.own_batches(batches)


def held_out_loss(run: SftRun, trainer: MegatronTrainer, data: Split) -> float:
    """Mean loss of the tokens of all held-out labels."""
    samples = [make_sample(data, i, i) for i in range(len(data))]
    return trainer.mean_nll(packed(run, trainer, samples))


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
    session: RunSession,
    stop: StopSignals,
    inputs: SftInputs,
    started: Callable[[], None],
) -> dict[str, Any]:
    total = run.trainer.num_steps
    trainer = make_trainer(run, inputs.model, total, session.device)
    progress = Progress(**session.restore(trainer))
    logger, bar = session.logger(progress), session.bar(progress)

    def save() -> None:
        session.save(progress.step, trainer.state_dict(), asdict(progress))

    def evaluate() -> dict[str, float]:
        if inputs.eval_set is None:
            return {}
        progress.eval_loss = held_out_loss(run, trainer, inputs.eval_set)
        return {"eval/loss": progress.eval_loss}

    with logger, bar, session.saving(progress, logger, save):
        session.started()
        started()
        if progress.step == 0 and (metrics := evaluate()):
            logger.log(0, metrics)
        while progress.step < total:
            stop.poll_together()
            session.writer.poll()
            samples = make_batch(run, progress.step, inputs.train_set)
            stats = trainer.train_step(packed(run, trainer, samples), stop.polled(sft_loss))
            progress.step += 1
            due = progress.step == total or progress.step % run.eval_every == 0
            metrics = {
                "train/loss": stats.loss,
                "train/grad_norm": stats.grad_norm,
                "train/learning_rate": stats.learning_rate,
                **stats.metrics,
            }
            logger.log(progress.step, metrics | (evaluate() if due else {}))
            if run.trainer.checkpoint_due(progress.step):
                logger.sync()
                save()
            bar.set_postfix_str(f"loss {stats.loss:.4f}")
            bar.update()
    summary: dict[str, Any] = {"steps": progress.step, "weights_digest": trainer.digest()}
    if progress.eval_loss is not None:
        summary["eval_loss"] = progress.eval_loss
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
