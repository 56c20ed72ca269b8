"""Samples to packed micro-batches under a token budget, in the samples' order."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from samebit.kernels.top_tokens import TopTokens
from samebit.kernels.truncation import Thresholds
from samebit.rollout.models.config import ModelConfig
from samebit.trainer.loss_means import LOSS_MEANS, LossMean
from samebit.trainer.types import MicroBatch, Sample


def pack_samples(
    samples: Sequence[Sample],
    max_tokens: int,
    loss_mean: str = "token",
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
    model: ModelConfig | None = None,
    at_least: int = 1,
    loss_mean_tokens: int | None = None,
    num_segments: int = 1,
) -> list[MicroBatch]:
    """Fill micro-batches of at most max_tokens tokens, never reordering.

    loss_mean, loss_mean_tokens: as in TrainerConfig; temperature: the rollout's. Where there would
    be fewer than `at_least` micro-batches, those of the most samples are halved; units are never
    parted. Each of `num_segments` (segments_of) is packed for itself.
    Raises ValueError for a sample or unit longer than max_tokens or an empty list and, given a
    model, for a sample that is longer than its context or has a token outside its vocabulary.
    """
    if not samples:
        raise ValueError("no samples to train on")
    if model is not None:
        for sample in samples:
            _check_fits(sample, model)
    groups = [
        (segment, list(chain(*group)))
        for segment, units in enumerate(segments_of(units_of(samples), num_segments))
        for group in _halved(_split(units, max_tokens), min(at_least, len(units)))
    ]
    mean = LOSS_MEANS[loss_mean], loss_mean_tokens
    return [
        _micro_batch(i, segment, group, mean, temperature, device)
        for i, (segment, group) in enumerate(groups)
    ]


def units_of(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Neighbours that stay in one micro-batch: those of one unit, and every other one alone."""
    units: list[list[Sample]] = []
    for sample in samples:
        if units and sample.unit is not None and sample.unit == units[-1][0].unit:
            units[-1].append(sample)
        else:
            units.append([sample])
    return units


def segments_of[T](units: Sequence[T], num_segments: int) -> list[Sequence[T]]:
    """Units in equal segments of neighbours: segment i of S holds those from floor(i n / S) on.

    They depend on nothing but the numbers n and S. Of fewer units than segments some are empty.
    """
    cuts = [len(units) * i // num_segments for i in range(num_segments + 1)]
    return [units[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


class Packed(Protocol):
    """A micro-batch as it is shared out."""

    @property
    def index(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...


def share_batches[B: Packed](batches: Sequence[B], num_ranks: int) -> list[list[B]]:
    """Micro-batches for each data rank, of nearly equal tokens; the same on every rank.

    The longest goes first, to whoever has least; each rank keeps the order of indices. Raises
    ValueError if there are fewer than ranks.
    """
    if len(batches) < num_ranks:
        raise ValueError(
            f"{len(batches)} micro-batches for {num_ranks} data ranks; each needs one: train on "
            "more samples"
        )
    shares: list[list[B]] = [[] for _ in range(num_ranks)]
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
    low, high = sample.token_ids.min(), sample.token_ids.max()
    if low < 0 or high >= model.vocab_size:
        raise ValueError(
            f"sample {sample.sample_id}: token {low if low < 0 else high} is outside the "
            f"vocabulary [0, {model.vocab_size})"
        )


def _split(units: Iterable[list[Sample]], max_tokens: int) -> list[list[list[Sample]]]:
    groups: list[list[list[Sample]]] = []
    room = 0
    for unit in units:
        length = sum(len(s.token_ids) for s in unit)
        if length > max_tokens:
            others = f" with the {len(unit) - 1} others of its unit" if len(unit) > 1 else ""
            raise ValueError(
                f"sample {unit[0].sample_id}{others} has {length} tokens; "
                f"trainer.micro_batch_tokens is {max_tokens}"
            )
        if length > room:  # the first one too
            groups.append([])
            room = max_tokens
        groups[-1].append(unit)
        room -= length
    return groups


def _halved[T](groups: list[list[T]], at_least: int) -> list[list[T]]:
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
    segment: int,
    samples: Sequence[Sample],
    loss_mean: tuple[LossMean, int | None],
    temperature: float,
    device: torch.device | str,
) -> MicroBatch:
    lens = tuple(len(s.token_ids) for s in samples)
    token_ids = np.concatenate([s.token_ids for s in samples])
    trained = np.flatnonzero(np.concatenate([s.loss_mask for s in samples]))
    row_counts = np.array([s.num_trained for s in samples])
    sample_of_row = np.repeat(np.arange(len(samples)), row_counts)
    weights, denominator = loss_mean[0](row_counts, sample_of_row, loss_mean[1])
    drawn = [s.logprobs for s in samples if s.logprobs is not None]
    if drawn and len(drawn) != len(samples):
        raise ValueError("some samples of a micro-batch have rollout logprobs and some have none")
    least = _thresholds(samples)
    tops = [s.teacher_top for s in samples if s.teacher_top is not None]
    if tops and len(tops) != len(samples):
        raise ValueError("some samples of a micro-batch have a teacher_top and some have none")
    newest = [np.arange(len(s.token_ids)) >= s.comparable_from for s in samples]
    is_compared = np.concatenate(newest)[trained] & bool(drawn)

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    return MicroBatch(
        index=index,
        segment=segment,
        samples=tuple(samples),
        input_ids=on_device(token_ids),
        positions=on_device(np.concatenate([np.arange(n) for n in lens])),
        seq_lens=lens,
        rows=on_device(trained - 1),  # a sample's first token is never trained on
        target_ids=on_device(token_ids[trained]),
        sample_of_row=on_device(sample_of_row),
        row_counts=on_device(row_counts),
        rollout_logprobs=on_device(np.concatenate(drawn)[trained]) if drawn else None,
        is_compared=on_device(is_compared),
        advantages=on_device(np.concatenate([s.advantages for s in samples])[trained]),
        loss_weights=on_device(weights),
        loss_denominator=denominator,
        temperature=temperature,
        kept=None if least is None else Thresholds(on_device(least[trained])),
        teacher_top=TopTokens.joined(tops).to(device) if tops else None,
    )


def _thresholds(samples: Sequence[Sample]) -> np.ndarray | None:
    """[T] fp32 of samples whose log-probs are truncated; None of others."""
    found = [s.thresholds for s in samples if s.thresholds is not None]
    if found and len(found) != len(samples):
        raise ValueError("some samples of a micro-batch have thresholds and some have none")
    for sample in samples:
        if found and not sample.has_one_version:
            raise ValueError(
                f"sample {sample.sample_id} was drawn by several weight versions; its thresholds "
                "say what could be drawn under one alone: train on full log-probs"
            )
    return np.concatenate(found) if found else None
