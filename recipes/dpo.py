"""Direct preference optimization on pairs of answers: supervised, with a frozen reference.

The reference is a copy of the model that the run starts from. Both samples of a pair stay in one
micro-batch. Algorithm and source: trainer/algorithms/dpo.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samebit.recipes.cli.dry_run import describe_dpo, train_or_describe
from samebit.recipes.config import DpoRun
from samebit.recipes.data.records import Split
from samebit.recipes.launch.placement import make_trainer
from samebit.recipes.run.batches import own_micro_batches
from samebit.recipes.run.inputs import SftInputs
from samebit.recipes.run.recorder import Progress, recording
from samebit.recipes.run.session import open_session
from samebit.recipes.run.signals import stop_signals
from samebit.recipes.run.training_metrics import train_metrics
from samebit.recipes.sft import export
from samebit.trainer.algorithms.dpo import Dpo, preference_losses
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.types import Sample
from samebit.weight_sync.objects import gather_objects


def train(run: DpoRun, started: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Train to the last step and export to run_dir/model; returns the summary.

    `started` is called once everything is set up. Raises Stopped if a signal has ended the run,
    which can be resumed.
    """
    with stop_signals() as stop:
        inputs = SftInputs(run, stop)
        with open_session(run, inputs.records) as session:
            total, algorithm = run.trainer.num_steps, Dpo(run.algorithm)
            trainer = make_trainer(run, inputs.model, total, session.device)
            trainer.freeze_reference()
            progress = DpoProgress(**session.restore(trainer))
            with recording(session, progress, trainer) as recorder:
                started()
                if progress.step == 0 and inputs.eval_set is not None:
                    recorder.log(evaluate(run, trainer, inputs.eval_set, progress))

                while progress.step < total:
                    stop.poll_together()
                    session.writer.poll()
                    samples = samples_of_step(run, progress.step, inputs.train_set)
                    batches = own_micro_batches(samples, run.trainer, trainer)
                    stats = trainer.train_step(batches, algorithm, stop.poll)
                    progress.step += 1

                    metrics = train_metrics([stats])
                    if inputs.eval_set is not None and recorder.is_due(run.eval_every):
                        metrics |= evaluate(run, trainer, inputs.eval_set, progress)
                    recorder.end_step(metrics, f"loss {stats.loss:.4f}")
            export(session)
            summary: dict[str, Any] = {"steps": progress.step, "weights_digest": trainer.digest()}
            if progress.eval_loss is not None:
                summary |= {
                    "eval_loss": progress.eval_loss,
                    "eval_accuracy": progress.eval_accuracy,
                }
            session.finish(summary)
            return summary


@dataclass
class DpoProgress(Progress):
    """Keeps what the summary needs of the steps so far."""

    eval_loss: float | None = None
    """Mean over the held-out pairs, if there are any, when it was last measured."""
    eval_accuracy: float | None = None
    """The share of them of which the policy has moved towards the better answer."""


def samples_of_step(run: DpoRun, step: int, data: Split) -> list[Sample]:
    """Return the samples of an optimizer step's pairs, which its number alone decides."""
    size = run.trainer.batch_size
    assert size is not None
    positions = range(step * size, (step + 1) * size)
    return [s for p in positions for s in make_pair(data, data.index_at(p, run.seed), p)]


def make_pair(data: Split, index: int, place: int) -> list[Sample]:
    """Join a record's prompt with its better answer, then with its worse one."""
    ids = data.encoded(data[index])
    return [
        Sample.of_response(
            sample_id=2 * place + i,
            token_ids=ids.prompt_ids + answer,
            prompt_len=len(ids.prompt_ids),
            unit=place,
        )
        for i, answer in enumerate((ids.label_ids, ids.rejected_ids))
    ]


def evaluate(
    run: DpoRun, trainer: MegatronTrainer, held_out: Split, progress: DpoProgress
) -> dict[str, float]:
    """Return loss, accuracy and margin over all held-out pairs; the progress keeps two of them."""
    samples = [sample for i in range(len(held_out)) for sample in make_pair(held_out, i, i)]
    ratios = log_ratios(run, trainer, samples)
    losses, margins = preference_losses(ratios, run.algorithm)
    progress.eval_loss = float(losses.mean())
    progress.eval_accuracy = float((margins > 0).double().mean())
    return {
        "eval/loss": progress.eval_loss,
        "eval/accuracy": progress.eval_accuracy,
        "eval/margin": float(margins.mean()),
    }


def log_ratios(run: DpoRun, trainer: MegatronTrainer, samples: Sequence[Sample]) -> Tensor:
    """Return each sample's log ratio to the reference, in order, fp64, the same on every rank."""
    batches, own = own_micro_batches(samples, run.trainer, trainer), dict[int, float]()
    both = (trainer.logprobs(batches, reference=x) for x in (False, True))
    for batch, policy, reference in zip(batches, *both, strict=True):
        parts = (policy.double() - reference.double()).split(batch.row_counts.tolist())
        own |= {s.sample_id: float(x.sum()) for s, x in zip(batch.samples, parts, strict=True)}
    found = {key: x for rank in gather_objects(own) for key, x in rank.items()}
    return torch.tensor([found[s.sample_id] for s in samples], dtype=torch.float64)


def main(run: DpoRun) -> int:
    """Run the command `samebit dpo`."""
    return train_or_describe(run, train, describe_dpo)
