"""What rollouts with partial_tokens leave to later steps, as part of a checkpoint.

As in waiting_rollouts: prompts and sample ids are functions of configuration and stint.
"""

from collections.abc import Iterator, Sequence
from dataclasses import astuple
from sys import intern
from typing import Any

from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.draws_ahead import DrawnStep
from samebit.recipes.run.sampling import Prompts, RolloutSource
from samebit.recipes.run.schedule import GroupDraw
from samebit.recipes.run.stints import PartialGroup, PartialStep, Stints
from samebit.recipes.run.waiting_rollouts import packed, unpacked
from samebit.trainer.stats import Comparison
from samebit.weight_sync.types import WeightVersion


def groups_to_state(groups: Sequence[PartialGroup]) -> dict[str, Any]:
    """Return groups as tensors and plain values."""
    return {
        "places": [group.place for group in groups],
        "rewards": [group.rewards for group in groups],
        "terms": [
            [(intern(label), values) for label, values in group.terms.items()] for group in groups
        ],
        **packed([c for group in groups for c in group.completions]),
    }


def step_to_state(drawn: DrawnStep) -> dict[str, Any]:
    """Return a step that was drawn in stints as tensors and plain values."""
    step, compared = drawn.rollout, drawn.comparison
    assert isinstance(step, PartialStep)
    return {
        "begin": drawn.begin,
        "refills": step.refills,
        "kept": list(step.kept),
        "comparison": None if compared is None else astuple(compared),
        "draws": [[g.first_id, [[*t] for t in g.tokens], [*g.pending]] for g in step.groups],
        "version": [step.version.step, intern(step.version.digest)],
        "ended": groups_to_state(step.ended),
        "left": groups_to_state(step.left),
    }


class WaitingParts:
    """Gives back what was saved; every prompt is looked up once, in the training order."""

    def __init__(
        self, settings: RolloutSection, source: RolloutSource, states: Sequence[dict[str, Any]]
    ) -> None:
        """states: all of groups that are to be given back."""
        self._settings, self._wanted = settings, settings.prompts_per_step
        self._stints = Stints(settings, source)
        numbers = {place // self._wanted for state in states for place in state["places"]}
        self._asked: dict[int, Prompts] = {n: source.training_prompts(n) for n in sorted(numbers)}

    def groups(self, state: dict[str, Any]) -> Iterator[PartialGroup]:
        """Yield the groups that `groups_to_state` was given."""
        places = [(self._asked[p // self._wanted], p % self._wanted, p) for p in state["places"]]
        ids = [asked.sample_ids[i] for asked, i, _ in places]
        rest = unpacked(state, [sample_id for group in ids for sample_id in group])
        scores = zip(state["rewards"], map(dict, state["terms"]), strict=True)
        for (asked, i, place), group, score in zip(places, ids, scores, strict=True):
            completions = [next(rest) for _ in group]
            yield PartialGroup(place, asked.problems[i], asked.token_ids[i], completions, *score)

    def step(self, state: dict[str, Any]) -> DrawnStep:
        """Return the step that `step_to_state` was given."""
        ended, compared = list(self.groups(state["ended"])), state["comparison"]
        step = PartialStep(
            self._stints.rollout_of(ended),
            state["kept"],
            state["refills"],
            settings=self._settings,
            groups=[
                GroupDraw(first_id, tuple((start, end) for start, end in tokens), tuple(pending))
                for first_id, tokens, pending in state["draws"]
            ],
            drawn_by=WeightVersion(*state["version"]),
            ended=ended,
            left=list(self.groups(state["left"])),
        )
        comparison = None if compared is None else Comparison(*compared)
        return DrawnStep(state["begin"], step, comparison=comparison)
