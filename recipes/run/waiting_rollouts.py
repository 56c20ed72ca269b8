"""Rollouts that wait to be trained on, or to be finished, as part of a checkpoint.

Kept is what was drawn, and what it is worth if that is known; prompts and sample ids are functions
of configuration and step, or stint. Seconds and what guesses came to are not kept: equal runs have
equal checkpoints.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from sys import intern
from typing import Any

import torch
from torch import Tensor

from samebit.recipes.data.conversation import Response
from samebit.recipes.run.draws_ahead import DrawnStep
from samebit.recipes.run.dynamic_sampling import StepRollout
from samebit.recipes.run.sampling import Prompts, Rollout
from samebit.rollout.types import Completion
from samebit.trainer.stats import Comparison
from samebit.weight_sync.types import VersionSpan, WeightVersion

PACKED_TOKEN_BYTES = 4 + 4
"""Of a drawn token in a checkpoint: the token and its log-prob."""
HOST_TOKEN_BYTES = (28 + 8) + (24 + 8)
"""Of a drawn token in a process: Python's int and float, and where two tuples refer to them."""


def to_state(drawn: DrawnStep) -> dict[str, Any]:
    """Return a step's rollout as tensors and plain values."""
    rollout = drawn.rollout.drawn
    completions = [c for group in rollout.completions for c in group]
    compared = drawn.comparison
    return {
        "begin": drawn.begin,
        "refills": drawn.rollout.refills,
        "kept": list(drawn.rollout.kept),
        "comparison": None if compared is None else astuple(compared),
        "rewards": torch.tensor(rollout.rewards, dtype=torch.float64),
        "terms": {
            label: torch.tensor(groups, dtype=torch.float64)
            for label, groups in rollout.terms.items()
        },
        **packed(completions),
    }


def of_state(
    state: dict[str, Any],
    prompts_of: Callable[[int, int], Prompts],
    decode: Callable[[Completion], str],
) -> DrawnStep:
    """Return what `to_state` was given.

    prompts_of(begin, refill): what a refill of the step has asked for, 0: what every step asks for.
    """
    rounds = [prompts_of(state["begin"], refill) for refill in range(state["refills"] + 1)]
    sample_ids = [ids for prompts in rounds for ids in prompts.sample_ids]
    rest = unpacked(state, [i for ids in sample_ids for i in ids])
    groups = [[next(rest) for _ in ids] for ids in sample_ids]
    rollout = Rollout(
        problems=[problem for prompts in rounds for problem in prompts.problems],
        prompt_ids=[prompt for prompts in rounds for prompt in prompts.token_ids],
        completions=groups,
        texts=[[decode(completion) for completion in group] for group in groups],
        rewards=state["rewards"].tolist(),
        terms={label: groups.tolist() for label, groups in state["terms"].items()},
    )
    compared = state["comparison"]
    return DrawnStep(
        state["begin"],
        StepRollout(rollout, state["kept"], state["refills"]),
        comparison=None if compared is None else Comparison(*compared),
    )


def packed(completions: Sequence[Completion]) -> dict[str, Any]:
    """Return completions as tensors and plain values, all but their ids.

    Equal texts are one object, as pickle writes another for it otherwise: engines of other
    processes send each its own.
    """
    responses = [c for c in completions if isinstance(c, Response)]
    lens = [len(c.token_ids) for c in completions]
    return {
        "lens": torch.tensor(lens, dtype=torch.int64),
        "token_ids": torch.tensor([x for c in completions for x in c.token_ids], dtype=torch.int32),
        "logprobs": torch.tensor([x for c in completions for x in c.logprobs], dtype=torch.float32),
        "finish_reasons": [intern(c.finish_reason) for c in completions],
        "version_spans": [
            [
                (span.start, span.recomputed, span.version.step, intern(span.version.digest))
                for span in c.version_spans
            ]
            for c in completions
        ],
        "loss_mask": torch.tensor([x for c in responses for x in c.loss_mask], dtype=torch.bool),
        "num_turns": [c.num_turns for c in responses],
    }


def unpacked(state: Mapping[str, Any], sample_ids: Sequence[int]) -> Iterator[Completion]:
    """Yield the completions that `packed` was given, whose sample ids these are."""
    lens = state["lens"].tolist()
    tokens, logprobs = _parts(state["token_ids"], lens), _parts(state["logprobs"], lens)
    masks, turns = _parts(state["loss_mask"], lens), state["num_turns"]
    for i, sample_id in enumerate(sample_ids):
        fields: dict[str, Any] = {
            "request_id": "",  # of a process that has ended
            "sample_id": sample_id,
            "token_ids": tuple(tokens[i]),
            "logprobs": tuple(logprobs[i]),
            "finish_reason": state["finish_reasons"][i],
            "version_spans": tuple(
                VersionSpan(start, WeightVersion(*version), recomputed)
                for start, recomputed, *version in state["version_spans"][i]
            ),
        }
        if turns:
            yield Response(**fields, loss_mask=tuple(masks[i]), num_turns=turns[i])
        else:
            yield Completion(**fields)


def _parts(values: Tensor, lens: Sequence[int]) -> list[list[Any]]:
    """Values of samples one behind another, by sample; none where there are none."""
    return [part.tolist() for part in values.split(lens)] if len(values) else []
