"""The figures that are logged of a training step."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from samebit.recipes.data.conversation import Response, num_drawn
from samebit.recipes.data.text import TextCodec
from samebit.recipes.run.metrics import SPECULATION
from samebit.recipes.run.sampling import Rollout, scale_of
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.types import Completion
from samebit.trainer.flops import peak_flops, train_flops
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.stats import Comparison
from samebit.trainer.types import Sample, StepStats


class PhaseTimer:
    """Adds up the seconds of each phase of a training step, by the names that are logged."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()
        self._inner = 0.0

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the block's wall time to perf/<phase>_s, without that of phases within it."""
        start, before = time.perf_counter(), self._inner
        self._inner = 0.0
        yield
        took, key = time.perf_counter() - start, f"perf/{phase}_s"
        self.seconds[key] = self.seconds.get(key, 0.0) + took - self._inner
        self._inner = before + took

    def end_step(self) -> None:
        """Put down perf/step_s: all that went by since the timer was made."""
        self.seconds["perf/step_s"] = time.perf_counter() - self.start


def rollout_metrics(rollout: Rollout, prefix: str) -> dict[str, float]:
    """Return rewards and lengths under the field's names."""
    rewards = rollout.reward_tensor.flatten()
    completions = [c for group in rollout.completions for c in group]
    lens = [num_drawn(c) for c in completions]
    turns = [c.num_turns for c in completions if isinstance(c, Response)]
    terms = {
        f"{prefix}/reward_mean/{label}": _mean(groups) for label, groups in rollout.terms.items()
    }
    scale = scale_of(rollout.rewards)
    return {
        f"{prefix}/reward_mean": float((rewards / scale).mean()) * scale,
        **terms,
        f"{prefix}/reward_std": float((rewards / scale).std(correction=0)) * scale,
        f"{prefix}/response_len_mean": sum(lens) / len(lens),
        f"{prefix}/truncated_fraction": sum(c.finish_reason == "length" for c in completions)
        / len(completions),
        **({f"{prefix}/turns_mean": sum(turns) / len(turns)} if turns else {}),
    }


def _mean(groups: Sequence[Sequence[float]]) -> float:
    scale = scale_of(groups)
    total = sum(sum(x / scale for x in group) for group in groups)
    return total / sum(map(len, groups)) * scale


def speculation_metrics(guesses: AcceptLengths | None) -> dict[str, float]:
    """Return what a rollout's guesses came to, under slime's names; nothing if none are made.

    Where nothing was guessed there are counts alone; place 0 is the first guess.
    """
    if guesses is None:
        return {}
    found: dict[str, float] = {
        "verifications": guesses.verifications,
        "draft_tokens": guesses.num_guessed,
        "accepted_tokens": guesses.num_right,
    }
    if guesses.num_guessed:
        found["accept_length"] = guesses.accept_length
        found["accept_rate"] = guesses.num_right / guesses.num_guessed
        rates = enumerate(zip(guesses.acceptance, guesses.guessed, strict=True))
        found |= {f"accept_rate_{i}": rate for i, (rate, tried) in rates if tried}
        found |= {} if math.isnan(guesses.speedup) else {"speedup": guesses.speedup}
    return {f"{SPECULATION}{name}": value for name, value in found.items()}


def reference_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the mean over drawn tokens of log(policy / reference); nothing without a reference."""
    pairs = [(s.logprobs, s.ref_logprobs, s.loss_mask) for s in samples]
    found = [(a - b)[mask] for a, b, mask in pairs if a is not None and b is not None]
    return {"rollout/kl": float(np.concatenate(found).mean(dtype=np.float64))} if found else {}


def train_metrics(
    stats: Sequence[StepStats], compared: Comparison | None = None
) -> dict[str, float]:
    """Return means over a step's optimizer steps, and how log-probs compare with a rollout's, if
    they do: `compared`, or what the first of them has found."""
    first = stats[0]
    compared = compared or Comparison.in_step(first)
    metrics = {
        "train/loss": sum(s.loss for s in stats) / len(stats),
        "train/grad_norm": sum(s.grad_norm for s in stats) / len(stats),
        "train/learning_rate": stats[-1].learning_rate,
    }
    if compared.tokens:
        metrics |= {
            "train/rollout_logprob_abs_diff_max": compared.abs_diff_max,
            "train/logprob_tokens_compared": compared.tokens,
            "train/logprob_mismatches": compared.mismatches,
        }
    for name in first.metrics:
        metrics[name] = sum(s.metrics[name] for s in stats) / len(stats)
    return metrics


def sample_rows(rollout: Rollout, num_samples: int, text: TextCodec) -> list[dict[str, Any]]:
    """Return the first sample of the first problems, readable; each token with its log-prob."""
    return [
        {
            "prompt": problem.prompt,
            **({"tools": problem.tools} if problem.tools else {}),
            "completion": rollout.texts[i][0],
            "label": problem.label,
            "reward": rollout.rewards[i][0],
            "finish_reason": rollout.completions[i][0].finish_reason,
            **({"rewards": _terms_of(rollout, i)} if rollout.terms else {}),
            **_tokens_of(rollout.completions[i][0], text),
        }
        for i, problem in enumerate(rollout.problems[:num_samples])
    ]


def _terms_of(rollout: Rollout, prompt: int) -> dict[str, float]:
    return {label: groups[prompt][0] for label, groups in rollout.terms.items()}


def _tokens_of(completion: Completion, text: TextCodec) -> dict[str, list[Any]]:
    """Its tokens one by one; of several turns, which of them were drawn."""
    found: dict[str, list[Any]] = {
        "tokens": text.pieces(completion.token_ids),
        "logprobs": list(completion.logprobs),
    }
    if isinstance(completion, Response):
        found["loss_mask"] = [int(drawn) for drawn in completion.loss_mask]
    return found


def speed(
    trainer: MegatronTrainer,
    rollout: Rollout,
    stats: Sequence[StepStats],
    seconds: Mapping[str, float],
    drawn_tokens: int,
) -> dict[str, float]:
    """Return tokens per second of the two large phases; on a GPU also the share of its peak.

    rollout: what is trained on; drawn_tokens: how many were drawn. Nothing is said of a rollout
    that was drawn before the run was resumed.
    """
    trained, train_s = sum(s.num_tokens for s in stats), seconds["perf/train_s"]
    found = {"perf/train_tokens_per_s": trained / train_s}
    if "perf/rollout_s" in seconds:
        found["perf/rollout_tokens_per_s"] = drawn_tokens / seconds["perf/rollout_s"]
    if peak := peak_flops(trainer.device):
        lens = [
            len(prompt) + len(c.token_ids)
            for prompt, group in zip(rollout.prompt_ids, rollout.completions, strict=True)
            for c in group
        ]
        per_device = train_flops(trainer.model, lens) / trainer.parallel.num_processes
        found["perf/train_mfu"] = per_device / train_s / peak
    return found
