"""One engine step: schedule, forward, draw, book-keeping."""

import torch

from samebit.rollout.runtime.batch import make_batch, sampling_rows, scoring_rows
from samebit.rollout.runtime.runner import Runner
from samebit.rollout.runtime.sampler import Sampler
from samebit.rollout.runtime.scheduler import Scheduler
from samebit.rollout.runtime.sequence import Sequence
from samebit.weight_sync.types import WeightVersion


@torch.no_grad()
def execute_step(
    scheduler: Scheduler, runner: Runner, sampler: Sampler, version: WeightVersion
) -> list[Sequence]:
    """Run one batch and return the sequences that it finished.

    Sequences change only once everything is computed: a step that raises can be run again.
    """
    step = scheduler.schedule()
    if not step:
        return []
    config = runner.model.config
    batch = make_batch(step, runner.cache.page_size, config.heads_per_kv, runner.device)
    wanted = {layer for item in step for layer in item.seq.request.hidden_state_layers}
    hidden, collected = runner.forward(batch, wanted)
    device, output_weight = hidden.device, runner.model.output_weight
    rows, next_ids, owners = scoring_rows(step, batch)
    scores: list[float] = []
    if owners.seqs:
        scores = sampler.score(
            hidden[rows.to(device)], output_weight, next_ids.to(device), owners.seqs
        )
    drawing = sampling_rows(step, batch)
    drawn = sampler.draw(hidden[drawing.hidden_rows.to(device)], output_weight, drawing.seqs)

    completed = [item for item in step if item.completes]
    for item, start in zip(step, batch.row_starts, strict=True):
        item.seq.num_computed += item.num_tokens
        item.seq.add_hidden(collected, slice(start, start + item.num_tokens))
    for seq, value in zip(owners.seqs, scores, strict=True):
        seq.logprobs.append(value)
    for seq, token_id, logprob in zip(drawing.seqs, *drawn, strict=True):
        _append(seq, token_id, logprob, version, sampler)
    for item in completed:
        _complete(item.seq, scheduler, runner)
    finished = [*drawing.seqs, *(item.seq for item in completed if item.seq.request.score_only)]
    finished = [seq for seq in finished if seq.finish_reason is not None]
    for seq in finished:
        scheduler.finish(seq)
    return finished


def _complete(seq: Sequence, scheduler: Scheduler, runner: Runner) -> None:
    """A sequence's whole context is computed: end a scoring, share a prompt."""
    if seq.request.score_only:
        seq.finish_reason = "stop"
    elif seq.num_new_tokens == 1:  # its first token has just been drawn
        scheduler.remember(seq)
        for source, target in scheduler.fork(seq):
            runner.cache.copy_page(source, target)


def _append(
    seq: Sequence, token_id: int, logprob: float, version: WeightVersion, sampler: Sampler
) -> None:
    """Add a drawn token, and say so if it was the last."""
    seq.append(token_id, logprob, version)
    params = seq.request.params
    if token_id in sampler.stop_ids(seq) and seq.num_new_tokens >= params.min_new_tokens:
        seq.finish_reason = "stop"
    elif seq.num_new_tokens >= params.max_new_tokens:
        seq.finish_reason = "length"
