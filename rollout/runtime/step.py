"""One engine step: schedule, forward, draw, book-keeping."""

import torch

from samebit.rollout.runtime.batch import Batch, make_batch, sampling_rows, scoring_rows
from samebit.rollout.runtime.runner import Runner
from samebit.rollout.runtime.sampler import Sampler
from samebit.rollout.runtime.scheduler import Scheduled, Scheduler
from samebit.rollout.runtime.sequence import Sequence
from samebit.weight_sync.types import WeightVersion


@torch.no_grad()
def execute_step(
    scheduler: Scheduler, runner: Runner, sampler: Sampler, version: WeightVersion
) -> list[Sequence]:
    """Run one batch and return the sequences that it finished."""
    step = scheduler.schedule()
    if not step:
        return []
    config = runner.model.config
    batch = make_batch(step, runner.cache.page_size, config.heads_per_kv, runner.device)
    wanted = {layer for item in step for layer in item.seq.request.hidden_state_layers}
    hidden, collected = runner.forward(batch, wanted)
    scored = _score(step, hidden, batch, runner, sampler)
    drawing = sampling_rows(step, batch)
    token_ids, logprobs = sampler.draw(
        hidden[drawing.hidden_rows.to(hidden.device)], runner.model.output_weight, drawing.seqs
    )
    for item, start in zip(step, batch.row_starts, strict=True):
        _advance(item, slice(start, start + item.num_tokens), collected, scheduler, runner)
    drawn = zip(drawing.seqs, token_ids, logprobs, strict=True)
    finished = [s for s, t, p in drawn if _append(s, t, p, version, sampler)]
    finished += [s for s in scored if s.finish_reason is not None]
    for seq in finished:
        scheduler.finish(seq)
    return finished


def _advance(
    item: Scheduled,
    rows: slice,
    collected: dict[int, torch.Tensor],
    scheduler: Scheduler,
    runner: Runner,
) -> None:
    """Book the computed tokens; give the forks their own copy of the last page."""
    completes_prompt = item.completes and item.seq.num_new_tokens == 0
    item.seq.num_computed += item.num_tokens
    item.seq.add_hidden(collected, rows)
    for source, target in item.page_copies:
        runner.cache.copy_page(source, target)
    for fork in item.forks:
        fork.hidden = {layer: list(parts) for layer, parts in item.seq.hidden.items()}
    if completes_prompt:
        scheduler.remember(item.seq)


def _append(
    seq: Sequence, token_id: int, logprob: float, version: WeightVersion, sampler: Sampler
) -> bool:
    """Add a drawn token; whether it was the last."""
    seq.append(token_id, logprob, version)
    params = seq.request.params
    if token_id in sampler.stop_ids(seq) and seq.num_new_tokens >= params.min_new_tokens:
        seq.finish_reason = "stop"
    elif seq.num_new_tokens >= params.max_new_tokens:
        seq.finish_reason = "length"
    return seq.finish_reason is not None


def _score(
    step: list[Scheduled],
    hidden: torch.Tensor,
    batch: Batch,
    runner: Runner,
    sampler: Sampler,
) -> list[Sequence]:
    """Log-probs of the given tokens of score_only sequences; those that are now complete end."""
    rows, next_ids, owners = scoring_rows(step, batch)
    if not owners.seqs:
        return []
    device = hidden.device
    values = sampler.score(
        hidden[rows.to(device)], runner.model.output_weight, next_ids.to(device), owners.seqs
    )
    for seq, value in zip(owners.seqs, values, strict=True):
        seq.logprobs.append(value)
    complete = [i.seq for i in step if i.seq.request.score_only and i.completes]
    for seq in complete:
        seq.finish_reason = "stop"
    return complete
