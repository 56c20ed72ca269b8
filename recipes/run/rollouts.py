"""A run's rollouts on disk: every token and the exact bits of its log-prob, one file a step."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from samebit.recipes.data.conversation import Response
from samebit.rollout.types import Completion
from samebit.weight_sync.disk import make_folder, sync, write_atomically
from samebit.weight_sync.types import VersionSpan, WeightVersion

ROLLOUTS_FOLDER = "rollouts"
_NAME = re.compile(r"step_([0-9]{8,})")


@dataclass(frozen=True)
class SavedSample:
    """Holds one sample as it was drawn and rewarded."""

    sample_id: int
    prompt_ids: Tensor
    token_ids: Tensor
    """[L] int32 tokens that follow the prompt."""
    logprobs: Tensor
    """[L] fp32, the rollout's own bits."""
    reward: float
    version_spans: tuple[VersionSpan, ...] = ()
    """None in files of earlier versions."""
    loss_mask: Tensor | None = None
    """[L] bool, whether the policy drew the token and is trained on it; None: all of them. A token
    without has the log-prob 0."""


def save_rollout(
    run_dir: Path,
    step: int,
    prompt_ids: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Completion]],
    rewards: Sequence[Sequence[float]],
    dropped: Sequence[tuple[Completion, float]] | None = None,
) -> None:
    """Write what a step is trained on: groups in prompt order, 8 bytes a token after the prompt.

    dropped: samples that dynamic sampling has dropped, and their rewards; None without it.
    """
    completions = [c for group in groups for c in group]

    def ints(values: Iterator[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32)

    tensors = {
        "prompt_lens": ints(len(p) for p in prompt_ids),
        "prompt_ids": ints(token for p in prompt_ids for token in p),
        "sample_ids": torch.tensor([c.sample_id for c in completions], dtype=torch.int64),
        "rewards": torch.tensor([r for group in rewards for r in group], dtype=torch.float64),
        "lens": ints(len(c.token_ids) for c in completions),
        "token_ids": ints(token for c in completions for token in c.token_ids),
        "logprobs": torch.tensor([x for c in completions for x in c.logprobs]),
        "version_spans": _spans_as_bytes(completions),
    }
    if any(isinstance(c, Response) for c in completions):
        masks = [x for c in completions if isinstance(c, Response) for x in c.loss_mask]
        tensors["loss_mask"] = torch.tensor(masks, dtype=torch.bool)
    if dropped is not None:
        ids, values = [c.sample_id for c, _ in dropped], [reward for _, reward in dropped]
        tensors["dropped_sample_ids"] = torch.tensor(ids, dtype=torch.int64)
        tensors["dropped_rewards"] = torch.tensor(values, dtype=torch.float64)
    file = run_dir / ROLLOUTS_FOLDER / f"step_{step:08d}.safetensors"
    make_folder(file.parent)
    write_atomically(file, save(tensors))


def load_rollout(file: Path) -> list[SavedSample]:
    """Read the samples of a file, in prompt order. Raises ValueError if it is damaged."""
    try:
        x = load_file(file)
        prompts = x["prompt_ids"].split(x["prompt_lens"].tolist())
        lens = x["lens"].tolist()
        parts = x["token_ids"].split(lens), x["logprobs"].split(lens)
        spans = _spans_of_bytes(x["version_spans"]) if "version_spans" in x else [()] * len(lens)
        masks = x["loss_mask"].split(lens) if "loss_mask" in x else [None] * len(lens)
        ids, rewards = x["sample_ids"].tolist(), x["rewards"].tolist()
        rows = zip(ids, *parts, rewards, spans, masks, strict=True)
        group_size = len(lens) // len(prompts)
        return [
            SavedSample(sample_id, prompts[i // group_size], *row)
            for i, (sample_id, *row) in enumerate(rows)
        ]
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def load_dropped(file: Path) -> dict[int, float]:
    """Read the rewards of the samples that dynamic sampling has dropped, by sample id.

    In the training order; none in a file of a run without it. Raises ValueError if it is damaged.
    """
    try:
        x = load_file(file)
        if "dropped_sample_ids" not in x:
            return {}
        pairs = zip(x["dropped_sample_ids"].tolist(), x["dropped_rewards"].tolist(), strict=True)
        return dict(pairs)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def drop_rollouts_after(run_dir: Path, step: int) -> None:
    """Remove those of a course that a resumed run has left behind."""
    later = [file for of_step, file in list_rollouts(run_dir).items() if of_step > step]
    for file in later:
        file.unlink()
    if later:
        sync(run_dir / ROLLOUTS_FOLDER)


def list_rollouts(run_dir: Path) -> dict[int, Path]:
    """Return the files by step; copies under other names are left out."""
    files = sorted((run_dir / ROLLOUTS_FOLDER).glob("*.safetensors"))
    return {int(name[1]): file for file in files if (name := _NAME.fullmatch(file.stem))}


def _spans_as_bytes(completions: Sequence[Completion]) -> Tensor:
    """The version spans of all samples, as JSON."""
    spans = [
        [(s.start, s.recomputed, s.version.step, s.version.digest) for s in c.version_spans]
        for c in completions
    ]
    return torch.frombuffer(bytearray(json.dumps(spans).encode()), dtype=torch.uint8)


def _spans_of_bytes(data: Tensor) -> list[tuple[VersionSpan, ...]]:
    return [
        tuple(
            VersionSpan(start, WeightVersion(*version), recomputed)
            for start, recomputed, *version in spans
        )
        for spans in json.loads(data.numpy().tobytes())
    ]
