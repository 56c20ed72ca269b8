"""Samples to packed micro-batches under a token budget, in the samples' order."""

from collections.abc import Iterable, Sequence

import torch

from samebit.rollout.models.config import ModelConfig
from samebit.trainer.types import MicroBatch, Sample


def pack_samples(
    samples: Sequence[Sample],
    max_tokens: int,
    loss_mean: str = "token",
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
    model: ModelConfig | None = None,
    at_least: int = 1,
) -> list[MicroBatch]:
    """Fill micro-batches of at most max_tokens tokens, never reordering.

    loss_mean as in TrainerConfig; temperature is the rollout's. If that makes fewer than `at_least`
    micro-batches, those of the most samples are halved, as long as there are samples. Raises
    ValueError for a sample longer than max_tokens or an empty list and, given a model, for one that
    is longer than its context or has a token outside its vocabulary.
    """
    if not samples:
        raise ValueError("no samples to train on")
    if model is not None:
        for sample in samples:
            _check_fits(sample, model)
    return [
        _micro_batch(i, group, loss_mean, temperature, device)
        for i, group in enumerate(_halved(_split(samples, max_tokens), at_least))
    ]


def share_batches(batches: Sequence[MicroBatch], num_ranks: int) -> list[list[MicroBatch]]:
    """Micro-batches for each data rank, of nearly equal tokens; the same on every rank.

    The longest goes first, to whoever has least; each rank keeps the order of indices. Raises
    ValueError if there are fewer than ranks.
    """
    if len(batches) < num_ranks:
        raise ValueError(
            f"{len(batches)} micro-batches for {num_ranks} data ranks; each needs one: train on "
            "more samples"
        )
    shares: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for batch in sorted(batches, key=lambda b: -b.num_tokens):
        rank = min(range(num_ranks), key=lambda r: (loads[r], r))
        shares[rank].append(batch)
        loads[rank] += batch.num_tokens
    return [sorted(share, key=lambda b: b.index) for share in shares]


def _check_fits(sample: Sample, model: ModelConfig) -> None:
    if len(sample.token_ids) > model.max_position:
        raise ValueError(
            f"sample {sample.sample_id} has {len(sample.token_ids)} tokens; the model's context "
            f"holds {model.max_position}"
        )
    low, high = min(sample.token_ids), max(sample.token_ids)
    if low < 0 or high >= model.vocab_size:
        raise ValueError(
            f"sample {sample.sample_id}: token {low if low < 0 else high} is outside the "
            f"vocabulary [0, {model.vocab_size})"
        )


def _split(samples: Iterable[Sample], max_tokens: int) -> list[list[Sample]]:
    groups: list[list[Sample]] = []
    room = 0
    for sample in samples:
        length = len(sample.token_ids)
        if length > max_tokens:
            raise ValueError(
                f"sample {sample.sample_id} has {length} tokens; trainer.micro_batch_tokens is "
                f"{max_tokens}"
            )
        if length > room:  # the first one too
            groups.append([])
            room = max_tokens
        groups[-1].append(sample)
        room -= length
    return groups


def _halved(groups: list[list[Sample]], at_least: int) -> list[list[Sample]]:
    while len(groups) < at_least:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        group = groups[largest]
        if len(group) == 1:
            break
        middle = len(group) // 2
        groups[largest : largest + 1] = [group[:middle], group[middle:]]
    return groups


def _micro_batch(
    index: int,
    samples: Sequence[Sample],
    loss_mean: str,
    temperature: float,
    device: torch.device | str,
) -> MicroBatch:
    input_ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    for sample in samples:
        start = len(input_ids)
        input_ids += sample.token_ids
        positions += range(len(sample.token_ids))
        rows += range(start + sample.prompt_len - 1, start + len(sample.token_ids) - 1)
        targets += sample.token_ids[sample.prompt_len :]
    lens = torch.tensor([s.response_len for s in samples])
    sample_of_row = torch.arange(len(samples)).repeat_interleave(lens)
    weights = torch.ones(len(rows)) if loss_mean == "token" else 1.0 / lens[sample_of_row]
    advantages = torch.tensor([s.advantage for s in samples], dtype=torch.float32)
    logprobs = [value for sample in samples for value in sample.logprobs]
    if logprobs and len(logprobs) != len(rows):
        raise ValueError("some samples of a micro-batch have rollout logprobs and some have none")
    return MicroBatch(
        index=index,
        samples=tuple(samples),
        input_ids=torch.tensor(input_ids, device=device),
        positions=torch.tensor(positions, device=device),
        seq_lens=tuple(len(s.token_ids) for s in samples),
        rows=torch.tensor(rows, device=device),
        target_ids=torch.tensor(targets, device=device),
        sample_of_row=sample_of_row.to(device),
        rollout_logprobs=torch.tensor(logprobs, device=device) if logprobs else None,
        advantages=advantages[sample_of_row].to(device),
        loss_weights=weights.to(device),
        loss_denominator=len(rows) if loss_mean == "token" else len(samples),
        temperature=temperature,
    )
